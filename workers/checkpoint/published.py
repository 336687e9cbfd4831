"""What the HALP study kept of each of its models, by its extraction scripts (read 2026-11-26). In words: docs/halp.md."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from storage.computation import Computation
from storage.errors import UserError

# Of `layer_k`: the layer's output; the same, but the last one's after the decoder's final norm; or what enters the layer,
# which of layer 0 is the embedding. The last two are what transformers' `hidden_states` has at k + 1 and at k.
LayerDefinition = Literal["output", "output,last_normed", "input"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Where in a prompt the image lies: indices of its first and its last token; patches of it before they are merged."""

    length: int
    first: int
    last: int
    patches: int


@dataclass(frozen=True, slots=True)
class Published:
    """The published features of a model. `place` gives the vision and the query position of a prompt."""

    positions: str
    place: Callable[[Prompt], tuple[int, int]]
    layers: LayerDefinition = "output"
    vision_only: str = "encoder"
    max_new_tokens: int = 200


def _estimated(least: int, share: int, most: int) -> Callable[[Prompt], tuple[int, int]]:
    def place(prompt: Prompt) -> tuple[int, int]:
        vision = min(max(least, prompt.length // share), most, prompt.length - 10)
        return max(1, vision), prompt.length - 1

    return place


_LAST_IMAGE = Published(
    "last_image_token,last_prompt_token", lambda p: (p.last, p.length - 1), layers="output,last_normed", vision_only="tower"
)
PUBLISHED = {
    "qwen2_5_vl": Published(
        "min(patches,seq_len//2),last_prompt_token", lambda p: (min(p.patches, p.length // 2), p.length - 1)
    ),
    "gemma3": Published(
        "min(255,seq_len//2),last_prompt_token", lambda p: (min(255, p.length // 2), p.length - 1), vision_only="tower"
    ),
    "mllama": _LAST_IMAGE,
    "phi4_multimodal": Published(
        _LAST_IMAGE.positions, _LAST_IMAGE.place, layers=_LAST_IMAGE.layers, vision_only="pixel_columns"
    ),
    "llava_next": Published(
        "max(1,min(400..seq_len//3..1500,seq_len-10)),last_prompt_token", _estimated(400, 3, 1500), layers="input",
        vision_only="token_means", max_new_tokens=100,
    ),
    "smolvlm": Published(
        "max(1,min(200..seq_len//4..800,seq_len-10)),last_prompt_token", _estimated(200, 4, 800), layers="input",
        max_new_tokens=100,
    ),
    # The script's last index counts the image as one token: in the expanded prompt it usually lies inside the image.
    "fast_vlm": Published(
        "first_image_token,seq_len-image_tokens", lambda p: (p.first, p.length - 1 - (p.last - p.first)), layers="input",
        max_new_tokens=100,
    ),
}  # fmt: skip


def refuse_unpublished(model_type: str) -> None:
    """Raise UserError for a model that the study does not have."""
    if model_type in PUBLISHED:
        return
    hint = " (the study's Molmo is an older one, with code of its own)" if model_type == "molmo2" else ""
    raise UserError(
        f"--halp-compat: the study has no {model_type} model{hint}; it has {', '.join(sorted(PUBLISHED))}: leave it out"
    )


def other_answer_length(model_type: str, asked: Computation) -> str | None:
    """Say it where a run's answers may be longer or shorter than the published ones."""
    published = PUBLISHED.get(model_type)
    if not asked.halp_compat or published is None or asked.max_new_tokens in (0, published.max_new_tokens):
        return None
    return (
        f"the published answers of {model_type} have at most {published.max_new_tokens} tokens, this run's "
        f"{asked.max_new_tokens}: --max-new-tokens {published.max_new_tokens} makes them comparable"
    )
