"""A trial: some of a dataset's questions through the real engine, timed, before anything is planned."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.computation import Computation
from workers.checkpoint.identity import resolve_layers
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.process import EngineProcess
from workers.engine.prompt import PromptStyle
from workers.errors import (
    BatchFailedError,
    EngineDiedError,
    EngineStartError,
    PermanentError,
    RunRefusedError,
    TransientError,
)
from workers.extract.preprocess import Preprocessor, limits_of
from workers.process.gpus import gpu_use, visible_gpus
from workers.settings import settings


@dataclass(frozen=True, slots=True)
class TrialCase:
    """A question as the model is asked it, about some images."""

    images: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Trial:
    """What a trial measured."""

    questions: int  # that the engine computed
    images: int
    device: str
    gpu: str
    load_seconds: float
    questions_per_second: float  # of the engine, the first batch apart where there are more
    image_tokens: tuple[int, int] | None  # the fewest and the most that an image became; None where the engine does not say
    memory_bytes: int | None  # on a GPU what is in use on it, on the CPU the engine's peak; None where unknown


TRIAL_ERRORS = (
    EngineStartError,
    RunRefusedError,
    BatchFailedError,
    EngineDiedError,
    PermanentError,
)  # what keeps a trial from its end


def run_trial(
    spec: EngineSpec, cases: Sequence[TrialCase], places: tuple[str, tuple[str, ...]], computation: Computation
) -> Trial:
    """Load the engine and compute the cases in batches as a worker forms them.

    `places` are the images directory and the further roots. Cases that cannot be prepared are left out.

    Raises UserError; EngineStartError; RunRefusedError where the prompt cannot be rendered; BatchFailedError,
    EngineDiedError where a batch fails; PermanentError where no case can be prepared.
    """
    engine = EngineProcess(spec, settings().engine_timeout)
    begun = time.monotonic()
    info = engine.start()
    loaded = time.monotonic() - begun
    try:
        prompts = {
            number: info.prompt if style == PromptStyle() else engine.prompt(style)
            for number in sorted({len(case.images) for case in cases})
            if (style := PromptStyle(computation.system_prompt, computation.chat_template, number))
        }
        layers = resolve_layers(computation.layers, info.num_hidden_layers)
        recipe = Recipe(**computation.options() | {"layers": layers})
        prepare = Preprocessor(info)
        limits = limits_of((computation.min_pixels, computation.max_pixels), info)

        def request(case: TrialCase) -> Request | None:
            options: dict[str, Any] = {"halp_compat": recipe.halp_compat, "exif_rotation": recipe.exif_rotation}
            try:
                with prepare.hold(case.images, *places, limits, **options) as images:
                    return prepare.request(images, case.text, recipe, prompts[len(images)])
            except (PermanentError, TransientError):
                return None

        requests = [r for case in cases if (r := request(case))]
        if not requests:
            raise PermanentError("trial", "none of the sampled questions can be prepared")
        times, tokens = [], set[int]()
        for batch in _batches(requests, 1 if recipe.exact else settings().batch_size, info.max_batch_tokens):
            started = time.monotonic()
            samples = engine.extract(batch)
            times.append((len(batch), time.monotonic() - started))
            tokens |= {sample.facts["num_vision_tokens"] for sample in samples if "num_vision_tokens" in sample.facts}
        measured = times[1:] or times  # the first batch warms the device up
        return Trial(
            questions=len(requests),
            images=len({request.image_key for request in requests}),
            device=info.environment["device"],
            gpu=info.environment["gpu"],
            load_seconds=loaded,
            questions_per_second=sum(n for n, _ in measured) / max(1e-9, sum(s for _, s in measured)),
            image_tokens=(min(tokens), max(tokens)) if tokens else None,
            memory_bytes=_memory(info.environment["device"], engine.pid),
        )
    finally:
        engine.stop()


def _batches(requests: Sequence[Request], size: int, tokens: int) -> Iterator[list[Request]]:
    batch: list[Request] = []
    for request in requests:
        if batch and (len(batch) == size or sum(r.weight for r in batch) + request.weight > tokens):
            yield batch
            batch = []
        batch.append(request)
    yield batch


def _memory(device: str, pid: int | None) -> int | None:
    if device.startswith("cuda"):
        uses = gpu_use(next(iter(visible_gpus()), None))
        return uses[0].memory_used if uses else None
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), None)
