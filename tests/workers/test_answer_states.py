"""States of answers' own tokens against a plain forward over prompt and answer, however the answer ended."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from storage.sample import Sample
from tests.workers.test_slots import QUESTIONS, bits
from workers.checks.reference import Reference
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.model import ModelEngine
from workers.extract.preprocess import Preprocessor

KINDS, LAYERS, LENGTH = ("first", "last", "mean", "all"), (0, 3, 6), 12


@pytest.fixture(scope="module")
def pairs(photographs: Path) -> list[tuple[Path, str]]:
    return [(path, question) for path in sorted(photographs.iterdir())[:3] for question in QUESTIONS]


@pytest.fixture(scope="module")
def model(small_model: Path, pairs: list[tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose end tokens are such that some answers are nothing else, some end midway, and some are cut."""
    plain = Reference(small_model)
    answers = [plain(path, question, max_new_tokens=LENGTH, layers=(0,))["answer_token_ids"] for path, question in pairs]
    first, midway = answers[0][0], next(a[4] for a in answers[1:] if a[4] not in a[:4] and a[4] != answers[0][0])
    directory = Path(shutil.copytree(small_model, tmp_path_factory.mktemp("ends") / "Qwen2.5-VL-Ends"))
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [first, midway]}))
    return directory


@pytest.fixture(scope="module")
def engine(model: Path) -> ModelEngine:
    return ModelEngine(EngineSpec("model", str(model), "main", "float32", "unused"))


def asked(engine: ModelEngine, pairs: Sequence[tuple[Path, str]], **settings: Any) -> list[Request]:
    preprocess, limits = Preprocessor(engine.info), (engine.info.min_pixels, engine.info.max_pixels)
    recipe = Recipe(**{"layers": LAYERS, "max_new_tokens": LENGTH, "answer_states": KINDS} | settings)
    return [preprocess.request([preprocess.image(p.name, p.parent, (), limits)], question, recipe) for p, question in pairs]


@torch.inference_mode()
def expected(model: Path, path: Path, question: str, answer: list[int], ends: list[int]) -> dict[str, np.ndarray]:
    """By one forward of plain transformers over the prompt and the answer's own tokens."""
    reference = Reference(model)
    plain: Qwen2_5_VLForConditionalGeneration = reference.model
    inputs = dict(reference.inputs(path, question))
    own = len(answer) - (len(answer) > 1 and answer[-1] in ends)
    begin = inputs["input_ids"].shape[1]
    for name, more in (("input_ids", answer), ("attention_mask", [1] * len(answer)), ("mm_token_type_ids", [0] * len(answer))):
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], torch.tensor([more])], dim=1)
    states: dict[int, torch.Tensor] = {}
    layers = plain.model.language_model.layers
    handles = [
        layers[i].register_forward_hook(lambda _m, _i, out, i=i: states.update({i: out[0] if isinstance(out, tuple) else out}))
        for i in LAYERS
    ]
    plain(**inputs)
    for handle in handles:
        handle.remove()
    found = {}
    for layer, of in states.items():
        tokens = of[0, begin:].numpy() if of.ndim == 3 else of[begin:].numpy()
        kinds = (("first", tokens[0]), ("last", tokens[own - 1]), ("mean", tokens[:own].mean(0)), ("all", tokens))
        for kind, value in kinds:
            found[f"answer_token_representation/{kind}/layer_{layer}"] = value
    return found


def assert_right(samples: list[Sample], model: Path, pairs: Sequence[tuple[Path, str]], engine: ModelEngine) -> None:
    for sample, (path, question) in zip(samples, pairs, strict=True):
        right = expected(model, path, question, sample.facts["answer_token_ids"], engine._generation.ends)
        assert {name for name in sample.vectors if name.startswith("answer")} == right.keys()
        for name, value in right.items():
            np.testing.assert_allclose(sample.vectors[name], value, rtol=0, atol=1e-4 * np.abs(value).max(), err_msg=name)


def test_answers_of_every_length(engine: ModelEngine, model: Path, pairs: list[tuple[Path, str]]) -> None:
    """In one batch: empty ones, one that ends midway, and some that are cut; and the answers are what they were."""
    samples = engine.extract(asked(engine, pairs))
    lengths = {(s.facts["num_answer_tokens"], s.facts["finish_reason"]) for s in samples}
    assert (1, "eos") in lengths
    assert (LENGTH, "length") in lengths
    assert any(1 < n < LENGTH and why == "eos" for n, why in lengths)
    assert_right(samples, model, pairs, engine)
    without = engine.extract(asked(engine, pairs, answer_states=()))
    for sample, bare in zip(samples, without, strict=True):
        assert sample.facts["answer_token_ids"] == bare.facts["answer_token_ids"]
        assert sample.vectors.keys() - bare.vectors.keys() == {name for name in sample.vectors if name.startswith("answer")}


def test_padded_and_whole_prompts(
    engine: ModelEngine, model: Path, pairs: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_right(engine.extract(asked(engine, pairs[:4], exact=True)), model, pairs[:4], engine)
    monkeypatch.setattr(engine, "_slots", None)
    assert_right(engine.extract(asked(engine, pairs)), model, pairs, engine)


@pytest.mark.parametrize("length", [1, 2])
def test_short_limits(length: int, engine: ModelEngine, model: Path, pairs: list[tuple[Path, str]]) -> None:
    assert_right(engine.extract(asked(engine, pairs, max_new_tokens=length)), model, pairs, engine)


def test_refilled_slots_keep_their_own(
    engine: ModelEngine, pairs: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any number of slots, in any order, the same bits."""
    from workers.engine import model as engine_model

    whole = [bits(sample) for sample in engine.extract(asked(engine, pairs))]
    for number in (1, 3, 5):
        monkeypatch.setattr(engine_model, "_MOST_SLOTS", number)
        engine.free_cache()
        assert [bits(sample) for sample in engine.extract(asked(engine, pairs[::-1]))][::-1] == whole


def test_other_kinds_and_layers_in_turn(engine: ModelEngine, model: Path, pairs: list[tuple[Path, str]]) -> None:
    """What is kept may change from batch to batch."""
    for settings in (
        {"answer_states": ("mean",), "layers": (6,)},
        {"answer_states": ()},
        {"answer_states": ("last",)},
        {"answer_states": ("all",)},
        {},
    ):
        samples = engine.extract(asked(engine, pairs[:5], **settings))
        kinds, layers = settings.get("answer_states", KINDS), settings.get("layers", LAYERS)
        names = {f"answer_token_representation/{kind}/layer_{layer}" for kind in kinds for layer in layers}
        assert {name for name in samples[0].vectors if name.startswith("answer")} == names
        for sample, (path, question) in zip(samples, pairs):
            right = expected(model, path, question, sample.facts["answer_token_ids"], engine._generation.ends)
            for name in names:
                np.testing.assert_allclose(sample.vectors[name], right[name], rtol=0, atol=1e-4 * np.abs(right[name]).max())
