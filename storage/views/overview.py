"""A whole run at a glance: its settings, its account, its fields with widths and norms, its drift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from storage.fields import in_order
from storage.hdf5.columns import Column
from storage.hdf5.part import read_certificate
from storage.reading.source import OpenPart, Source
from storage.runs.account import Account, Bookkeeper
from storage.screen.console import Console
from storage.screen.tables import WIDE, Sentence, Table
from storage.screen.terminal import amount


@dataclass(frozen=True, slots=True)
class FieldOverview:
    """One field over all questions, by the Euclidean norms of its vectors."""

    field: str
    width: int
    questions: int
    norm_mean: float
    norm_std: float
    norm_min: float
    norm_max: float


@dataclass(frozen=True, slots=True)
class DriftOverview:
    """The drift certificates of all parts, a field in each: root mean squares of z, as docs/format.md defines them."""

    field: str
    parts: int
    drift_mean: float
    drift_max: float
    noise_floor_mean: float


@dataclass(frozen=True, slots=True)
class Overview:
    """A run, or any files of the layout. `account` is None where there is no plan."""

    source: str
    parts: int
    questions: int
    settings: dict[str, Any]
    account: Account | None
    fields: tuple[FieldOverview, ...]
    drift: tuple[DriftOverview, ...]
    answers_disagree: int  # parts whose certified answer is not the exact one


def overview(path: str | Path, *, progress: bool = False) -> Overview:
    """Return what there is to say of a run or of files. Reads every vector. Raises UserError, DamagedError."""
    source = Source(path)
    settings: dict[str, Any] = {}
    columns: dict[str, list[Column]] = {}
    certificates: list[dict[str, Any]] = []
    parts = questions = 0
    for number, kind, certificate, found in source.read(_look, progress=progress):
        parts, questions = parts + 1, questions + number
        settings = settings or kind
        certificates += certificate
        for column in found:
            columns.setdefault(column.field, []).append(column)
    names = sorted(columns, key=in_order)
    shown = track(names, "reading", console=Console(stderr=True), disable=not progress, transient=True)
    return Overview(
        source=str(path),
        parts=parts,
        questions=questions,
        settings=settings,
        account=Bookkeeper(source.runs[0]).account() if source.runs else None,
        fields=tuple(_field(columns[name]) for name in shown),
        drift=tuple(_drift(certificates)),
        answers_disagree=sum(not c["answers_agree"] for c in certificates),
    )


def overview_tables(found: Overview) -> list[Table]:
    """Return the overview as tables for a terminal."""
    head = Table(found.source, f"{amount(found.questions, 'question')} in {amount(found.parts, 'part')}", show_header=False)
    for name, value in found.settings.items():
        head.row((name, Sentence(str(value))))
    tables = [head]
    if (account := found.account) is not None:
        counts = _table("planned = written + failed + staged + outstanding", ["", "questions"])
        for name in ("planned", "written", "failed", "staged", "outstanding"):
            counts.add_row(name, f"{getattr(account, name):,}")
        for reason, number in account.reasons.items():
            counts.row((f"failed: {reason}", f"{number:,}"))
        tables.append(counts)
    fields = _table("norms", ["field", "width", "questions", "mean", "std", "min", "max"])
    for f in found.fields:
        numbers = (f"{x:.4g}" for x in (f.norm_mean, f.norm_std, f.norm_min, f.norm_max))
        fields.add_row(f.field, str(f.width), f"{f.questions:,}", *numbers)
    tables.append(fields)
    if found.drift:
        title = f"drift (rms of z); exact answers that differ: {found.answers_disagree} of {found.drift[0].parts}"
        drift = _table(title, ["field", "mean", "max", "noise floor"])
        for d in found.drift:
            drift.add_row(d.field, f"{d.drift_mean:.3g}", f"{d.drift_max:.3g}", f"{d.noise_floor_mean:.3g}")
        tables.append(drift)
    return tables


def _table(title: str, header: list[str]) -> Table:
    table = Table(what=title)
    for number, name in enumerate(header):
        right, wide = number > 0, WIDE if name in {"min", "max"} and "std" in header else 0
        table.column(name, justify="right" if right else "left", whole=name == "field", wide=wide)
    return table


def _field(columns: list[Column]) -> FieldOverview:
    norms = np.concatenate(
        [np.linalg.norm(piece.astype(np.float64), axis=1) for column in columns for piece in column.pieces()]
    )
    questions = sum(len(column.ids) for column in columns)
    numbers = (float(x) for x in (norms.mean(), norms.std(), norms.min(), norms.max()))
    return FieldOverview(columns[0].field, columns[0].width, questions, *numbers)


def _look(part: OpenPart) -> tuple[int, dict[str, Any], list[dict[str, Any]], list[Column]]:
    certificate = read_certificate(part.file)
    return (
        len(part.ids),
        part.kind(),
        [certificate] if certificate else [],
        [part.column(field) for field in part.fields()],
    )


def _drift(certificates: list[dict[str, Any]]) -> Iterator[DriftOverview]:
    names = sorted({name for c in certificates for name in c["fields"]}, key=in_order)
    for name in names:
        measured = [f for c in certificates if (f := c["fields"].get(name)) and f["drift"] and f["noise_floor"]]
        if measured:
            drifts = [f["drift"]["rms"] for f in measured]
            floor = sum(f["noise_floor"]["rms"] for f in measured) / len(measured)
            yield DriftOverview(name, len(measured), sum(drifts) / len(drifts), max(drifts), floor)
