"""The states of an answer's own tokens, while they pass through the decoder: of its first, of its last, their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from storage.fields import answer_field, at_layer


class AnswerStates:
    """Of some answers, at some layers. In float32: a mean is more than its terms have room for.

    The end token is none of the answer's; of an answer that is nothing else, it stands for the whole.
    """

    def __init__(self, kinds: Sequence[str], layers: Sequence[int], number: int, width: int, device: torch.device) -> None:
        self.kinds, self.layers = tuple(kinds), tuple(layers)
        self._first, self._last, self._total = (torch.zeros(number, len(layers), width, device=device) for _ in range(3))
        self._count = torch.zeros(number, dtype=torch.long, device=device)

    def clear(self, rows: Tensor) -> None:
        """Begin with some answers (n,)."""
        self._total[rows] = 0
        self._count[rows] = 0

    def add(self, rows: Tensor, states: Sequence[Tensor], kept: Tensor) -> None:
        """Take the states (n, D) of each layer's tokens of some answers (n,), where `kept` (n,). Reads nothing."""
        stacked = torch.stack([one.to(self._total.device) for one in states], dim=1).float()  # (n, layers, D)
        chosen, count = kept[:, None, None], self._count[rows]
        self._first[rows] = torch.where(chosen & (count == 0)[:, None, None], stacked, self._first[rows])
        self._last[rows] = torch.where(chosen, stacked, self._last[rows])
        self._total[rows] = self._total[rows] + torch.where(chosen, stacked, 0)
        self._count[rows] = count + kept

    def vectors(self, rows: Tensor, dtype: torch.dtype) -> list[dict[str, Tensor]]:
        """Return the vectors (D,) of some answers (n,) by the names that they have in a part."""
        mean = self._total[rows] / self._count[rows].clamp(min=1)[:, None, None]
        by_kind = {"first": self._first[rows], "last": self._last[rows], "mean": mean}
        names = [at_layer(answer_field(kind), layer) for kind in self.kinds for layer in self.layers]
        found = torch.cat([by_kind[kind] for kind in self.kinds], dim=1).to(dtype)  # (n, kinds x layers, D)
        return [dict(zip(names, states.unbind(0))) for states in found]
