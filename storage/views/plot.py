"""A picture of a run: norms by layer, and the two main components of each representation, coloured by a column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from storage.errors import UserError
from storage.fields import in_order, is_ragged, split_layer
from storage.reading.load import part_frame
from storage.reading.source import Source
from storage.screen.terminal import one_line
from storage.views.components import principal_components
from storage.views.overview import Overview

_POINTS = 500  # questions in a cloud: as many as a small picture shows; the work grows with their cube
_LAYERS = 5  # of a token representation
_CATEGORIES = 9  # the rest are "other"
_RANGES = 5  # of a column of many numbers
_COLUMNS = 4  # panels in a row
_Cloud = tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]  # rows of a frame, and the vectors of those


def plot(source: str | Path, found: Overview, colour_by: str | None, output: Path) -> None:
    """Draw a run's overview into a new file of any format that matplotlib knows. Raises UserError."""
    try:
        from matplotlib.figure import Figure  # without pyplot there is no window and no state: Agg draws
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'halp-extractor[plot]'") from None
    if output.exists():
        raise UserError(f"{output} exists: move it elsewhere, or give another name to --plot")
    frame, clouds = _sample(source, _chosen([field.field for field in found.fields if not is_ragged(field.field)]))
    colours = _colours(frame, colour_by)
    rows = -(-(len(clouds) + 1) // _COLUMNS)
    figure = Figure(figsize=(4 * _COLUMNS, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    _draw_norms(panels[0], found)
    for panel, (field, (rows_of, vectors)) in zip(panels[1:], clouds.items(), strict=False):
        its = {value: rows[rows_of] for value, rows in colours.items()}
        _draw_cloud(panel, field, principal_components(vectors)[0], its)
    for panel in panels[len(clouds) + 1 :]:
        panel.set_visible(False)
    if colour_by is not None and clouds:
        panels[len(clouds)].legend(title=_plain(colour_by), fontsize=7, loc="best")
    figure.suptitle(f"{_plain(found.source)}: {found.questions:,} questions, {len(frame):,} shown")
    try:
        figure.savefig(output, dpi=120)
    except ValueError as error:  # a suffix that it does not know
        raise UserError(f"{output}: {error}") from None


def _plain(text: str) -> str:
    """Return a text that matplotlib draws as it is: between two dollars it would read a formula, and fail on most."""
    return one_line(text).replace("$", r"\$")


def _sample(source: str | Path, fields: list[str]) -> tuple[pd.DataFrame, dict[str, _Cloud]]:
    """Return some questions, evenly over all, and of each field the rows of those that have it, with their vectors."""
    look = Source(source).read(lambda part: (part_frame(part), {field: part.column(field) for field in fields}))
    parts = list(look)
    number = sum(len(frame) for frame, _ in parts)
    wanted = np.unique(np.linspace(0, number - 1, min(number, _POINTS)).astype(int)) if number else np.empty(0, int)
    frames: list[pd.DataFrame] = []
    clouds: dict[str, list[_Cloud]] = {field: [] for field in fields}
    start = shown = 0
    for frame, columns in parts:
        rows = (wanted[(wanted >= start) & (wanted < start + len(frame))] - start).tolist()
        start += len(frame)
        frames.append(frame.iloc[rows])
        ids = frame["question_id"].tolist()
        for field, column in columns.items():
            places = {question: place for place, question in enumerate(column.ids)}
            having = [k for k, row in enumerate(rows) if ids[row] in places]
            if having:
                vectors = column.read_rows([places[ids[rows[k]]] for k in having])
                clouds[field].append((np.array(having) + shown, vectors))
        shown += len(rows)
    joined = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
    found = {field: tuple(map(np.concatenate, zip(*some))) for field, some in clouds.items() if some}
    return joined, {field: (rows, vectors) for field, (rows, vectors) in found.items()}


def _chosen(fields: list[str]) -> list[str]:
    """Return every field; of a token representation with many layers, some evenly."""
    families: dict[str, list[str]] = {}
    for field in sorted(fields, key=in_order):
        families.setdefault(split_layer(field)[0], []).append(field)
    return [
        family[i]
        for family in families.values()
        for i in sorted(set(np.linspace(0, len(family) - 1, min(len(family), _LAYERS)).round().astype(int).tolist()))
    ]


def _colours(frame: pd.DataFrame, column: str | None) -> dict[str, npt.NDArray[np.bool_]]:
    """Return the questions of each colour: the column's commonest values and the rest, or ranges of many numbers."""
    if column is None:
        return {"": np.ones(len(frame), bool)}
    if column not in frame:
        raise UserError(f"there is no column {column}; there are {', '.join(map(str, frame.columns))}")
    values = frame[column]
    if pd.api.types.is_numeric_dtype(values) and values.nunique() > _CATEGORIES:
        ranges = pd.qcut(values, _RANGES, duplicates="drop")
        return {str(interval): (ranges == interval).to_numpy() for interval in ranges.cat.categories}
    texts = values.astype(str)
    common = texts.value_counts().index[:_CATEGORIES].tolist()
    groups = {value: (texts == value).to_numpy() for value in common}
    if (rest := ~texts.isin(common).to_numpy()).any():
        groups["other"] = rest
    return groups


def _draw_norms(panel: Any, found: Overview) -> None:
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for field in found.fields:
        name, layer = in_order(field.field)
        lines.setdefault(name, []).append((layer, field.norm_mean, field.norm_std))
    for name, points in lines.items():
        layers, means, spreads = zip(*points, strict=True)
        if layers == (-1,):  # no decoder's layer: a line across
            panel.axhline(means[0], linestyle=":", color=f"C{len(panel.lines)}", label=name)
        else:
            panel.errorbar(layers, means, yerr=spreads, marker="o", capsize=2, label=name)
    panel.set(title="norms by layer (mean, std)", xlabel="layer", yscale="log")
    if lines:
        panel.legend(fontsize=6)


def _draw_cloud(panel: Any, field: str, points: npt.NDArray[np.float64], colours: dict[str, Any]) -> None:
    for number, (value, rows) in enumerate(colours.items()):
        panel.scatter(*points[rows].T, s=4, color=f"C{number}", label=_plain(value))
    panel.set_title(_plain(field), fontsize=8)
    panel.set(xticks=[], yticks=[])
