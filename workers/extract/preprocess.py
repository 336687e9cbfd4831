"""From an image file and a question to an engine request: decoded once per image in flight, tokenised, its length known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from storage.images.lookup import OutsideRootError, resolve_image
from storage.question import MAX_IMAGES
from workers.engine.interface import ModelInfo, Recipe, Request
from workers.engine.prompt import PromptParts, QuestionTokenizer
from workers.errors import PermanentError, TransientError
from workers.extract.image_cache import ImageCache
from workers.extract.loading import Limits, PreparedImage, PreparedImages, load_image, load_quick

# Of decoded images in memory: 1,100 of 400 tokens, or 27 of 16k, may be in use; 64 MB wait for further questions.
_IMAGE_BYTES = 1 << 30
_IDLE_IMAGE_BYTES = 64 << 20
_QUESTION_BYTES = 1 << 29  # of the images of a question, where there are several
MAX_PROMPT = 32_768  # tokens that the model was trained on; its config admits more, and transformers does not check


class Preprocessor:
    """Prepares questions for one loaded model. Thread-safe."""

    def __init__(self, info: ModelInfo) -> None:
        self._info = info
        self._tokenize = QuestionTokenizer(info.tokenizer_json, info.placeholders)
        self._prompt = info.prompt
        self._factor = info.factor
        self._limit = min(MAX_PROMPT, info.max_position_embeddings)
        self._images: ImageCache[PreparedImages] = ImageCache(_IMAGE_BYTES, _IDLE_IMAGE_BYTES)

    @contextmanager
    def hold(
        self,
        image_ids: Sequence[str],
        images_dir: str | Path,
        roots: tuple[str | Path, ...],
        limits: Limits,
        *,
        halp_compat: bool = False,
        exif_rotation: bool = False,
    ) -> Iterator[tuple[PreparedImage, ...]]:
        """Yield a question's images within pixel limits (minimum, maximum), which take their memory until the block ends.

        Raises PermanentError, TransientError.
        """
        if not image_ids:
            yield ()
            return
        if len(image_ids) > MAX_IMAGES:
            raise PermanentError("images_refused", f"{len(image_ids):,} images are named: a question takes up to {MAX_IMAGES}")
        locations = [_place(image_id, images_dir, roots) for image_id in image_ids]
        options = {"halp_compat": halp_compat, "exif_rotation": exif_rotation}
        key = (*locations, *limits, halp_compat, exif_rotation)
        ready: list[PreparedImage] = []

        def load(one: Callable[..., PreparedImage | None]) -> PreparedImages | None:
            for location in locations[len(ready) :]:
                self._images.begin(key)
                if (image := one(location, self._factor, limits, **options)) is None:
                    return None
                ready.append(image)
                self._refuse_too_large(ready)
            return PreparedImages(tuple(ready))

        def apart() -> PreparedImages:
            found = load(load_image)
            assert found is not None
            return found

        # All of a question at once: one that held some and waited for room for others would wait for its like.
        with self._images.hold(key, lambda: load(load_quick), apart) as found:
            yield found.images

    def _refuse_too_large(self, images: Sequence[PreparedImage]) -> None:
        """Raise PermanentError where a question's images are more than it can have."""
        size = sum(image.nbytes for image in images)
        tokens = self._tokens(images) if self._factor is not None else 0
        if len(images) > 1 and (tokens > self._limit or size > _QUESTION_BYTES):
            raise PermanentError(
                "prompt_too_long" if tokens > self._limit else "image_too_large",
                f"{len(images)} of the question's images take {size >> 20:,} MB of pixels and {tokens:,} tokens, of at most "
                f"{_QUESTION_BYTES >> 20} and {self._limit:,}: name fewer, shrink them, or lower --max-pixels",
            )

    def _tokens(self, images: Iterable[PreparedImage], most: int | None = None) -> int:
        """Return how many tokens images become; `most` of each, where their processor sizes them."""
        return sum(most or self._info.image_tokens(*image.pixels.shape[:2]) for image in images)

    def image(self, image_id: str, *arguments: Any, **options: Any) -> PreparedImage:
        """Return one image as `hold` yields it, to a caller that bounds its memory itself."""
        with self.hold([image_id], *arguments, **options) as [image]:
            return image

    def loading_since(self) -> float | None:
        """Return when the oldest image began that is being read or decoded now, on the wall clock."""
        return self._images.loading_since()

    def request(
        self,
        images: Sequence[PreparedImage],
        question: str,
        recipe: Recipe,
        prompt: PromptParts | None = None,
    ) -> Request:
        """Return the engine request of a question about images. Raises PermanentError: the prompt is too long.

        `prompt` None is that of the checkpoint's own template with one image; another one's head is the recipe's too.
        """
        prompt = prompt or self._prompt
        suffix = prompt.suffix(self._tokenize, question, recipe.special_tokens)
        tokens = self._tokens(images, prompt.image_tokens)
        total = len(prompt.head_ids) + tokens + len(suffix)
        if total > self._limit:
            raise PermanentError(
                "prompt_too_long",
                f"the prompt has {total} tokens, {tokens} of them from images; the model takes {self._limit}. "
                "Shorten the question or lower --max-pixels",
            )
        key, pixels = " ".join(image.key for image in images), tuple(image.pixels for image in images)
        return Request(key, pixels, suffix, total, recipe, self._info.held_tokens)


def _place(image_id: str, images_dir: str | Path, roots: tuple[str | Path, ...]) -> str:
    try:
        return resolve_image(image_id, images_dir, roots)
    except OutsideRootError as error:
        raise PermanentError("image_outside_root", str(error)) from error
    except OSError as error:
        raise TransientError(f"{image_id!r} cannot be looked up: {error.strerror}") from error


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
