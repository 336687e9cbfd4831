"""The probes: from vectors to the probability that an answer is wrong. torch is imported by the MLP's functions alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from storage.probing.score import Bools, Floats, auroc
from storage.probing.split import Split

ProbeName = Literal["linear", "mlp"]
Vectors = npt.NDArray[np.float32]
# How strongly the linear probe is held back: chosen on the validation side, or the middle where there is none.
_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
_UNCHOSEN_STRENGTH = 1e-2

# The published probe and its training: https://github.com/alliedbrother/HALP_EACL
_LAYERS, _DROPOUT = (512, 256, 128), 0.3
_EPOCHS, _BATCH, _RATE = 50, 32, 1e-3


def fit(probe: ProbeName, vectors: Vectors, wrong: Bools, split: Split, *, seed: int) -> Floats:
    """Fit a probe on the training side; return each question's probability of a wrong answer."""
    return linear(vectors, wrong, split) if probe == "linear" else mlp(vectors, wrong, split, seed=seed)


def linear(vectors: Vectors, wrong: Bools, split: Split) -> Floats:
    """Fit a logistic regression on standardised vectors [N, D], its strength chosen on the validation side."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaled = StandardScaler().fit(vectors[split.train]).transform(vectors)
    best, found = -1.0, np.zeros(len(wrong))
    for strength in _STRENGTHS if len(split.validation) else (_UNCHOSEN_STRENGTH,):
        regression = LogisticRegression(C=strength, max_iter=1000).fit(scaled[split.train], wrong[split.train])
        scores: Floats = regression.predict_proba(scaled)[:, 1].astype(np.float64)
        quality = auroc(wrong[split.validation], scores[split.validation]) if len(split.validation) else 0.0
        if quality > best:
            best, found = quality, scores
    return found


def mlp(vectors: Vectors, wrong: Bools, split: Split, *, seed: int) -> Floats:
    """Train the published MLP as it was published, on vectors [N, D] as they are, but seeded; on a CPU in one thread.

    Sums in two threads come out otherwise, so that the seed alone would not do. And where others use the cores too, threads
    that wait for one another at each of a batch's small products take twelve times as long (load 7 on 2 cores, 2026-11-24).
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _trained(vectors, wrong, split, seed=seed)
    finally:
        torch.set_num_threads(threads)


def _trained(vectors: Vectors, wrong: Bools, split: Split, *, seed: int) -> Floats:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    network = _network(vectors.shape[1]).to(device)
    inputs = torch.from_numpy(vectors[split.train]).to(device)
    targets = torch.from_numpy(wrong[split.train].astype(np.float32)).to(device)
    loss_of, optimizer = torch.nn.BCELoss(), torch.optim.Adam(network.parameters(), lr=_RATE)
    order = torch.Generator().manual_seed(seed)
    for _ in range(_EPOCHS):
        for rows in torch.split(torch.randperm(len(inputs), generator=order).to(device), _BATCH):
            if len(rows) == 1:  # a batch's variance needs two
                continue
            optimizer.zero_grad()
            loss_of(network(inputs[rows]).squeeze(1), targets[rows]).backward()
            optimizer.step()
    network.eval()
    with torch.inference_mode():
        pieces = [network(piece.to(device)).squeeze(1).cpu() for piece in torch.split(torch.from_numpy(vectors), 4096)]
    scores: Floats = torch.cat(pieces).numpy().astype(np.float64)
    return scores


def _network(width: int) -> Any:
    from torch import nn

    layers: list[nn.Module] = []
    for size in _LAYERS:
        layers += [nn.Linear(width, size), nn.ReLU(), nn.BatchNorm1d(size), nn.Dropout(_DROPOUT)]
        width = size
    return nn.Sequential(*layers, nn.Linear(width, 1), nn.Sigmoid())
