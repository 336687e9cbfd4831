"""The engine's interface: what goes in, what comes out, what it says of its model. Knows neither torch nor queues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from storage.computation import Computation
from storage.sample import Sample
from workers.engine.prompt import PromptParts, PromptStyle


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """What an engine's process is started with."""

    kind: str
    model: str
    revision: str
    dtype: str
    cache_dir: str
    cudnn_attention: bool = False


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an engine has loaded, as far as others must know it."""

    model_type: str
    revision: str  # of a hub model the commit, where it is known
    config_sha256: str
    num_hidden_layers: int
    hidden_size: int
    vision_hidden_size: int
    vision_encoder_definition: str  # what of the vision tower its field is the mean of
    max_position_embeddings: int
    repetition_penalty: float
    tokenizer_json: str
    placeholders: tuple[str, ...]  # what stands for an image or a video, and is text in a question
    prompt: PromptParts  # of the checkpoint's own template
    # An image is resized to multiples of it, between the limits; None: the model's processor sizes images, without limits.
    factor: int | None
    min_pixels: int | None
    max_pixels: int | None
    most_image_tokens: int | None  # that an image was seen to take, where the processor sizes it
    held_tokens: int  # what a prompt holds in memory whatever its length, in tokens: recurrent states, an image beside the text
    max_batch_tokens: int  # prompt tokens that fit into a batch, by the memory that the loaded model leaves free
    environment: dict[str, str]  # what computes, and how far results depend on the batch: storage.hdf5.part.ENVIRONMENT
    shares_images: bool = True  # else it computes whole prompts
    published_vision_size: int | None = None  # of `vision_only` as the HALP study has it; None: it is the vision tower's

    def image_tokens(self, height: int, width: int) -> int:
        """Return how many tokens an image of this size becomes; where its processor sizes it, at most."""
        if self.factor is None:
            assert self.most_image_tokens is not None
            return self.most_image_tokens
        return height * width // self.factor**2


class Recipe(Computation):
    """A computation as a loaded checkpoint does it: its layers are numbers. A batch has one recipe."""

    layers: tuple[int, ...]
    math_kernel: bool = False  # another attention kernel than the usual one, for the noise floor of `exact`


@dataclass(frozen=True, slots=True)
class Request:
    """One question, ready for the model.

    images: of each its pixels, uint8 [H, W, 3], resized: H and W are multiples of patch size x merge size. Requests of one
        image hold one array.
    suffix_ids: token ids of everything after the image tokens; without an image, of what differs between questions.
    """

    image_key: str  # of the images together, in their order; none: empty
    images: tuple[npt.NDArray[np.uint8], ...]
    suffix_ids: tuple[int, ...]
    num_tokens: int  # of the whole prompt
    recipe: Recipe
    held_tokens: int = 0  # see ModelInfo

    @property
    def weight(self) -> int:
        """What it takes of a batch's memory, in tokens."""
        return self.num_tokens + self.held_tokens


class Engine(Protocol):
    """Computes samples. One method, synchronous; a batch has one recipe."""

    info: ModelInfo

    def extract(self, requests: Sequence[Request]) -> list[Sample]:
        """Return a sample per request, in their order; facts hold what the model alone knows."""
        ...

    def prompt(self, style: PromptStyle) -> PromptParts:
        """Return the prompt of a style. Raises EngineStartError where the template cannot be used so."""
        ...

    def free_cache(self) -> None:
        """Free what is kept between batches."""
        ...
