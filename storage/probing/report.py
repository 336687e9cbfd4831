"""How an experiment is shown: lines and tables for a terminal, one JSON object for scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from storage.fields import FIELDS, in_words
from storage.probing.experiment import Experiment
from storage.probing.finding import Finding
from storage.probing.score import Estimate
from storage.screen.console import Text


def report_lines(experiment: Experiment) -> Iterator[str]:
    """Yield what was asked of which questions."""
    labels = experiment.labels
    wrong = sum(labels.wrong.values())
    yield f"labels: {labels.source}: {wrong:,} of {len(labels.wrong):,} answers are wrong"
    if labels.agreement is not None:
        fate = "used all the same" if experiment.settings.keep_mismatches else "left out"
        yield (
            f"answers: {labels.agreement:.1%} are those that the labels were given to; "
            f"{len(labels.mismatched):,} others are {fate}"
        )
    if labels.unlabelled or labels.unknown:
        yield f"without a label: {labels.unlabelled:,} questions; labels of other questions: {labels.unknown:,}"
    sides = [f"{name} {s.questions:,} ({s.wrong:,} wrong, {s.images:,} images)" for name, s in experiment.sides.items()]
    yield f"split: {experiment.settings.split}: {', '.join(sides)}"


def report_tables(experiment: Experiment) -> Iterator[Table]:
    """Yield the tables: baselines, probes, and the breakdown if there is one."""
    baselines = _table("what needs no look into the model", ("baseline", "AUROC", "AUPRC", "F1"))
    for scored in experiment.baselines:
        baselines.add_row(scored.name, show(scored.auroc), show(scored.auprc), _short(scored.f1.value, 3))
    yield baselines
    differ = experiment.best_baseline != experiment.best_baseline_on_test
    more = ("(val.)", "AUPRC") if differ else ("AUPRC", "F1")  # 80 columns hold no more
    probes = _table("probes", ("  field", "probe", "AUROC", "above", *more))
    for scored in experiment.probes:
        above = scored.above[experiment.best_baseline_on_test]
        over_validation, f1 = scored.above[experiment.best_baseline].value, scored.f1.value
        auprc = show(scored.auprc)
        last = (_short(over_validation, 3), auprc) if differ else (auprc, _short(f1, 3))
        cells = (scored.probe, show(scored.auroc), show(above, 2 if differ else 3), *last)
        field = f"{'*' if scored.chosen else ' '} {in_words(scored.name)}"
        probes.add_row(field, *cells, style="bold" if scored.chosen else None)
    yield probes
    if experiment.breakdown:
        by = str(experiment.settings.by)
        table = _table(f"the best probes by {by}", (by, "field", "probe", "questions", "wrong", "AUROC"))
        for piece in experiment.breakdown:
            numbers = (f"{piece.questions:,}", f"{piece.wrong:,}", show(piece.auroc))
            table.add_row(Text(piece.value), in_words(piece.field), piece.probe, *numbers)
        yield table


def closing_lines(experiment: Experiment) -> Iterator[str]:
    """Yield what one must know to read the tables."""
    test = experiment.sides["test"]
    yield f"All on the {test.questions:,} test questions, with 95% intervals over their {test.images:,} images."
    yield f"above: AUROC minus that of {experiment.best_baseline_on_test}, the best baseline on the test side, paired."
    if experiment.best_baseline != experiment.best_baseline_on_test:
        yield (
            f"(val.): minus that of {experiment.best_baseline}, the best on the validation side; "
            "it claims too much, as another is better on the test side. F1 is in probe.json."
        )
    if "validation" in experiment.sides:
        yield "*: the layer with the best AUROC on the validation side, of its representation and probe."
    else:
        yield "No layer is chosen: without a validation side, the best on the test side is best by luck too."
    if any(FIELDS[p.representation].of_answer for p in experiment.probes if p.representation in FIELDS):
        yield "answer first, last, mean: states of the answer's own tokens, read after it is generated."
    yield f"finding: {finding_words(experiment.finding)}"
    yield from (f"warning: {text}" for text in experiment.warnings)


def finding_words(finding: Finding) -> str:
    """Return the finding as a sentence, with the lesser margin."""
    above = finding.margin.above
    size = f"{abs(above.value):.3f} ({above.low:+.3f} to {above.high:+.3f})"
    perhaps = "" if above.low > 0 else ", which may be nothing,"
    said = f"{size} below" if above.value < 0 else f"{size} above{perhaps}"
    return (
        f"{in_words(finding.field)}, {finding.probe}, the best on the {finding.chosen_on} side, has AUROC "
        f"{finding.auroc.value:.3f}, {said} {finding.margin.baseline}, the best baseline on the test side."
    )


def experiment_json(experiment: Experiment) -> dict[str, Any]:
    """Return everything but the labels one by one."""
    body = asdict(experiment)
    wrong = body["labels"].pop("wrong")
    body["labels"] |= {"questions": len(wrong), "wrong": sum(wrong.values())}
    body["settings"]["labels"] = str(experiment.settings.labels) if experiment.settings.labels else None
    for scored, shown in zip(experiment.probes, body["probes"], strict=True):
        shown |= {"representation": scored.representation, "layer": scored.layer}
    found: dict[str, Any] = _finite(body)
    return found


def show(estimate: Estimate | None, digits: int = 2) -> str:
    """Return a value with its interval, as `.912 .89–.93`: 80 columns must hold four of them."""
    if estimate is None:
        return "–"
    return f"{_short(estimate.value, 3)} {_short(estimate.low, digits)}–{_short(estimate.high, digits)}"


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(Text(name), justify="right" if name in {"questions", "wrong"} else "left")
    return table


def _finite(value: Any) -> Any:
    """Replace NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
