"""What a GPU worker does for one question: open its run, prepare it, have the engine compute it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from storage.computation import Computation
from storage.errors import ReplacedError, UserError
from storage.question import DIGESTS
from storage.runs.run import Run
from storage.sample import Sample, refuse_too_large
from storage.settings import AS_ASKED, LAST_POSITIONS, ModelFacts, RunSettings
from storage.stores.location import is_within, resolve_location
from storage.wording import asked
from workers.checkpoint.hub import cache_of
from workers.checkpoint.identity import resolve_layers
from workers.checkpoint.published import PUBLISHED, refuse_unpublished
from workers.engine.interface import EngineSpec, ModelInfo, Recipe, Request
from workers.engine.process import BATCHES, EngineProcess
from workers.engine.prompt import PromptParts, PromptStyle
from workers.errors import (
    EngineDiedError,
    EngineStartError,
    MessageRefusedError,
    PermanentError,
    RunRefusedError,
    TransientError,
)
from workers.extract.batcher import MAX_CRASHES_ALONE, Crashes, DynamicBatcher, engine_crashed
from workers.extract.certificate import Certifier
from workers.extract.loading import PreparedImage
from workers.extract.preprocess import Preprocessor, limits_of
from workers.monitor.metrics import measured
from workers.settings import WorkerSettings

# Far above the time that a question can take; reached only if the batcher's threads are gone.
_RESULT_TIMEOUT = 3600.0


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run that this worker has agreed to compute."""

    run: Run
    facts: ModelFacts
    prompt: PromptParts
    images: int  # that the prompt has
    recipe: Recipe


class _CrashesInFiles:
    """The crashes of the engine under one question, as marks beside its staged file: every worker sees them."""

    def __init__(self, run: Run, part: int, sequence: int, worker: str) -> None:
        self._run, self._part, self._sequence, self._worker = run, part, sequence, worker
        self.alone = run.crashes_alone(part, sequence)

    @property
    def suspect(self) -> bool:
        """Whether the question was in flight at a crash."""
        return self.alone is not None

    def note(self, error: EngineDiedError, *, alone: bool) -> int:
        """Record a crash."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        facts = {"error": str(error), "worker": self._worker, "time": time}
        self.alone = self._run.note_crash(self._part, self._sequence, alone=alone, **facts)
        return self.alone


class Extractor:
    """One preloaded engine with its preprocessor and batcher. Its methods are called from many task threads."""

    def __init__(self, config: WorkerSettings, worker: str, on_fatal: Callable[[BaseException], None]) -> None:
        self._worker = worker
        cache = cache_of(config.model, config.revision, config.cache_dir)
        spec = EngineSpec(config.engine, config.model, config.revision, config.dtype, cache, config.cudnn_attention)
        self.engine = EngineProcess(spec, config.engine_timeout, config.load_timeout)
        self.info: ModelInfo = self.engine.start()
        self.preprocess = Preprocessor(self.info)
        self._batcher = DynamicBatcher(
            measured(self.engine.extract),
            max_batch_size=config.batch_size,
            max_batch_tokens=config.max_batch_tokens or self.info.max_batch_tokens,
            max_queue_delay=config.max_queue_delay,
            on_fatal=on_fatal,
            ahead=BATCHES - 1,
        )
        self._certifier = Certifier(self._compute)
        self._roots = config.data_roots
        self._runs: dict[tuple[str, str], OpenRun] = {}
        self._prompts: dict[PromptStyle, PromptParts | RunRefusedError] = {}
        self._lock, self._prompting = threading.Lock(), threading.Lock()

    def open_run(self, run_dir: str, run_id: str) -> OpenRun:
        """Open a run that a message names, once. Raises RunRefusedError; TransientError while its files are not there.

        One that is open is known by what its run.json says now: the directory may have been removed, and hold another.
        """
        with self._lock:
            opened = self._runs.get((run_dir, run_id))
        if opened is not None:
            try:
                opened.run.store.check()
                return opened
            except ReplacedError:
                with self._lock:
                    self._runs.pop((run_dir, run_id), None)
        with self._lock:
            if (run_dir, run_id) not in self._runs:
                self._runs[run_dir, run_id] = self._agree(open_run_in_roots(run_dir, run_id, self._roots))
            return self._runs[run_dir, run_id]

    def extract(self, opened: OpenRun, part: int, sequence: int) -> Sample:
        """Compute one question. With one of each part come its exact results: the part keeps how far they are.

        Raises PermanentError, TransientError, BatchFailedError, EngineStartError.
        """
        settings, facts = opened.run.settings, opened.facts
        question = opened.run.questions(part)[sequence]
        crashes = _CrashesInFiles(opened.run, part, sequence, self._worker)
        if crashes.alone is not None and crashes.alone >= MAX_CRASHES_ALONE:  # a worker was killed before it could say so
            raise engine_crashed(f"the engine died {crashes.alone} times")
        named = () if settings.blind else question.images
        with self.preprocess.hold(
            named,
            opened.run.images.images_dir,
            opened.run.images.image_roots,
            (facts.min_pixels, facts.max_pixels),
            halp_compat=settings.halp_compat,
            exif_rotation=settings.exif_rotation,
        ) as images:
            text = asked(settings.prompt, question, columns=settings.prompt_columns)
            prompt = opened.prompt if len(images) == opened.images else self._prompt_about(settings, len(images))
            request = self.preprocess.request(images, text, opened.recipe, prompt)
            sample = self._compute(settings.run_id, request, crashes)
            _refuse_unfinite(sample)
            if not settings.exact and not settings.halp_compat:
                sample = self._certifier.add(opened.run, part, request, sample)
        return replace(sample, facts=sample.facts | self.info.environment | _provenance(images))

    def _compute(self, run_id: str, request: Request, crashes: Crashes) -> Sample:
        return self._batcher.submit((run_id, request.recipe), request, crashes).result(_RESULT_TIMEOUT)

    def close(self) -> None:
        """Finish what waits and stop the engine."""
        self._batcher.close()
        self.engine.stop()

    def _agree(self, run: Run) -> OpenRun:
        try:
            images = 0 if run.settings.blind else 1
            prompt = self._prompt(prompt_style(run.settings, images))
            facts = self._facts(run, prompt)
            opened = OpenRun(run, facts, prompt, images, _recipe(run.settings, facts))
        except RunRefusedError as error:
            run.note_refusal(self._worker, str(error))
            raise
        run.withdraw_refusal(self._worker)
        return opened

    def _prompt_about(self, settings: RunSettings, images: int) -> PromptParts:
        """Return the prompt of a run's question about another number of images than its others. Raises PermanentError."""
        try:
            return self._prompt(prompt_style(settings, images))
        except RunRefusedError as error:
            what = f"{images} images" if images else "no image"
            raise PermanentError("images_refused", f"the model cannot be asked about {what}: {error}") from error

    def _prompt(self, style: PromptStyle) -> PromptParts:
        """Return the prompt of a style; what was refused once is not tried again, as it may cost the engine's time."""
        if style == PromptStyle():
            return self.info.prompt
        if style not in self._prompts:
            with self._prompting:
                if style not in self._prompts:
                    self._prompts[style] = self._made(style)
        found = self._prompts[style]
        if isinstance(found, RunRefusedError):
            raise found
        return found

    def _made(self, style: PromptStyle) -> PromptParts | RunRefusedError:
        try:
            return self.engine.prompt(style)
        except RunRefusedError as error:
            return error
        except EngineDiedError as error:
            if style.images == 1:  # a template that does not end
                return RunRefusedError(f"the run's chat template cannot be rendered: {error}")
            # Perhaps of memory that was full: another time there is room.
            raise TransientError(f"the engine ended while it tried a prompt about {style.images} images: {error}") from error
        except EngineStartError as error:
            raise TransientError(str(error)) from error

    def _facts(self, run: Run, prompt: PromptParts) -> ModelFacts:
        settings, info = run.settings, self.info
        try:
            layers = resolve_layers(settings.layers, info.num_hidden_layers)
            published = None
            if settings.halp_compat:
                if info.model_type != "fake":
                    refuse_unpublished(info.model_type)
                published = PUBLISHED.get(info.model_type, PUBLISHED["qwen2_5_vl"])
        except UserError as error:
            raise RunRefusedError(str(error)) from error
        asked_limits = settings.min_pixels, settings.max_pixels
        minimum, maximum = limits_of(asked_limits, info)
        if info.factor is None and asked_limits != (None, None):
            raise RunRefusedError(
                f"--min-pixels and --max-pixels: a {info.model_type} model's own processor sizes images: leave them out"
            )
        if minimum is not None and maximum is not None and minimum > maximum:
            raise RunRefusedError(f"--min-pixels {minimum} is above --max-pixels {maximum}")
        facts = ModelFacts(
            model_type=info.model_type,
            revision=info.revision,
            config_sha256=info.config_sha256,
            template_sha256=prompt.sha256,
            num_hidden_layers=info.num_hidden_layers,
            hidden_size=info.hidden_size,
            vision_hidden_size=info.vision_hidden_size,
            vision_encoder_definition=info.vision_encoder_definition,
            layers=layers,
            chat_template_sha256=settings.chat_template_sha256(),
            **{name: getattr(settings, name) for name in AS_ASKED},
            positions=published.positions if published else LAST_POSITIONS,
            layer_definition=published.layers if published else "output",
            vision_only_definition=published.vision_only if published else "merged",
            vision_only_size=info.published_vision_size if published else None,
            min_pixels=minimum,
            max_pixels=maximum,
            repetition_penalty=(
                info.repetition_penalty if settings.repetition_penalty is None else settings.repetition_penalty
            ),
        )
        try:
            refuse_too_large(facts.field_widths(), settings)
        except UserError as error:
            raise RunRefusedError(str(error)) from error
        recorded = run.pin_model(facts)
        if recorded != facts:
            ours, theirs = facts.model_dump(), recorded.model_dump()
            differing = ", ".join(f"{k}: {v!r} here, {theirs[k]!r} in the run" for k, v in ours.items() if v != theirs[k])
            raise RunRefusedError(f"this worker's model is not the one that the run began with ({differing})")
        return facts


def prompt_style(settings: Computation, images: int) -> PromptStyle:
    """Return what a computation has rendered otherwise than the checkpoint would, about so many images."""
    return PromptStyle(settings.system_prompt, settings.chat_template, images)


def _provenance(images: Sequence[PreparedImage]) -> dict[str, Any]:
    """Return what is recorded of a question's images: of several their digests in one text, and lists of sizes."""
    if not images:
        return {}
    sizes, resized = ([list(size) for size in found] for found in zip(*((i.original_size, i.resized_size) for i in images)))
    one = len(images) == 1
    return {
        "image_sha256": DIGESTS.join(image.sha256 for image in images),
        "image_size": sizes[0] if one else sizes,
        "resized_size": resized[0] if one else resized,
    }


def _recipe(settings: RunSettings, facts: ModelFacts) -> Recipe:
    resolved = {name: getattr(facts, name) for name in ("layers", "repetition_penalty", "min_pixels", "max_pixels")}
    return Recipe(**settings.options() | resolved)


def _refuse_unfinite(sample: Sample) -> None:
    """Raise PermanentError for vectors that no probe can use; computed again they would be the same."""
    for name, vector in sample.vectors.items():
        if not np.isfinite(vector).all():
            raise PermanentError(
                "not_finite",
                f"the model gives {name} values that are not finite for it: try --dtype float32, or another image",
            )


def open_run_in_roots(run_dir: str, run_id: str, roots: tuple[str, ...]) -> Run:
    """Open the run that a message names if it lies under a data root, links followed.

    Raises RunRefusedError, MessageRefusedError, TransientError.
    """
    try:
        location = resolve_location(run_dir)
    except UserError as error:
        raise MessageRefusedError(str(error)) from error
    if not any(is_within(location, root) for root in roots):
        places = ", ".join(roots)
        raise RunRefusedError(f"{location} is outside this worker's data roots ({places}): set HALP_DATA_ROOTS")
    try:
        run = Run.open(location)
    except UserError as error:
        raise TransientError(str(error)) from error
    if run.run_id != run_id:
        raise MessageRefusedError(f"{location} holds run {run.run_id}, not {run_id}: it is of a run that was deleted")
    return run
