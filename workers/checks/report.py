"""The self-check's outcome: what passes, as a table and as JSON. It computes nothing itself.

- float32 passes where every vector is within 1e-4 (max|a-b| / max|b|) of the reference and every answer is the same.
- bfloat16 passes where, for each family of fields, the median and the worst error are within four times the noise floor's,
  which counts as at least 2**-8, one rounding. Answers are reported: a rounding may turn a word without a mistake anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

TOLERANCE = 1e-4
NOISE_FACTOR = 4
ROUNDING = 2.0**-8  # of a bfloat16

_RULES = {
    "float32": f"every vector within {TOLERANCE:g}, every answer the same",
    "bfloat16": f"median and worst within {NOISE_FACTOR} x the noise floor's (at least 2^-8)",
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """One way of computing against the reference, over all questions: errors by field family, answers that are the same."""

    median: dict[str, float]
    worst: dict[str, float]
    same_answers: int


@dataclass(frozen=True, slots=True)
class Verdict:
    """A dtype's outcome. Of `num_layers` the first `checked_layers` were run; of none, nothing was."""

    dtype: str
    questions: int
    num_layers: int
    checked_layers: int
    memory: str
    environment: dict[str, str]
    batched: Comparison | None = None
    exact: Comparison | None = None
    noise: Comparison | None = None

    def family_passes(self, family: str) -> bool:
        """Tell whether both recipes keep a family's bound."""
        ours = [comparison for comparison in (self.batched, self.exact) if comparison is not None]
        if self.noise is None or not ours:
            return False
        if self.dtype == "float32":
            return all(c.worst[family] <= TOLERANCE for c in ours)
        floor = NOISE_FACTOR * max(self.noise.median[family], ROUNDING)
        ceiling = NOISE_FACTOR * max(self.noise.worst[family], ROUNDING)
        return all(c.median[family] <= floor and c.worst[family] <= ceiling for c in ours)

    @property
    def answers_pass(self) -> bool:
        """Tell whether all answers are the reference's; in bfloat16 they need not be."""
        return self.dtype != "float32" or all(
            c is not None and c.same_answers == self.questions for c in (self.batched, self.exact)
        )

    @property
    def passes(self) -> bool:
        """Tell whether this dtype was checked and is right."""
        return self.noise is not None and self.answers_pass and all(map(self.family_passes, self.noise.worst))


def verdict_table(verdict: Verdict) -> Table:
    """Return a dtype's table: errors by field family, answers, and what passed."""
    table = Table(title=f"median and worst of max|a-b| / max|b|; {_RULES[verdict.dtype]}")
    for column in ("", "batched", "exact", "noise floor", "verdict"):
        table.add_column(column, justify="right" if column and column != "verdict" else "left")
    columns = [c for c in (verdict.batched, verdict.exact, verdict.noise) if c is not None]
    for family in columns[0].worst if columns else ():
        cells = [f"{c.median[family]:.0e} {c.worst[family]:.0e}" for c in columns]
        table.add_row(family, *cells, "pass" if verdict.family_passes(family) else "FAIL")
    if columns:
        table.add_row("answers identical", *(f"{c.same_answers}/{verdict.questions}" for c in columns), _answers(verdict))
    return table


def summary(verdict: Verdict) -> str:
    """Return one line: the dtype, how much of the model was checked and why not all, and the outcome."""
    if verdict.checked_layers == 0:
        return f"{verdict.dtype}: NOT CHECKED: not one layer fits ({verdict.memory})"
    layers = f"all {verdict.num_layers} layers"
    if verdict.checked_layers < verdict.num_layers:
        layers = f"the first {verdict.checked_layers} of {verdict.num_layers} layers only ({verdict.memory})"
    return f"{verdict.dtype}, {layers}, {verdict.questions} questions: {'PASS' if verdict.passes else 'FAIL'}"


def as_json(model: str, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Return all of it; an error that is no number is null."""
    return {
        "ok": all(verdict.passes for verdict in verdicts),
        "model": model,
        "dtypes": {
            v.dtype: {
                "ok": v.passes,
                "summary": summary(v),
                "rule": _RULES[v.dtype],
                "questions": v.questions,
                "num_layers": v.num_layers,
                "checked_layers": v.checked_layers,
                "environment": v.environment,
                **{name: _plain(getattr(v, name)) for name in ("batched", "exact", "noise")},
            }
            for v in verdicts
        },
    }


def _answers(verdict: Verdict) -> str:
    if verdict.dtype != "float32":
        return "reported"
    return "pass" if verdict.answers_pass else "FAIL"


def _plain(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    facts = asdict(comparison)
    for name in ("median", "worst"):
        facts[name] = {family: e if math.isfinite(e) else None for family, e in facts[name].items()}
    return facts
