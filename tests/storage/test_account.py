"""The account: every planned question is in exactly one of written, failed, staged and outstanding, at every stage."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import storage.runs.pack
from storage.runs.account import Account, Bookkeeper
from storage.runs.pack import pack, sidecars
from storage.runs.repair import repair
from storage.runs.run import Run
from tests.support.builders import make_failure, make_run, make_sample, make_settings, stage


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "out", 7)


def counts(account: Account) -> tuple[int, int, int, int]:
    assert account.planned == account.written + account.failed + account.staged + account.outstanding
    return account.written, account.failed, account.staged, account.outstanding


def test_before_anything_is_planned(tmp_path):
    account = Bookkeeper(Run.create(tmp_path, make_settings())).account()
    assert account == Account()
    assert not account.finished


def test_every_stage_of_a_run(run):
    keeper = Bookkeeper(run)
    assert counts(keeper.account()) == (0, 0, 0, 7)
    stage(run, 1, failed=[0], skipped=[2])
    assert counts(keeper.account()) == (0, 0, 2, 5)
    stage(run, 1)
    assert counts(keeper.account()) == (0, 0, 3, 4)
    pack(run, 1)
    account = keeper.account()
    assert counts(account) == (3, 0, 0, 4)
    assert (account.parts_planned, account.parts_published, account.finished) == (3, 1, False)
    stage(run, 3, failed=[0])
    stage(run, 2, failed=[0, 1], skipped=[2])
    assert counts(keeper.account()) == (3, 0, 3, 1)
    pack(run, 3)
    assert counts(keeper.account()) == (3, 1, 2, 1)
    stage(run, 2)
    pack(run, 2)
    account = keeper.account()
    assert counts(account) == (6, 1, 0, 0)
    assert (account.parts_planned, account.parts_published, account.finished) == (3, 3, True)
    assert counts(Bookkeeper(Run.open(run.output_dir)).account()) == (6, 1, 0, 0)


def test_a_question_with_a_result_and_a_failure_counts_once(run):
    stage(run, 1, failed=[0])
    stage(run, 1)
    assert counts(Bookkeeper(run).account()) == (0, 0, 3, 4)


@pytest.mark.parametrize("step", ["_describe", "delete_staging"])
def test_between_the_steps_of_packing_nothing_counts_twice(run, monkeypatch, step):
    """A published part counts from its sidecar on; what is staged beside a sidecar is a leftover."""
    stage(run, 1, failed=[1])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(*((storage.runs.pack, step) if step == "_describe" else (Run, step)), killed)
        pack(run, 1)
    assert run.part_path(1).exists()
    assert counts(Bookkeeper(run).account()) == ((0, 0, 3, 4) if step == "_describe" else (2, 1, 0, 4))
    pack(run, 1)
    assert counts(Bookkeeper(run).account()) == (2, 1, 0, 4)


def test_a_part_that_a_repair_takes_away_counts_no_more(run):
    """`producer status --watch` goes on while another process repairs the run."""
    keeper = Bookkeeper(run)
    stage(run, 1, failed=[1])
    pack(run, 1)
    assert counts(keeper.account()) == (2, 1, 0, 4)
    run.part_path(1).unlink()
    repair(Run.open(run.output_dir))
    assert counts(keeper.account()) == (0, 0, 0, 7)


def test_reasons_are_those_of_published_failures(run):
    for part, reasons in ((1, ["image_damaged", "image_missing", "image_missing"]), (3, ["image_missing"])):
        for sequence, reason in enumerate(reasons):
            run.stage_failure(part, sequence, make_failure(run.questions(part)[sequence], reason=reason))
        if part == 1:
            pack(run, part)
    account = Bookkeeper(run).account()
    assert list(account.reasons.items()) == [("image_missing", 2), ("image_damaged", 1)]


def test_the_account_becomes_json(run):
    stage(run, 1, failed=[0, 1])
    pack(run, 1)
    body = json.loads(json.dumps(asdict(Bookkeeper(run).account())))
    assert body["reasons"] == {"image_missing": 2}
    assert (body["planned"], body["written"], body["failed"]) == (7, 1, 2)


def test_sidecars_are_in_the_order_of_the_plan(run):
    for part in (3, 1, 2):
        stage(run, part)
        pack(run, part)
    assert [sidecar.part for sidecar in sidecars(run)] == [1, 2, 3]
    assert [i for sidecar in sidecars(run) for i in sidecar.question_ids] == [f"q{n}" for n in range(1, 8)]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["sample", "failure"]), st.integers(1, 3), st.integers(0, 2)),
        st.tuples(st.just("pack"), st.integers(1, 3), st.just(0)),
    ),
    max_size=25,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(STEPS)
def test_in_any_order_of_steps_the_sum_holds(tmp_path_factory: pytest.TempPathFactory, steps):
    directory: Path = tmp_path_factory.mktemp("run")
    run = make_run(directory, 7)
    keeper = Bookkeeper(run)
    results: set[tuple[int, int]] = set()
    failures: set[tuple[int, int]] = set()
    published: set[int] = set()
    for action, part, sequence in steps:
        if action == "pack":
            if pack(run, part):
                published.add(part)
        elif sequence < run.slice(part).size:
            question = run.questions(part)[sequence]
            if action == "sample":
                run.stage_sample(part, sequence, make_sample(question))
            else:
                run.stage_failure(part, sequence, make_failure(question))
            if part not in published:
                (results if action == "sample" else failures).add((part, sequence))
        done = Counter(part in published for part, _ in results)
        failed = Counter(part in published for part, _ in failures - results)
        expected = (done[True], failed[True], done[False] + failed[False], 7 - len(results | failures))
        assert counts(keeper.account()) == counts(Bookkeeper(Run.open(directory)).account()) == expected
