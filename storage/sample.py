"""A finished question: a sample with its vectors, or a failure with its reason; and their bytes in the staging area."""

from __future__ import annotations

import json
import re
import zlib
from dataclasses import asdict, dataclass
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from storage.errors import DamagedError

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


def encode_sample(sample: Sample) -> bytes:
    """Return a sample as safetensors in the computed dtype, with a checksum over all of it."""
    metadata = {"answer": sample.answer, "facts": json.dumps(sample.facts)}
    metadata["crc32"] = _checksum(sample.vectors, metadata)
    data: bytes = save({name: np.ascontiguousarray(v) for name, v in sample.vectors.items()}, metadata)
    return data


def decode_sample(data: bytes) -> Sample:
    """Return the sample of `encode_sample`'s bytes. Raises DamagedError where they were changed."""
    try:
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        vectors = {
            name: np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
            for name, tensor in deserialize(data)  # type: ignore[no-untyped-call]
        }
        crc = metadata.pop("crc32")
        if crc != _checksum(vectors, metadata):
            raise DamagedError("checksum mismatch")
        return Sample(vectors, metadata["answer"], json.loads(metadata["facts"]))
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DamagedError(f"not a staged sample: {error}") from error


def encode_failure(failure: Failure) -> bytes:
    """Return a failure as JSON with a checksum. A lone surrogate, of a path that is not UTF-8, becomes a question mark."""
    body = json.dumps(asdict(failure), ensure_ascii=False).encode(errors="replace")
    return b'{"crc32": %d, "failure": %b}' % (zlib.crc32(body), body)


def decode_failure(data: bytes) -> Failure:
    """Return the failure of `encode_failure`'s bytes. Raises DamagedError where they were changed."""
    match = re.fullmatch(rb'\{"crc32": (\d{1,10}), "failure": (.*)\}', data, re.DOTALL)
    try:
        if match is None or zlib.crc32(match[2]) != int(match[1]):
            raise ValueError("checksum mismatch")
        return Failure(**json.loads(match[2]))
    except (ValueError, TypeError) as error:
        raise DamagedError(f"not a staged failure: {error}") from error


def _checksum(vectors: dict[str, np.ndarray], metadata: dict[str, str]) -> str:
    crc = 0
    for name in sorted(vectors):
        crc = zlib.crc32(f"{name} {vectors[name].dtype.name} {vectors[name].shape}".encode(), crc)
        crc = zlib.crc32(np.ascontiguousarray(vectors[name]).view(np.uint8).data, crc)
    return str(zlib.crc32(json.dumps([metadata["answer"], metadata["facts"]]).encode(), crc))
