"""The finding: the best probe, and by how much it is above the baselines. It claims the lesser of two margins.

Which baseline to beat is a choice too. Where the one that is best on the validation side is another than the best on the test
side, by luck of the split, the margin over it is too large: on two runs it was .31 and .18 where .05 was left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from storage.probing.judge import Scored, quality
from storage.probing.score import Estimate

ENOUGH_WRONG = 200  # wrong answers, and
ENOUGH_IMAGES = 50  # images of the test side, below which an interval says little


@dataclass(frozen=True, slots=True)
class Margin:
    """By how much a probe's AUROC is above a baseline's, paired."""

    baseline: str
    above: Estimate


@dataclass(frozen=True, slots=True)
class Finding:
    """The best probe, chosen on the validation side or, without one, on the test side."""

    field: str
    probe: str
    auroc: Estimate
    chosen_on: str
    over_validation_best: Margin | None  # the baseline that is best on the validation side; None where there is none
    over_test_best: Margin
    margin: Margin  # the lesser of them


def find(probes: Sequence[Scored], baselines: Sequence[Scored], *, validated: bool) -> Finding:
    """Return the finding of an experiment; `validated`: its split has a validation side."""
    best = max(probes, key=quality)
    over_test = margin(best, best_on_test(baselines))
    over_validation = margin(best, max(baselines, key=quality)) if validated else None
    return Finding(
        field=best.name,
        probe=best.probe,
        auroc=best.auroc,
        chosen_on="validation" if validated else "test",
        over_validation_best=over_validation,
        over_test_best=over_test,
        margin=min((m for m in (over_test, over_validation) if m is not None), key=lambda m: m.above.value),
    )


def best_on_test(baselines: Sequence[Scored]) -> Scored:
    """Return the baseline with the best AUROC on the test side."""
    return max(baselines, key=lambda scored: scored.auroc.value)


def margin(probe: Scored, baseline: Scored) -> Margin:
    """Return a probe's margin over a baseline."""
    return Margin(baseline.name, probe.above[baseline.name])


def too_few(wrong: int, test_images: int) -> list[str]:
    """Say what there is too little of for the figures to be trusted."""
    found = []
    if wrong < ENOUGH_WRONG:
        found.append(f"{wrong:,} wrong answers are few: below {ENOUGH_WRONG} the figures depend much on the split's luck")
    if test_images < ENOUGH_IMAGES:
        found.append(f"the test side has {test_images:,} images: below {ENOUGH_IMAGES} the intervals are too narrow to trust")
    return found
