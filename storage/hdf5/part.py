"""An HDF5 part: one group per question, as the reference script lays it out. Format: docs/format.md."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import h5py
import numpy.typing as npt
from pydantic import ValidationError

from storage.computation import ONLY_IF_ASKED
from storage.drift import DriftMeter, decode_certificate
from storage.hdf5.columns import COLUMN
from storage.hdf5.layout import Part, open_part
from storage.hdf5.memory import keep_heap, uncollected
from storage.hdf5.objects import clean, create_group, write_attributes, write_text
from storage.hdf5.placement import Placement, check_placed
from storage.hdf5.rows import ROWS, encode_rows
from storage.hdf5.stored import TEXTS
from storage.hdf5.timing import Timing
from storage.naming import group_key, model_type
from storage.question import Question
from storage.sample import Failure, Sample
from storage.settings import ModelFacts, RunSettings

# Facts of a sample that describe the worker, not the question: a part lists the distinct ones at its root.
ENVIRONMENT = ("device", "gpu", "attention_implementation", "attention_kernels", "batch_invariance", "library_versions")

# Attributes of a question's group that the CSV's other columns must not replace.
QUESTION_ATTRIBUTES = frozenset(
    {
        "question_id", "csv_row", "seq_len", "vision_token_position", "query_token_position", "image_grid_thw",
        "image_sha256", "image_size", "resized_size", "num_vision_tokens", "finish_reason", "num_answer_tokens",
        "answer_token_ids", "answer_token_logprobs", "batch_size", "image_prefix", "first_token_entropy",
    }
)  # fmt: skip

# Metadata a tenth of the default's size; `latest` would write layouts that h5py <= 3.14 and h5dump 1.10 reject.
_LIBVER = ("v110", "v110")
# Else 64 KB of hash table for every dataset that is created. Per dataset it would be a property list to copy each time.
_NO_CHUNK_CACHE = {"rdcc_nslots": 1, "rdcc_nbytes": 0}


@dataclass(frozen=True, slots=True)
class PartHeader:
    """What a published part says of itself."""

    run_id: str
    part: int
    question_ids: tuple[str, ...]
    failures: tuple[Failure, ...]


@uncollected()
def write_part(
    path: Path,
    settings: RunSettings,
    model: ModelFacts | None,
    part: int,
    samples: Iterable[tuple[Question, Sample]],
    failures: Iterable[Failure],
) -> None:
    """Write a part to a new file. Vectors become float32 datasets (a bfloat16 value is exact in float32)."""
    keep_heap()
    placement, meter, timing = Placement(), DriftMeter(), Timing()
    environments: dict[str, set[str]] = {name: set() for name in ENVIRONMENT}
    rows: dict[str, tuple[dict[str, str], dict[str, Any]]] = {}
    with h5py.File(path, "x", libver=_LIBVER, locking=False) as file:
        for question, staged in samples:
            sample = meter.take(staged)
            facts = dict(sample.facts)
            for name in ENVIRONMENT:
                if value := facts.pop(name, None):
                    environments[name].add(value)
            key = group_key(question.question_id)
            timing.take(key, facts)
            own = {"question_id": question.question_id, "csv_row": question.csv_row}
            rows[key] = _texts(question, sample), {**question.extra, **facts, **own}
            _write_question(file, placement, key, sample.vectors, *rows[key])
    options = {"libver": _LIBVER, "locking": False, "meta_block_size": placement.metadata_size, **_NO_CHUNK_CACHE}
    with h5py.File(path, "r+", **options) as file:
        columns = placement.write(file.id)
        attributes = {
            **_root_attributes(settings, model, part),
            **{name: ", ".join(sorted(values)) for name, values in environments.items()},
            "num_samples": len(rows),
            "failures": json.dumps([asdict(f) for f in failures], ensure_ascii=False),
            ROWS: encode_rows(rows[key] for key in sorted(rows)),
            **{COLUMN + field: index for field, index in columns.items()},
            **timing.attributes(),
        }
        if (certificate := meter.certificate()) is not None:
            attributes["drift"] = json.dumps(certificate)
        elif not (settings.exact or settings.halp_compat) and (absence := meter.absence()) is not None:
            attributes["drift_absent"] = clean(absence)
        for name, value in attributes.items():
            file.attrs[name] = value
    check_placed(path, columns)


def read_header(path: Path) -> PartHeader | None:
    """Return what a part says of itself; None where the file is no part of any run of ours. Raises as `open_part` does."""
    with open_part(path) as part:
        if not all(map(part.has, ("run_id", "part", "failures"))):
            return None
        return PartHeader(
            run_id=part.text("run_id") or "",
            part=int(part.attribute("part")),
            question_ids=tuple(part.ids),
            failures=read_failures(part),
        )


def read_failures(part: Part) -> tuple[Failure, ...]:
    """Return the failures that an open part lists; none where it does not say. Raises LayoutError."""
    try:
        return tuple(Failure(**failure) for failure in json.loads(part.text("failures") or "[]"))
    except (ValueError, TypeError, RecursionError) as error:
        raise part.refusal("/@failures", f"is no list of failures ({error})") from error


def read_certificate(part: Part) -> dict[str, Any] | None:
    """Return the drift certificate of an open part; None where it has none. Raises LayoutError."""
    if (text := part.text("drift")) is None:
        return None
    try:
        return decode_certificate(text)
    except ValidationError as error:
        raise part.refusal("/@drift", f"is no drift certificate ({error.error_count()} faults)") from error


def _texts(question: Question, sample: Sample) -> dict[str, str]:
    values = question.question, question.image_id, sample.answer, question.ground_truth_answer
    return dict(zip(TEXTS, values, strict=True))


def _write_question(
    file: h5py.File,
    placement: Placement,
    key: str,
    vectors: dict[str, npt.NDArray[Any]],
    texts: dict[str, str],
    attributes: dict[str, Any],
) -> None:
    group = create_group(file.id, key)
    for name, text in texts.items():
        write_text(group, name, text)
    try:
        placement.add(group, key, vectors)
    except ValueError as error:
        where = f"question {attributes['question_id']} cannot be written into {file.filename}"
        raise ValueError(f"{where}: {error}") from error
    write_attributes(group, attributes)


def _attribute(value: Any) -> Any:
    """Return a value as an attribute holds it: several words in one text."""
    if isinstance(value, tuple):
        return ", ".join(value) if isinstance(value[0], str) else list(value)
    return value


def _root_attributes(settings: RunSettings, model: ModelFacts | None, part: int) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "format_version": settings.format_version,
        "software_version": settings.software_version,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "run_id": settings.run_id,
        "part": part,
        "model_name": settings.model,
        "model_type": model_type(settings.model),
        "dtype": settings.dtype,
        "max_new_tokens": settings.max_new_tokens,
        "dataset": settings.dataset,
        "dataset_sha256": settings.dataset_sha256,
    }
    if model is not None:  # absent only where no worker ever opened the run
        facts = settings.recorded() | model.model_dump(exclude={"model_type"}, exclude_none=True)
        attributes |= {name: _attribute(value) for name, value in facts.items() if value or name not in ONLY_IF_ASKED}
    return attributes
