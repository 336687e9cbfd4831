"""The drift certificate: how far a part's batched results are from exact ones, in units of the part's own spread.

For the first question of a slice the worker also computes the exact result (batch 1, nothing shared), and that again under
another attention kernel. They travel in the staged sample under names of their own; packing turns them into one attribute.
A cosine would not do: a few massive dimensions hide everything else in it. So errors are divided, dimension by dimension,
by the standard deviation over the part's samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from storage.sample import Sample

_EXACT, _KERNEL, _ANSWER = "exact/", "exact_other_kernel/", "exact_answer"


def with_certificate(sample: Sample, exact: Sample, other_kernel: Sample) -> Sample:
    """Return a sample that carries its exact result, and that result under another attention kernel."""
    carried = {_EXACT + name: vector for name, vector in exact.vectors.items()}
    carried |= {_KERNEL + name: vector for name, vector in other_kernel.vectors.items()}
    return replace(sample, vectors=sample.vectors | carried, facts={**sample.facts, _ANSWER: exact.answer})


@dataclass(frozen=True, slots=True)
class _Certified:
    """The sample that carried exact results."""

    sample: Sample
    exact: dict[str, npt.NDArray[Any]]
    other_kernel: dict[str, npt.NDArray[Any]]
    exact_answer: str


class DriftMeter:
    """Collects the spread of a part's samples and the certified one among them, while they pass by."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: dict[str, npt.NDArray[np.float64]] = {}
        self._squares: dict[str, npt.NDArray[np.float64]] = {}
        self._certified: _Certified | None = None

    def take(self, sample: Sample) -> Sample:
        """Count a sample in; return it as it belongs into the part, without what it carried."""
        vectors = {name: v for name, v in sample.vectors.items() if not name.startswith((_EXACT, _KERNEL))}
        self._count += 1
        for name, vector in vectors.items():
            values = vector.astype(np.float64)
            if name not in self._sums:
                self._sums[name], self._squares[name] = np.zeros_like(values), np.zeros_like(values)
            self._sums[name] += values
            self._squares[name] += values * values
        if _ANSWER not in sample.facts:
            return sample
        facts = dict(sample.facts)
        answer = facts.pop(_ANSWER)
        bare = Sample(vectors, sample.answer, facts)
        self._certified = _Certified(bare, _carried(sample, _EXACT), _carried(sample, _KERNEL), answer)
        return bare

    def certificate(self) -> dict[str, Any] | None:
        """Return the drift per field: root mean square and maximum of the z-scored error, beside the noise floor.

        None where no sample was certified. A field that does not vary within the part has no spread to measure by: None.
        """
        certified = self._certified
        if certified is None:
            return None
        fields = {}
        for name, vector in certified.sample.vectors.items():
            mean = self._sums[name] / self._count
            spread = np.sqrt(np.maximum(self._squares[name] / self._count - mean * mean, 0.0))
            fields[name] = {
                "drift": _z_score(vector, certified.exact[name], spread),
                "noise_floor": _z_score(certified.other_kernel[name], certified.exact[name], spread),
            }
        return {"answers_agree": certified.sample.answer == certified.exact_answer, "fields": fields}


def _z_score(
    vector: npt.NDArray[Any], exact: npt.NDArray[Any], spread: npt.NDArray[np.float64]
) -> dict[str, float] | None:
    varying = spread > 0
    if not varying.any():
        return None
    errors = np.abs(vector.astype(np.float64) - exact.astype(np.float64))[varying] / spread[varying]
    return {"rms": float(np.sqrt((errors**2).mean())), "max": float(errors.max())}


def _carried(sample: Sample, prefix: str) -> dict[str, npt.NDArray[Any]]:
    return {name.removeprefix(prefix): v for name, v in sample.vectors.items() if name.startswith(prefix)}
