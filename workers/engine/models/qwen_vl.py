"""Qwen2-VL, Qwen3-VL and Qwen3.5: images come resized, to multiples of a merged patch.

What follows from an image's size (positions, windows) is computed on the host, which knows it: transformers would read it
from a GPU, some times for each image.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.engine.attention import Spans
from workers.engine.models import base
from workers.engine.models.base import Inputs, Packed
from workers.errors import in_a_line

logger = logging.getLogger(__name__)


class Flat(torch.nn.Module):
    """A convolution over patches that do not overlap, each given alone, as the matrix product that it is."""

    def __init__(self, convolution: torch.nn.Conv3d) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(convolution.weight.flatten(1), requires_grad=False)  # (E, values of a patch)
        self.bias = convolution.bias

    def forward(self, patches: Tensor) -> Tensor:
        """Return (N, E) of (N, C, T, H, W)."""
        return torch.nn.functional.linear(patches.flatten(1), self.weight, self.bias)


class Family(base.Family):
    """Its processor leaves the size of an image alone."""

    _where: Mapping[str, Any] = MappingProxyType({})  # a device that processes images

    @property
    def factor(self) -> int:
        """The side in pixels of the square that becomes one token."""
        vision = self.model.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)

    @property
    def together(self) -> bool:  # type: ignore[override]
        """Patches of several images are one row, which `image_grid_thw` takes apart."""
        return not self.recurrent  # padding would go through a recurrent state

    def _processing(self, rows: int) -> dict[str, Any]:
        return {**super()._processing(rows), "do_resize": False, **self._where}

    @contextmanager
    def entering(self, inputs: Inputs) -> Iterator[Inputs]:
        """Have the tower take what follows from the sizes of images as it was computed here."""
        if "image_grid_thw" not in inputs:
            yield self.on_device(inputs)
            return
        visual, grid = self.core.visual, inputs["image_grid_thw"].cpu()

        def with_sizes(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, **of_sizes(visual, grid)}

        handle = visual.register_forward_pre_hook(with_sizes, with_kwargs=True)
        try:
            yield self.on_device(inputs)
        finally:
            handle.remove()

    def packed(self, inputs: Inputs) -> Packed:
        """Put left-padded rows behind one another; each keeps the positions that it has alone."""
        real = inputs["attention_mask"].bool()
        accepted = inspect.signature(self.core.get_rope_index).parameters
        positions, _ = self.core.get_rope_index(**{name: v for name, v in inputs.items() if name in accepted})  # (3, B, L)
        in_a_row = {name: v[real][None] if base.by_token(v, real.shape) else v for name, v in inputs.items()}
        del in_a_row["attention_mask"]
        in_a_row["position_ids"] = positions[:, real][:, None]
        following = positions.amax(0).masked_fill(~real, -1).amax(1) + 1
        return Packed(in_a_row, real.sum(1).tolist(), following.tolist())

    @property
    def active_bytes(self) -> int:
        """Memory that a prefill takes for each token, at most; one is several patches in the tower."""
        visual = self.core.visual
        patches = visual.spatial_merge_size**2 * base.active_values(visual.blocks[0])
        return max(super().active_bytes, int(self.model.dtype.itemsize * patches))

    def tokens_of(self, inputs: Inputs, prompts: int) -> list[int]:
        """Return how many image tokens each prompt has."""
        merged = self.core.visual.spatial_merge_size**2
        return [patches // merged for patches in _patches(inputs, prompts)]

    def speed_up(self) -> None:
        """Embed patches by a matrix product, see to all windows at once, and have a GPU cut pixels into patches."""
        attend_in_spans(self.core.visual)
        embedding = self.core.visual.patch_embed
        if isinstance(getattr(embedding, "proj", None), torch.nn.Conv3d):
            embedding.proj = Flat(embedding.proj)
        device = self.core.visual.device
        if device.type == "cuda":
            self.process_on(device)

    def process_on(self, device: torch.device) -> None:
        """Have a device process images, if it makes the same of them."""
        image = np.random.default_rng(0).integers(0, 256, (4 * self.factor, 3 * self.factor, 3), np.uint8)
        here = self.processor.image_processor(images=[image], do_resize=False, return_tensors="pt")["pixel_values"]
        try:
            options = {"do_resize": False, "device": device, "return_tensors": "pt"}
            there = self.processor.image_processor(images=[image], **options)["pixel_values"]
        except (TypeError, ValueError, RuntimeError) as error:  # one that does not know of devices
            logger.warning("images are processed on the CPU: %s", in_a_line(error))
            return
        if torch.equal(here, there.cpu()):
            self._where = {"device": device}
        else:
            logger.warning("images are processed on the CPU: %s makes others of them", device)

    def encoder_means(self, out: Tensor, inputs: Inputs, prompts: int) -> list[Tensor]:
        """Return the mean (E,) over the patches of each prompt's images."""
        return [patches.mean(0) for patches in torch.split(out.flatten(0, -2), _patches(inputs, prompts))]


def _patches(inputs: Inputs, prompts: int) -> list[int]:
    """Return how many patches the images of each prompt have; each has as many images."""
    found: list[int] = inputs["image_grid_thw"].prod(dim=1).view(prompts, -1).sum(dim=1).tolist()
    return found


def of_sizes(visual: Any, grid: Tensor) -> dict[str, Tensor]:
    """Return what a tower takes beside patches, of the sizes of images (B, 3) on the host, by transformers' functions for it.

    Nothing where it has none, or others, as before 5.17: then it reads the sizes itself.
    """
    try:
        return _of_sizes(visual, grid)
    except (ImportError, AttributeError, TypeError) as error:
        _say_once(in_a_line(error))
        return {}


@cache
def _say_once(reason: str) -> None:
    logger.warning("transformers computes what follows from the sizes of images, which is slower on a GPU: %s", reason)


def _of_sizes(visual: Any, grid: Tensor) -> dict[str, Tensor]:
    from transformers import vision_utils

    device, merge = visual.device, visual.spatial_merge_size
    found = {"position_ids": vision_utils.get_vision_position_ids(grid, merge).to(device)}
    found["cu_seqlens"] = vision_utils.get_vision_cu_seqlens(grid)  # stays on the host: `attend_in_spans` has it from there
    if hasattr(visual, "window_size"):
        index, found["cu_window_seqlens"] = vision_utils.get_vision_window_index(
            grid, spatial_merge_size=merge, window_size=visual.window_size, patch_size=visual.patch_size
        )
        found["window_index"] = index.to(device)
    if hasattr(visual, "interpolation_mode"):
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid, num_grid_per_side=visual.num_grid_per_side, mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners, spatial_merge_size=merge,
        )  # fmt: skip
        found["interp_indices"], found["interp_weights"] = indices.to(device), weights.to(device)
    return found


def attend_in_spans(visual: Any) -> None:
    """Have a tower's attention take images, or windows of an image, as spans of a row: transformers calls one after another."""
    spans = _SpansOf()
    for block in visual.blocks:
        block.attn.forward = _SpanAttention(block.attn, spans)


class _SpansOf:
    """The spans between boundaries; the same boundaries serve every block of a forward."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, Spans]] = []

    def of(self, boundaries: Tensor) -> Spans:
        """Return the spans between boundaries (S + 1,)."""
        for known, spans in self._known:
            if known is boundaries:
                return spans
        spans = Spans(boundaries.diff().tolist())
        self._known = [*self._known[-1:], (boundaries, spans)]  # a forward has two: of windows and of images
        return spans


class _SpanAttention:
    """The forward of a tower's attention."""

    def __init__(self, attention: Any, spans: _SpansOf) -> None:
        self._attention, self._spans = attention, spans
        self._rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision

    def __call__(self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: Any, **_: Any) -> Tensor:
        attention, rows = self._attention, hidden_states.shape[0]
        query, key, value = attention.qkv(hidden_states).reshape(rows, 3, attention.num_heads, -1).unbind(1)  # (N, heads, d)
        query, key = self._rotate(query, key, *position_embeddings)
        attended = self._spans.of(cu_seqlens).attend(query, key, value, scale=attention.scaling)
        out: Tensor = attention.proj(attended.reshape(rows, -1))
        return out
