"""The engine's values against a plain batch-1 float32 forward with its own hooks; and that wrong positions would show."""

from __future__ import annotations

import multiprocessing
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from storage.sample import Sample
from tests.support.mistakes import MISTAKES
from workers.checks.reference import Reference
from workers.engine import process as engine_process
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.model import ModelEngine
from workers.engine.models.qwen2_5_vl import widen
from workers.errors import PermanentError
from workers.extract.batcher import DynamicBatcher
from workers.extract.preprocess import Preprocessor

LAYERS = (0, 1, 3, 5, 6)
MAX_NEW_TOKENS = 24
TOLERANCE = 1e-4
QUESTIONS = (
    "What is in the image?",
    "Is there an animal in this picture, and if so, what colour is it? Answer in one word.",
    "Why?",
    "Use <tool_call> here: 画像には何がありますか？",
)


@pytest.fixture(scope="module")
def engine(small_model: Path) -> ModelEngine:
    return ModelEngine(EngineSpec("model", str(small_model), "main", "float32", "unused"))


@pytest.fixture(scope="module")
def cases(engine: ModelEngine, small_model: Path, photographs: Path) -> list[tuple[Request, dict[str, Any]]]:
    """Every photograph with two or three questions: the request, and what the reference says."""
    reference, preprocess = Reference(small_model), Preprocessor(engine.info)
    limits = (engine.info.min_pixels, engine.info.max_pixels)
    found = []
    for index, path in enumerate(sorted(photographs.iterdir())):
        image = preprocess.image(path.name, photographs, (), limits)
        for question in QUESTIONS[index % 3 : index % 3 + 2 + index % 2]:
            expected = reference(path, question, max_new_tokens=MAX_NEW_TOKENS, layers=LAYERS)
            found.append(
                (preprocess.request([image], question, Recipe(layers=LAYERS, max_new_tokens=MAX_NEW_TOKENS)), expected)
            )
    assert len(found) >= 24
    return found


def worst_error(sample: Sample, expected: dict[str, Any]) -> float:
    """Return max|a-b| / max|b| of the worst vector."""
    assert len(sample.vectors) == 2 + 2 * len(LAYERS)
    return max(float(np.abs(v - expected[k]).max() / np.abs(expected[k]).max()) for k, v in sample.vectors.items())


def assert_equal(sample: Sample, expected: dict[str, Any]) -> None:
    assert worst_error(sample, expected) < TOLERANCE
    assert sample.answer == expected["answer"]
    assert sample.facts["answer_token_ids"] == expected["answer_token_ids"]
    for name in ("seq_len", "vision_token_position", "query_token_position", "image_grid_thw"):
        assert sample.facts[name] == expected[name]


@pytest.mark.parametrize("size", [1, 5, 64])
def test_values_equal_the_reference(engine: ModelEngine, cases: Any, size: int) -> None:
    for start in range(0, len(cases), size):
        batch = cases[start : start + size]
        for sample, (_, expected) in zip(engine.extract([request for request, _ in batch]), batch, strict=True):
            assert_equal(sample, expected)


def test_values_do_not_depend_on_the_order(engine: ModelEngine, cases: Any) -> None:
    shuffled = random.Random(3).sample(cases, len(cases))
    for start in range(0, len(shuffled), 7):
        batch = shuffled[start : start + 7]
        for sample, (_, expected) in zip(engine.extract([request for request, _ in batch]), batch, strict=True):
            assert_equal(sample, expected)


def test_answers_end_for_both_reasons(engine: ModelEngine, cases: Any) -> None:
    reasons = {sample.facts["finish_reason"] for sample in engine.extract([request for request, _ in cases])}
    assert reasons == {"eos", "length"}


def test_no_answer_is_asked_for(engine: ModelEngine, cases: Any) -> None:
    request, expected = cases[0]
    silent = replace(request, recipe=Recipe(layers=LAYERS, max_new_tokens=0))
    [sample] = engine.extract([silent])
    assert (sample.answer, sample.facts["finish_reason"]) == ("", "none")
    assert worst_error(sample, expected) < TOLERANCE


def test_log_probabilities_are_the_models(engine: ModelEngine, cases: Any, small_model: Path, photographs: Path) -> None:
    """The first token's log-probability and entropy, from a plain forward's logits."""
    request, _ = cases[0]
    [sample] = engine.extract([request])
    reference = Reference(small_model)
    with torch.inference_mode():
        inputs = reference.inputs(sorted(photographs.iterdir())[0], QUESTIONS[0])
        distribution = reference.model(**inputs).logits[0, -1].float().log_softmax(-1)
    token = sample.facts["answer_token_ids"][0]
    assert sample.facts["answer_token_logprobs"][0] == pytest.approx(distribution[token].item(), abs=1e-4)
    entropy = -(distribution.exp() * distribution).sum().item()
    assert sample.facts["first_token_entropy"] == pytest.approx(entropy, abs=1e-4)


def test_bfloat16_vectors_stay_bfloat16(small_model: Path, cases: Any) -> None:
    engine = ModelEngine(EngineSpec("model", str(small_model), "main", "bfloat16", "unused"))
    [sample] = engine.extract([cases[0][0]])
    assert {vector.dtype.name for vector in sample.vectors.values()} == {"bfloat16"}
    worst = max(
        np.abs(v.astype(np.float32) - cases[0][1][k]).max() / np.abs(cases[0][1][k]).max() for k, v in sample.vectors.items()
    )
    assert worst < 0.1  # bfloat16 keeps 8 bits


# The checks above are worth what they would catch: each of these mistakes must fail them by far.


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_would_show(
    engine: ModelEngine, cases: Any, mistake: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.free_cache()
    mistake(monkeypatch)
    batch = cases[:8]
    samples = engine.extract([request for request, _ in batch])
    engine.free_cache()
    errors = [worst_error(sample, expected) for sample, (_, expected) in zip(samples, batch, strict=True)]
    assert max(errors) > 100 * TOLERANCE


# Recipes that share nothing, and others.


def test_exact_equals_the_reference(engine: ModelEngine, cases: Any) -> None:
    requests = [replace(request, recipe=request.recipe.model_copy(update={"exact": True})) for request, _ in cases[:8]]
    for sample, (_, expected) in zip(engine.extract(requests), cases, strict=False):
        assert_equal(sample, expected)
        assert (sample.facts["batch_size"], sample.facts["image_prefix"]) == (1, "computed")


def test_another_kernel_is_the_noise_floor(engine: ModelEngine, cases: Any) -> None:
    request, expected = cases[0]
    [sample] = engine.extract([replace(request, recipe=request.recipe.model_copy(update={"exact": True, "math_kernel": True}))])
    assert 0 < worst_error(sample, expected) < TOLERANCE


def test_images_are_shared_within_and_across_batches(engine: ModelEngine, cases: Any) -> None:
    engine.free_cache()
    requests = [request for request, _ in cases]
    images = {request.image_key for request in requests}
    first = [sample.facts["image_prefix"] for sample in engine.extract(requests[:6])]
    rest = [sample.facts["image_prefix"] for sample in engine.extract(requests[6:])]
    assert (first + rest).count("computed") == len(images)
    for sample, (_, expected) in zip(engine.extract(requests), cases, strict=True):  # all of them from the cache
        assert sample.facts["image_prefix"] == "shared"
        assert_equal(sample, expected)


def test_the_prefix_cache_is_bounded(engine: ModelEngine, cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.free_cache()
    monkeypatch.setattr(engine._prefixes.kept, "max_bytes", 300_000)
    for request, expected in cases:
        [sample] = engine.extract([request])
        assert_equal(sample, expected)
        assert engine._prefixes.kept._bytes <= 300_000
    assert engine._prefixes.kept._bytes == sum(prefix.nbytes for prefix in engine._prefixes.kept._kept.values())
    engine.free_cache()


def test_images_are_prefilled_together_on_a_gpu(engine: ModelEngine, cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.free_cache()
    monkeypatch.setattr(engine._prefixes, "packed", True)
    monkeypatch.setattr(engine._prefixes, "at_once", 250)  # as on a GPU: several images of different sizes in one row
    for sample, (_, expected) in zip(engine.extract([request for request, _ in cases]), cases, strict=True):
        assert_equal(sample, expected)
    engine.free_cache()


def test_embeddings_only_ends_after_the_highest_layer(engine: ModelEngine, cases: Any) -> None:
    request, expected = cases[0]
    ran: list[int] = []
    handles = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(engine._family.layers)]
    [sample] = engine.extract([replace(request, recipe=Recipe(layers=(0, 3), max_new_tokens=0))])
    for handle in handles:
        handle.remove()
    assert max(ran) == 3
    for name in ("vision_token_representation/layer_3", "query_token_representation/layer_0"):
        np.testing.assert_allclose(sample.vectors[name], expected[name], rtol=0, atol=1e-4 * np.abs(expected[name]).max())


def test_halp_compat_takes_the_published_positions(
    engine: ModelEngine, cases: Any, small_model: Path, photographs: Path
) -> None:
    """The mean before the merger, and the vision token at min(patches, seq_len // 2), from a plain forward."""
    request, expected = cases[0]
    [sample] = engine.extract([replace(request, recipe=request.recipe.model_copy(update={"halp_compat": True}))])
    position = min(int(np.prod(expected["image_grid_thw"])), expected["seq_len"] // 2)
    assert sample.facts["vision_token_position"] == position
    reference = Reference(small_model)
    inputs = reference.inputs(sorted(photographs.iterdir())[0], QUESTIONS[0])
    with torch.inference_mode():
        states = reference.model(**inputs, output_hidden_states=True).hidden_states
    for layer in (0, 3, 5):  # of the last layer, hidden_states has the normed output
        wanted = states[layer + 1][0, position].numpy()
        found = sample.vectors[f"vision_token_representation/layer_{layer}"]
        assert np.abs(found - wanted).max() < TOLERANCE * np.abs(wanted).max()
    np.testing.assert_allclose(
        sample.vectors["vision_only_representation"], expected["vision_encoder_representation"], rtol=1e-3, atol=1e-4
    )
    assert "vision_encoder_representation" not in sample.vectors
    assert sample.answer == expected["answer"]


def test_options_of_a_recipe(engine: ModelEngine, cases: Any, small_model: Path, photographs: Path) -> None:
    request, _ = cases[0]
    plain = Reference(small_model, repetition_penalty=1.5)
    expected = plain(sorted(photographs.iterdir())[0], QUESTIONS[0], max_new_tokens=MAX_NEW_TOKENS, layers=(2,))
    recipe = Recipe(layers=(2,), max_new_tokens=MAX_NEW_TOKENS, repetition_penalty=1.5, vision_encoder=False)
    [sample] = engine.extract([replace(request, recipe=recipe)])
    assert sample.answer == expected["answer"]
    assert set(sample.vectors) == {
        "vision_only_representation",
        "vision_token_representation/layer_2",
        "query_token_representation/layer_2",
    }


def test_out_of_memory_splits_and_recovers(engine: ModelEngine, cases: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than three questions do not fit: batches are halved until they do, and the values are those of the reference."""
    engine.free_cache()
    slots = engine._slots
    assert slots is not None
    fits = slots.run
    sizes: list[int] = []

    def run(prefill: Any) -> None:
        sizes.append(len(prefill.where))
        ends = [prefill.ids[end - 3 : end].tolist() for _, _, end, _ in prefill.plan.spans]
        if len(ends) > 3 or [5, 6, 7] in ends:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        fits(prefill)

    too_large = replace(cases[0][0], suffix_ids=(5, 6, 7))
    monkeypatch.setattr(slots, "run", run)
    monkeypatch.setattr(engine_process, "make_engine", lambda spec: engine)
    ours, theirs = multiprocessing.Pipe()
    process = engine_process.EngineProcess(EngineSpec("model", "", "main", "float32", ""), 60)
    threading.Thread(target=engine_process._serve, args=(theirs, process._memories), daemon=True).start()
    ours.send(process._spec)
    assert ours.recv() == engine.info
    process._connection = ours
    fatal: list[BaseException] = []
    batcher = DynamicBatcher(
        process.extract, max_batch_size=16, max_batch_tokens=10**6, max_queue_delay=0.2, on_fatal=fatal.append
    )
    futures = [batcher.submit("run", request) for request, _ in cases]
    alone = batcher.submit("run", too_large)
    for future, (_, expected) in zip(futures, cases, strict=True):
        assert_equal(future.result(60), expected)
    with pytest.raises(PermanentError, match="does not fit into memory even alone") as caught:
        alone.result(60)
    assert caught.value.reason == "out_of_memory"
    batcher.close()
    ours.close()
    assert max(sizes) == 16
    assert not fatal
    engine.free_cache()


def test_patches_are_bit_equal_to_the_official_recipe(engine: ModelEngine, small_model: Path, photographs: Path) -> None:
    """uint8 pixels resized in the task threads, normalised and patchified in the engine: qwen-vl-utils and the processor."""
    preprocess = Preprocessor(engine.info)
    for limits in [(3136, 12_845_056), (3136, 20_000), (150_000, 12_845_056)]:
        reference = Reference(small_model, min_pixels=limits[0], max_pixels=limits[1])
        for path in sorted(photographs.iterdir()):
            pixels = preprocess.image(path.name, photographs, (), limits).pixels
            patches = engine._family.inputs("<|image_pad|>", [pixels])
            official = reference.inputs(path, "?")
            assert torch.equal(patches["pixel_values"], official["pixel_values"])
            assert torch.equal(patches["image_grid_thw"], official["image_grid_thw"])


def test_a_device_makes_the_same_patches(small_model: Path, photographs: Path) -> None:
    """As a GPU normalises and cuts them: here the device is the CPU, said explicitly."""
    engine = ModelEngine(EngineSpec("model", str(small_model), "main", "float32", "unused"))
    family, image = engine._family, np.array(Image.open(photographs / "coffee.png").resize((280, 196)))
    before = family.inputs("<|image_pad|>", [image])
    family.process_on(torch.device("cpu"))
    assert family._where
    after = family.inputs("<|image_pad|>", [image])
    assert torch.equal(before["pixel_values"], after["pixel_values"])


def test_a_wider_perceptron_is_the_same() -> None:
    torch.manual_seed(0)
    perceptron = Qwen2_5_VLMLP(SimpleNamespace(hidden_size=40, intermediate_size=107, hidden_act="silu"), bias=True)
    states = torch.randn(5, 40)
    expected = perceptron(states)
    widen(perceptron)
    assert perceptron.down_proj.in_features == perceptron.gate_proj.weight.shape[0] == 128
    torch.testing.assert_close(perceptron(states), expected, rtol=1e-6, atol=1e-6)
