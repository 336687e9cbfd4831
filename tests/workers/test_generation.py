"""What generation_config.json asks for: answers equal `generate`'s, or the checkpoint is refused with the reason."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from workers.checks.reference import Reference
from workers.engine.interface import EngineSpec, Recipe
from workers.engine.model import ModelEngine
from workers.errors import EngineStartError
from workers.extract.preprocess import Preprocessor

QUESTIONS = ("What is in the image?", "Why?", "Is there an animal in this picture? Answer in one word.")
LAYERS = (6,)
LENGTH = 16


def checkpoint(small_model: Path, directory: Path, **settings: Any) -> Path:
    """A copy whose generation_config.json says more."""
    shutil.copytree(small_model, directory, copy_function=lambda a, b: Path(b).symlink_to(a))
    path = directory / "generation_config.json"
    body = json.loads(path.read_text())
    path.unlink()
    path.write_text(json.dumps({**body, **settings}))
    return directory


def answers(model: Path, photographs: Path, *, penalty: float | None = None) -> tuple[list[Any], list[Any]]:
    """The engine's token ids, of one batch of several images and questions, and the reference's."""
    engine = ModelEngine(EngineSpec("model", str(model), "main", "float32", "unused"))
    preprocess, reference = Preprocessor(engine.info), Reference(model, repetition_penalty=penalty)
    limits = (engine.info.min_pixels, engine.info.max_pixels)
    requests, expected = [], []
    for path in sorted(photographs.iterdir())[:2]:
        image = preprocess.image(path.name, photographs, (), limits)
        for question in QUESTIONS:
            requests.append(
                preprocess.request([image], question, Recipe(layers=LAYERS, max_new_tokens=LENGTH, repetition_penalty=penalty))
            )
            expected.append(reference(path, question, max_new_tokens=LENGTH, layers=LAYERS)["answer_token_ids"])
    return [sample.facts["answer_token_ids"] for sample in engine.extract(requests)], expected


@pytest.fixture(scope="module")
def plain(small_model: Path, photographs: Path) -> list[Any]:
    return answers(small_model, photographs)[1]


SETTINGS: dict[str, dict[str, Any]] = {
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "min_new_tokens": {"min_new_tokens": 14},
    "min_length": {"min_length": 130},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 5.0},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": [2, 2.5]},
    "forced_eos_token_id": {"forced_eos_token_id": 8194},
    "no penalty": {"repetition_penalty": None},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_answers_equal_generates(name: str, plain: list[Any], small_model: Path, photographs: Path, tmp_path: Path) -> None:
    found, expected = answers(checkpoint(small_model, tmp_path / "model", **SETTINGS[name]), photographs)
    assert found == expected
    assert expected != plain  # else the setting would not be tested


@pytest.mark.parametrize("name", ["suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"])
def test_tokens_that_may_not_be_said(name: str, plain: list[Any], small_model: Path, photographs: Path, tmp_path: Path) -> None:
    first = sorted({ids[0] for ids in plain})
    value: Any = {"bad_words_ids": [[t] for t in first], "sequence_bias": [[[t], -50.0] for t in first]}.get(name, first)
    found, expected = answers(checkpoint(small_model, tmp_path / "model", **{name: value}), photographs)
    assert found == expected
    assert expected != plain


def test_the_runs_penalty_stands_beside_other_rules(small_model: Path, photographs: Path, tmp_path: Path) -> None:
    model = checkpoint(small_model, tmp_path / "model", no_repeat_ngram_size=3)
    found, expected = answers(model, photographs, penalty=1.6)
    assert found == expected
    assert expected != answers(model, photographs)[1]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_beams": 4}, "beam_search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"guidance_scale": 2.0}, "Guidance"),
        ({"max_time": 5.0}, "MaxTimeCriteria"),
        ({"stop_strings": ["."]}, "stop strings"),
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"eos_token_id": None}, "no end token.*eos_token_id"),
    ],
)
def test_what_cannot_be_done_is_refused_at_the_start(
    settings: dict[str, Any], named: str, small_model: Path, tmp_path: Path
) -> None:
    model = checkpoint(small_model, tmp_path / "model", **settings)
    if "eos_token_id" in settings:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").unlink()
        (model / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    with pytest.raises(EngineStartError, match=named) as caught:
        ModelEngine(EngineSpec("model", str(model), "main", "float32", "unused"))
    assert "generation_config.json" in str(caught.value)
