"""Principal components of vectors, for figures: of standardised dimensions, or a few massive ones would be both components."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def principal_components(vectors: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], tuple[float, float]]:
    """Return [N, 2] coordinates along the first two principal components, and their shares of the variance.

    Each dimension counts by its own spread; one that does not vary, or is not finite somewhere, does not count. By the N x N
    Gram matrix, which is smaller than D x D.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # of what is not finite
        centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
        deviation = centred.std(axis=0)
    varying = np.isfinite(deviation) & (deviation > 0)
    standard = centred[:, varying] / deviation[varying]
    values, axes = np.linalg.eigh(standard @ standard.T)  # ascending
    values = np.maximum(values[::-1][:2], 0.0)
    points = axes[:, ::-1][:, :2] * np.sqrt(values)
    # Of standardised dimensions the squares sum up to their number.
    shares = [*(values / max(standard.size, 1)).tolist(), 0.0]
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1]))), (shares[0], shares[1])
