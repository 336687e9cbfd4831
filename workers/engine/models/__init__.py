"""One module for each family of models: what differs from the others in the forward pass. Found by `model_type`.

A module here has `MODEL`, transformers' class, and `VisionTower`; none is imported before it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from workers.errors import EngineStartError

# What config.json says to what people call it; the module has the first one's name.
FAMILIES = {"qwen2_5_vl": "Qwen2.5-VL"}


def refuse_unknown(model_type: str) -> None:
    """Raise EngineStartError where no family is known by what a checkpoint's config.json calls itself."""
    if model_type not in FAMILIES:
        raise EngineStartError(f"it is a {model_type} model, not {' or '.join(FAMILIES.values())}")


def family(model_type: str) -> ModuleType:
    """Return a family's module. Raises EngineStartError."""
    refuse_unknown(model_type)
    return import_module(f"{__name__}.{model_type}")
