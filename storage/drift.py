"""The drift certificate: how far a part's batched results are from exact ones, in units of the part's own spread.

For one question of a slice the worker also computes the exact result (batch 1, nothing shared), and that again under another
attention kernel. They travel in the staged sample under names of their own; packing turns them into one attribute, or into
the reason why there is none.
A cosine would not do: a few massive dimensions hide everything else in it. So errors are divided, dimension by dimension,
by the standard deviation over the first samples of the part, in the order of their keys.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from storage.fields import FIELDS, VISION_ONLY, split_layer
from storage.sample import ENGINE_SECONDS, Sample

_SPREAD_SAMPLES = 64  # that the spread is taken over: enough for a scale, and 3% of what packing 1000 samples costs
_EXACT, _KERNEL, _ANSWER = "exact/", "exact_other_kernel/", "exact_answer"
_OTHER_ANSWER = "exact_other_kernel_answer"
_SECONDS = "exact_seconds"
_ABSENT, _FAILED = "certificate_absent", "certificate_failed"
_UNKNOWN = "no question of this part was computed for it, or the worker ended meanwhile"


def with_certificate(sample: Sample, exact: Sample, other_kernel: Sample) -> Sample:
    """Return a sample that carries its exact result, and that result under another attention kernel."""
    carried = {_EXACT + name: vector for name, vector in exact.vectors.items()}
    carried |= {_KERNEL + name: vector for name, vector in other_kernel.vectors.items()}
    facts = {**sample.facts, _ANSWER: exact.answer, _OTHER_ANSWER: other_kernel.answer}
    took = [found.facts.get(ENGINE_SECONDS) for found in (exact, other_kernel)]
    if None not in took:
        facts[_SECONDS] = sum(took)
    return replace(sample, vectors=sample.vectors | carried, facts=facts)


def without_certificate(sample: Sample, reason: str, *, tried: bool = False) -> Sample:
    """Return a sample that carries why it has no exact result; `tried`: it was to have one."""
    return replace(sample, facts={**sample.facts, _FAILED if tried else _ABSENT: reason})


@dataclass(frozen=True, slots=True)
class _Certified:
    """The sample that carried exact results."""

    sample: Sample
    exact: dict[str, npt.NDArray[Any]]
    other_kernel: dict[str, npt.NDArray[Any]]
    exact_answer: str
    other_answer: str | None
    seconds: float | None  # that the engine took for them, where that was measured


class _Moments:
    """Mean and spread of a field, summed up sample by sample."""

    def __init__(self, width: int) -> None:
        self._count = 0
        self._sum, self._squares = np.zeros(width), np.zeros(width)

    def add(self, vector: npt.NDArray[Any]) -> None:
        with np.errstate(invalid="ignore"):  # a vector that is not finite is for `storage verify` to report
            values = np.atleast_2d(vector.astype(np.float64))  # of answers, a row for each token
        self._count += len(values)
        self._sum += values.sum(axis=0)
        self._squares += (values * values).sum(axis=0)

    def spread(self) -> npt.NDArray[np.float64]:
        """Return the standard deviation of each dimension."""
        variance: npt.NDArray[np.float64] = self._squares / self._count - (self._sum / self._count) ** 2
        return np.sqrt(np.maximum(variance, 0.0))


class DriftMeter:
    """Collects the spread of a part's samples and the certified one among them, while they pass by."""

    def __init__(self) -> None:
        self._count = 0
        self._moments: dict[tuple[str, int], _Moments] = {}
        self._certified: _Certified | None = None
        self._reasons: dict[str, str] = {}

    def take(self, sample: Sample) -> Sample:
        """Count a sample in; return it as it belongs into the part, without what it carried."""
        vectors = {name: v for name, v in sample.vectors.items() if not name.startswith((_EXACT, _KERNEL))}
        self._count += 1
        if self._count <= _SPREAD_SAMPLES:
            for name, vector in vectors.items():
                width = vector.shape[-1]
                self._moments.setdefault((name, width), _Moments(width)).add(vector)
        if not sample.facts.keys() & {_ANSWER, _ABSENT, _FAILED}:
            return sample
        facts = dict(sample.facts)
        self._reasons |= {name: str(facts.pop(name)) for name in (_ABSENT, _FAILED) if name in facts}
        if _ANSWER not in facts:
            return Sample(vectors, sample.answer, facts)
        answer, seconds, other = (facts.pop(name, None) for name in (_ANSWER, _SECONDS, _OTHER_ANSWER))
        bare = Sample(vectors, sample.answer, facts)
        self._certified = _Certified(bare, _carried(sample, _EXACT), _carried(sample, _KERNEL), answer, other, seconds)
        return bare

    def certificate(self) -> dict[str, Any] | None:
        """Return the drift per field: root mean square and maximum of the z-scored error, beside the noise floor.

        None where no sample was certified. A field that does not vary within the part has no spread to measure by: None.
        """
        certified = self._certified
        if certified is None:
            return None
        agree = certified.sample.answer == certified.exact_answer
        fields = {}
        for name, vector in certified.sample.vectors.items():
            moments = self._moments.get((name, vector.shape[-1]))
            spread = np.zeros(vector.shape[-1]) if moments is None else moments.spread()
            drift, floor = (_z_score(found, certified.exact[name], spread) for found in (vector, certified.other_kernel[name]))
            if FIELDS.get(split_layer(name)[0], VISION_ONLY).of_answer:  # of another answer it is no drift
                drift = drift if agree else None
                floor = floor if certified.other_answer == certified.exact_answer else None
            fields[name] = {"drift": drift, "noise_floor": floor}
        took = {} if certified.seconds is None else {"seconds": round(certified.seconds, 3)}
        return {"answers_agree": agree, "fields": fields, **took}

    def absence(self) -> str | None:
        """Return why there is no certificate; None where there is one, or no sample."""
        if self._certified is not None or self._count == 0:
            return None
        return self._reasons.get(_FAILED) or self._reasons.get(_ABSENT) or _UNKNOWN


def _z_score(vector: npt.NDArray[Any], exact: npt.NDArray[Any], spread: npt.NDArray[np.float64]) -> dict[str, float] | None:
    varying = spread > 0
    if not varying.any() or vector.shape != exact.shape:  # of answers of other lengths
        return None
    errors = np.abs(vector.astype(np.float64) - exact.astype(np.float64))[..., varying] / spread[varying]
    return {"rms": float(np.sqrt((errors**2).mean())), "max": float(errors.max())}


def _carried(sample: Sample, prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {name.removeprefix(prefix): v for name, v in sample.vectors.items() if name.startswith(prefix)}


class _Error(BaseModel):
    model_config = ConfigDict(extra="allow")
    rms: float
    max: float


class _Field(BaseModel):
    model_config = ConfigDict(extra="allow")
    drift: _Error | None = None
    noise_floor: _Error | None = None


class _Certificate(BaseModel):
    model_config = ConfigDict(extra="allow")
    answers_agree: bool
    fields: dict[str, _Field]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None  # of a part of an earlier version unknown


def decode_certificate(text: str) -> dict[str, Any]:
    """Return the certificate that a part keeps as JSON. Raises ValidationError."""
    return _Certificate.model_validate_json(text).model_dump()
