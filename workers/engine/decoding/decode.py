"""Greedy decoding of a batch: tokens by the checkpoint's rules, finished rows dropped, probabilities kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from workers.engine.cache import Batch
from workers.engine.decoding.answer_states import AnswerStates
from workers.engine.decoding.generation import Rules

_DROP_SHARE = 0.125  # of the batch: dropping copies the cache, so finished rows leave together


@dataclass(slots=True)
class Answer:
    """A generated answer. Log-probabilities and the first token's entropy are the model's, before any rule, in nats."""

    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    entropy: float | None = None
    finish_reason: str = "none"
    vectors: dict[str, Tensor] = field(default_factory=dict)  # of its own tokens, where they are kept

    @property
    def facts(self) -> dict[str, Any]:
        """What is kept beside the text."""
        if self.entropy is None:
            return {"finish_reason": self.finish_reason}
        return {
            "finish_reason": self.finish_reason,
            "num_answer_tokens": len(self.ids),
            "answer_token_ids": self.ids,
            "answer_token_logprobs": self.log_probabilities,
            "first_token_entropy": self.entropy,
        }


def decode(
    batch: Batch,
    last: Tensor,
    *,
    rules: Rules,
    head: Callable[[Tensor], Tensor],
    forward: Callable[[Batch, Tensor], tuple[Tensor, Sequence[Tensor]]],
    eos: Sequence[int],
    max_new_tokens: int,
    keep: AnswerStates | None = None,
) -> list[Answer]:
    """Continue every prompt; `last` holds the last prompt tokens' final states, (B, D).

    `forward` runs one token per sequence, (B,), and extends the batch; it returns the final states, (B, D), and those of the
    layers that `keep` takes. The tokens are those of `generate(do_sample=False)`, by the rules that it has from the checkpoint.
    """
    answers = [Answer(finish_reason="length") for _ in last]
    ends = torch.tensor(list(eos), device=last.device)
    alive = list(range(len(answers)))  # sequences in the batch
    running = set(alive)  # of these, the ones that have not ended
    for step in range(max_new_tokens):
        logits = head(last).to(last.device).float()  # (B, V); of a model on several GPUs, the head may be on another
        distribution = logits.log_softmax(-1)
        tokens = rules.scores(logits).argmax(-1)
        taken = distribution.gather(1, tokens[:, None])[:, 0]
        entropies = torch.special.entr(distribution.exp()).sum(-1).tolist() if step == 0 else []
        for row, entropy in zip(alive, entropies):
            answers[row].entropy = entropy
        own, fed = set(), set()  # sequences whose last token is the answer's own; whose last token is run for its states
        for row, token, log_probability, end in zip(alive, tokens.tolist(), taken.tolist(), torch.isin(tokens, ends).tolist()):
            if row in running:
                if keep is not None and (not end or step == 0):
                    own.add(row)
                if keep is not None and (row in own or keep.every):
                    fed.add(row)
                answers[row].ids.append(token)
                answers[row].log_probabilities.append(log_probability)
                if end:
                    answers[row].finish_reason = "eos"
                    running.discard(row)
        if step + 1 == max_new_tokens:
            running = set()
        if not (wanted := running | fed):
            break
        if len(alive) - len(wanted) >= max(1, _DROP_SHARE * len(alive)):
            chosen = torch.tensor([i for i, row in enumerate(alive) if row in wanted], device=last.device)
            batch.select(chosen)
            rules.select(chosen)
            tokens = tokens[chosen]
            alive = [row for row in alive if row in wanted]
        rules.append(tokens)
        last, states = forward(batch, tokens)
        if keep is not None:
            masks = ([row in its for row in alive] for its in (own, fed))
            keep.add(*(torch.tensor(alive, device=last.device), states), *(torch.tensor(m, device=last.device) for m in masks))
        if not running:
            break
    return answers
