"""The self-check: the engine against a plain forward and `generate`, on the user's own weights and device.

One model is in memory at a time: first the engine answers all questions, batched and one by one, then the reference, with
the usual attention kernel and with the plain one. The second against the first is the noise floor.

Where the memory does not hold the model in a dtype, the check takes its first layers, as many as fit, and says so.
"""

from __future__ import annotations

import gc
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig
from transformers.utils import cached_file, logging

from storage.errors import UserError
from workers.checkpoint.families import refuse_blind
from workers.checkpoint.identity import local_directory, resolve_layers
from workers.checks.questions import Case
from workers.checks.reference import Reference
from workers.checks.report import Comparison, Verdict
from workers.engine.interface import EngineSpec, Recipe
from workers.engine.memory_errors import is_out_of_memory
from workers.engine.models import family_of
from workers.engine.models.base import decoder_of
from workers.engine.process import make_engine
from workers.errors import EngineStartError, PermanentError, TransientError
from workers.extract.loading import Limits
from workers.extract.preprocess import Preprocessor

_MAX_PIXELS = 1280 * 28 * 28  # the plain attention kernel keeps a whole matrix of scores
_BATCH = 16
_SPARE_BYTES = 1 << 30  # beside the weights: activations, caches
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Result:
    """What one way of computing gave for one question."""

    vectors: dict[str, np.ndarray]
    answer_ids: list[int]


def check(spec: EngineSpec, cases: Sequence[Case], max_new_tokens: int, log: Callable[[str], None]) -> Verdict:
    """Check one dtype. Raises UserError: the model or an image cannot be read, or memory ran out."""
    try:
        return _check(spec, cases, max_new_tokens, log)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{spec.dtype}: the device ran out of memory: end what else uses it, or take another") from error


def _check(spec: EngineSpec, cases: Sequence[Case], max_new_tokens: int, log: Callable[[str], None]) -> Verdict:
    local_directory(spec.model)
    source = {"cache_dir": spec.cache_dir, **({} if Path(spec.model).is_dir() else {"revision": spec.revision})}
    with _refused(spec.model):
        config = AutoConfig.from_pretrained(spec.model, **source)
        refuse_blind(config.to_dict())
        number, fit, memory = _layers_that_fit(config, _DTYPES[spec.dtype].itemsize)
    if fit == 0:
        return Verdict(spec.dtype, len(cases), number, 0, memory, {})
    with _first_layers(spec.model, source, fit if fit < number else None) as model:
        log(f"{spec.dtype}: the engine, {len(cases)} questions, batched and one by one")
        recipe = Recipe(layers=resolve_layers(None, fit), max_new_tokens=max_new_tokens)
        environment, limits, batched, exact = _run_engine(replace(spec, model=model), cases, recipe)
        _free_memory()
        log(f"{spec.dtype}: the reference, under two attention kernels")
        source = source if model == spec.model else {}
        plain, other = _run_reference(model, source, _DTYPES[spec.dtype], limits, cases, recipe)
        _free_memory()
    compared = (_compare(ours, plain) for ours in (batched, exact, other))
    return Verdict(spec.dtype, len(cases), number, fit, memory, environment, *compared)


@contextmanager
def _refused(model: str) -> Iterator[None]:
    """Turn what a checkpoint that cannot be loaded raises into the user's mistake."""
    try:
        yield
    except (EngineStartError, OSError, ValueError, AttributeError, SafetensorError) as error:
        lines = str(error).strip().splitlines()
        raise UserError(f"--model {model}: cannot be loaded: {lines[0] if lines else repr(error)}") from error


def _run_engine(
    spec: EngineSpec, cases: Sequence[Case], recipe: Recipe
) -> tuple[dict[str, str], Limits, list[Result], list[Result]]:
    """Return the environment, the pixel limits, and the results of batches and of the `exact` recipe."""
    with _refused(spec.model):
        engine = make_engine(spec)
    least, most = engine.info.min_pixels, engine.info.max_pixels
    limits = (least, None if most is None else min(most, _MAX_PIXELS))
    preprocess = Preprocessor(engine.info)
    found: list[list[Result]] = []
    for one in (recipe, recipe.model_copy(update={"exact": True})):
        requests = []
        for case in cases:
            try:
                image = preprocess.image(case.path.name, case.path.parent, (case.path.resolve().parent,), limits)
                requests.append(preprocess.request([image], case.question, one))
            except PermanentError as error:
                raise UserError(error.message) from error
            except TransientError as error:
                raise UserError(str(error)) from error
        batches = [requests[start : start + _BATCH] for start in range(0, len(requests), _BATCH)]
        samples = [sample for batch in batches for sample in engine.extract(batch)]
        found.append(
            [
                Result({name: v.astype(np.float32) for name, v in s.vectors.items()}, s.facts.get("answer_token_ids", []))
                for s in samples
            ]
        )
    return engine.info.environment, limits, found[0], found[1]


def _run_reference(
    model: str,
    source: dict[str, Any],
    dtype: torch.dtype,
    limits: Limits,
    cases: Sequence[Case],
    recipe: Recipe,
) -> tuple[list[Result], list[Result]]:
    """Return the reference's results under the usual attention kernel and under the plain one."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    place: Any = None if gpus == 0 else {"": 0} if gpus == 1 else "auto"
    reference = Reference(
        model, min_pixels=limits[0], max_pixels=limits[1], dtype=dtype, device_map=place, **source
    )  # fmt: skip
    found: list[list[Result]] = []
    for kernel in (nullcontext(), sdpa_kernel(SDPBackend.MATH)):
        with kernel:
            results = [reference(c.path, c.question, max_new_tokens=recipe.max_new_tokens, layers=recipe.layers) for c in cases]
        found.append([Result({n: v for n, v in r.items() if "_representation" in n}, r["answer_token_ids"]) for r in results])
    return found[0], found[1]


def _compare(ours: Sequence[Result], reference: Sequence[Result]) -> Comparison:
    errors: dict[str, list[float]] = {}
    for one, other in zip(ours, reference, strict=True):
        for name, wanted in other.vectors.items():
            with np.errstate(all="ignore"):
                error = float(np.abs(one.vectors[name] - wanted).max() / np.abs(wanted).max())
            # What cannot be compared is wrong.
            errors.setdefault(name.split("_representation")[0], []).append(error if math.isfinite(error) else math.inf)
    same = sum(one.answer_ids == other.answer_ids for one, other in zip(ours, reference, strict=True))
    return Comparison({n: median(e) for n, e in errors.items()}, {n: max(e) for n, e in errors.items()}, same)


# Memory


def _layers_that_fit(config: Any, itemsize: int) -> tuple[int, int, str]:
    """Return how many decoder layers the model has, how many of them fit, and the sizes in words."""
    auto = family_of(config.model_type).AUTO
    with torch.device("meta"):
        model = auto.from_config(config) if hasattr(auto, "from_config") else auto(config)
    layers = decoder_of(model).layers
    total, layer = (sum(p.numel() for p in m.parameters()) * itemsize for m in (model, layers[0]))
    free = free_bytes()
    spare = _SPARE_BYTES + total // 10
    words = f"it needs {(total + spare) / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    fit = (free - _SPARE_BYTES - (total - layer * len(layers)) * 11 // 10) // (layer * 11 // 10)
    if config.model_type != "qwen2_5_vl" and fit < len(layers):
        return len(layers), 0, words  # of which the first layers alone are no checkpoint that anything loads
    return len(layers), max(0, min(len(layers), fit)), words


def free_bytes() -> int:
    """Return the memory that is free where the model will lie."""
    if torch.cuda.is_available():
        return sum(torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count()))
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))


@contextmanager
def _first_layers(model: str, source: dict[str, Any], number: int | None) -> Iterator[str]:
    """Give the model itself, or a directory that links its files and says that it has fewer layers."""
    if number is None:
        yield model
        return
    logging.set_verbosity_error()  # it would list the weights of the other layers
    if not (directory := Path(model)).is_dir():
        from huggingface_hub import snapshot_download

        directory = Path(snapshot_download(model, **source))
    config = json.loads(Path(cached_file(str(directory), "config.json")).read_text())
    for part in (config, config.get("text_config", {})):
        if "num_hidden_layers" in part:
            part["num_hidden_layers"] = part["max_window_layers"] = number
            part.pop("layer_types", None)
    with tempfile.TemporaryDirectory() as folder:
        for file in directory.iterdir():
            if file.name != "config.json":
                os.symlink(file.resolve(), Path(folder) / file.name)
        (Path(folder) / "config.json").write_text(json.dumps(config))
        yield folder


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
