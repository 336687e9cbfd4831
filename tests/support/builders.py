"""Small runs for the tests: settings, questions, samples, failures, and a planned run directory."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from producer.dataset.selection import cut
from storage.naming import model_slug
from storage.question import Question
from storage.runs.plan import write_generation
from storage.runs.run import Run
from storage.sample import Failure, Sample
from storage.settings import ModelFacts, RunSettings

MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
ENVIRONMENT = {
    "device": "cpu",
    "gpu": "",
    "attention_implementation": "sdpa",
    "library_versions": "torch 2.14.0, transformers 5.0.0",
}


def make_settings(**changes: Any) -> RunSettings:
    """Return the settings of a run as the defaults make them; `changes` replace fields."""
    model = changes.get("model", MODEL)
    fields: dict[str, Any] = {
        "run_id": "0123456789abcdef",
        "created_at": "2026-01-01T00:00:00+00:00",
        "software_version": "0.1.0",
        "staged_identity": True,
        "model": model,
        "revision": "main",
        "model_digest": "0" * 12,
        "model_slug": model_slug(model),
        "dtype": "bfloat16",
        "layers": None,
        "max_new_tokens": 64,
        "min_pixels": None,
        "max_pixels": None,
        "dataset": "vqa.csv",
        "dataset_sha256": "0" * 64,
        "images_dir": "/images",
        "image_roots": (),
        "order": "image",
        "limit": None,
        "test": False,
        "checkpoint_interval": 3,
        "part_digits": 3,
    }
    return RunSettings(**(fields | changes))


def make_facts(**changes: Any) -> ModelFacts:
    """Return what a first worker records; the two widths differ, so that a confusion shows."""
    fields: dict[str, Any] = {
        "model_type": "qwen2_5_vl",
        "revision": "0123abcd",
        "config_sha256": "1" * 64,
        "template_sha256": "2" * 64,
        "num_hidden_layers": 4,
        "hidden_size": 8,
        "vision_hidden_size": 6,
        "layers": (0, 1, 3),
        "min_pixels": 3136,
        "max_pixels": 12845056,
        "repetition_penalty": 1.05,
    }
    return ModelFacts(**(fields | changes))


def make_questions(number: int, *, per_image: int = 2, extra: dict[str, str] | None = None) -> list[Question]:
    """Return questions q1, q2, … with `per_image` consecutive ones to an image."""
    return [
        Question(
            question_id=f"q{row}",
            image_id=f"image_{(row - 1) // per_image}.jpg",
            question=f"What is in image {(row - 1) // per_image}, seen for the {row}th time?",
            ground_truth_answer=f"truth {row}",
            csv_row=row,
            extra=dict(extra or {}),
        )
        for row in range(1, number + 1)
    ]


def make_vector(width: int, dtype: str, *content: str) -> np.ndarray:
    """Return a vector that is a function of `content` alone, in the computed dtype."""
    generator = np.random.default_rng(zlib.crc32("\0".join(content).encode(errors="surrogatepass")))
    values = generator.standard_normal(width, dtype=np.float32)
    return values.astype(ml_dtypes.bfloat16) if dtype == "bfloat16" else values


def make_sample(
    question: Question,
    *,
    dtype: str = "bfloat16",
    model: ModelFacts | None = None,
    answer: str | None = None,
    **facts: Any,
) -> Sample:
    """Return the sample of a question, always the same; questions of one image share their vision vectors."""
    model = model or make_facts()
    image, text = question.image_id, f"{question.image_id} {question.question_id}"
    vectors = {
        "vision_only_representation": make_vector(model.hidden_size, dtype, "vision only", image),
        "vision_encoder_representation": make_vector(model.vision_hidden_size, dtype, "vision encoder", image),
    }
    for layer in model.layers:
        vision = make_vector(model.hidden_size, dtype, f"vision token {layer}", image)
        vectors[f"vision_token_representation/layer_{layer}"] = vision
        query = make_vector(model.hidden_size, dtype, f"query token {layer}", text)
        vectors[f"query_token_representation/layer_{layer}"] = query
    common = {"seq_len": 40, "image_grid_thw": [1, 4, 6], "finish_reason": "eos", **ENVIRONMENT}
    return Sample(vectors, f"answer to {question.question_id}" if answer is None else answer, common | facts)


def make_failure(question: Question, *, reason: str = "image_missing", **changes: Any) -> Failure:
    """Return a permanent failure of a question."""
    fields: dict[str, Any] = {
        "question_id": question.question_id,
        "reason": reason,
        "message": f"{question.image_id} does not exist",
        "traceback": "Traceback (most recent call last): …",
        "attempts": 1,
        "worker": "worker@host",
        "time": "2026-01-01T00:00:00+00:00",
    }
    return Failure(**(fields | changes))


def make_run(
    output_dir: Path,
    questions: int | Sequence[Question] = 6,
    *,
    model: ModelFacts | None = None,
    agreed: bool = True,
    **changes: Any,
) -> Run:
    """Return a planned run. `agreed`: a worker has recorded the model; `changes` replace settings."""
    run = Run.create(output_dir, make_settings(**changes))
    if isinstance(questions, int):
        questions = make_questions(questions)
    assert write_generation(run.store, cut(questions, run.settings.checkpoint_interval), run_id=run.run_id)
    if agreed:
        run.pin_model(model or make_facts())
    return run


def stage(run: Run, part: int, *, failed: Collection[int] = (), skipped: Collection[int] = ()) -> None:
    """Stage every question of a slice: sequences in `failed` as failures, those in `skipped` not at all."""
    for sequence, question in enumerate(run.questions(part)):
        if sequence in failed:
            run.stage_failure(part, sequence, make_failure(question))
        elif sequence not in skipped:
            sample = make_sample(question, dtype=run.settings.dtype, model=run.model_facts())
            run.stage_sample(part, sequence, sample)
