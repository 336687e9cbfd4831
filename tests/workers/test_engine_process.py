from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file

from storage.sample import Sample
from tests.support.processes import wait_for
from workers.engine import process as engine_process
from workers.engine.fake import _ALPHABET, FakeEngine
from workers.engine.interface import EngineSpec, Recipe, Request
from workers.engine.pixel_memory import PixelMemory
from workers.engine.process import EngineProcess
from workers.errors import BatchFailedError, EngineDiedError, EngineStartError


def spec(kind: str = "fake:0", model: str = "fake/model") -> EngineSpec:
    return EngineSpec(kind, model, "main", "float32", "")


def requests(count: int = 3, *, side: int = 28) -> list[Request]:
    random = np.random.default_rng(0)
    return [
        Request(
            f"image {i}",
            (random.integers(0, 256, (side, side, 3), np.uint8),),
            (1, i),
            4,
            Recipe(layers=(0, 3), max_new_tokens=5),
        )
        for i in range(count)
    ]


def assert_same(ours: list[Sample], theirs: list[Sample]) -> None:
    assert [(s.answer, s.facts) for s in ours] == [(s.answer, s.facts) for s in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.vectors.keys() == b.vectors.keys()
        for name, vector in a.vectors.items():
            assert vector.dtype == b.vectors[name].dtype
            np.testing.assert_array_equal(vector, b.vectors[name])


def is_gone(pid: int, within: float = 2.0) -> bool:
    """Tell whether a process ends in time; a zombie that nobody has waited for has ended."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.01)
    return False


@pytest.fixture
def start() -> Iterator[Callable[..., EngineProcess]]:
    """Start engines that are stopped at the test's end."""
    engines: list[EngineProcess] = []

    def begin(kind: str = "fake:0", model: str = "fake/model", step_timeout: float = 20.0) -> EngineProcess:
        engines.append(EngineProcess(spec(kind, model), step_timeout))
        engines[-1].start()
        return engines[-1]

    yield begin
    for engine in engines:
        engine.stop()


# Life


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_card_and_samples_equal_the_engine_in_this_process(dtype):
    fake = EngineSpec("fake:0.05", "fake/model", "main", dtype, "")
    here, there = FakeEngine(fake), EngineProcess(fake, 20.0)
    try:
        assert there.start() == here.info
        assert there.pid not in (None, os.getpid())
        for count in (3, 1):
            assert_same(there.extract(requests(count)), here.extract(requests(count)))
    finally:
        there.stop()


def test_extract_starts_an_engine_that_is_not_there():
    engine = EngineProcess(spec(), 20.0)
    try:
        assert len(engine.extract(requests())) == 3
    finally:
        engine.stop()


def test_engine_starts_while_celery_shuts_down(start):
    """Celery sets a timeout for all new sockets then; a batch that takes longer is computed all the same."""
    engine = start("fake:0")
    os.kill(engine.pid, signal.SIGKILL)
    socket.setdefaulttimeout(0.2)
    try:
        with pytest.raises(EngineDiedError):
            engine.extract(requests())
        engine._spec = spec("fake:0.5")
        assert len(engine.extract(requests())) == 3
        time.sleep(0.5)  # the child waits for its next batch
        assert len(engine.extract(requests())) == 3
    finally:
        socket.setdefaulttimeout(None)


def test_stop_ends_the_process_and_may_be_repeated(start):
    engine = start()
    pid = engine.pid
    engine.stop()
    assert not psutil.pid_exists(pid)
    assert engine.pid is None
    assert engine.stop() is None


def test_batches_larger_than_the_sockets_buffer_pass(start):
    large = requests(4, side=1400)  # 24 MB
    assert_same(start().extract(large), FakeEngine(spec()).extract(large))


# Crashes


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_death_while_idle(start, number):
    engine = start()
    pid = engine.pid
    os.kill(pid, number)
    assert is_gone(pid)
    with pytest.raises(EngineDiedError, match=number.name):
        engine.extract(requests())
    assert_same(engine.extract(requests()), FakeEngine(spec()).extract(requests()))
    assert engine.pid != pid


def test_death_in_the_middle_of_a_batch(start):
    engine = start("fake:30")
    pid = engine.pid
    killer = threading.Timer(0.15, os.kill, (pid, signal.SIGKILL))
    killer.start()
    begin = time.monotonic()
    with pytest.raises(EngineDiedError, match="SIGKILL"):
        engine.extract(requests())
    assert time.monotonic() - begin < 10
    engine.start()
    assert engine.pid != pid


def test_hang_is_ended(start):
    engine = start("fake:30", step_timeout=0.2)
    pid = engine.pid
    begin = time.monotonic()
    with pytest.raises(EngineDiedError, match=r"no answer for 0\.2 s"):
        engine.extract(requests())
    assert time.monotonic() - begin < 5
    assert not psutil.pid_exists(pid)
    engine.start()


@pytest.mark.parametrize("side", [28, 1400])
def test_stopped_process_does_not_block_a_batch_of_any_size(start, side):
    """A batch above the socket's buffer does not pass until the child reads it."""
    engine = start(step_timeout=0.3)
    pid = engine.pid
    os.kill(pid, signal.SIGSTOP)
    with pytest.raises(EngineDiedError, match=r"no answer for 0\.3 s"):
        engine.extract(requests(4, side=side))
    assert not psutil.pid_exists(pid)


def test_interrupt_and_termination_are_the_parents_business(start):
    """Ctrl-C in a terminal and a container's stop reach every process of the group; the worker drains first."""
    engine = start()
    pid = engine.pid
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid, number)
    assert_same(engine.extract(requests()), FakeEngine(spec()).extract(requests()))
    assert engine.pid == pid


PARENT = """
import sys, time
from workers.engine.interface import EngineSpec
from workers.engine.process import EngineProcess
engine = EngineProcess(EngineSpec("fake:30", "fake/model", "main", "float32", ""), 60.0)
engine.start()
print(engine.pid, flush=True)
if sys.argv[1] == "busy":
    import numpy as np
    from workers.engine.interface import Recipe, Request
    engine.extract([Request("image", (np.zeros((28, 28, 3), np.uint8),), (1,), 4, Recipe(layers=(0,), max_new_tokens=5))])
time.sleep(60)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_child_dies_with_a_killed_parent(state):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, state], stdout=subprocess.PIPE, text=True)
    try:
        child = int(parent.stdout.readline())
        assert psutil.pid_exists(child)
        if state == "busy":
            time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
    assert is_gone(child)


# Two batches at once


def marked(text: str) -> Request:
    """Return a question that has the fake engine go wrong."""
    ids = tuple(3 + _ALPHABET.index(letter) for letter in text)
    return replace(requests(1)[0], suffix_ids=ids)


def asked_behind(engine: EngineProcess, first: list[Request], second: list[Request]) -> list[Future]:
    """Ask for two batches; the second lies in the process while the first one is computed."""
    pool = ThreadPoolExecutor(2)
    os.kill(engine.pid, signal.SIGSTOP)  # so that the first is not done before the second is asked for
    futures = [pool.submit(engine.extract, first)]
    wait_for(lambda: len(engine._line) == 1, 20, "the first batch")
    futures.append(pool.submit(engine.extract, second))
    wait_for(lambda: len(engine._line) == 2, 20, "the second batch")
    os.kill(engine.pid, signal.SIGCONT)
    pool.shutdown(wait=False)
    return futures


def test_two_batches_are_answered_in_their_order(start):
    engine = start("fake:0.01")
    first, second = requests(2), requests(5)[2:]
    pid = engine.pid
    for _ in range(5):
        futures = asked_behind(engine, first, second)
        expected = FakeEngine(spec())
        for future, batch in zip(futures, (first, second), strict=True):
            assert [s.answer for s in future.result(20)] == [s.answer for s in expected.extract(batch)]
    assert engine.pid == pid
    assert engine.busy_since is None
    assert not engine._line


@pytest.mark.parametrize("mark", ["[kill]", "[hang]"])
def test_only_the_batch_that_it_was_at_is_told_of_a_death(start, mark):
    """Its follower had not begun: it is asked again, of a new process."""
    engine = start("fake:0.05", step_timeout=3.0)
    pid = engine.pid
    futures = asked_behind(engine, [marked(mark)], requests())
    with pytest.raises(EngineDiedError):
        futures[0].result(20)
    assert [s.answer for s in futures[1].result(20)] == [s.answer for s in FakeEngine(spec()).extract(requests())]
    assert engine.pid != pid


def test_a_batch_that_kills_behind_another_is_told(start):
    engine = start("fake:0.2")
    futures = asked_behind(engine, requests(), [marked("[kill]")])
    assert len(futures[0].result(20)) == 3
    with pytest.raises(EngineDiedError, match="SIGKILL"):
        futures[1].result(20)
    assert len(engine.extract(requests())) == 3


def test_time_of_a_batch_begins_with_its_turn(start):
    """Each takes a second of the 1.5 that are allowed; the second one waits for the first."""
    engine = start("fake:0.5", step_timeout=1.5)
    pid = engine.pid
    futures = asked_behind(engine, requests(2), requests(2))
    assert [len(future.result(20)) for future in futures] == [2, 2]
    assert engine.pid == pid


def test_two_batches_and_random_deaths(start):
    """Each question is answered, rightly, or told of a death; and no more are told than processes died."""
    engine = start("fake:0.002")
    random, expected = Random(3), [s.answer for s in FakeEngine(spec()).extract(requests())]
    over, killed = threading.Event(), set()

    def kill() -> None:
        while not over.wait(random.uniform(0.05, 0.2)) and len(killed) < 5:
            pid = engine.pid
            if pid is not None and engine.loading_since is None and engine._line:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.add(pid)

    def ask(_: int) -> bool:
        try:
            return [s.answer for s in engine.extract(requests())] == expected
        except EngineDiedError:
            return False

    killer = threading.Thread(target=kill)
    killer.start()
    right: list[bool] = []
    with ThreadPoolExecutor(2) as pool:
        while len(killed) < 3 or len(right) < 100:
            right += pool.map(ask, range(20))
    over.set()
    killer.join()
    assert right.count(False) <= len(killed)
    assert not engine._line


def test_the_process_outlives_the_thread_that_first_asked(start):
    """The kernel would kill it with the thread that made it."""
    engine = EngineProcess(spec("fake:0.2"), 20.0)
    first = threading.Thread(target=engine.extract, args=(requests(),))
    first.start()
    first.join()
    pid = engine.pid
    assert len(engine.extract(requests())) == 3
    assert engine.pid == pid
    engine.stop()


def test_what_cannot_be_sent_blocks_nobody(start):
    engine = start()
    odd = replace(requests(1)[0], suffix_ids=(threading.Lock(),))
    with pytest.raises(TypeError, match="pickle"):
        engine.extract([odd])
    assert len(engine.extract(requests())) == 3
    assert not engine._line


def test_what_cannot_be_read_is_a_death_at_once(start):
    engine = start(step_timeout=60.0)
    begin = time.monotonic()
    odd = replace(requests(1)[0], image_key=_Unreadable())
    with pytest.raises(EngineDiedError, match="exit code 1"):
        engine.extract([odd])
    assert time.monotonic() - begin < 30
    assert len(engine.extract(requests())) == 3


class _Unreadable:
    def __reduce__(self):
        return int, ("no number",)


def test_stop_is_no_reason_to_begin_again(start):
    engine = start("fake:5")
    futures = asked_behind(engine, requests(), requests())
    engine.stop()
    for future in futures:
        with pytest.raises(EngineDiedError):
            future.result(20)
    assert engine.pid is None


# Exceptions in the child


def test_exception_comes_back_with_its_traceback(start):
    wrong = requests(1)[0]
    broken = replace(wrong, suffix_ids=None)
    engine = start()
    pid = engine.pid
    with pytest.raises(BatchFailedError, match=r"^TypeError: .*NoneType") as caught:
        engine.extract([broken])
    assert "in extract" in caught.value.child_traceback
    assert_same(engine.extract(requests()), FakeEngine(spec()).extract(requests()))
    assert engine.pid == pid


class AcceleratorError(RuntimeError):
    """Named as torch's, which this process need not import."""


@pytest.mark.parametrize(
    "error",
    [
        AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: unknown error"),
    ],
)
def test_broken_device_ends_the_process(monkeypatch, error):
    """After such an error every call fails: an engine that lived on would fail the whole queue, fast."""
    with pytest.raises(RuntimeError, match="CUDA error"):
        serve_one(monkeypatch, error)


@pytest.mark.parametrize(
    "error", [ValueError(""), RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()]
)
def test_other_errors_do_not(monkeypatch, error):
    answered = serve_one(monkeypatch, error)
    assert answered.summary.startswith(f"{type(error).__name__}: ")


def serve_one(monkeypatch, error):
    """Serve one batch here, with an engine that raises; return what the parent would receive."""

    class Broken(FakeEngine):
        def extract(self, requests):
            raise error

    monkeypatch.setattr(engine_process, "make_engine", Broken)
    ours, theirs = socket.socketpair()
    with Connection(ours.detach()) as parent, Connection(theirs.detach()) as child:
        pixels = PixelMemory()
        parent.send(spec())
        parent.send(pixels.put(requests(1)))
        with socket.fromfd(parent.fileno(), socket.AF_UNIX, socket.SOCK_STREAM) as end:
            end.shutdown(socket.SHUT_WR)  # `_serve` returns where nothing more comes
        try:
            engine_process._serve(child, [pixels])
        finally:  # else it might read from what has the closed socket's number by then
            [listener.join(10) for listener in threading.enumerate() if listener.name == "engine-listener"]
        parent.recv()
        return parent.recv()


def test_process_that_ends_by_itself_is_not_taken_for_a_killed_one(monkeypatch):
    """It closes its end before it has an exit code; killed at once, it would seem to have been out of memory."""
    child = (
        "import os, sys, time\n"
        "from multiprocessing.connection import Connection\n"
        "c = Connection(int(sys.argv[1]))\n"
        "spec = c.recv(); c.close(); time.sleep(0.2); os._exit(7)\n"
    )
    monkeypatch.setattr(engine_process, "_CHILD", child)
    engine = EngineProcess(spec(), 20.0)
    with pytest.raises(EngineStartError, match=r"exit code 7 while it loaded fake/model"):
        engine.start()
    assert engine.pid is None


# Models that cannot be loaded


def refusal(model: Path | str) -> str:
    engine = EngineProcess(EngineSpec("model", str(model), "main", "float32", ""), 20.0)
    with pytest.raises(EngineStartError) as caught:
        engine.start()
    assert engine.pid is None
    message = str(caught.value)
    assert str(model) in message.splitlines()[0]
    return message


def copy_of(small_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "Qwen2.5-VL-Copy"))


def test_directory_that_is_not_there(tmp_path):
    assert "no such directory" in refusal(tmp_path / "absent")


def test_directory_without_a_checkpoint(tmp_path):
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("llama", "it is a llama model, which takes no images"),
        ("qwen2_vl", "its weights have other shapes than its config.json says"),
    ],
)
def test_model_of_another_kind(small_model, tmp_path, kind, reason):
    """Transformers warns, and fills what the files lack with noise; a Qwen2-VL would then answer."""
    model = copy_of(small_model, tmp_path)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    assert re.search(reason, refusal(model))


@pytest.mark.slow
def test_corrupt_weights(small_model, tmp_path):
    model = copy_of(small_model, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    assert "model.safetensors is damaged" in refusal(model)


def test_truncated_weights(small_model, tmp_path):
    model = copy_of(small_model, tmp_path)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "model.safetensors is cut short" in refusal(model)


@pytest.mark.slow
def test_weights_that_lack_a_tensor(small_model, tmp_path):
    """Transformers warns and draws the missing ones at random: every vector of the run would be noise."""
    model = copy_of(small_model, tmp_path)
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 of the model's weights" in refusal(model)


def test_engine_starts_again_after_its_model_is_mended(small_model, tmp_path):
    engine = EngineProcess(EngineSpec("model", str(tmp_path / "model"), "main", "float32", ""), 20.0)
    with pytest.raises(EngineStartError):
        engine.start()
    shutil.copytree(small_model, tmp_path / "model")
    try:
        assert engine.start().model_type == "qwen2_5_vl"
    finally:
        engine.stop()
