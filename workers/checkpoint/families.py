"""The families of models, by what a config.json calls its architecture: what is known of each without loading one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from storage.errors import UserError
from workers.errors import EngineStartError

# What config.json says to what people call it.
FAMILIES = {
    "qwen2_vl": "Qwen2-VL", "qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL", "qwen3_5": "Qwen3.5", "glm4v": "GLM-4V",
    "gemma3": "Gemma 3", "llava": "LLaVA and Pixtral", "mistral3": "Mistral 3", "llava_next": "LLaVA-NeXT",
    "llava_onevision": "LLaVA-OneVision", "idefics3": "Idefics3", "smolvlm": "SmolVLM", "internvl": "InternVL",
    "aya_vision": "Aya Vision", "ovis2": "Ovis2", "deepseek_vl": "DeepSeek-VL", "janus": "Janus", "molmo2": "Molmo2",
    "phi4_multimodal": "Phi-4 multimodal", "mllama": "Llama 3.2 Vision", "paligemma": "PaliGemma", "fast_vlm": "FastVLM",
}  # fmt: skip
# Images of these are resized as qwen-vl-utils does, within pixel limits; others' processors size them.
SIZED = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"}

_WITH_IMAGES_ONLY = {
    "mllama": "its layers that attend to images are left out then, and have no states",
    "paligemma": "its processor takes no prompt without one",
}

# What to take in place of a model whose release has code of its own.
_NATIVE = {
    "molmo": "Molmo 2 is served: allenai/Molmo2-8B",
    "llava_qwen2": "FastVLM is served from a checkpoint that was converted for transformers",
    "phi4mm": "Phi-4 multimodal is served from the checkpoint that was converted for transformers",
}


def refuse_without_image(model_type: str) -> None:
    """Raise UserError for a family that cannot be asked without an image."""
    if reason := _WITH_IMAGES_ONLY.get(model_type):
        raise UserError(
            f"a {FAMILIES[model_type]} model cannot be asked without an image: {reason}. Remove the questions that have none, "
            "leave out --blind, or take another --model"
        )


def refuse_blind(config: Mapping[str, Any]) -> None:
    """Raise EngineStartError for a config.json, read as JSON, of a model that sees no images."""
    kind = config.get("model_type")
    if kind not in FAMILIES and not any("vision" in name or "image" in name for name in config):
        raise EngineStartError(f"it is a {kind} model, which takes no images")
    if config.get("auto_map") and kind not in FAMILIES:
        raise EngineStartError(
            f"it is a {kind} model with code of its own, and no code of a model's repository is run here; "
            + _NATIVE.get(str(kind), "is there a version of it that transformers knows?")
        )
