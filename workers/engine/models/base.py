"""What differs between families of models in the forward pass. The defaults serve most; a family overrides what it must.

A family is asked for three things: what its processor makes of an image and a constant prompt, where in that prompt the image
ends, and what its text decoder needs to go on from there. Everything else is the model's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from storage.settings import LAST_BLOCK
from workers.engine.prompt import PromptParts, PromptStyle
from workers.errors import EngineStartError

_IMAGE_IDS = ("image_token_id", "image_token_index", "image_patch_id")  # of a config, or of its vision_config
_TYPES = ("token_type_ids", "mm_token_type_ids")  # 1 where a token is an image's
_TOWERS = ("visual", "vision_tower", "vision_model")
_BY_LENGTH = {"dynamic", "longrope"}
Inputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Packed:
    """Prompts of several images behind one another in one row."""

    inputs: Inputs  # with position_ids, (1, N) or (axes, 1, N), and without an attention mask
    lengths: list[int]
    next_positions: list[int]  # of the text that follows each


class Family:
    """A loaded model as the engine sees it.

    together: whether images of any sizes can be prefilled together: what the tower puts out is then taken apart by image.
    share: what the questions of an image share: `prefix`, its part of the prompt, run once; or `nothing`, where image tokens
        see the question, and prompts are computed whole.
    """

    AUTO: Any = AutoModelForImageTextToText
    encoder_definition = LAST_BLOCK
    share = "prefix"
    together = False  # several images can be run at once
    marks_images = True  # token_type_ids say which tokens are an image's

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor
        self.core = model.model
        self.decoder = self._decoder()
        self.layers = self.decoder.layers
        self.text = model.config.get_text_config()
        self.image_id = image_id(model.config)
        self.kinds: list[str] = list(getattr(self.text, "layer_types", None) or ())
        self.recurrent = "linear_attention" in self.kinds
        # Of rotary scaling that differs beyond a length: a prefix of it and the whole prompt may be on two sides.
        named = (getattr(self.text, name, None) for name in ("rope_parameters", "rope_scaling"))
        scaling: dict[str, Any] = next(filter(None, named), {})
        by_length = scaling.get("rope_type", scaling.get("type")) in _BY_LENGTH
        name = "original_max_position_embeddings"
        original = scaling.get(name) or getattr(self.text, name, None) or self.text.max_position_embeddings
        self.scaled_from: int | None = original if by_length else None
        self._window = getattr(self.text, "sliding_window", None)
        self._finish: Callable[[Tensor], Tensor] = lambda logits: logits
        self._added = set(processor.tokenizer.added_tokens_decoder)

    @property
    def factor(self) -> int | None:
        """Where images come resized, to multiples of it; None: the processor sizes them."""
        return None

    def _decoder(self) -> Any:
        return decoder_of(self.model)

    def inputs(self, text: str, *rows: Sequence[np.ndarray]) -> Inputs:
        """Return what the processor makes of a rendered prompt and a row of images, uint8 [H, W, 3], or of several as long.

        On the host, pixels perhaps not: what is asked of it here is not asked of a GPU.
        """
        several = len(rows[0]) > 1
        images = [list(row) for row in rows] if several else [image for row in rows for image in row]
        given = {"images": images} if images else {}
        made = self.processor(text=[text] * len(rows), **given, **self._processing(len(rows)))
        return {name: values for name, values in made.items() if name != "labels"}

    def _processing(self, rows: int) -> dict[str, Any]:
        return {"return_tensors": "pt"} | ({"padding": True, "padding_side": "left"} if rows > 1 else {})

    def on_device(self, inputs: Inputs) -> Inputs:
        """Return inputs where the embeddings are, in the model's dtype."""
        device = self.model.get_input_embeddings().weight.device
        return {k: v.to(device, self.model.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}

    @contextmanager
    def entering(self, inputs: Inputs) -> Iterator[Inputs]:
        """Yield what the model's forward takes of inputs on the host; it runs while the context lasts."""
        yield self.on_device(inputs)

    def packed(self, inputs: Inputs) -> Packed:
        """Put the rows of several images' inputs behind one another in one; where `together` says that it can be done."""
        raise NotImplementedError

    def cut(self, inputs: Inputs) -> int:
        """Return where an image's part of a prompt ends, closing tokens included."""
        ids = inputs["input_ids"][0]
        special = ids == self.image_id
        for name in _TYPES if self.marks_images else ():
            if name in inputs:
                special = special | (inputs[name][0] == 1)
        end = int(special.nonzero()[-1]) + 1
        while end < len(ids) and int(ids[end]) in self._added:
            end += 1
        return end

    def up_to(self, inputs: Inputs, end: int) -> Inputs:
        """Return the inputs of a prompt's first `end` tokens."""
        shape = inputs["input_ids"].shape
        return {k: v[:, :end] if by_token(v, shape) else v for k, v in inputs.items()}

    def extended(self, inputs: Inputs, suffix: Sequence[int]) -> Inputs:
        """Return the inputs of a prompt that goes on with text, whose tokens see what the last one sees."""
        shape, found = inputs["input_ids"].shape, {}
        for name, values in inputs.items():
            if not by_token(values, shape):
                found[name] = values
                continue
            if name == "input_ids":
                more = torch.tensor([list(suffix)], device=values.device)
            elif name in _TYPES:
                more = values.new_zeros(1, len(suffix))
            else:
                more = values[:, -1:].expand(-1, len(suffix), *values.shape[2:])
            found[name] = torch.cat([values, more], dim=1)
        return found

    def prompt(self, style: PromptStyle) -> PromptParts | None:
        """Return the prompt of a style, by the template alone; None: by what the processor makes of it."""
        return None

    def step(self, extra: Tensor | None, width: int) -> dict[str, Any]:
        """Return what else the decoder takes for `width` text tokens; `extra` has what `kept_of` gave of each image, (B, …)."""
        return {}

    def kept_of(self, inputs: Inputs) -> Tensor | None:
        """Return what of a prefix's inputs `step` needs, with one row; None where it needs nothing."""
        return None

    def masks(self, valid: Tensor, width: int) -> Any:
        """Return the attention masks of the last `width` columns of `valid`, (B, K), 0 on padding; booleans (B, 1, width, K).

        By the order among real tokens: in a window, padding between an image and a question does not count.
        """
        real, order = valid.bool(), valid.cumsum(1) - 1
        columns = torch.arange(valid.shape[1], device=valid.device)
        full = real[:, None, :] & (columns[None, None, :] <= columns[-width:][None, :, None])
        padding = ~real[:, -width:, None]  # sees all: a row that sees nothing would be NaN, and stay in the cache
        masks = {"full_attention": (full | padding)[:, None]}
        if "sliding_attention" in self.kinds and self._window:
            near = order[:, -width:, None] - order[:, None, :] < self._window
            masks["sliding_attention"] = ((full & near) | padding)[:, None]
        if self.recurrent:
            masks["linear_attention"] = valid[:, -width:]
        if self.text._attn_implementation == "eager":  # which adds what it gets
            masks = {kind: self._added_to_scores(mask) for kind, mask in masks.items()}
        return masks if len(set(self.kinds)) > 1 else masks.get(self.kinds[0] if self.kinds else "", masks["full_attention"])

    def _added_to_scores(self, mask: Tensor) -> Tensor:
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    def scores(self, states: Tensor) -> Tensor:
        """Return the model's logits (B, V) of final states (B, D)."""
        logits: Tensor = self.model.get_output_embeddings()(states).to(states.device)
        return self._finish(logits)

    def learn_scores(self, states: Tensor, logits: Tensor) -> None:
        """Find what the model does to its head's output, by the logits of some final states. Raises EngineStartError.

        A config may name a factor or a bound that its class leaves alone, as Aya Vision's does.
        """
        plain = self.model.get_output_embeddings()(states)
        # The nearest: of small logits, a bound changes next to nothing.
        errors = {finish: float((finish(plain) - logits).abs().max()) for finish in self._finishes()}
        self._finish = min(errors, key=errors.__getitem__)
        if not errors[self._finish] <= 1e-2 * float(logits.abs().max()):  # NaN too
            raise EngineStartError("its logits are not its head's output, nor what is known of other models: not served here")

    def _finishes(self) -> Iterator[Callable[[Tensor], Tensor]]:
        yield lambda logits: logits
        if scale := getattr(self.text, "logit_scale", None):  # Cohere
            yield lambda logits: logits * scale
        if scaling := getattr(self.text, "logits_scaling", None):  # Granite
            yield lambda logits: logits / scaling
        if cap := getattr(self.text, "final_logit_softcapping", None):  # Gemma 2
            yield lambda logits: torch.tanh(logits / cap) * cap

    @contextmanager
    def ending(self) -> Iterator[list[Tensor]]:
        """Collect the decoder's final states, (B, L, D), while the context lasts."""
        seen: list[Tensor] = []
        handle = self.decoder.register_forward_hook(lambda _module, _inputs, out: seen.append(out.last_hidden_state))
        try:
            yield seen
        finally:
            handle.remove()

    def tower(self) -> Any:
        """Return the module whose output is the vision tower's."""
        for name in _TOWERS:
            if hasattr(self.core, name):
                return last_block(getattr(self.core, name))
        raise EngineStartError(f"it is a {self.model.config.model_type} model, whose vision tower is not known here")

    def of_tower(self, out: Any) -> Tensor:
        """Return the states in what the tower's module puts out."""
        return out if isinstance(out, Tensor) else out.last_hidden_state

    def vision_modules(self) -> dict[int, Any]:
        """Return the modules whose outputs the vision fields are of: 0 the tower's, 1 the projector's, where it is needed."""
        projector = self.projector()
        return {0: self.tower()} | ({} if projector is None else {1: projector})

    @property
    def active_bytes(self) -> int:
        """Memory that a prefill takes for each token, at most: of its text decoder, or of its tower."""
        text = self.text
        experts = getattr(text, "num_experts_per_tok", 0) * getattr(text, "moe_intermediate_size", 0)
        hidden = max(experts, getattr(text, "intermediate_size", 0) or 0, text.hidden_size)
        return int(self.model.dtype.itemsize * active_values(self.layers[0], hidden))

    def speed_up(self) -> None:
        """Change modules so that they compute the same faster; plain forwards of transformers come before it."""

    def encoder_means(self, out: Tensor, inputs: Inputs, prompts: int) -> list[Tensor]:
        """Return the mean (E,) of the tower's output for the images of each prompt."""
        return [self.encoder_mean(out, inputs)]

    def merged_means(self, out: Tensor, inputs: Inputs, prompts: int) -> list[Tensor]:
        """Return the mean (D,) of the embeddings of the images of each prompt, which lie in one row, of (1, L, D)."""
        [where] = (inputs["input_ids"][0] == self.image_id).nonzero(as_tuple=True)
        of_prompts = torch.split(out[0, where.to(out.device)], self.tokens_of(inputs, prompts))
        return [states.float().mean(0).to(out.dtype) for states in of_prompts]

    def tokens_of(self, inputs: Inputs, prompts: int) -> list[int]:
        """Return how many image tokens each prompt has."""
        return [int((inputs["input_ids"] == self.image_id).sum())]

    def encoder_mean(self, out: Tensor, inputs: Inputs) -> Tensor:
        """Return the mean (E,) of the tower's output: over patches, tiles, images and, where it has one, the class token."""
        return out.flatten(0, -2).mean(0)

    def projector(self) -> Any:
        """Return the module that puts out what `merged_mean` takes; None: it takes what enters the decoder, (1, L, D)."""
        return None

    def published_vision(self, tower: Tensor, embedded: Tensor, inputs: Inputs) -> Tensor:
        """Return what the HALP study keeps of an image, (S,): of what the tower puts out, or of what enters the decoder."""
        return self.encoder_mean(tower, inputs)


def by_token(values: Tensor, shape: Any) -> bool:
    """Tell whether something has a value for each token of a prompt; pixels have none."""
    return values.ndim >= 2 and values.shape[:2] == shape and not values.is_floating_point()


def image_id(config: Any) -> int:
    """Return the token that stands for a piece of an image. Raises EngineStartError where the config names none."""
    for owner in (config, getattr(config, "vision_config", None)):
        for name in _IMAGE_IDS:
            if isinstance(found := getattr(owner, name, None), int):
                return found
    raise EngineStartError(f"it is a {config.model_type} model, whose config names no image token")


def decoder_of(model: Any) -> Any:
    """Return a model's text decoder. Raises EngineStartError where it is not known."""
    # Not get_decoder(): of some models in transformers 4.57 that is the whole model.
    for name in ("language_model", "text_model"):
        if hasattr(model.model, name):
            return getattr(model.model, name)
    if hasattr(model.model, "layers"):  # it is the decoder itself, and embeds images
        return model.model
    raise EngineStartError(f"it is a {model.config.model_type} model, whose text decoder is not known here")


def last_block(tower: Any) -> Any:
    """Return a tower's last block: of its longest list of modules, the last one."""
    lists = [module for module in tower.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=len)[-1] if lists else tower


def active_values(layer: Any, experts: int = 0) -> int:
    """Return the values of a token that are alive at once in a layer: in its perceptron, or among the states around it.

    `experts`: the width of those that a token goes through, where they are no modules of their own.
    """
    # Quantised ones have these too, and are no torch.nn.Linear.
    linear = [module for module in layer.modules() if hasattr(module, "out_features") and hasattr(module, "in_features")]
    if not linear:
        return 4 * experts
    widest, hidden = max(one.out_features for one in linear), min(one.in_features for one in linear)
    return int(3 * max(experts, widest) + 12 * hidden)
