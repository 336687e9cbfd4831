"""A finished question: a sample with its vectors, or a failure with its reason; and their bytes in the staging area."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from storage.computation import Computation
from storage.errors import DamagedError, UserError
from storage.fields import values_of
from storage.identity import Identity
from storage.settings import faults

# safetensors.numpy saves bfloat16 but does not load it.
_DTYPES: dict[str, Any] = {"BF16": ml_dtypes.bfloat16, "F32": np.float32}


@dataclass(frozen=True, slots=True)
class Sample:
    """What was computed for one question.

    vectors: HALP field (`vision_only_representation`, `query_token_representation/layer_7`, …) to a 1-D array in the dtype
        that it was computed in (bfloat16 or float32).
    facts: provenance that becomes attributes of the question's group: `seq_len`, `image_sha256`, `finish_reason`, …
    """

    vectors: dict[str, np.ndarray]
    answer: str
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a question has no sample. `reason` is a class such as `image_missing`, `message` names the file and the fix."""

    question_id: str
    reason: str
    message: str
    traceback: str
    attempts: int
    worker: str
    time: str


COMPUTED_AT = "computed_at"  # a fact: seconds since 1970, by the worker's clock
ENGINE_SECONDS = "engine_seconds"  # a fact: a question's share of its batch's time
_FAILURE = TypeAdapter(Failure)
MAX_STAGED = 1 << 28  # bytes of a staged file: a sample of 72B with all its layers and its certificate has 16 MB
_FIELD = re.compile(r"(exact/|exact_other_kernel/)?[A-Za-z_]{1,64}(/[a-z]{1,16})?(/layer_\d{1,5})?")


def refuse_too_large(widths: Mapping[str, int], asked: Computation) -> None:
    """Raise UserError where a question's result could be larger than what is read again."""
    itemsize = 2 if asked.dtype == "bfloat16" else 4
    needed = 3 * itemsize * values_of(widths, asked.max_new_tokens)  # one with the exact results for a certificate
    if needed > MAX_STAGED:
        raise UserError(
            f"--answer-states all: an answer of {asked.max_new_tokens:,} tokens may take {needed >> 20:,} MB at so many "
            f"layers, where a result of {MAX_STAGED >> 20:,} MB is read again: fewer --layers, or a smaller --max-new-tokens"
        )


def encode_sample(sample: Sample, identity: Identity | None = None) -> bytes:
    """Return a sample as safetensors in the computed dtype, with a checksum over all of it, and with whose it is."""
    metadata = {"answer": sample.answer, "facts": json.dumps(sample.facts)}
    metadata["crc32"] = _checksum(sample.vectors, metadata)
    if identity is not None:  # past the checksum: it is compared as it is
        metadata |= {"identity": identity.text, "question_id": json.dumps(identity.question_id)}
    data: bytes = save({name: np.ascontiguousarray(v) for name, v in sample.vectors.items()}, metadata)
    return data


def decode_sample(data: bytes, identity: Identity | None = None) -> Sample:
    """Return the sample of `encode_sample`'s bytes. Raises DamagedError where they were changed or are of something else."""
    try:
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        vectors = {
            name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            for name, tensor in deserialize(data)  # type: ignore[no-untyped-call]
        }
        crc = metadata.pop("crc32")
        if crc != _checksum(vectors, metadata):
            raise DamagedError("checksum mismatch")
        if identity is not None:
            identity.check(metadata.get("identity"))
            if odd := [name for name in vectors if not _FIELD.fullmatch(name)]:
                raise DamagedError(f"{odd[0]!r} is no field")
        return Sample(vectors, metadata["answer"], json.loads(metadata["facts"]))
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DamagedError(f"not a staged sample: {error}") from error


def encode_failure(failure: Failure, identity: Identity | None = None) -> bytes:
    """Return a failure as JSON with a checksum. A lone surrogate, of a path that is not UTF-8, becomes a question mark."""
    body = json.dumps(asdict(failure), ensure_ascii=False).encode(errors="replace")
    whose = b"" if identity is None else b'"identity": "%b", ' % identity.text.encode()
    return b'{"crc32": %d, %b"failure": %b}' % (zlib.crc32(body), whose, body)


def decode_failure(data: bytes, identity: Identity | None = None) -> Failure:
    """Return the failure of `encode_failure`'s bytes. Raises DamagedError where they were changed or are of something else."""
    match = re.fullmatch(rb'\{"crc32": (\d{1,10}), (?:"identity": "([\w/-]{1,128})", )?"failure": (.*)\}', data, re.DOTALL)
    try:
        if match is None or zlib.crc32(match[3]) != int(match[1]):
            raise ValueError("checksum mismatch")
        failure = _FAILURE.validate_json(match[3])
    except ValueError as error:
        what = faults(error) if isinstance(error, ValidationError) else error
        raise DamagedError(f"not a staged failure: {what}") from error
    if identity is not None:
        identity.check(match[2].decode() if match[2] else None)
        if failure.question_id != identity.question_id:
            raise DamagedError(f"is of question {failure.question_id!r}, not {identity.question_id!r}")
    return failure


def _checksum(vectors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    crc = 0
    for name in sorted(vectors):
        crc = zlib.crc32(f"{name} {vectors[name].dtype.name} {vectors[name].shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(vectors[name]).view(np.uint8).data, crc)
    return str(zlib.crc32(json.dumps([metadata["answer"], metadata["facts"]]).encode(), crc))
