"""What a checkpoint must not be: refused by name when it is loaded, where transformers says nothing or warns."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch

from workers.errors import EngineStartError

logger = logging.getLogger(__name__)
_TOKENS = {"<|image_pad|>": "image_token_id", "<|vision_start|>": "vision_start_token_id"}
_PADDING = 64  # released vocabularies are rounded up to a multiple of it, and more: 151,665 tokens have 152,064 rows
# Weights that change what the others do: of adapters that were not merged, of quantisation whose settings were lost.
_TELLING = ("lora_", "base_layer", "modules_to_save", "weight_scale", "scale_inv", "qweight", "qzeros", "absmax")


def refuse_unmerged(unexpected: Iterable[str]) -> None:
    """Raise EngineStartError where the files have weights that transformers leaves out and that change the others."""
    if found := sorted(name for name in unexpected if any(part in name for part in _TELLING)):
        raise EngineStartError(
            f"its weights have {found[0]} and {len(found) - 1} more of the kind, which would be left out: they are of an "
            "adapter that was not merged, or of quantisation that config.json does not mention. Merge them and save again"
        )


def refuse_foreign_tokenizer(config: Any, tokenizer: Any, rows: int) -> None:
    """Raise EngineStartError where the tokenizer is not the one that the embeddings, `rows` tokens, were trained with.

    Where it may be another one, that is a line in the log.
    """
    restore = "restore tokenizer.json (or vocab.json, merges.txt, added_tokens.json) and tokenizer_config.json"
    vocabulary = tokenizer.get_vocab()
    for token, setting in _TOKENS.items() if config.model_type == "qwen2_5_vl" else ():
        wanted, found = getattr(config, setting, None), vocabulary.get(token)
        if found is None or (wanted is not None and wanted != found):
            there = "is not known to its tokenizer" if found is None else f"is token {found} of its tokenizer"
            raise EngineStartError(f"{token} {there}, and token {wanted} by config.json ({setting}): {restore}")
    last = max(vocabulary.values())
    if last >= rows:
        raise EngineStartError(f"its tokenizer has tokens up to {last}, its embeddings only {rows} rows: {restore}")
    if rows > last + 1 and rows % _PADDING:
        # Also of a sound checkpoint, whose embeddings were given rows to spare.
        logger.warning(
            "its embeddings have %d rows, and its tokenizer tokens up to %d: if they were resized for tokens that the "
            "tokenizer lacks by now, %s",
            rows,
            last,
            restore,
        )


def refuse_no_end(ends: Iterable[int], tokenizer: Any) -> None:
    """Raise EngineStartError where no end token is one of the tokenizer's."""
    vocabulary = set(tokenizer.get_vocab().values())
    if not vocabulary.intersection(ends):
        raise EngineStartError(
            f"no answer would end: its end token (eos_token_id {list(ends)} in generation_config.json) is none of its "
            "tokenizer's"
        )


def refuse_unfinite(model: Any) -> None:
    """Raise EngineStartError for weights that are NaN or infinite: every vector behind them would be."""
    bad = []
    for name, weight in model.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and weight.numel():
            ends = torch.stack(weight.detach().aminmax()).tolist()  # NaN wins both; one pass, nothing is allocated
            if not all(map(math.isfinite, ends)):
                bad.append(name)
    if bad:
        others = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise EngineStartError(
            f"its weights {bad[0]}{others} have values that are not finite: the files are damaged, or training diverged. "
            "Download them again, or take another checkpoint"
        )
