"""Plain transformers over a tiny checkpoint: one prompt at a time, the official processor, hooks, and `generate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from tests.support.tiny import decoder_of


@dataclass(frozen=True)
class Expected:
    """What one question must give: float32 vectors by field and layer."""

    ids: list[int]
    vision_position: int
    vectors: dict[str, np.ndarray]
    answer: list[int]
    log_probabilities: list[float]
    merged: np.ndarray | None  # the mean over the image tokens that enter the decoder


class Plain:
    """A checkpoint as its own documentation runs it."""

    def __init__(self, directory: Path) -> None:
        config = transformers.AutoConfig.from_pretrained(directory)
        causal = config.model_type == "phi4_multimodal"
        auto: Any = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForImageTextToText
        self.model = auto.from_pretrained(directory).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(directory)
        template = self.processor.chat_template or self.processor.tokenizer.chat_template
        self.template = template
        owners = (config, config.vision_config)
        names = ("image_token_id", "image_token_index", "image_patch_id")
        self.image_id = next(
            found for owner in owners for name in names if isinstance(found := getattr(owner, name, None), int)
        )

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[np.ndarray], question: str, *, new: int, system: str | None = None, **processing: Any
    ) -> Expected:
        content: list[Any] = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
        messages: list[Any] = [] if system is None else [{"role": "system", "content": system}]
        text = self.processor.apply_chat_template(
            [*messages, {"role": "user", "content": content}], chat_template=self.template, add_generation_prompt=True,
            tokenize=False,
        )  # fmt: skip
        if images:
            processing["images"] = [[Image.fromarray(image) for image in images]]
        inputs = self.processor(text=[text], return_tensors="pt", **processing)
        inputs = {name: values for name, values in inputs.items() if name != "labels"}
        ids = inputs["input_ids"][0].tolist()
        last = max((i for i, token in enumerate(ids) if token == self.image_id), default=-1)
        states: dict[int, torch.Tensor] = {}
        entering: list[torch.Tensor] = []

        def keep(layer: int) -> Any:
            return lambda _m, _i, out: states.__setitem__(layer, (out[0] if isinstance(out, tuple) else out).clone())

        handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(decoder_of(self.model).layers)]
        first = decoder_of(self.model).layers[0]
        handles.append(first.register_forward_pre_hook(lambda _m, args: entering.append(args[0].clone())))
        self._forget()
        self.model(**inputs)
        for handle in handles:
            handle.remove()
        self._forget()
        made = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=new, return_dict_in_generate=True, output_logits=True
        )
        self._forget()
        answer = made.sequences[0, len(ids) :].tolist()
        scores = [step[0].float().log_softmax(-1)[token].item() for step, token in zip(made.logits, answer)]
        vectors = {f"query_token_representation/layer_{i}": s[0, -1].numpy() for i, s in states.items()}
        if images:
            vectors |= {f"vision_token_representation/layer_{i}": s[0, last].numpy() for i, s in states.items()}
        merged = entering[0][0, inputs["input_ids"][0] == self.image_id].mean(0).numpy() if images else None
        return Expected(ids, last, vectors, answer, scores, merged)

    @torch.inference_mode()
    def answer_states(self, image: np.ndarray, question: str, answer: list[int], **processing: Any) -> dict[int, np.ndarray]:
        """Return each layer's states of an answer's tokens, (T, D), by one forward over prompt and answer.

        Where the prompt would see the answer then, they are those that `generate` makes.
        """
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], chat_template=self.template, add_generation_prompt=True, tokenize=False
        )
        inputs = self.processor(images=[Image.fromarray(image)], text=[text], return_tensors="pt", **processing)
        shape, given = inputs["input_ids"].shape, {}
        for name, values in inputs.items():
            if values.ndim < 2 or values.shape[:2] != shape or values.is_floating_point():
                given[name] = values
                continue
            more = values[:, -1:].expand(-1, len(answer), *values.shape[2:])
            if name == "input_ids":
                more = torch.tensor([answer])
            elif name.endswith("token_type_ids"):
                more = torch.zeros_like(more)
            given[name] = torch.cat([values, more], dim=1)
        given.pop("labels", None)
        states: dict[int, np.ndarray] = {}

        def keep(layer: int) -> Any:
            def hook(_m: Any, _i: Any, out: Any) -> None:
                states[layer] = (out[0] if isinstance(out, tuple) else out)[0, shape[1] :].clone().numpy()

            return hook

        one_by_one = self.model.config.model_type == "paligemma"
        taken: dict[int, list[np.ndarray]] = {}

        def note(layer: int) -> Any:
            def hook(_m: Any, _i: Any, out: Any) -> None:
                found = out[0] if isinstance(out, tuple) else out
                if found.shape[1] == 1:
                    taken.setdefault(layer, []).append(found[0, 0].clone().numpy())

            return hook

        layers = enumerate(decoder_of(self.model).layers)
        handles = [layer.register_forward_hook(note(i) if one_by_one else keep(i)) for i, layer in layers]
        self._forget()
        if one_by_one:
            self.model.generate(**inputs, do_sample=False, max_new_tokens=len(answer) + 1)
            states = {layer: np.stack(found[: len(answer)]) for layer, found in taken.items()}
        else:
            self.model(**given)
        self._forget()
        for handle in handles:
            handle.remove()
        return states

    def _forget(self) -> None:
        if hasattr(self.model.model, "rope_deltas"):
            self.model.model.rope_deltas = None
