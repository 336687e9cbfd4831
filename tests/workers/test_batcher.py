from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storage.sample import Sample
from tests.support.processes import wait_for
from workers.engine.interface import Recipe, Request
from workers.errors import BatchFailedError, EngineDiedError, EngineStartError, PermanentError
from workers.extract.batcher import MAX_CRASHES_ALONE, DynamicBatcher

WAIT = 20.0  # far above what a healthy batcher needs: a lost future fails the test instead of hanging it
PIXELS = np.zeros((28, 28, 3), np.uint8)


def ask(number: int, *, image: str = "", tokens: int = 10) -> Request:
    return Request(image or f"image {number}", (PIXELS,), (number,), tokens, Recipe(layers=(0,), max_new_tokens=1))


def number_of(request: Request) -> int:
    return request.suffix_ids[0]


def answer(request: Request) -> Sample:
    return Sample({}, f"answer {number_of(request)}", {})


class Recorder:
    """A stand-in for the engine: records every batch, and holds the first one back until `go`."""

    def __init__(self, behave: Callable[[Sequence[Request]], list[Sample]] | None = None) -> None:
        self.batches: list[list[int]] = []
        self.entered, self.go = threading.Event(), threading.Event()
        self._behave = behave or (lambda requests: [answer(request) for request in requests])

    def __call__(self, requests: Sequence[Request]) -> list[Sample]:
        self.batches.append([number_of(request) for request in requests])
        self.entered.set()
        assert self.go.wait(WAIT)
        return self._behave(requests)


class Rig:
    """A batcher around a recorder, and what `on_fatal` was called with."""

    def __init__(
        self,
        behave: Callable[[Sequence[Request]], list[Sample]] | None = None,
        *,
        size: int = 8,
        tokens: int = 10_000,
        delay: float = 0.0,
        ahead: int = 0,
    ) -> None:
        self.engine = Recorder(behave)
        self.fatal: list[BaseException] = []
        self.batcher = DynamicBatcher(
            self.engine, max_batch_size=size, max_batch_tokens=tokens, max_queue_delay=delay,
            on_fatal=self.fatal.append, ahead=ahead,
        )  # fmt: skip

    def occupy(self) -> None:
        """Have the engine busy with a first batch, question -1 alone, so that what comes next waits and is seen whole."""
        self.batcher.submit("busy", ask(-1))
        assert self.engine.entered.wait(WAIT)

    def submit(self, *requests: Request, group: Hashable = "run") -> list[Future[Sample]]:
        return [self.batcher.submit(group, request) for request in requests]

    def finish(self) -> list[list[int]]:
        """Let the engine go on, run everything and return the batches, without the one that occupied it."""
        self.engine.go.set()
        self.batcher.close()
        return [batch for batch in self.engine.batches if batch != [-1]]


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    rigs: list[Rig] = []

    def build(*args, **kwargs) -> Rig:
        rigs.append(Rig(*args, **kwargs))
        return rigs[-1]

    yield build
    for each in rigs:
        each.finish()


# Forming batches


def test_batches_by_count(rig):
    r = rig(size=3)
    r.occupy()
    r.submit(*(ask(i) for i in range(7)))
    assert r.finish() == [[0, 1, 2], [3, 4, 5], [6]]


def test_batches_by_tokens(rig):
    r = rig(tokens=100)
    r.occupy()
    r.submit(*(ask(i, tokens=n) for i, n in enumerate([40, 60, 1, 99, 50, 51, 49])))
    assert r.finish() == [[0, 2], [1], [3], [4, 6], [5]]  # questions times the longest one's


def test_prompt_above_the_token_budget_runs_alone(rig):
    r = rig(tokens=100)
    r.occupy()
    futures = r.submit(ask(0, tokens=10), ask(1, tokens=5000), ask(2, tokens=10), ask(3, tokens=10))
    assert r.finish() == [[0, 2, 3], [1]]
    assert [future.result(0).answer for future in futures] == [f"answer {i}" for i in range(4)]


def test_full_batch_does_not_wait(rig):
    r = rig(size=2, delay=60)
    r.engine.go.set()
    futures = r.submit(ask(0), ask(1))
    assert [future.result(WAIT).answer for future in futures] == ["answer 0", "answer 1"]
    assert r.engine.batches == [[0, 1]]


def test_batch_full_by_tokens_does_not_wait(rig):
    r = rig(tokens=100, delay=60)
    r.engine.go.set()
    first, second = r.submit(ask(0, tokens=90), ask(1, tokens=90))
    assert first.result(WAIT).answer == "answer 0"
    assert not second.done()


def test_partial_batch_leaves_after_max_queue_delay(rig):
    r = rig(delay=0.1)
    r.engine.go.set()
    begin = time.monotonic()
    futures = r.submit(ask(0), ask(1))
    for future in futures:
        future.result(WAIT)
    assert time.monotonic() - begin >= 0.1
    assert r.engine.batches == [[0, 1]]


def test_a_full_batch_is_handed_on_while_one_runs(rig):
    """The next is then at hand."""
    rig = rig(size=3, ahead=1)
    rig.occupy()
    rig.submit(*(ask(n) for n in range(3)))
    wait_for(lambda: len(rig.engine.batches) == 2, WAIT, "the second batch")
    assert rig.finish() == [[0, 1, 2]]


def test_what_is_not_full_waits_for_the_one_that_runs(rig):
    rig = rig(size=3, ahead=1)
    rig.occupy()
    rig.submit(ask(0), ask(1))
    time.sleep(0.1)  # well beyond the delay of 0
    assert rig.engine.batches == [[-1]]
    rig.engine.go.set()
    wait_for(lambda: len(rig.engine.batches) == 2, WAIT, "the second batch")
    assert rig.finish() == [[0, 1]]


def test_delay_counts_from_the_oldest(rig):
    """Later questions do not put the first one off: a trickle would starve it."""
    r = rig(delay=0.15)
    r.engine.go.set()
    begin = time.monotonic()
    (first,) = r.submit(ask(0))
    number = 1
    while not first.done() and time.monotonic() - begin < WAIT:
        r.submit(ask(number, tokens=1))
        number += 1
        time.sleep(0.02)
    assert time.monotonic() - begin < 5


def test_never_mixes_groups(rig):
    r = rig(size=4)
    r.occupy()
    for i in range(12):
        r.submit(ask(i, image="the same"), group=("run", i % 3))
    batches = r.finish()
    assert sorted(map(sorted, batches)) == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_keeps_interleaved_questions_of_an_image_together(rig):
    r = rig(size=6)
    r.occupy()
    r.submit(*(ask(i, image="abc"[i % 3]) for i in range(9)))
    assert r.finish() == [[0, 3, 6, 1, 4, 7], [2, 5, 8]]


def test_an_image_cut_by_a_batch_comes_first_in_the_next(rig):
    r = rig(size=4)
    r.occupy()
    r.submit(*(ask(i, image="ab"[i % 2]) for i in range(6)))
    assert r.finish() == [[0, 2, 4, 1], [3, 5]]


@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(1, 60)), min_size=1, max_size=40),
    size=st.integers(1, 8),
    tokens=st.integers(10, 100),
)
def test_batches_obey_every_bound(requests, size, tokens):
    r = Rig(size=size, tokens=tokens)
    r.occupy()
    futures = [
        r.batcher.submit(group, ask(i, image=f"image {image}", tokens=n)) for i, (group, image, n) in enumerate(requests)
    ]
    batches = r.finish()
    assert sorted(i for batch in batches for i in batch) == list(range(len(requests)))
    for batch in batches:
        assert len(batch) <= size
        assert len({requests[i][0] for i in batch}) == 1
        assert len(batch) == 1 or sum(requests[i][2] for i in batch) <= tokens
        images = [requests[i][1] for i in batch]
        assert sum(a != b for a, b in pairwise(images)) == len(set(images)) - 1, "an image's questions are apart"
    assert [future.result(0).answer for future in futures] == [f"answer {i}" for i in range(len(requests))]


@pytest.mark.parametrize("ahead", [0, 1])
def test_results_reach_their_futures_under_many_threads(ahead):
    """Three hundred threads, as with a pool whose tasks each wait for one question; one in twenty of them bad."""
    bad = set(range(0, 1500, 20))

    def behave(requests: Sequence[Request]) -> list[Sample]:
        if any(number_of(request) in bad for request in requests):
            raise BatchFailedError("ValueError: bad", "")
        return [answer(request) for request in requests]

    r = Rig(behave, size=32, delay=0.002, ahead=ahead)
    r.engine.go.set()
    shuffled = random.Random(0).sample(range(1500), 1500)

    def one(i: int) -> str:
        try:
            return r.batcher.submit(i % 3, ask(i, image=f"image {i // 6}")).result(WAIT).answer
        except BatchFailedError:
            return "bad"

    with ThreadPoolExecutor(300) as pool:
        answers = dict(zip(shuffled, pool.map(one, shuffled)))
    r.finish()
    assert answers == {i: "bad" if i in bad else f"answer {i}" for i in range(1500)}
    assert not r.fatal


# Exceptions


@pytest.mark.parametrize("bad", [set(), {0}, {7}, {3, 4}, {0, 2, 4, 6}, set(range(8))])
def test_halves_until_exactly_the_bad_fail(rig, bad):
    def behave(requests: Sequence[Request]) -> list[Sample]:
        if wrong := bad & {number_of(request) for request in requests}:
            raise BatchFailedError(f"ValueError: {min(wrong)}", "child's traceback")
        return [answer(request) for request in requests]

    r = rig(behave)
    r.occupy()
    futures = r.submit(*(ask(i) for i in range(8)))
    batches = r.finish()
    for i, future in enumerate(futures):
        if i in bad:
            with pytest.raises(BatchFailedError, match=f"^ValueError: {i}\n") as caught:
                future.result(0)
            assert caught.value.child_traceback == "child's traceback"
        else:
            assert future.result(0).answer == f"answer {i}"
    assert batches[0] == list(range(8))
    if len(bad) == 1:
        assert len(batches) == 7  # 8, then two halves of each failing half: log2(8) times


@pytest.mark.parametrize("returned", [0, 3, 5])
def test_wrong_number_of_samples_is_never_distributed(rig, returned):
    """Zipped without a look, every answer after a lost one would be its neighbour's, or a future would wait for ever."""

    def behave(requests: Sequence[Request]) -> list[Sample]:
        if len(requests) == 1:
            return [answer(requests[0])]
        return [Sample({}, "somebody's", {})] * returned

    r = rig(behave)
    r.occupy()
    futures = r.submit(*(ask(i) for i in range(4)))
    r.finish()
    assert [future.result(0).answer for future in futures] == [f"answer {i}" for i in range(4)]


def test_wrong_number_of_samples_for_one_question_fails_it(rig):
    r = rig(lambda requests: [])
    (future,) = r.submit(ask(0))
    r.engine.go.set()
    with pytest.raises(BatchFailedError, match="0 samples for 1 questions"):
        future.result(WAIT)


# Crashes


def test_after_a_death_everyone_runs_alone(rig):
    died: list[int] = []

    def behave(requests: Sequence[Request]) -> list[Sample]:
        if len(requests) == 4 and not died:
            died.append(1)
            raise EngineDiedError("the engine's process ended with signal SIGSEGV")
        return [answer(request) for request in requests]

    r = rig(behave)
    r.occupy()
    futures = r.submit(*(ask(i) for i in range(4)))
    assert r.finish() == [[0, 1, 2, 3], [0], [1], [2], [3]]
    assert [future.result(0).answer for future in futures] == [f"answer {i}" for i in range(4)]


def test_killer_fails_after_three_deaths_alone_and_its_mates_succeed(rig):
    def behave(requests: Sequence[Request]) -> list[Sample]:
        if any(number_of(request) == 2 for request in requests):
            raise EngineDiedError("the engine's process ended with signal SIGSEGV")
        return [answer(request) for request in requests]

    r = rig(behave)
    r.occupy()
    futures = r.submit(*(ask(i) for i in range(5)))
    batches = r.finish()
    assert batches.count([2]) == MAX_CRASHES_ALONE == 3
    with pytest.raises(PermanentError, match=r"SIGSEGV.*3 with this question alone") as caught:
        futures[2].result(0)
    assert caught.value.reason == "killed_worker"
    assert [futures[i].result(0).answer for i in (0, 1, 3, 4)] == [f"answer {i}" for i in (0, 1, 3, 4)]
    assert not r.fatal


def test_question_that_comes_alone_has_three_deaths_too(rig):
    def behave(requests: Sequence[Request]) -> list[Sample]:
        raise EngineDiedError("it died")

    r = rig(behave)
    (future,) = r.submit(ask(0))
    assert r.finish() == [[0]] * 3
    assert isinstance(future.exception(0), PermanentError)


def test_two_deaths_alone_are_forgiven(rig):
    alone: list[int] = []

    def behave(requests: Sequence[Request]) -> list[Sample]:
        alone.append(1)
        if len(alone) < MAX_CRASHES_ALONE:
            raise EngineDiedError("it died")
        return [answer(request) for request in requests]

    r = rig(behave)
    (future,) = r.submit(ask(0))
    r.finish()
    assert future.result(0).answer == "answer 0"


def test_death_after_an_exception_halved_the_batch(rig):
    """A bad question and a killer in one batch: each is found, and nobody else pays."""

    def behave(requests: Sequence[Request]) -> list[Sample]:
        numbers = {number_of(request) for request in requests}
        if 1 in numbers:
            raise BatchFailedError("ValueError: bad", "")
        if 6 in numbers:
            raise EngineDiedError("it died")
        return [answer(request) for request in requests]

    r = rig(behave)
    r.occupy()
    futures = r.submit(*(ask(i) for i in range(8)))
    r.finish()
    assert isinstance(futures[1].exception(0), BatchFailedError)
    assert isinstance(futures[6].exception(0), PermanentError)
    assert [futures[i].result(0).answer for i in (0, 2, 3, 4, 5, 7)] == [f"answer {i}" for i in (0, 2, 3, 4, 5, 7)]


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("seed", range(5))
def test_innocent_questions_are_never_blamed_for_random_crashes(seed, ahead):
    """Batches die at random, and single questions up to twice: only the killers fail, each after exactly three crashes."""
    dice, killers = random.Random(seed), {7, 40, 41, 90}
    crashes: Counter[int] = Counter()

    def behave(requests: Sequence[Request]) -> list[Sample]:
        numbers = [number_of(request) for request in requests]
        alone = len(numbers) == 1
        by_chance = dice.random() < 0.3 and not (alone and crashes[numbers[0]] == MAX_CRASHES_ALONE - 1)
        if killers & set(numbers) or by_chance:
            if alone:
                crashes[numbers[0]] += 1
            raise EngineDiedError("it died")
        return [answer(request) for request in requests]

    r = Rig(behave, size=8, ahead=ahead)
    r.engine.go.set()
    with ThreadPoolExecutor(50) as pool:
        errors = list(pool.map(lambda i: r.batcher.submit("run", ask(i)).exception(WAIT), range(100)))
    r.finish()
    blamed = {i for i, error in enumerate(errors) if error is not None}
    assert blamed == killers
    assert {errors[i].reason for i in killers} == {"killed_worker"}
    assert {crashes[i] for i in killers} == {3}


# The end


@pytest.mark.parametrize("error", [EngineStartError("cannot load the model"), RuntimeError("a bug"), SystemExit(1)])
@pytest.mark.parametrize("ahead", [0, 1])
def test_fatal_error_fails_everyone_and_is_reported_once(rig, error, ahead):
    def behave(requests: Sequence[Request]) -> list[Sample]:
        if number_of(requests[0]) == -1:
            return [answer(request) for request in requests]
        raise error

    r = rig(behave, size=2, ahead=ahead)
    r.occupy()
    futures = r.submit(*(ask(i) for i in range(5))) + r.submit(ask(5), group="another run")
    r.engine.go.set()
    for future in futures:
        with pytest.raises(EngineStartError, match=str(error)):
            future.result(WAIT)
    r.batcher.close()
    assert r.fatal == [error]
    with pytest.raises(EngineStartError, match=str(error)):
        r.batcher.submit("run", ask(9))


def test_engine_that_cannot_come_back_spares_what_is_done(rig):
    """The engine dies, answers one question alone, dies again and does not start: the answer stays given."""
    calls: list[int] = []

    def behave(requests: Sequence[Request]) -> list[Sample]:
        calls.append(len(requests))
        if len(calls) == 1:
            raise EngineDiedError("it died")
        if len(calls) == 2:
            return [answer(request) for request in requests]
        raise EngineStartError("no GPU")

    r = rig(behave, size=3, delay=60)
    r.engine.go.set()
    first, *others = r.submit(ask(0), ask(1), ask(2))
    assert first.result(WAIT).answer == "answer 0"
    assert [type(future.exception(WAIT)) for future in others] == [EngineStartError] * 2
    r.batcher.close()
    assert [str(error) for error in r.fatal] == ["no GPU"]


def test_close_drains(rig):
    r = rig(size=2, delay=60)
    futures = r.submit(*(ask(i) for i in range(5)))
    assert [len(batch) for batch in r.finish()] == [2, 2, 1]
    assert [future.result(0).answer for future in futures] == [f"answer {i}" for i in range(5)]


def test_close_is_final(rig):
    """Nobody would ever run a question handed in afterwards."""
    r = rig()
    r.finish()
    with pytest.raises(EngineStartError, match="closed"):
        r.batcher.submit("run", ask(0))
    assert not r.fatal


# Crashes that are counted elsewhere


class Marks:
    """Crashes as another process may have left them."""

    def __init__(self, alone: int = 0, *, suspect: bool = True, full: bool = False) -> None:
        self.alone, self.suspect, self._full = alone, suspect, full
        self.noted: list[bool] = []

    def note(self, error: EngineDiedError, *, alone: bool) -> int:
        if self._full:
            raise OSError(28, "No space left on device")
        self.noted.append(alone)
        self.alone += alone
        return self.alone


def test_a_suspect_runs_alone_and_the_others_in_batches(rig):
    r = rig(size=8)
    r.occupy()
    futures = [r.batcher.submit("run", ask(i, image="one"), Marks() if i in (2, 5) else None) for i in range(7)]
    assert r.finish() == [[0, 1, 3, 4, 6], [2], [5]]
    assert [future.result(0).answer for future in futures] == [f"answer {i}" for i in range(7)]


def test_deaths_go_on_from_where_another_process_left_them(rig):
    def behave(requests: Sequence[Request]) -> list[Sample]:
        raise EngineDiedError("it died")

    r = rig(behave)
    marks = Marks(alone=2)
    future = r.batcher.submit("run", ask(0), marks)
    assert r.finish() == [[0]]
    assert marks.noted == [True]
    assert str(future.exception(0)).startswith("killed_worker: it died; that was death 3 with this question alone")


def test_everyone_in_flight_is_noted_before_one_runs_again(rig):
    marks = [Marks(suspect=False) for _ in range(3)]

    def behave(requests: Sequence[Request]) -> list[Sample]:
        if len(requests) > 1:
            raise EngineDiedError("it died")
        assert [mark.noted for mark in marks] == [[False]] * 3
        return [answer(request) for request in requests]

    r = rig(behave, size=3, delay=60)
    r.engine.go.set()
    futures = [r.batcher.submit("run", ask(i), mark) for i, mark in enumerate(marks)]
    assert [future.result(WAIT).answer for future in futures] == ["answer 0", "answer 1", "answer 2"]
    r.finish()


def test_a_death_that_cannot_be_noted_fails_its_question_for_now(rig):
    """On a full disk nothing is counted: run again and again, the question would never end."""

    def behave(requests: Sequence[Request]) -> list[Sample]:
        if len(requests) > 1:
            raise EngineDiedError("it died")
        return [answer(request) for request in requests]

    r = rig(behave, size=2, delay=60)
    r.engine.go.set()
    full = r.batcher.submit("run", ask(0), Marks(suspect=False, full=True))
    other = r.batcher.submit("run", ask(1))
    assert isinstance(full.exception(WAIT), OSError)
    assert other.result(WAIT).answer == "answer 1"
    r.finish()


def test_batches_that_had_no_room_are_smaller_from_then_on():
    """Ten tokens each: eight questions at once do not fit, four do."""
    sizes: list[int] = []

    def run(requests):
        sizes.append(len(requests))
        if len(requests) > 4:
            raise BatchFailedError("CUDA out of memory", "", out_of_memory=True)
        return [Sample({}, "", {}) for _ in requests]

    batcher = DynamicBatcher(run, max_batch_size=8, max_batch_tokens=1000, max_queue_delay=0.05, on_fatal=lambda error: None)
    for _ in range(2):
        futures = [batcher.submit("run", ask(i, tokens=10)) for i in range(8)]
        for future in futures:
            future.result(WAIT)
    batcher.close()
    assert sizes == [8, 4, 4, 4, 4]
