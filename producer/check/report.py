"""How a check looks: tables and histograms for a terminal, one object for a script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.table import Table

from producer.check.check import Checked, in_bytes
from storage.screen.console import Console, Text
from storage.screen.terminal import amount, duration, one_line

_BAR = 30
_MEGAPIXELS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


def check_json(checked: Checked) -> dict[str, Any]:
    """Return what was found as a script reads it."""
    megapixels = [width * height / 1e6 for width, height in checked.sizes]
    shape = checked.shape
    return {
        "exit_code": checked.exit_code,
        "questions": checked.questions,
        "images": checked.images,
        "parts": checked.parts,
        "extra_columns": list(checked.extra_columns),
        "without_answer": checked.without_answer,
        "special_tokens": {token: len(ids) for token, ids in checked.texts.special.items()},
        "image_words": len(checked.texts.image_words),
        "exif_turned": len(checked.turned),
        "questions_per_image": {str(k): n for k, n in sorted(checked.per_image.items())},
        "image_file_bytes": checked.file_bytes,
        "megapixels": {**_quantiles(megapixels), "histogram": _histogram(megapixels, _MEGAPIXELS)},
        "vision_tokens": {
            **_quantiles(checked.tokens),
            "all_questions": checked.vision_tokens,
            "histogram": _histogram(checked.tokens, _TOKENS),
        },
        "max_pixels": [asdict(what_if) for what_if in checked.what_ifs],
        "disk": None if checked.disk is None else asdict(checked.disk),
        "weight_bytes": None if shape is None else _weight_bytes(checked),
        "decode_seconds_per_image": checked.decode_seconds,
        "trial": None if checked.trial is None else asdict(checked.trial),
        "hours": checked.hours,
        "decode_cores": checked.decode_cores,
        "findings": [asdict(finding) for finding in checked.findings],
    }


def print_check(checked: Checked, console: Console) -> None:
    """Print what was found. Texts of the dataset are `Text`: rich would take `[b]` in a string for markup."""
    console.print(_overview(checked))
    megapixels = [width * height / 1e6 for width, height in checked.sizes]
    if checked.sizes:
        console.print(_bars("megapixels of an image", _histogram(megapixels, _MEGAPIXELS)))
        if checked.tokens:
            console.print(_bars("vision tokens of an image", _histogram(checked.tokens, _TOKENS)))
            console.print(_what_ifs(checked))
        else:
            console.print(f"vision tokens of an image: {_trial_tokens(checked)}")
    for finding in checked.findings:
        console.print(Text(one_line(f"{finding.level}: {finding.number:,} {finding.message}")), soft_wrap=True)
        for example in finding.examples:
            console.print(Text(one_line(f"  {example}")), soft_wrap=True)
        if finding.number > len(finding.examples) > 0:
            console.print(Text(f"  and {finding.number - len(finding.examples):,} more"))
    if not checked.findings:
        console.print("Nothing was found that you need to look at before the run.")


def _overview(checked: Checked) -> Table:
    table = Table(title=Text(str(checked.options.source.path)), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    images = "none"
    if checked.images:
        asked = sum(number * times for number, times in checked.per_image.items())
        images = f"{checked.images:,}, {in_bytes(checked.file_bytes)}; {asked / checked.images:.2f} questions an image"
    rows = [
        (
            "questions",
            f"{checked.questions:,} in {amount(checked.parts, 'part')}; {checked.without_answer:,} have no answer",
        ),
        ("images", images),
        ("questions per image", ", ".join(f"{n:,} images x {k}" for k, n in checked.per_image.most_common(6)) or "none"),
        ("texts", checked.texts.words()),
        ("turned images", _turned(checked)),
        ("columns", checked.columns or "by our own names"),
        ("further columns", ", ".join(checked.extra_columns) or "none"),
        ("disk", _disk(checked)),
        ("decoding", _decoding(checked)),
        ("memory", _memory(checked)),
        ("time", _time(checked)),
    ]
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _trial_tokens(checked: Checked) -> str:
    if checked.trial is None or checked.trial.image_tokens is None:
        return "the model's own processor makes them; --sample 64 counts those of 64 questions"
    least, most = checked.trial.image_tokens
    return f"{least:,}" + (f" to {most:,}" if most > least else "") + " in the trial; the model's own processor makes them"


def _turned(checked: Checked) -> str:
    if not checked.turned:
        return "none by their EXIF data"
    how = "turned upright" if checked.options.computation.exif_rotation else "taken as stored"
    return f"{len(checked.turned):,} by their EXIF data, which are {how}"


def _disk(checked: Checked) -> str:
    if checked.disk is None:
        return f"not known: the dimensions of {checked.options.model} are not known here"
    disk = checked.disk
    free = "" if disk.free is None else f"; {in_bytes(disk.free)} are free"
    images = f", {in_bytes(disk.images)} of the table's images" if disk.images else ""
    return f"about {in_bytes(disk.parts)} of parts, up to {in_bytes(disk.staging)} of staging{images}{free}"


def _decoding(checked: Checked) -> str:
    if checked.decode_seconds is None:
        return "not known: no image could be decoded"
    text = f"{checked.decode_seconds * 1e3:.1f} ms of a core for an image"
    if checked.decode_cores is not None:
        text += f"; at the trial's speed that takes {checked.decode_cores:.1f} cores"
    return text


def _memory(checked: Checked) -> str:
    weights = "" if checked.shape is None else f"weights about {in_bytes(_weight_bytes(checked))}; "
    if checked.trial is None or checked.trial.memory_bytes is None:
        return f"{weights}the whole is not known: --sample 64 measures it"
    return f"{weights}{in_bytes(checked.trial.memory_bytes)} in use on {_device(checked)} in the trial"


def _time(checked: Checked) -> str:
    if checked.trial is None or checked.hours is None:
        return "not known: --sample 64 loads the model and measures it here"
    trial = checked.trial
    return (
        f"about {checked.hours:.2g} h on one device like this ({_device(checked)}: {trial.questions_per_second:.2f}"
        f" questions/s over {trial.questions} sampled), and {duration(trial.load_seconds)} to load the model"
    )


def _device(checked: Checked) -> str:
    assert checked.trial is not None
    return checked.trial.gpu or checked.trial.device


def _weight_bytes(checked: Checked) -> int:
    assert checked.shape is not None
    return checked.shape.weight_bytes * (2 if checked.options.computation.dtype == "float32" else 1)


def _what_ifs(checked: Checked) -> Table:
    table = Table(title="what --max-pixels would do", title_justify="left")
    for name in ("max pixels", "images shrunk", "vision tokens", "saved"):
        table.add_column(name, justify="right")
    now = checked.what_ifs[0].vision_tokens
    for what_if in checked.what_ifs:
        saved = 1 - what_if.vision_tokens / max(1, now)
        first = what_if is checked.what_ifs[0]
        table.add_row(
            f"{what_if.max_pixels:,}" + (" (now)" if first else ""),
            f"{what_if.shrunk_images:,}",
            f"{what_if.vision_tokens:,}",
            "" if first else f"{saved:.0%}",
        )
    return table


def _bars(title: str, histogram: Sequence[tuple[float | None, int]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    most = max(number for _, number in histogram)
    for bound, number in histogram:
        label = "more" if bound is None else f"up to {bound:g}"
        table.add_row(label, "█" * -(-number * _BAR // most) if number else "", f"{number:,}")
    return table


def _histogram(values: Sequence[float], bounds: Sequence[float]) -> list[tuple[float | None, int]]:
    """Return how many values are at most each bound and above the one before; None is above all. Empty ends are left out."""
    counts = np.bincount(np.searchsorted(bounds, values), minlength=len(bounds) + 1).tolist()
    rows = list(zip([*bounds, None], counts))
    filled = [i for i, (_, number) in enumerate(rows) if number]
    return rows[filled[0] : filled[-1] + 1] if filled else []


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    points = np.quantile(values, (0, 0.5, 0.95, 1)).tolist()
    return {"mean": float(np.mean(values)), **dict(zip(("least", "median", "p95", "most"), points))}
