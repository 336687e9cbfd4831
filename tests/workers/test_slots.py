"""Slots: any number of them, refilled, in any order, gives the same bits and `generate`'s answers; a step reads nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from storage.sample import Sample
from tests.support.launches import DEPTH, HEAD, TEXT, Launches, fake_seven, filled, images, prefilled, spread
from workers.checks.reference import Reference
from workers.engine import model as engine_model
from workers.engine.attention import Spans
from workers.engine.decoding.slot_cache import SlotCache
from workers.engine.decoding.slots import Slots
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.loading import MemoryBounds
from workers.engine.model import ModelEngine
from workers.engine.passes import Passes
from workers.engine.prefixes import Prefixes
from workers.engine.proving.proof import is_invariant
from workers.extract.preprocess import Preprocessor

QUESTIONS = ("What is in the image?", "Why?", "Is there an animal in this picture? Answer in one word.", "How many?")
LAYERS = (0, 3, 6)
LENGTH = 24
CACHED = 57_344  # bytes of a token's keys and values in the 7B


@pytest.fixture(scope="module")
def engine(small_model: Path) -> ModelEngine:
    return ModelEngine(EngineSpec("model", str(small_model), "main", "float32", "unused"))


@pytest.fixture(scope="module")
def pairs(photographs: Path) -> list[tuple[Path, str]]:
    return [(path, question) for path in sorted(photographs.iterdir())[:3] for question in QUESTIONS]


def asked(engine: ModelEngine, pairs: Sequence[tuple[Path, str]], **settings: Any) -> list[Request]:
    preprocess, limits = Preprocessor(engine.info), (engine.info.min_pixels, engine.info.max_pixels)
    recipe = Recipe(**{"layers": LAYERS, "max_new_tokens": LENGTH} | settings)
    return [preprocess.request([preprocess.image(p.name, p.parent, (), limits)], question, recipe) for p, question in pairs]


def expected(
    small_model: Path, pairs: Sequence[tuple[Path, str]], penalty: float | None = None, length: int = LENGTH
) -> list[list[int]]:
    plain = Reference(small_model, repetition_penalty=penalty)
    return [plain(path, question, max_new_tokens=length, layers=(0,))["answer_token_ids"] for path, question in pairs]


def bits(sample: Sample) -> tuple[Any, ...]:
    vectors = tuple((name, vector.tobytes()) for name, vector in sorted(sample.vectors.items()))
    return vectors, tuple(sample.facts["answer_token_ids"]), tuple(sample.facts["answer_token_logprobs"])


@pytest.fixture
def few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def even_products(engine: ModelEngine) -> None:
    """Skip where a row of a matrix product depends on how many there are, even of multiples of four for each thread."""
    torch.manual_seed(0)
    rows, weights = torch.randn(256, 160), torch.randn(320, 160)
    whole = torch.nn.functional.linear(rows, weights)
    if not all(torch.equal(torch.nn.functional.linear(rows[:n], weights), whole[:n]) for n in range(8, 257, 8)):
        pytest.skip("on this processor a product's last bits depend on its number of rows")


# More threads than free cores make each other wait: of two, only what shows their own way of sharing a product.
@pytest.mark.parametrize(("threads", "questions", "numbers"), [(1, 12, (*range(1, 9), 11, 32)), (2, 5, (1, 3))])
def test_bits_do_not_depend_on_the_batch(
    threads: int, questions: int, numbers: Sequence[int], engine: ModelEngine, pairs: list[tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch, few_threads: None, even_products: None,
) -> None:  # fmt: skip
    """Together, in another order, each alone, and in several numbers of slots, which are refilled as answers end."""
    torch.set_num_threads(threads)
    engine.free_cache()
    assert engine.info.environment["batch_invariance"] == "bitwise"
    requests = asked(engine, pairs[:questions], max_new_tokens=LENGTH if threads == 1 else 6)
    first = [bits(sample) for sample in engine.extract(requests)]
    assert threads > 1 or len({len(ids) for _, ids, _ in first}) > 1  # so that slots are free at different times
    for number in numbers:
        monkeypatch.setattr(engine_model, "_MOST_SLOTS", number)
        engine.free_cache()
        assert [bits(sample) for sample in engine.extract(requests)] == first
    order = np.random.default_rng(3).permutation(len(requests))
    shuffled = engine.extract([requests[i] for i in order])
    assert [bits(shuffled[i]) for i in np.argsort(order)] == first
    assert [bits(engine.extract([request])[0]) for request in requests] == first


@pytest.mark.parametrize(
    ("slots", "penalty", "length"),
    [(1, None, LENGTH), (2, 1.7, LENGTH), (5, 1.7, LENGTH), (5, 1.0, 200), (32, None, LENGTH), (2, None, 1)],
)
def test_answers_are_generates(
    slots: int, penalty: float | None, length: int, engine: ModelEngine, small_model: Path, pairs: list[tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(engine_model, "_MOST_SLOTS", slots)
    chosen = pairs[:4] if length == 200 else pairs[:6]
    samples = engine.extract(asked(engine, chosen, repetition_penalty=penalty, max_new_tokens=length))
    assert [sample.facts["answer_token_ids"] for sample in samples] == expected(small_model, chosen, penalty, length)
    for sample in samples:
        ids = sample.facts["answer_token_ids"]
        assert sample.facts["finish_reason"] == ("eos" if ids[-1] in engine._generation.ends else "length")


def test_no_answers(
    engine: ModelEngine, pairs: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch, even_products: None
) -> None:
    whole = engine.extract(asked(engine, pairs, max_new_tokens=1))
    monkeypatch.setattr(engine_model, "_MOST_SLOTS", 5)
    for sample, other in zip(engine.extract(asked(engine, pairs, max_new_tokens=0)), whole, strict=True):
        assert (sample.answer, sample.facts["finish_reason"]) == ("", "none")
        assert all(np.array_equal(vector, other.vectors[name]) for name, vector in sample.vectors.items())


def test_all_end_at_once_and_at_the_first_token(
    engine: ModelEngine, small_model: Path, pairs: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = expected(small_model, pairs)
    slots = engine._slots
    assert slots is not None
    monkeypatch.setattr(engine_model, "_MOST_SLOTS", 5)
    for ends in ({ids[0] for ids in wanted}, {wanted[0][0]}):
        monkeypatch.setattr(slots, "_ends", torch.tensor(sorted(ends)))
        for sample, ids in zip(engine.extract(asked(engine, pairs)), wanted, strict=True):
            stop = next((n + 1 for n, token in enumerate(ids) if token in ends), len(ids))
            if stop < len(ids) or ids[-1] not in engine._generation.ends:  # else the answer goes on beyond its old end
                assert sample.facts["answer_token_ids"] == ids[:stop]


def test_as_many_slots_as_memory_has_room_for(
    engine: ModelEngine, pairs: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch, even_products: None
) -> None:
    requests = asked(engine, pairs)
    first = [bits(sample) for sample in engine.extract(requests)]
    longest = max(request.num_tokens for request in requests) + LENGTH
    monkeypatch.setattr(engine, "info", replace(engine.info, max_batch_tokens=3 * longest))
    engine.free_cache()
    assert [bits(sample) for sample in engine.extract(requests)] == first
    assert engine._slots is not None
    assert engine._slots._kv.number == 3


def test_the_measure_of_invariance_can_fail(engine: ModelEngine, pairs: list[tuple[Path, str]]) -> None:
    """One bit of one vector, where a question has company."""

    def extract(requests: Sequence[Request]) -> list[Sample]:
        samples = engine.extract(requests)
        if len(requests) > 1:
            name = "query_token_representation/layer_3"
            samples[0].vectors[name] = samples[0].vectors[name].copy()
            samples[0].vectors[name].view(np.uint32)[0] ^= 1
        return samples

    requests = asked(engine, pairs[:1])
    assert is_invariant(requests, engine.extract)
    assert not is_invariant(requests * 2, extract)


# On CUDA, without one: fake tensors have shapes and devices, and no values.


@pytest.fixture
def seven(small_model: Path) -> Iterator[Any]:
    """A 7B decoder of fake tensors on a GPU that is not there."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield fake_seven(small_model)


def test_a_step_on_a_gpu_reads_and_crosses_nothing(seven: Any) -> None:
    """Of the 7B, 128 questions: what one captured graph holds. A read of a value raises here."""
    slots, prefill = filled(seven)
    slots._step_of_all()
    with Launches() as step:
        slots._step_of_all()
    assert not step.crossed.total()
    assert step.run.total() <= 1300
    assert step.run["_flash_attention_forward"] == DEPTH
    assert prefill.run.total() <= 1600
    assert prefill.crossed.total() <= 8  # ids, positions and places, to the device


def test_a_step_that_keeps_states_of_answers_reads_nothing(seven: Any) -> None:
    slots, _ = filled(seven, 8)
    slots.begin(1.0, ("first", "last", "mean"), (0, 14, DEPTH - 1))
    slots._step_of_all()
    with Launches() as step:
        slots._step_of_all()
    assert not step.crossed.total()
    assert slots._kept is not None


def test_a_read_in_a_step_would_show(seven: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slots, _ = filled(seven, 8)
    original = Slots._choose
    monkeypatch.setattr(Slots, "_choose", lambda self, rows: (original(self, rows), self._state.alive.any().item()))
    with pytest.raises(DataDependentOutputException):
        slots._step_of_all()


def test_a_model_on_two_gpus(seven: Any) -> None:
    """Keys and values lie where their layer lies; everything of ours on the first."""
    spread(seven)
    passes, recipe = Passes(seven), Recipe(layers=(0, DEPTH // 2, DEPTH - 1), max_new_tokens=1)
    with passes.capture(recipe, torch.arange(8, device="cuda:0")) as captured:
        slots, _ = filled(seven, 8)
    assert [captured[layer].device.index for layer in recipe.layers] == [0, 1, 1]
    slots._steps()
    assert slots._graph is False  # two devices are not captured
    state = slots._state
    assert {state.last.device.index, state.used.device.index, state.alive.device.index} == {0}
    assert [layer.keys.device.index for layer in slots._kv.cache.layers] == [0] * (DEPTH // 2) + [1] * (DEPTH // 2)


def test_what_cannot_be_captured_is_run_as_it_is(seven: Any, caplog: pytest.LogCaptureFixture) -> None:
    slots, _ = filled(seven, 8)
    slots._steps()  # no GPU is there: capturing fails
    assert slots._graph is False
    assert "steps of decoding are not captured, which is slower" in caplog.text


def test_a_prefill_takes_the_memory_that_is_reckoned(seven: Any) -> None:
    """Of the 7B: forty images of 400 tokens, and one of 16,384. The reckoning is near it, and above."""
    for shapes in ([(20, 20)] * 40, [(128, 128)]):
        tokens = sum(height * width for height, width in shapes)
        assert 0.7 < prefilled(seven, shapes).most / (tokens * (seven.active_bytes + CACHED)) < 1


@pytest.mark.parametrize(
    ("card", "tokens", "others"), [(80, 16384, 127), (80, 4096, 127), (24, 2048, 90), (24, 16384, 5)], ids=str
)
def test_the_largest_batches_fit(card: int, tokens: int, others: int, seven: Any) -> None:
    """Of the 7B on cards of so many gigabytes: an image of so many tokens, and questions about it or smaller images."""
    weights = sum(parameter.nbytes for parameter in seven.model.parameters())
    free = int(card * 1e9) - weights - (1 << 30)  # a GiB for CUDA's own
    bounds = MemoryBounds.within(free, "cuda", CACHED, seven.active_bytes)
    room = tokens + HEAD + TEXT + 200
    number = max(1, min(others + 1, bounds.batch_tokens // room))  # as the batcher and the engine reckon it
    slots, taken = filled(seven, number, tokens + HEAD, room)
    assert taken.most < (0.3 + 0.25) * free  # slots and their prefix, the suffixes' prefill
    side = math.isqrt(tokens)
    prefill = prefilled(seven, [(side, tokens // side)]).most
    assert sum(layer.keys.nbytes * 2 for layer in slots._kv.cache.layers) + prefill < free


@pytest.mark.slow  # 20 s
def test_images_take_few_launches(small_model: Path) -> None:
    """Of 128, at the 7B's depth, in one row."""
    counted = images(small_model)
    assert counted.run.total() <= 4000
    assert counted.run["_to_copy"] + counted.crossed.total() <= 40
    assert 0 < counted.reads.total() <= 20


# What a GPU or a torch cannot do


class Packing(Prefixes):
    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.packed = True


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this torch has another flash attention")


def wrong(original: Any) -> Any:
    return lambda *states: original(*states) * 1.5


@pytest.mark.parametrize("fault", ["fails", "differs"])
@pytest.mark.parametrize("part", ["packing", "slots", "both"])
def test_a_plainer_way_is_found_at_load(
    part: str, fault: str, small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Only what is at fault is given up."""
    monkeypatch.setattr(engine_model, "Prefixes", Packing)
    for owner, name, of in ((Spans, "attend_causally", "packing"), (SlotCache, "attend", "slots")):
        if part in (of, "both"):
            monkeypatch.setattr(owner, name, fail if fault == "fails" else wrong(getattr(owner, name)))
    engine = ModelEngine(EngineSpec("model", str(small_model), "main", "float32", "unused"))
    assert (engine._slots is None, engine._prefixes.packed) == (part != "packing", part == "slots")
    assert ("questions are padded" in caplog.text) == (part != "packing")
    assert ("images are run one at a time" in caplog.text) == (part != "slots")
    assert engine.info.shares_images
