"""Retries: a further generation of the plan of exactly what has failed, and the account by id over all of them."""

from __future__ import annotations

import csv
import json
import threading
from collections.abc import Collection
from pathlib import Path

import h5py
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage.runs.pack as packing
from producer import retrying
from producer.retrying import plan_retry
from storage.errors import UserError
from storage.runs.account import Account, Bookkeeper
from storage.runs.failures import published_failures, staged_failures
from storage.runs.pack import pack
from storage.runs.repair import repair
from storage.runs.run import Run
from storage.runs.verify import verify
from tests.support.builders import make_failure, make_questions, make_run, make_sample, stage
from workers.collect import collector
from workers.collect.collector import Collector, collect_run


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Seven questions in slices of three; q1, q5 and q6 have failed, q5 for another reason; nothing is fed."""
    monkeypatch.setattr(collector, "feed", lambda run, published=None: 0)
    run = make_run(tmp_path / "out", 7)
    for part, failed in ((1, [0]), (2, [1, 2]), (3, [])):
        finish(run, part, failed)
    run.refresh()
    assert collect_run(run)
    return run


def finish(run: Run, part: int, failed: Collection[int] = (), reason: str = "image_missing") -> None:
    """Stage a slice; the first failure of part 2 has a reason of its own."""
    for sequence, question in enumerate(run.questions(part)):
        if sequence in failed:
            own = "image_corrupt" if (part, sequence) == (2, 1) else reason
            run.stage_failure(part, sequence, make_failure(question, reason=own))
        else:
            run.stage_sample(part, sequence, make_sample(question))


def counts(account: Account) -> tuple[int, int, int, int]:
    assert account.planned == account.written + account.failed + account.staged + account.outstanding == 7
    return account.written, account.failed, account.staged, account.outstanding


def ids(run: Run, part: int) -> list[str]:
    return [question.question_id for question in run.questions(part)]


def failures_file(run: Run) -> dict[str, str]:
    with (run.output_dir / "failures.csv").open(newline="") as file:
        return {row["question_id"]: row["part"] for row in csv.DictReader(file)}


def problems(run: Run) -> list[str]:
    return [str(finding) for finding in verify(Run.open(run.output_dir))]


def written(run: Run) -> list[str]:
    found: list[str] = []
    for path in run.output_dir.glob("*.h5"):
        with h5py.File(path) as part:
            found += list(part)
    return sorted(found)


def test_exactly_the_failed_are_planned_again(run):
    assert failures_file(run) == {"q1": "1", "q5": "2", "q6": "2"}
    planned = plan_retry(run)
    assert (planned.questions, planned.parts, planned.generation, planned.staged) == (3, (4,), 1, 0)
    assert ids(Run.open(run.output_dir), 4) == ["q1", "q5", "q6"]
    assert not run.is_finished()


def test_a_retry_heals_and_the_account_follows(run):
    keeper = Bookkeeper(run)
    assert counts(keeper.account()) == (4, 3, 0, 0)
    plan_retry(Run.open(run.output_dir))
    assert counts(keeper.account()) == (4, 0, 0, 3)
    assert not keeper.account().finished
    other = Run.open(run.output_dir)
    finish(other, 4, failed=[2])
    assert counts(keeper.account()) == (4, 0, 3, 0)
    assert collect_run(run)  # which has seen the first generation alone
    account = keeper.account()
    assert counts(account) == counts(Bookkeeper(other).account()) == (6, 1, 0, 0)
    assert (account.reasons, account.parts_planned, account.finished) == ({"image_missing": 1}, 4, True)
    assert run.is_finished()
    assert failures_file(run) == {"q6": "4"}
    assert problems(run) == []

    assert plan_retry(run).parts == (5,)
    finish(run, 5)
    assert collect_run(run)
    assert counts(keeper.account()) == (7, 0, 0, 0)
    assert not (run.output_dir / "failures.csv").exists()
    assert written(run) == [f"q{n}" for n in range(1, 8)]
    assert problems(run) == []


@pytest.mark.parametrize(
    ("reasons", "chosen_ids", "expected"),
    [
        (["image_corrupt"], [], ["q5"]),
        (["image_corrupt", "image_missing"], [], ["q1", "q5", "q6"]),
        ([], ["q6", "q1"], ["q1", "q6"]),
        (["image_missing"], ["q1", "q5"], ["q1"]),
    ],
)
def test_some_of_the_failed(run, reasons, chosen_ids, expected):
    plan_retry(run, reasons, chosen_ids)
    assert ids(run, 4) == expected
    assert {f.question.question_id for f in published_failures(run)} == {"q1", "q5", "q6"} - set(expected)


@pytest.mark.parametrize(
    ("reasons", "chosen_ids", "message"),
    [
        (
            ["killed"],
            [],
            r"--reason killed: no question has failed so; the reasons are image_missing \(2\), image_corrupt \(1\)",
        ),
        ([], ["q2"], r"--id 'q2': has not failed.*failed are .*'q1'"),
        (["image_corrupt"], ["q1"], "no question named by --id has failed with that --reason"),
    ],
)
def test_what_is_not_there_is_refused_and_named(run, reasons, chosen_ids, message):
    with pytest.raises(UserError, match=message):
        plan_retry(run, reasons, chosen_ids)
    assert len(Run.open(run.output_dir).slices) == 3
    assert run.is_finished()


def test_nothing_to_retry(run):
    plan_retry(run)
    with pytest.raises(UserError, match="nothing to retry: no published part"):
        plan_retry(run)  # they are outstanding now
    finish(run, 4)
    collect_run(run)
    with pytest.raises(UserError, match="nothing to retry"):
        plan_retry(run)


def test_failures_that_are_not_packed_yet_are_mentioned(tmp_path):
    run = make_run(tmp_path, 6)
    finish(run, 1, failed=[0])
    stage(run, 2, failed=[0, 1], skipped=[2])
    with pytest.raises(UserError, match=r"nothing to retry.*3 more failed, but their parts are not published yet"):
        plan_retry(run)
    pack(run, 1)
    assert plan_retry(run).staged == 2
    assert ids(run, 3) == ["q1"]
    assert [failed.question.question_id for failed in staged_failures(run)] == ["q4", "q5"]
    account = Bookkeeper(run).account()
    assert (account.written, account.failed, account.staged, account.outstanding) == (2, 0, 2, 2)


def test_a_damaged_staged_failure_is_not_listed(tmp_path):
    run = make_run(tmp_path, 3)
    stage(run, 1, failed=[0, 1], skipped=[2])
    path = tmp_path / ".run/staging/001/000000.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert [failed.question.question_id for failed in staged_failures(run)] == ["q2"]
    assert not path.exists()  # so that it is computed again


def test_of_retries_at_once_exactly_one_plans(run):
    barrier, outcomes = threading.Barrier(4), []

    def one() -> None:
        own = Run.open(run.output_dir)
        barrier.wait()
        try:
            outcomes.append(plan_retry(own).parts)
        except UserError as error:
            outcomes.append("same moment" if "at the same moment" in str(error) else str(error)[:16])

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count((4,)) == 1
    assert {o for o in outcomes if o != (4,)} <= {"same moment", "nothing to retry"}
    assert ids(Run.open(run.output_dir), 4) == ["q1", "q5", "q6"]


def test_the_loser_of_two_retries_is_told(run, monkeypatch):
    monkeypatch.setattr(retrying, "write_generation", lambda *_, **__: False)
    with pytest.raises(UserError, match="planned at the same moment, and this one was not"):
        plan_retry(run)
    assert run.is_finished()


def test_part_numbers_do_not_outgrow_their_digits(tmp_path):
    """`part_1000.h5` would sort before `part_999.h5`."""
    run = make_run(tmp_path, 9, checkpoint_interval=1, part_digits=1)
    for piece in run.slices:
        finish(run, piece.part, failed=[0])
        pack(run, piece.part)
    with pytest.raises(UserError, match=r"would make part 18, but the parts of .* have numbers of 1 digits"):
        plan_retry(run)
    assert len(Run.open(tmp_path).slices) == 9


def test_a_collector_picks_a_finished_run_up_again(run):
    sweeper = Collector((run.location,))
    sweeper.sweep()
    assert sweeper._scanner.runs == {}
    plan_retry(Run.open(run.output_dir))
    sweeper._next_scan = 0.0
    sweeper.sweep()
    assert list(sweeper._scanner.runs) == [run.location]
    finish(run, 4)
    sweeper.sweep()
    assert sweeper._scanner.runs == {}
    assert run.is_finished()


def test_a_collector_in_the_middle_of_a_run_sees_the_retry(tmp_path, monkeypatch):
    monkeypatch.setattr(collector, "feed", lambda run, published=None: 0)
    run = make_run(tmp_path, 6)
    sweeper = Collector((str(tmp_path),))
    finish(run, 1, failed=[1])
    sweeper.sweep()
    assert plan_retry(Run.open(tmp_path)).parts == (3,)
    finish(run, 2)
    finish(run, 3)
    sweeper.sweep()
    assert sorted(path.name[-6:] for path in tmp_path.glob("*.h5")) == ["001.h5", "002.h5", "003.h5"]
    assert run.is_finished()


@pytest.mark.parametrize("moment", ["before the account", "before the summary"])
def test_a_retry_while_a_collector_ends_the_run_is_not_forgotten(tmp_path, monkeypatch, moment):
    monkeypatch.setattr(collector, "feed", lambda run, published=None: 0)
    run = make_run(tmp_path, 3)
    finish(run, 1, failed=[0])
    hooked = "published_failures" if moment == "before the summary" else "Bookkeeper"
    original = getattr(collector, hooked)

    def retry_first(own: Run):
        plan_retry(Run.open(tmp_path))
        return original(own)

    with monkeypatch.context() as patch:
        patch.setattr(collector, hooked, retry_first)
        collect_run(run)
    assert not run.is_finished()
    finish(run, 2)
    assert collect_run(run)
    assert run.is_finished()


def test_a_worker_that_opened_the_run_before_finds_the_new_slice(run):
    worker = Run.open(run.output_dir)
    assert len(worker.slices) == 3
    plan_retry(run)
    assert [q.question_id for q in worker.questions(4)] == ["q1", "q5", "q6"]
    with pytest.raises(KeyError):
        worker.questions(5)


def test_a_part_that_is_repaired_after_its_failures_were_retried_repeats_nothing(run):
    """The image is there now: computed again, the first part could write q1 a second time."""
    plan_retry(run)
    finish(run, 4)
    collect_run(run)
    run.part_path(1).write_bytes(b"damaged")
    assert list(repair(run)) == [run.part_name(1)]
    account = Bookkeeper(run).account()
    assert counts(account) == (5, 0, 0, 2)
    finish(run, 1)
    assert counts(Bookkeeper(run).account()) == (5, 0, 2, 0)
    assert collect_run(run)
    assert counts(Bookkeeper(run).account()) == (7, 0, 0, 0)
    assert written(run) == [f"q{n}" for n in range(1, 8)]
    assert problems(run) == []
    assert list(published_failures(run)) == []


def test_a_question_in_two_parts_is_found(run):
    plan_retry(run)
    finish(run, 4)
    collect_run(run)
    key = run.sidecar_key(1)
    run.store.put(key, run.store.get(key).replace(b'"q2"', b'"q1"'))
    assert f"{run.part_name(4)}, question q1: is written in {run.part_name(1)} too" in problems(run)


def repair_first(run: Run) -> Run:
    """The first part is damaged and moved aside; q1 succeeds now. Return the run as another process has it."""
    other = Run.open(run.location)
    other.part_path(1).write_bytes(b"damaged")
    assert list(repair(other)) == [other.part_name(1)]
    finish(other, 1)
    return other


def assert_each_once(run: Run) -> None:
    run.refresh()
    assert collect_run(run)
    assert written(run) == [f"q{n}" for n in range(1, 8)]
    assert counts(Bookkeeper(run).account()) == (7, 0, 0, 0)
    assert problems(run) == []
    assert list(published_failures(run)) == []


def test_a_retry_that_is_frozen_while_a_repair_succeeds_writes_nothing_twice(run, monkeypatch):
    """It has read the failures and has not written its plan; the failed question is then written in its first part."""
    original = retrying.write_generation

    def frozen(*arguments, **options):
        collect_run(repair_first(run))
        return original(*arguments, **options)

    monkeypatch.setattr(retrying, "write_generation", frozen)
    assert plan_retry(run).questions == 3
    assert {piece.part: piece.based_on for piece in run.slices} == {1: (), 2: (), 3: (), 4: (1, 2)}
    finish(run, 4)
    assert_each_once(run)
    with h5py.File(run.part_path(1)) as first, h5py.File(run.part_path(4)) as retried:
        assert "q1" in first and set(retried) == {"q5", "q6"}
    # Repaired once more, the first part has again what the retried one has left to it.
    repair_first(run)
    assert_each_once(run)


def test_a_retry_that_is_planned_while_a_repaired_part_is_packed_waits_for_it(run, monkeypatch):
    """The collector has looked for retries and found none; plan, results and another collector come before its part."""
    original, seen = packing.write_part, []
    failures = list(published_failures(run))

    def slow(path, settings, facts, part, *more):
        if part == 1 and not seen:
            other = Run.open(run.location)
            monkeypatch.setattr(retrying, "published_failures", lambda _: failures)
            plan_retry(other)
            finish(other, 4)
            seen.append(pack(other, 4))
        original(path, settings, facts, part, *more)

    monkeypatch.setattr(packing, "write_part", slow)
    repaired = repair_first(run)
    assert pack(repaired, 1)
    assert seen == [False]
    assert_each_once(run)


def test_a_retry_of_a_retry_looks_into_all_parts_of_its_questions(run):
    plan_retry(run)
    finish(run, 4, [0, 1, 2])
    collect_run(run)
    plan_retry(run)
    assert run.slice(5).based_on == (1, 2, 4)
    finish(run, 5)
    repair_first(run)
    assert not pack(run, 5)  # the first part could still be written by a process that knows of no retry
    assert pack(run, 1)
    assert_each_once(run)


def test_a_plan_of_an_earlier_version_is_based_on_nothing(run):
    plan_retry(run)
    key = ".run/plan/001.json"
    body = json.loads(run.store.get(key))
    assert set(body) == {"generation", "run_id", "slices", "based_on"} and "based_on" not in body["slices"][0]
    del body["based_on"]
    run.store.put(key, json.dumps(body).encode())
    finish(again := Run.open(run.location), 4)
    assert again.slice(4).based_on == ()
    assert_each_once(again)


OUTCOMES = st.lists(st.lists(st.booleans(), min_size=7, max_size=7), min_size=1, max_size=4)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(OUTCOMES)
def test_any_number_of_retries_accounts_for_every_id_once(tmp_path_factory: pytest.TempPathFactory, outcomes):
    """Each round, each question that is computed succeeds or fails; a question that succeeds is never computed again."""
    run = make_run(tmp_path_factory.mktemp("run"), make_questions(7))
    keeper = Bookkeeper(run)
    parts, done = [piece.part for piece in run.slices], set()
    for outcome in outcomes:
        for part in parts:
            for sequence, question in enumerate(run.questions(part)):
                assert question.question_id not in done
                if outcome[question.csv_row - 1]:
                    run.stage_sample(part, sequence, make_sample(question))
                    done.add(question.question_id)
                else:
                    run.stage_failure(part, sequence, make_failure(question))
            assert counts(keeper.account()) == counts(Bookkeeper(Run.open(run.output_dir)).account())
            assert pack(run, part)
        assert counts(keeper.account()) == (len(done), 7 - len(done), 0, 0)
        assert len(list(published_failures(run))) == 7 - len(done)
        if len(done) == 7:
            break
        parts = list(plan_retry(run).parts)
    assert written(run) == sorted(done)
