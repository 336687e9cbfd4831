"""What generation_config.json does to greedy answers: the scores' processors, taken from `generate` itself.

`generate(custom_generate=…)` prepares everything and hands it to a callable in place of the decoding loop. A checkpoint
that asks for no more than a repetition penalty, as the released ones do, is served by one mask for the whole batch; others
get, row by row, the very processors that `generate` would use, since most of them count the row's own tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.errors import EngineStartError, in_a_line

_WITHOUT_CHANGE = {"greedy_search", "assisted_generation"}  # the second is the first, faster
_PENALTY = "RepetitionPenaltyLogitsProcessor"
_UNSERVED = {"UnbatchedClassifierFreeGuidanceLogitsProcessor"}  # it runs a second forward beside the prompt's
_ENDS = {"MaxLengthCriteria", "EosTokenCriteria"}


class Rules(Protocol):
    """Which token comes next, for each sequence of a batch."""

    def scores(self, logits: Tensor) -> Tensor:
        """Return what the next tokens are chosen by, (B, V), of the model's own float32 logits."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep the given sequences."""
        ...

    def append(self, tokens: Tensor) -> None:
        """Note the tokens that were chosen, (B,)."""
        ...


class Penalty:
    """The repetition penalty alone. Source: transformers' RepetitionPenaltyLogitsProcessor."""

    def __init__(self, prompts: Sequence[Sequence[int]], vocabulary: int, penalty: float, device: torch.device) -> None:
        seen = torch.zeros(len(prompts), vocabulary, dtype=torch.bool)
        for row, ids in zip(seen, prompts):
            row[[token for token in set(ids) if token < vocabulary]] = True  # an image's may have no logit
        self._seen, self._penalty = seen.to(device), penalty

    def scores(self, logits: Tensor) -> Tensor:
        """Return the logits, those of seen tokens lowered."""
        penalty = self._penalty
        return torch.where(self._seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)

    def select(self, rows: Tensor) -> None:
        """Keep the given sequences."""
        self._seen = self._seen[rows]

    def append(self, tokens: Tensor) -> None:
        """Count tokens as seen."""
        self._seen.scatter_(1, tokens[:, None], True)


class Processors:
    """Any processors of `generate`, row by row."""

    def __init__(self, prompts: Sequence[Sequence[int]], processors: Sequence[Any], device: torch.device) -> None:
        self._ids = [torch.tensor([list(ids)], device=device) for ids in prompts]  # each (1, L)
        self._processors = list(processors)

    def scores(self, logits: Tensor) -> Tensor:
        """Return the processed logits."""
        rows = zip(self._processors, self._ids, logits.clone())
        return torch.cat([process(ids, row[None]) for process, ids, row in rows])

    def select(self, rows: Tensor) -> None:
        """Keep the given sequences."""
        kept = rows.tolist()
        self._ids, self._processors = [self._ids[i] for i in kept], [self._processors[i] for i in kept]

    def append(self, tokens: Tensor) -> None:
        """Lengthen the sequences."""
        self._ids = [torch.cat([ids, token.view(1, 1)], dim=1) for ids, token in zip(self._ids, tokens)]


@dataclass(frozen=True, slots=True)
class _Prepared:
    """What `generate` would decode with."""

    processors: Any
    criteria: Any
    mode: str


class Generation:
    """A checkpoint's way to answer. Raises EngineStartError for one that greedy decoding here would not equal."""

    def __init__(self, model: Any) -> None:
        config = model.generation_config
        if config.eos_token_id is None:
            raise EngineStartError(
                "it names no end token, so that no answer would end: generation_config.json needs the eos_token_id of "
                "the base checkpoint's"
            )
        ends = config.eos_token_id
        self.ends: list[int] = list(ends) if isinstance(ends, (list, tuple)) else [ends]
        self.penalty = float(config.repetition_penalty or 1.0)
        self._model = model
        try:
            prepared = _prepare(model, [0, 1], 2, None)
        except Exception as error:
            # Whatever transformers raises for a value that it does not take.
            raise EngineStartError(f"generate() refuses its generation_config.json: {in_a_line(error)}") from error
        _refuse_other_decoding(prepared)
        self.plain = {type(p).__name__ for p in prepared.processors} <= {_PENALTY}

    def rules(
        self, prompts: Sequence[Sequence[int]], vocabulary: int, penalty: float | None, max_new_tokens: int, device: Any
    ) -> Rules:
        """Return how the next tokens of a batch are chosen; `penalty` None is the checkpoint's own."""
        if self.plain:
            return Penalty(prompts, vocabulary, self.penalty if penalty is None else penalty, device)
        prepared = [_prepare(self._model, ids, max_new_tokens, penalty).processors for ids in prompts]
        return Processors(prompts, prepared, device)


def _prepare(model: Any, prompt: Sequence[int], max_new_tokens: int, penalty: float | None) -> _Prepared:
    """Have `generate` prepare a greedy answer to a prompt, without a forward."""
    found: list[_Prepared] = []

    def take(_: Any, input_ids: Tensor, *, logits_processor: Any, stopping_criteria: Any, **more: Any) -> Tensor:
        mode = more["generation_config"].get_generation_mode()
        found.append(_Prepared(logits_processor, stopping_criteria, str(getattr(mode, "value", mode))))
        return input_ids

    ids = torch.tensor([list(prompt)], device=model.get_input_embeddings().weight.device)
    asked = {} if penalty is None else {"repetition_penalty": penalty}
    positions = torch.arange(len(prompt), device=ids.device).expand(3, 1, -1)  # given, so that no image is looked for
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lengths that exclude each other, for every question
        model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=positions, custom_generate=take,
            do_sample=False, max_new_tokens=max_new_tokens, **asked,
        )  # fmt: skip
    return found[0]


def _refuse_other_decoding(prepared: _Prepared) -> None:
    if prepared.mode not in _WITHOUT_CHANGE:
        raise EngineStartError(
            f"its generation_config.json asks for {prepared.mode}, and answers here are greedy: remove num_beams, "
            "penalty_alpha, dola_layers or what else asks for it"
        )
    for found, served in ((prepared.processors, None), (prepared.criteria, _ENDS)):
        for name in (type(one).__name__ for one in found):
            if name in _UNSERVED or (served is not None and name not in served):
                raise EngineStartError(
                    f"its generation_config.json asks for what cannot be done here ({name}): remove that setting"
                )
