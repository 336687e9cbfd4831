"""The plain reference: one question at a time by the model card's recipe, with hooks of its own and `generate`.

What the tests and `workers selfcheck` hold the engine against. It imports nothing of the engine, so that both cannot make
the same mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from storage.fields import QUERY_TOKEN, VISION_ENCODER, VISION_ONLY, VISION_TOKEN, at_layer

# Of these qwen-vl-utils resizes the images; other processors size them.
_RESIZED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"}


class Reference:
    """Answer questions and return hidden states from a batch-1 forward, in float32 unless told otherwise.

    `repetition_penalty` None keeps the checkpoint's; `min_pixels` and `max_pixels` None keep the processor's limits.
    `device_map` and `source` (`revision`, `cache_dir`) go to `from_pretrained` as they are.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        repetition_penalty: float | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        attention: str = "sdpa",
        dtype: torch.dtype = torch.float32,
        device_map: Any = None,
        **source: Any,
    ) -> None:
        self.processor: Any = AutoProcessor.from_pretrained(model, **source)
        config = AutoConfig.from_pretrained(model, **source)
        self.resized = config.model_type in _RESIZED
        limits = _pixel_limits(self.processor.image_processor) if self.resized else (None, None)
        # Only qwen-vl-utils resizes, so the processor need not be told: versions differ in which form it heeds.
        self.min_pixels = limits[0] if min_pixels is None else min_pixels
        self.max_pixels = limits[1] if max_pixels is None else max_pixels
        auto: Any = AutoModelForCausalLM if config.model_type == "phi4_multimodal" else AutoModelForImageTextToText
        options = {"dtype": dtype, "device_map": device_map, **source}
        try:
            self.model: Any = auto.from_pretrained(model, attn_implementation=attention, **options).eval()
        except ValueError:  # it has no such attention
            self.model = auto.from_pretrained(model, **options).eval()
        if self.processor.chat_template is None:
            self.processor.chat_template = self.processor.tokenizer.chat_template
        self.repetition_penalty = repetition_penalty

    @torch.inference_mode()
    def __call__(self, image_path: str | Path, question: str, *, max_new_tokens: int, layers: Iterable[int]) -> dict[str, Any]:
        """Return the representations (float32 arrays), the answer and its ids, end of turn included, and positions."""
        inputs = self.inputs(image_path, question)
        ids = inputs["input_ids"]  # (1, L)
        image_tokens = (ids[0] == _image_token(self.model.config)).nonzero()
        vision, query = int(image_tokens[-1]), ids.shape[1] - 1
        result: dict[str, Any] = {
            "seq_len": ids.shape[1],
            "vision_token_position": vision,
            "query_token_position": query,
        }
        if "image_grid_thw" in inputs:
            result["image_grid_thw"] = inputs["image_grid_thw"][0].tolist()

        visual, decoder = getattr(self.model.model, "visual", None), _decoder_layers(self.model)
        seen: dict[Any, torch.Tensor] = {}
        layers = list(layers)
        handles = [decoder[i].register_forward_hook(_keep(seen, i)) for i in layers]
        if self.resized and visual is not None:
            # The merger's rows come in window order, of which the means know nothing.
            handles.append(visual.blocks[-1].register_forward_hook(_keep(seen, "E")))
            handles.append(visual.merger.register_forward_hook(_keep(seen, "D")))
        try:
            self.model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
        if "E" in seen:
            result[VISION_ENCODER.name] = _array(seen["E"].mean(dim=0))  # (patches, E) -> (E,)
            result[VISION_ONLY.name] = _array(seen["D"].mean(dim=0))  # (patches / 4, D) -> (D,)
        for i in layers:
            result[at_layer(VISION_TOKEN.name, i)] = _array(seen[i][0, vision])  # (1, L, D) -> (D,)
            result[at_layer(QUERY_TOKEN.name, i)] = _array(seen[i][0, query])

        new = self._generate(inputs, max_new_tokens) if max_new_tokens else []
        result["answer_token_ids"] = new
        result["answer"] = self.processor.decode(new, skip_special_tokens=True).strip()
        return result

    def inputs(self, image_path: str | Path, question: str) -> dict[str, torch.Tensor]:
        """Return the model's inputs by the official recipe: where qwen-vl-utils resizes, the processor does not."""
        if not self.resized:
            plain: Any = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            text = self.processor.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
            made = self.processor(text=[text], images=[Image.open(image_path).convert("RGB")], return_tensors="pt")
            made.pop("labels", None)
            weights = self.model.get_input_embeddings().weight
            return {k: v.to(weights.device, self.model.dtype if v.is_floating_point() else v.dtype) for k, v in made.items()}
        limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
        content = [{"type": "image", "image": str(image_path), **limits}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        images = process_vision_info(messages, image_patch_size=self.model.config.vision_config.patch_size)[0]
        inputs = self.processor(text=[text], images=images, do_resize=False, return_tensors="pt")
        return dict(inputs.to(self.model.get_input_embeddings().weight.device))

    def _generate(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[int]:
        penalty = {} if self.repetition_penalty is None else {"repetition_penalty": self.repetition_penalty}
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, **penalty)
        ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return ids


def _pixel_limits(image_processor: Any) -> tuple[int, int]:
    """Return the limits that rule: `size` from 4.50 on, two attributes before."""
    size = image_processor.size
    if "shortest_edge" in size:
        return size["shortest_edge"], size["longest_edge"]
    return image_processor.min_pixels, image_processor.max_pixels


def _image_token(config: Any) -> int:
    for owner in (config, config.vision_config):
        for name in ("image_token_id", "image_token_index", "image_patch_id"):
            if isinstance(found := getattr(owner, name, None), int):
                return found
    raise ValueError("its config names no image token")


def _decoder_layers(model: Any) -> Any:
    inner = model.model
    return next((getattr(inner, n) for n in ("language_model", "text_model") if hasattr(inner, n)), inner).layers


def _keep(seen: dict[Any, torch.Tensor], key: Any) -> Callable[..., None]:
    def hook(_module: Any, _args: Any, output: Any) -> None:
        seen[key] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    return hook


def _array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
