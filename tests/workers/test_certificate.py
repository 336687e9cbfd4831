"""The drift certificate never costs a question: what is computed is handed back, with exact results or why there are none."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from storage.runs.pack import pack
from storage.runs.run import Run
from storage.sample import Sample
from tests.support.builders import make_run, make_sample, stage
from workers.engine import kernels
from workers.engine.interface import Recipe, Request
from workers.errors import BatchFailedError, EngineStartError, PermanentError
from workers.extract import certificate
from workers.extract.batcher import Crashes
from workers.extract.certificate import MAX_TOKENS, Certifier
from workers.extract.extractor import Extractor
from workers.settings import WorkerSettings


def ask(tokens: int = 40) -> Request:
    return Request("image", (np.zeros((28, 28, 3), np.uint8),), (1, 2), tokens, Recipe(layers=(0,), max_new_tokens=4))


class Computing:
    """Counts what is computed; raises where told to."""

    def __init__(self, sample: Sample, error: BaseException | None = None) -> None:
        self.recipes: list[Recipe] = []
        self.crashes: list[Crashes] = []
        self._sample, self._error = sample, error

    def __call__(self, _: str, request: Request, crashes: Crashes) -> Sample:
        self.recipes.append(request.recipe)
        self.crashes.append(crashes)
        if self._error is not None:
            raise self._error
        return self._sample


def published(run: Run, part: int = 1) -> dict[str, object]:
    assert pack(run, part)
    with h5py.File(run.part_path(part)) as file:
        names: set[str] = set()
        file.visit(names.add)
        assert not [n for n in names if "exact" in n]
        assert not [k for group in file.values() for k in group.attrs if "certificate" in k or "exact" in k]
        return dict(file.attrs)


def test_one_question_of_a_part_has_exact_results(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6, dtype="float32")
    samples = [make_sample(question, dtype="float32") for question in run.questions(1)]
    compute = Computing(samples[0])
    certifier = Certifier(compute)
    for sequence, sample in enumerate(samples):
        run.stage_sample(1, sequence, certifier.add(run, 1, ask(), sample))
    assert [(r.exact, r.math_kernel, r.max_new_tokens) for r in compute.recipes] == [(True, False, 4), (True, True, 0)]
    attributes = published(run)
    assert json.loads(attributes["drift"])["answers_agree"] is True
    assert "drift_absent" not in attributes
    assert Certifier(compute).add(run, 2, ask(), samples[0]) != samples[0]  # every part has one


def test_a_second_worker_leaves_it_to_the_first(tmp_path: Path) -> None:
    """Also one that was killed meanwhile: what killed it must not kill the next."""
    run = make_run(tmp_path, 3)
    sample = make_sample(run.questions(1)[0])
    with pytest.raises(SystemExit):  # as if the process ended in it
        Certifier(Computing(sample, SystemExit())).add(run, 1, ask(), sample)
    second = Computing(sample)
    assert Certifier(second).add(Run.open(tmp_path), 1, ask(), sample) is sample
    assert not second.recipes
    stage(run, 1)
    assert "the worker ended meanwhile" in str(published(run)["drift_absent"])


def test_of_many_at_once_one_is_chosen(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    sample = make_sample(run.questions(1)[0])
    compute = Computing(sample)
    certifiers = [Certifier(compute) for _ in range(3)]
    threads = [threading.Thread(target=c.add, args=(run, 1, ask(), sample)) for c in certifiers for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compute.recipes) == 2


def test_a_long_prompt_is_left_to_a_shorter_one(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    samples = [make_sample(question) for question in run.questions(1)]
    compute = Computing(samples[1])
    certifier = Certifier(compute)
    run.stage_sample(1, 0, certifier.add(run, 1, ask(MAX_TOKENS + 1), samples[0]))
    assert not compute.recipes
    run.stage_sample(1, 1, certifier.add(run, 1, ask(MAX_TOKENS), samples[1]))
    run.stage_sample(1, 2, certifier.add(run, 1, ask(), samples[2]))
    assert len(compute.recipes) == 2
    assert "drift" in published(run)


def test_where_all_are_long_the_part_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    certifier = Certifier(Computing(make_sample(run.questions(1)[0])))
    for sequence, question in enumerate(run.questions(1)):
        run.stage_sample(1, sequence, certifier.add(run, 1, ask(16_224), make_sample(question)))
    attributes = published(run)
    assert "drift" not in attributes
    assert attributes["drift_absent"] == "its prompts have more than 2,048 tokens, one of them 16,224"


@pytest.mark.parametrize(
    "error",
    [
        PermanentError("out_of_memory", "the question does not fit into memory even alone"),
        PermanentError("killed_worker", "the engine's process ended with signal SIGKILL"),
        BatchFailedError("RuntimeError: CUDA kernel errors", "Traceback …"),
        EngineStartError("the batcher is closed"),
        TimeoutError(),
        MemoryError(),
        OSError(28, "No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_goes_wrong_the_sample_is_handed_back(tmp_path: Path, error: Exception) -> None:
    run = make_run(tmp_path, 3, dtype="float32")
    samples = [make_sample(question, dtype="float32") for question in run.questions(1)]
    certifier = Certifier(Computing(samples[0], error))
    for sequence, sample in enumerate(samples):
        run.stage_sample(1, sequence, certifier.add(run, 1, ask(), sample))
    attributes = published(run)
    assert str(attributes["drift_absent"]).startswith(f"it could not be computed: {type(error).__name__}")
    with h5py.File(run.part_path(1)) as file:
        assert len(file) == 3
        for sample, question in zip(samples, run.questions(1), strict=True):
            for name, vector in sample.vectors.items():
                np.testing.assert_array_equal(file[question.question_id][name][:], vector)


def test_a_claim_that_cannot_be_written_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, 3)
    sample = make_sample(run.questions(1)[0])

    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run.store, "put_new", full)
    found = Certifier(Computing(sample)).add(run, 1, ask(), sample)
    assert (found.vectors, found.answer) == (sample.vectors, sample.answer)


@pytest.mark.parametrize("settings", [{"exact": True}, {"halp_compat": True}])
def test_runs_that_are_exact_have_nothing_to_say(tmp_path: Path, settings: dict[str, bool]) -> None:
    run = make_run(tmp_path, 3, **settings)
    stage(run, 1)
    assert not {"drift", "drift_absent"} & set(published(run))


def test_commands_show_a_part_without(tmp_path: Path, storage_command: Callable[..., tuple[int, str, str]]) -> None:
    run = make_run(tmp_path, 3)
    stage(run, 1)
    published(run)
    code, out, _ = storage_command("inspect", run.part_path(1))
    assert code == 0
    assert "drift_absent" in out
    code, _, err = storage_command("verify", tmp_path)
    assert (code, err) == (0, "")
    code, out, _ = storage_command("inspect", tmp_path)
    assert code == 0
    assert storage_command("report", tmp_path)[0] == 0
    assert "1 parts have no certificate: no question of this part" in (tmp_path / "report.html").read_text()


# Through the batcher and the engine's process


@pytest.fixture
def extractor(tmp_path: Path) -> Iterator[Extractor]:
    config = WorkerSettings(engine="fake:0", model="fake/model", data_roots=(str(tmp_path),), max_queue_delay=0.0)
    fatal: list[BaseException] = []
    made = Extractor(config, "extract@here", fatal.append)
    yield made
    made.close()
    assert not fatal


@pytest.mark.parametrize("mark", ["[kill-exact]", "[error-exact]"])
def test_an_engine_that_fails_at_the_certificate_alone(tmp_path: Path, extractor: Extractor, mark: str) -> None:
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (56, 56), "red").save(images / "image_0.jpg")
    Image.new("RGB", (56, 56), "blue").save(images / "image_1.jpg")
    questions = [replace(q, question=mark) for q in make_run(tmp_path / "other", 3).questions(1)]
    run = make_run(tmp_path / "run", questions, agreed=False, model="fake/model", images_dir=str(images))
    opened = extractor.open_run(run.location, run.run_id)
    first = extractor.engine.pid
    for sequence in range(3):
        run.stage_sample(1, sequence, extractor.extract(opened, 1, sequence))
        assert run.crashes_alone(1, sequence) is None  # a crash at its certificate is not the question's
    assert (extractor.engine.pid == first) is (mark == "[error-exact]")
    attributes = published(run)
    assert attributes["num_samples"] == 3
    reason = "killed_worker" if mark == "[kill-exact]" else "is marked"
    assert reason in str(attributes["drift_absent"])


def test_vectors_that_are_not_finite_fail_their_question(
    tmp_path: Path, extractor: Extractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (56, 56), "red").save(tmp_path / "images" / "image_0.jpg")
    run = make_run(tmp_path / "run", 1, agreed=False, model="fake/model", images_dir=str(tmp_path / "images"))
    opened = extractor.open_run(run.location, run.run_id)
    sample = extractor.extract(opened, 1, 0)
    broken = {**sample.vectors, "vision_only_representation": np.full(8, np.nan, np.float32)}
    monkeypatch.setattr(extractor, "_compute", lambda *_: replace(sample, vectors=broken))
    with pytest.raises(PermanentError, match="vision_only_representation values that are not finite") as caught:
        extractor.extract(opened, 1, 0)
    assert caught.value.reason == "not_finite"


# The other kernel


@pytest.mark.parametrize("size", [1, 4000, 1 << 24])
@pytest.mark.parametrize("masked", ["causal", "mask", "broadcast", "none"])
def test_the_plain_kernel_in_chunks_is_the_plain_kernel(masked: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SCORES", size)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 37, 8), torch.randn(2, 2, 37, 8), torch.randn(2, 2, 37, 8)
    options = {
        "causal": {"is_causal": True},
        "mask": {"attn_mask": torch.rand(2, 1, 37, 37) > 0.3},
        "broadcast": {"attn_mask": torch.rand(2, 1, 1, 37) > 0.3},
        "none": {},
    }[masked]
    with sdpa_kernel(SDPBackend.MATH):
        expected = scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    with kernels.PlainAttention():
        found = torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True, **options)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    with kernels.PlainAttention():  # nothing else is touched
        assert torch.equal(torch.nn.functional.softmax(query, -1), query.softmax(-1))


def test_the_bound_is_what_the_docs_say() -> None:
    docs = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    assert f"{certificate.MAX_TOKENS:,} tokens" in docs
