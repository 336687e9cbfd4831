"""From an image file and a question to an engine request: decoded once per image in flight, tokenised, its length known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from storage.images.lookup import OutsideRootError, resolve_image
from workers.engine.interface import ModelInfo, Recipe, Request
from workers.engine.prompt import PromptParts, QuestionTokenizer
from workers.errors import PermanentError, TransientError
from workers.extract.image_cache import ImageCache
from workers.extract.loading import Limits, PreparedImage, load_apart, load_quick

# Of decoded images in memory: 1,100 of 400 tokens, or 27 of 16k, may be in use; 64 MB wait for further questions.
_IMAGE_BYTES = 1 << 30
_IDLE_IMAGE_BYTES = 64 << 20
MAX_PROMPT = 32_768  # tokens that the model was trained on; its config admits more, and transformers does not check


class Preprocessor:
    """Prepares questions for one loaded model. Thread-safe."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._tokenize = QuestionTokenizer(info.tokenizer_json, info.placeholders)
        self._prompt = info.prompt
        self._factor = info.factor
        self._images: ImageCache[PreparedImage] = ImageCache(_IMAGE_BYTES, _IDLE_IMAGE_BYTES)

    @contextmanager
    def hold(
        self,
        image_id: str,
        images_dir: str | Path,
        roots: tuple[str | Path, ...],
        limits: Limits,
        *,
        halp_compat: bool = False,
        exif_rotation: bool = False,
    ) -> Iterator[PreparedImage]:
        """Yield an image within pixel limits (minimum, maximum), which takes its memory until the block ends.

        Raises PermanentError, TransientError.
        """
        try:
            location = resolve_image(image_id, images_dir, roots)
        except OutsideRootError as error:
            raise PermanentError("image_outside_root", str(error)) from error
        except OSError as error:
            raise TransientError(f"{image_id!r} cannot be looked up: {error.strerror}") from error

        options = {"halp_compat": halp_compat, "exif_rotation": exif_rotation}
        with self._images.hold(
            (location, *limits, halp_compat, exif_rotation),
            lambda: load_quick(location, self._factor, limits, **options),
            lambda: load_apart(location, self._factor, limits, **options),
        ) as image:
            yield image

    def image(self, *arguments: Any, **options: Any) -> PreparedImage:
        """Return what `hold` yields, to a caller that bounds its memory itself."""
        with self.hold(*arguments, **options) as image:
            return image

    def loading_since(self) -> float | None:
        """Return when the oldest image began that is being read or decoded now, on the wall clock."""
        return self._images.loading_since()

    def request(
        self,
        image: PreparedImage,
        question: str,
        recipe: Recipe,
        prompt: PromptParts | None = None,
    ) -> Request:
        """Return the engine request of a question about an image. Raises PermanentError: the prompt is too long.

        `prompt` None is that of the checkpoint's own template; another one's head is the recipe's too.
        """
        prompt = prompt or self._prompt
        suffix = prompt.suffix(self._tokenize, question, recipe.special_tokens)
        tokens = self._info.image_tokens(*image.pixels.shape[:2])
        total = len(prompt.head_ids) + tokens + len(suffix)
        limit = min(MAX_PROMPT, self._info.max_position_embeddings)
        if total > limit:
            raise PermanentError(
                "prompt_too_long",
                f"the prompt has {total} tokens, {tokens} of them from the image; the model takes {limit}. "
                "Shorten the question or lower --max-pixels",
            )
        return Request(image.key, image.pixels, suffix, total, recipe, self._info.held_tokens)


class HasLimits(Protocol):
    """A model, loaded or not, as far as its own pixel limits go."""

    @property
    def min_pixels(self) -> int | None: ...  # noqa: D102

    @property
    def max_pixels(self) -> int | None: ...  # noqa: D102


def limits_of(asked: Limits, model: HasLimits) -> Limits:
    """Return the pixel limits of a run: those that were asked for, else the model's own, if it has any."""
    minimum, maximum = asked
    return (
        model.min_pixels if minimum is None else minimum,
        model.max_pixels if maximum is None else maximum,
    )
