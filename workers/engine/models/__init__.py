"""One module for each family of models that differs from the others in the forward pass. Found by `model_type`.

A family without a module of its own is served by the defaults in `base.py`. None is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = {
    **dict.fromkeys(("qwen2_vl", "qwen3_vl", "qwen3_5"), "qwen_vl"),
    **{name: name for name in ("qwen2_5_vl", "fast_vlm", "gemma3", "llava_next", "mllama", "paligemma", "phi4_multimodal")},
}


def family_of(model_type: str) -> Any:
    """Return the class of a family, the defaults' where it has none of its own."""
    return import_module(f"{__name__}.{_MODULES.get(model_type, 'base')}").Family
