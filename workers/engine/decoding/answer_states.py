"""States of an answer's own tokens, while they pass through the decoder: of its first, its last, their mean, all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from storage.fields import EVERY, answer_field, at_layer


class AnswerStates:
    """Of some answers of at most `longest` tokens, at some layers. In float32: a mean is more than its terms have room for.

    Of the first, the last and the mean, the end token is none of the answer's; of an answer that is nothing else, it stands for
    the whole. All of them are all that were generated, the end token too.
    """

    def __init__(
        self, kinds: Sequence[str], layers: Sequence[int], number: int, longest: int, width: int, dtype: torch.dtype,
        device: torch.device,
    ) -> None:  # fmt: skip
        self.kinds, self.layers, self._dtype = tuple(kinds), tuple(layers), dtype
        self._first, self._last, self._total = (torch.zeros(number, len(layers), width, device=device) for _ in range(3))
        self._count = torch.zeros(number, dtype=torch.long, device=device)
        self._fed = torch.zeros(number, dtype=torch.long, device=device)
        self.every = EVERY in self.kinds  # states of end tokens are wanted too
        self._all = torch.zeros(number, longest if self.every else 0, len(layers), width, dtype=dtype, device=device)

    def clear(self, rows: Tensor) -> None:
        """Begin with some answers (n,)."""
        self._total[rows] = 0
        self._count[rows] = 0
        self._fed[rows] = 0

    def add(self, rows: Tensor, states: Sequence[Tensor], own: Tensor, fed: Tensor) -> None:
        """Take the states (n, D) of each layer's tokens of some answers (n,). Reads nothing.

        own: where the token is the answer's own, (n,); fed: where it is one at all, and no padding.
        """
        stacked = torch.stack([one.to(self._total.device) for one in states], dim=1).float()  # (n, layers, D)
        chosen, count = own[:, None, None], self._count[rows]
        self._first[rows] = torch.where(chosen & (count == 0)[:, None, None], stacked, self._first[rows])
        self._last[rows] = torch.where(chosen, stacked, self._last[rows])
        self._total[rows] = self._total[rows] + torch.where(chosen, stacked, 0)
        self._count[rows] = count + own
        if self.every:
            number = self._fed[rows]
            place = number.clamp(max=self._all.shape[1] - 1)
            self._all[rows, place] = torch.where(fed[:, None, None], stacked.to(self._dtype), self._all[rows, place])
            self._fed[rows] = number + fed

    def vectors(self, rows: Tensor) -> list[dict[str, Tensor]]:
        """Return the vectors (D,) of some answers (n,), and of all tokens (T, D), by the names that they have in a part."""
        mean = self._total[rows] / self._count[rows].clamp(min=1)[:, None, None]
        by_kind = {"first": self._first[rows], "last": self._last[rows], "mean": mean}
        single = [kind for kind in self.kinds if kind in by_kind]
        found: list[dict[str, Tensor]] = [{} for _ in rows]
        if single:
            names = [at_layer(answer_field(kind), layer) for kind in single for layer in self.layers]
            joined = torch.cat([by_kind[kind] for kind in single], dim=1).to(self._dtype)  # (n, kinds x layers, D)
            found = [dict(zip(names, states.unbind(0))) for states in joined]
        if self.every:
            names = [at_layer(answer_field(EVERY), layer) for layer in self.layers]
            for vectors, row, number in zip(found, rows.tolist(), self._fed[rows].tolist(), strict=True):
                vectors.update(zip(names, self._all[row, :number].clone().unbind(1)))
        return found
