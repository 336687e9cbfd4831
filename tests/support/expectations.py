"""Datasets of tests, and what a run over one must hold: computed again with hashlib and numpy, read with plain h5py."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
from PIL import Image

from tests.support.processes import command, write_csv

_DAMAGES = ("missing", "empty", "unreadable", "corrupt")


@dataclass(frozen=True, slots=True)
class Dataset:
    """A table and its images: 5 % of the questions have an image that fails for good, 5 % one that fails at first."""

    table: Path
    images: Path
    rows: list[dict[str, str]]
    reasons: dict[str, str]  # id of each question that must fail to the reason

    @property
    def transient(self) -> int:
        """Questions whose image fails at first."""
        return sum(row["image_id"].startswith("flaky") for row in self.rows)


def make_dataset(directory: Path, number: int, generator: random.Random) -> Dataset:
    """Make `number` questions, six to an image; two to a flaky one, one to a damaged one."""
    images = directory / "images"
    images.mkdir()
    names: list[str] = []
    for kind, share, each in (("flaky", 0.05, 2), ("damaged", 0.05, 1), ("good", 1.0, 6)):
        left = min(round(number * share), number - len(names))
        for index in range(-(-left // each)):
            name = f"{kind}-{index}.png"
            names += [name] * min(each, left - index * each)
            _write_image(images / name, index, generator)
    generator.shuffle(names)
    rows = [
        {"question_id": f"q{n}", "image_id": name, "question": f"What is it, for the {n}th time?! ü", "answer": str(n)}
        for n, name in enumerate(names)
    ]
    reasons = {
        row["question_id"]: f"image_{_DAMAGES[int(row['image_id'].split('-')[1].split('.')[0]) % len(_DAMAGES)]}"
        for row in rows
        if row["image_id"].startswith("damaged")
    }
    return Dataset(write_csv(directory / "vqa.csv", rows), images, rows, reasons)


def _write_image(path: Path, index: int, generator: random.Random) -> None:
    # Of a size that needs no resizing, so that the pixels that the engine sees are those of the file.
    pixels = np.frombuffer(generator.randbytes(28 * 28 * 3), np.uint8).reshape(28, 28, 3)
    Image.fromarray(pixels).save(path)
    if path.name.startswith("damaged"):
        damage = _DAMAGES[index % len(_DAMAGES)]
        if damage == "missing":
            path.unlink()
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "unreadable":
            path.write_bytes(b"not an image")
        else:
            path.write_bytes(path.read_bytes()[:1000])


_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_LETTERS = {byte: chr(byte) for byte in _PRINTABLE}  # GPT-2's letters for bytes: the others follow from 256
_LETTERS |= {byte: chr(256 + i) for i, byte in enumerate(b for b in range(256) if b not in _LETTERS)}
_TOKENS = {letter: 3 + i for i, letter in enumerate(sorted(_LETTERS.values()))}


def expected_values(pixels: bytes, text: str) -> tuple[dict[str, np.ndarray], str]:
    """Return the fake engine's vectors and answer, from its definition."""
    question = pixels + repr((1, *(_TOKENS[_LETTERS[byte]] for byte in text.encode()), 2)).encode()

    def vector(content: bytes, name: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(name.encode() + content).digest()[:8], "big")
        values = np.random.default_rng(seed).standard_normal(8, dtype=np.float32)
        return values.astype(ml_dtypes.bfloat16).astype(np.float32)

    vectors = {
        "vision_only_representation": vector(pixels, "vision_only"),
        "vision_encoder_representation": vector(pixels, "vision_encoder"),
    }
    for layer in range(4):
        vectors[f"vision_token_representation/layer_{layer}"] = vector(pixels, f"vision {layer}")
        vectors[f"query_token_representation/layer_{layer}"] = vector(question, f"query {layer}")
    return vectors, hashlib.sha256(question).hexdigest()[:8]


def assert_whole(output: Path, data: Dataset) -> None:
    """Every planned question once: written with the right values, or failed with its reason. Nothing is left behind."""
    rows = {row["question_id"]: row for row in data.rows}
    found: Counter[str] = Counter()
    failed: dict[str, dict[str, str]] = {}
    pixels: dict[str, bytes] = {}
    for path in sorted(output.glob("*.h5")):
        with h5py.File(path) as part:
            for failure in json.loads(part.attrs["failures"]):
                found[failure["question_id"]] += 1
                failed[failure["question_id"]] = failure
            for question_id, group in part.items():
                found[question_id] += 1
                row = rows[question_id]
                if row["image_id"] not in pixels:
                    with Image.open(data.images / row["image_id"]) as image:
                        pixels[row["image_id"]] = np.asarray(image).tobytes()
                vectors, answer = expected_values(pixels[row["image_id"]], row["question"])
                for name, vector in vectors.items():
                    np.testing.assert_array_equal(group[name][:], vector, err_msg=f"{question_id} {name}")
                texts = [group[n].asstr()[()] for n in ("question", "image_id", "ground_truth_answer", "answer")]
                assert texts == [row["question"], row["image_id"], row["answer"], answer]
    assert found == Counter(rows.keys()), (set(rows) - set(found), [i for i, n in found.items() if n > 1])
    assert {question_id: failure["reason"] for question_id, failure in failed.items()} == data.reasons
    for question_id, failure in failed.items():
        assert rows[question_id]["image_id"] in failure["message"] + failure["traceback"]
        assert failure["worker"].startswith("extract-")
        assert failure["attempts"] >= 1
    with (output / "failures.csv").open(newline="", encoding="utf-8") as file:
        assert {row["question_id"]: row["reason"] for row in csv.DictReader(file)} == data.reasons
    assert leftovers(output) == []
    verified = command("storage", "verify", output, "--deep", timeout=1800)
    assert verified.returncode == 0, verified.stderr


def leftovers(output: Path) -> list[str]:
    """Return what is staged, or begun and not finished."""
    staging = output / ".run" / "staging"
    return sorted(files_below(output / ".run" / "tmp") + [str(path) for path in staging.glob("*")])


def files_below(directory: Path) -> list[str]:
    """Return the files in a directory and below, which others may remove meanwhile."""
    return [os.path.join(path, name) for path, _, names in os.walk(directory) for name in names]
