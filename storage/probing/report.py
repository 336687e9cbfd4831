"""How an experiment is shown: lines and tables for a terminal, one JSON object for scripts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from storage.probing.experiment import Experiment
from storage.probing.score import Estimate


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
    best = experiment.best_baseline
    baselines = Table(title="what needs no look into the model", title_justify="left")
    for name in ("baseline", "AUROC", "AUPRC", "F1"):
        baselines.add_column(name)
    for scored in experiment.baselines:
        baselines.add_row(scored.name, *map(show, (scored.auroc, scored.auprc, scored.f1)))
    yield baselines
    probes = Table(title="probes, on the test side, with 95% intervals", title_justify="left", caption_justify="left")
    for name in ("representation", "layer", "probe", "AUROC", f"above {best}", "AUPRC", "F1"):
        probes.add_column(name, justify="right" if name == "layer" else "left", overflow="fold")
    for scored in experiment.probes:
        name = scored.representation.removesuffix("_representation").replace("_", " ")
        layer = "" if scored.layer is None else str(scored.layer)
        cells = map(show, (scored.auroc, scored.above[best], scored.auprc, scored.f1))
        marked = Text("* ", style="bold") if scored.chosen else Text("  ")
        probes.add_row(marked + name, layer, scored.probe, *cells, style="bold" if scored.chosen else None)
    probes.caption = _caption(experiment)
    yield probes
    if experiment.breakdown:
        yield _breakdown(experiment)


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


def show(estimate: Estimate | None) -> str:
    """Return a value with its interval, as `0.912 .89–.93`."""
    if estimate is None:
        return "–"
    low, high = (f"{x:.2f}".replace("0.", ".", 1) for x in (estimate.low, estimate.high))
    return f"{estimate.value:.3f} {low}–{high}"


def _caption(experiment: Experiment) -> str:
    if "validation" in experiment.sides:
        return "* the layer with the best AUROC on the validation side, of its representation and probe"
    return "No layer is chosen: this split has no validation side, and the best on the test side is best by luck too."


def _breakdown(experiment: Experiment) -> Table:
    by = str(experiment.settings.by)
    table = Table(title=Text(f"by {by}"), title_justify="left")
    for name in (by, "probe", "field", "questions", "wrong", "AUROC"):
        table.add_column(Text(name), justify="right" if name in {"questions", "wrong"} else "left", overflow="fold")
    for piece in experiment.breakdown:
        table.add_row(
            Text(piece.value), piece.probe, piece.field, f"{piece.questions:,}", f"{piece.wrong:,}", show(piece.auroc)
        )
    return table


def _finite(value: Any) -> Any:
    """Replace NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
