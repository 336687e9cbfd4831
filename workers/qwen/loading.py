"""Loading a checkpoint, and what differs between versions of transformers in doing so."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
import transformers
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from workers.engine import EngineSpec
from workers.errors import EngineStartError

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def load_model(spec: EngineSpec, source: dict[str, Any]) -> Any:
    """Load the weights on the GPU, on several where there are several, or on the CPU.

    Raises EngineStartError for another kind of model, and where transformers would warn and fill in random weights.
    """
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # in a log a bar is a hundred lines
    kind = AutoConfig.from_pretrained(spec.model, **source).model_type
    if kind != "qwen2_5_vl":
        raise EngineStartError(f"it is a {kind} model, not Qwen2.5-VL")
    placement: dict[str, Any] = {}
    if torch.cuda.is_available():
        # One GPU that is seen is the usual case (CUDA_VISIBLE_DEVICES); several are for a model that one cannot hold.
        placement["device_map"] = "auto" if torch.cuda.device_count() > 1 else {"": 0}
    model, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        spec.model,
        dtype=_DTYPES[spec.dtype],
        attn_implementation="sdpa",
        output_loading_info=True,
        **placement,
        **source,
    )
    if missing := sorted(report["missing_keys"]):
        raise EngineStartError(f"the checkpoint lacks {len(missing)} of the model's weights, among them {missing[0]}")
    return model.eval()


def as_ids(value: Any) -> list[int]:
    """Return one or several token ids as a list."""
    return list(value) if isinstance(value, (list, tuple)) else [value]


def pixel_limits(processor: Any) -> tuple[int, int]:
    """Return the image processor's pixel limits; they moved into `size` in transformers 5."""
    size = processor.size
    minimum = getattr(processor, "min_pixels", None) or size["shortest_edge"]
    maximum = getattr(processor, "max_pixels", None) or size["longest_edge"]
    return int(minimum), int(maximum)


def environment(device: torch.device, attention: str) -> dict[str, str]:
    """Return what computes, as a part records it."""
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "device": device.type,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "",
        "attention_implementation": attention,
        "library_versions": json.dumps(versions),
    }


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Return the size of one token in the KV cache of all layers: 57 KB for 7B in bfloat16."""
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    return int(2 * config.num_hidden_layers * width * dtype.itemsize)
