"""Slots: any number of them, refilled, in any order, gives the same bits and `generate`'s answers; a step reads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from storage.sample import Sample
from workers.checks.reference import Reference
from workers.engine import model as engine_model
from workers.engine.cache import Row
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.model import ModelEngine
from workers.engine.models import family_of
from workers.engine.slots import Slots
from workers.extract.preprocess import Preprocessor

QUESTIONS = ("What is in the image?", "Why?", "Is there an animal in this picture? Answer in one word.", "How many?")
LAYERS = (0, 3, 6)
LENGTH = 24


@pytest.fixture(scope="module")
def engine(small_model: Path) -> ModelEngine:
    return ModelEngine(EngineSpec("model", str(small_model), "main", "float32", "unused"))


@pytest.fixture(scope="module")
def pairs(photographs: Path) -> list[tuple[Path, str]]:
    return [(path, question) for path in sorted(photographs.iterdir())[:3] for question in QUESTIONS]


def asked(engine: ModelEngine, pairs: Sequence[tuple[Path, str]], **settings: Any) -> list[Request]:
    preprocess, limits = Preprocessor(engine.info), (engine.info.min_pixels, engine.info.max_pixels)
    recipe = Recipe(**{"layers": LAYERS, "max_new_tokens": LENGTH} | settings)
    return [preprocess.request(preprocess.image(p.name, p.parent, (), limits), question, recipe) for p, question in pairs]


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


@pytest.mark.parametrize("threads", [1, 2])
def test_bits_do_not_depend_on_the_batch(
    threads: int, engine: ModelEngine, pairs: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch, few_threads: None
) -> None:
    """Together, in other orders, each alone, and in 1 to 32 slots, which are refilled as answers end."""
    torch.set_num_threads(threads)
    engine.free_cache()
    assert engine.info.environment["batch_invariance"] == "bitwise"
    requests = asked(engine, pairs)
    first = [bits(sample) for sample in engine.extract(requests)]
    assert len({len(ids) for _, ids, _ in first}) > 1  # so that slots are free at different times
    for number in (*range(1, 9), 11, 32):
        monkeypatch.setattr(engine_model, "_MOST_SLOTS", number)
        engine.free_cache()
        assert [bits(sample) for sample in engine.extract(requests)] == first
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(requests))
        shuffled = engine.extract([requests[i] for i in order])
        assert [bits(shuffled[i]) for i in np.argsort(order)] == first
    assert [bits(engine.extract([request])[0]) for request in requests] == first


@pytest.mark.parametrize("slots", [1, 2, 5, 32])
@pytest.mark.parametrize(("penalty", "length"), [(None, LENGTH), (1.7, LENGTH), (1.0, 200), (None, 1)])
def test_answers_are_generates(
    slots: int, penalty: float | None, length: int, engine: ModelEngine, small_model: Path, pairs: list[tuple[Path, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(engine_model, "_MOST_SLOTS", slots)
    chosen = pairs[:6]
    samples = engine.extract(asked(engine, chosen, repetition_penalty=penalty, max_new_tokens=length))
    assert [sample.facts["answer_token_ids"] for sample in samples] == expected(small_model, chosen, penalty, length)
    for sample in samples:
        ids = sample.facts["answer_token_ids"]
        assert sample.facts["finish_reason"] == ("eos" if ids[-1] in engine._generation.ends else "length")


def test_no_answers(engine: ModelEngine, pairs: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch) -> None:
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
    engine: ModelEngine, pairs: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked(engine, pairs)
    first = [bits(sample) for sample in engine.extract(requests)]
    longest = max(request.num_tokens for request in requests) + LENGTH
    monkeypatch.setattr(engine, "info", replace(engine.info, max_batch_tokens=3 * longest))
    engine.free_cache()
    assert [bits(sample) for sample in engine.extract(requests)] == first
    assert engine._slots is not None
    assert engine._slots._kv.number == 3


# On CUDA, without one: fake tensors have shapes and devices, and no values.

SEVEN = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "max_window_layers": 28,
         "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064}  # fmt: skip
IMAGE, TEXT, NUMBER = 400, 40, 128  # tokens of an image and of a question; slots


class Launches(TorchDispatchMode):
    """Counts what a device runs, and what crosses between it and the host."""

    VIEWS = frozenset(
        [
            "view",
            "_unsafe_view",
            "reshape",
            "expand",
            "transpose",
            "slice",
            "select",
            "unsqueeze",
            "squeeze",
            "permute",
            "t",
            "detach",
            "alias",
            "split",
            "unbind",
            "split_with_sizes",
            "as_strided",
            "unsafe_split",
            "chunk",
            "empty",
            "empty_like",
            "new_empty",
            "lift_fresh",
            "arange_view",
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.run: Counter[str] = Counter()
        self.crossed: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        scalars = {"cpu"} if any(isinstance(a, torch.Tensor) and a.device.type == "cpu" and a.ndim for a in args) else set()
        if "cuda" in devices and (scalars or name in {"aten::_local_scalar_dense", "aten::nonzero"}):
            self.crossed[name] += 1
        kernel = name.removeprefix("aten::")
        if "cuda" in devices and name.startswith("aten::") and kernel not in self.VIEWS:
            self.run[kernel] += 1
        return out


@pytest.fixture(scope="module")
def seven(small_model: Path) -> Iterator[tuple[FakeTensorMode, Any]]:
    """A 7B decoder of fake bfloat16 tensors on a GPU that is not there; the tower stays tiny."""
    config = AutoConfig.from_pretrained(small_model)
    for name, value in SEVEN.items():
        setattr(config.get_text_config(), name, value)
    config.get_text_config().layer_types = ["full_attention"] * SEVEN["num_hidden_layers"]
    config.get_text_config().rope_parameters["mrope_section"] = [16, 24, 24]
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        with torch.device("cuda"):
            model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        yield fake, family_of("qwen2_5_vl")(model.eval(), AutoProcessor.from_pretrained(small_model))


def filled(family: Any, number: int = NUMBER) -> tuple[Slots, Any]:
    slots = Slots(family, (151645, 151643), axes=3)
    row = Row([torch.empty(2, 4, IMAGE, 128, dtype=torch.bfloat16, device="cuda") for _ in family.layers], IMAGE, 30)
    slots.reserve(row, number, 1024, 200)
    suffixes = [tuple(range(TEXT - i % 5)) for i in range(number)]
    with Launches() as counted:
        slots.run(slots.take(range(number), [row], [0] * number, suffixes, suffixes, [200] * number))
    return slots, counted


def test_a_step_on_a_gpu_reads_and_crosses_nothing(seven: Any) -> None:
    """Of the 7B, 128 questions: what one captured graph holds. A read of a value raises here."""
    _, family = seven
    slots, prefill = filled(family)
    slots._step_of_all()
    with Launches() as step:
        slots._step_of_all()
    assert not step.crossed
    assert sum(step.run.values()) <= 1300
    assert step.run["_flash_attention_forward"] == SEVEN["num_hidden_layers"]
    assert sum(prefill.run.values()) <= 1600
    assert sum(prefill.crossed.values()) <= 8  # ids, positions and places, to the device


def test_a_read_in_a_step_would_show(seven: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, family = seven
    slots, _ = filled(family, 8)
    original = Slots._choose
    monkeypatch.setattr(Slots, "_choose", lambda self, rows: (original(self, rows), self._state.alive.any().item()))
    with pytest.raises(DataDependentOutputException):
        slots._step_of_all()


def test_what_cannot_be_captured_is_run_as_it_is(seven: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, family = seven
    slots, _ = filled(family, 8)
    slots._steps()  # no GPU is there: capturing fails
    assert slots._graph is False
    assert "steps of decoding are not captured, which is slower" in caplog.text
