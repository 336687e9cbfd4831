"""What decoding knows of each slot, on the device: where it stands, and the answer so far."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from workers.engine.models.base import Family


@dataclass(slots=True)
class SlotState:
    """S slots; answers of at most T tokens."""

    used: Tensor  # (S,) int32, tokens
    position: Tensor  # (S,) text position of the next token
    last: Tensor  # (S, D) final state of the last token
    seen: Tensor  # (S, V) which tokens the penalty is on
    chosen: Tensor  # (S,) the answer's last token
    alive: Tensor  # (S,)
    count: Tensor  # (S,) tokens of the answer
    ended: Tensor  # (S,) by an end token
    own: Tensor  # (S,) whether the last token is the answer's own, and no end token; of an answer of one, that
    fed: Tensor  # (S,) whether there is a last token that was not there before
    tokens: Tensor  # (S, T)
    log_probabilities: Tensor  # (S, T)
    entropy: Tensor  # (S,) of the first token
    penalty: Tensor
    limit: Tensor  # (S,) tokens of the answer at most

    @classmethod
    def empty(cls, family: Family, device: torch.device, number: int, answer: int) -> SlotState:
        """Return the state of empty slots."""

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        words = family.model.get_output_embeddings().out_features
        return cls(
            used=zeros(number, dtype=torch.int32),
            position=zeros(number),
            last=zeros(number, family.text.hidden_size, dtype=family.model.dtype),
            seen=zeros(number, words, dtype=torch.bool),
            chosen=zeros(number),
            alive=zeros(number, dtype=torch.bool),
            count=zeros(number),
            ended=zeros(number, dtype=torch.bool),
            own=zeros(number, dtype=torch.bool),
            fed=zeros(number, dtype=torch.bool),
            tokens=zeros(number, answer),
            log_probabilities=zeros(number, answer, dtype=torch.float32),
            entropy=zeros(number, dtype=torch.float32),
            penalty=torch.ones((), device=device),
            limit=zeros(number),
        )
