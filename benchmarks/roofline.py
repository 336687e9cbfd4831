"""The roofline: the least time that a device needs for the operations and bytes that questions take without padding."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from workers.engine.interface import Request

# Dense bf16 TFLOP/s and GB/s from the makers' data sheets; the first name that a device's name contains counts.
PEAKS = {
    "H200": (989.0, 4800.0),
    "H100 PCIe": (756.0, 2000.0),
    "H100 NVL": (835.0, 3900.0),
    "H100": (989.0, 3350.0),
    "A100-SXM4-40GB": (312.0, 1555.0),
    "A100-PCIE-40GB": (312.0, 1555.0),
    "A100 80GB PCIe": (312.0, 1935.0),
    "A100": (312.0, 2039.0),
    "4090": (165.0, 1008.0),
}
STAGES = ("vision", "prefix", "suffix", "decode")
BYTES = 2  # of a bfloat16


@dataclass(frozen=True)
class Case:
    """One question: the engine's request, the whole prompt, the image's grid in patches, the answer's forced length."""

    request: Request
    prompt: tuple[int, ...]
    grid: tuple[int, int, int]
    length: int


@dataclass(frozen=True)
class Peak:
    """What the device can do at best; zero where it is not known."""

    flops: float
    bytes: float

    def seconds(self, flops: float, moved: float) -> float:
        """Return the least time for so many operations and bytes."""
        return max(flops / self.flops, moved / self.bytes) if self.flops and self.bytes else 0.0


@dataclass
class Work:
    """What one stage takes at least."""

    flops: float = 0.0
    seconds: float = 0.0


class Counter:
    """Counts the operations and bytes of questions on one configuration. A multiply-add is two operations."""

    def __init__(self, config: Any, peak: Peak) -> None:
        text, self._eye = config.get_text_config(), config.vision_config
        self._peak = peak
        head = text.hidden_size // text.num_attention_heads
        inner = head * text.num_attention_heads
        shared = head * text.num_key_value_heads
        layer = 2 * text.hidden_size * (inner + shared) + 3 * text.hidden_size * text.intermediate_size
        self._decoder = text.num_hidden_layers * layer  # weights
        self._attention = 4 * text.num_hidden_layers * inner  # operations per pair of tokens
        self._kv = 2 * text.num_hidden_layers * shared * BYTES  # bytes per token
        self._head = text.hidden_size * text.vocab_size  # weights
        eye = self._eye
        self._block = 4 * eye.hidden_size**2 + 3 * eye.hidden_size * eye.intermediate_size
        self._patch = eye.in_channels * eye.temporal_patch_size * eye.patch_size**2 * eye.hidden_size
        merged = eye.hidden_size * eye.spatial_merge_size**2
        self._merger = merged * (merged + eye.out_hidden_size)
        self._tower = self._patch + eye.depth * self._block + self._merger

    def stages(self, batches: Sequence[Sequence[Case]], *, whole: bool = False) -> dict[str, Work]:
        """Return the least work of each stage. `whole`: prefix and suffix go through the model in one forward."""
        work = {stage: Work() for stage in STAGES}
        seen: set[str] = set()
        for batch in batches:
            new = {c.request.image_key: c for c in batch if whole or c.request.image_key not in seen}
            seen |= new.keys()
            if new:
                self._add(work["vision"], sum(self._vision(c.grid) for c in new.values()), self._tower * BYTES)
                prefixes = sum(self._forward(_prefix(c), 0) for c in new.values())
                self._add(work["prefix"], prefixes, 0 if whole else self._decoder * BYTES)
            suffixes = sum(self._forward(len(c.request.suffix_ids), _prefix(c)) for c in batch)
            moved = self._decoder * BYTES + sum(_prefix(c) for c in batch) * self._kv
            self._add(work["suffix"], suffixes, moved)
            for step in range(max(c.length for c in batch)):
                contexts = [c.request.num_tokens + step for c in batch if c.length > step]
                # The first token comes from the suffix's own forward.
                flops = 2 * self._head * len(contexts) + (sum(self._forward(1, n) for n in contexts) if step else 0)
                moved = self._head * BYTES + (self._decoder * BYTES + sum(contexts) * self._kv if step else 0)
                self._add(work["decode"], flops, moved)
        return work

    def _add(self, work: Work, flops: float, moved: float) -> None:
        work.flops += flops
        work.seconds += self._peak.seconds(flops, moved)

    def _forward(self, tokens: int, before: int) -> float:
        """Return the operations of the decoder on some tokens after others."""
        return 2 * self._decoder * tokens + self._attention * (tokens * before + tokens * (tokens + 1) / 2)

    def _vision(self, grid: tuple[int, int, int]) -> float:
        """Return the operations of the tower on one image."""
        eye, (_, height, width) = self._eye, grid
        patches = height * width
        side = eye.window_size // eye.patch_size
        pairs = sum(min(side, height - y) ** 2 for y in range(0, height, side)) * sum(
            min(side, width - x) ** 2 for x in range(0, width, side)
        )
        full = len(eye.fullatt_block_indexes)
        attention = 4 * eye.hidden_size * ((eye.depth - full) * pairs + full * patches**2)
        weights = (self._patch + eye.depth * self._block) * patches + self._merger * patches / eye.spatial_merge_size**2
        return float(2 * weights + attention)


def _prefix(case: Case) -> int:
    return case.request.num_tokens - len(case.request.suffix_ids)


def find_peak(options: argparse.Namespace, device: torch.device) -> Peak:
    """Return the device's peaks: as given, or by its name."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    flops, moved = next((peak for key, peak in PEAKS.items() if key in name), (0.0, 0.0))
    return Peak((options.peak_tflops or flops) * 1e12, (options.peak_gbps or moved) * 1e9)
