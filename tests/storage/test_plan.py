"""The plan: generations of slices, each written whole or absent."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import DamagedError
from storage.question import Question
from storage.runs.plan import read_questions, read_slices, write_generation
from storage.stores.store import DirectoryStore
from tests.support.builders import make_questions

ROUNDS = 30
QUESTIONS = make_questions(7)
CUT = [QUESTIONS[:3], QUESTIONS[3:6], QUESTIONS[6:]]


@pytest.fixture
def store(tmp_path) -> DirectoryStore:
    return DirectoryStore(tmp_path, ".run/tmp")


def plan_files(store: DirectoryStore) -> list[str]:
    plan = store.root / ".run" / "plan"
    return sorted(str(path.relative_to(plan)) for path in plan.rglob("*") if path.is_file())


def test_nothing_is_planned_at_first(store):
    assert read_slices(store) == ()


def test_slices_and_questions_come_back_in_order(store):
    assert write_generation(store, CUT) is True
    slices = read_slices(store)
    assert [(s.part, s.size) for s in slices] == [(1, 3), (2, 3), (3, 1)]
    assert [list(read_questions(store, s)) for s in slices] == CUT


def test_the_plan_is_readable_without_us(store):
    write_generation(store, CUT)
    body = json.loads((store.root / ".run/plan/000.json").read_bytes())
    assert body["generation"] == 0
    lines = (store.root / body["slices"][1]["key"]).read_text("utf-8").splitlines()
    assert [json.loads(line)["question_id"] for line in lines] == ["q4", "q5", "q6"]


def test_a_second_generation_goes_on_with_the_next_parts(store):
    write_generation(store, CUT)
    assert write_generation(store, [QUESTIONS[1:2]], generation=1, first_part=4) is True
    assert [(s.part, s.size) for s in read_slices(store)] == [(1, 3), (2, 3), (3, 1), (4, 1)]
    assert read_questions(store, read_slices(store)[3]) == (QUESTIONS[1],)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.lists(
        st.builds(Question, *[st.text()] * 4, st.integers(1), st.dictionaries(st.text(), st.text(), max_size=2)),
        min_size=1,
        max_size=4,
    )
)
def test_any_text_survives(tmp_path_factory, questions):
    store = DirectoryStore(tmp_path_factory.mktemp("plan"), ".run/tmp")
    write_generation(store, [questions])
    assert list(read_questions(store, read_slices(store)[0])) == questions


@pytest.mark.parametrize("text", ["\n", "\r\n", "\u2028", "\x85", "\x0b", "\x1c", "日本"])
def test_line_breaks_inside_a_question_do_not_split_it(store, text):
    questions = [replace(QUESTIONS[0], question=f"a{text}b"), QUESTIONS[1]]
    write_generation(store, [questions])
    assert list(read_questions(store, read_slices(store)[0])) == questions


# Whole or absent


def test_a_writer_that_fails_midway_leaves_no_plan(store):
    def cut() -> Iterator[list[Question]]:
        yield CUT[0]
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_generation(store, cut())
    assert read_slices(store) == ()
    assert write_generation(store, CUT) is True
    assert [list(read_questions(store, s)) for s in read_slices(store)] == CUT


def test_a_writer_killed_before_the_generation_appears_leaves_no_plan(store, monkeypatch):
    put_new = store.put_new

    def killed(key, data):
        if key.endswith("000.json"):
            raise KeyboardInterrupt
        return put_new(key, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(store, "put_new", killed)
        write_generation(store, CUT)
    assert len(plan_files(store)) == 3
    assert read_slices(store) == ()
    assert write_generation(store, CUT) is True
    assert [list(read_questions(store, s)) for s in read_slices(store)] == CUT


def test_the_slower_of_two_writers_changes_nothing(store, monkeypatch):
    put_new, other = store.put_new, DirectoryStore(store.root, ".run/tmp")

    def overtaken(key, data):
        if key.endswith("000.json"):
            assert write_generation(other, [QUESTIONS]) is True
        return put_new(key, data)

    monkeypatch.setattr(store, "put_new", overtaken)
    assert write_generation(store, CUT) is False
    [piece] = read_slices(store)
    assert list(read_questions(store, piece)) == QUESTIONS
    assert len(plan_files(store)) == 2


def test_a_plan_that_is_there_is_not_written_again(store):
    write_generation(store, CUT)
    assert write_generation(store, [QUESTIONS]) is False
    assert [s.size for s in read_slices(store)] == [3, 3, 1]
    assert len(plan_files(store)) == 4


def plan_in_rounds(root: Path, number: int, barrier, results) -> None:
    for round_ in range(ROUNDS):
        store = DirectoryStore(root / str(round_), ".run/tmp")
        mine = [replace(question, ground_truth_answer=str(number)) for question in QUESTIONS]
        barrier.wait(60)
        results.put((round_, number, write_generation(store, [mine[:4], mine[4:]])))


def test_two_writers_at_once_make_one_plan_each_time(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.SimpleQueue()
    writers = [context.Process(target=plan_in_rounds, args=(tmp_path, n, barrier, results)) for n in range(2)]
    for writer in writers:
        writer.start()
    outcome: dict[int, list[int]] = {}
    for _ in range(2 * ROUNDS):
        round_, number, written = results.get()
        outcome.setdefault(round_, []).extend([number] * written)
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    for round_, winners in outcome.items():
        store = DirectoryStore(tmp_path / str(round_), ".run/tmp")
        [winner] = winners
        assert len(plan_files(store)) == 3
        planned = [question for piece in read_slices(store) for question in read_questions(store, piece)]
        assert planned == [replace(question, ground_truth_answer=str(winner)) for question in QUESTIONS]


# Damage


@pytest.mark.parametrize("change", ["flip", "truncate", "append", "empty"])
def test_a_changed_slice_is_refused(store, change):
    write_generation(store, CUT)
    piece = read_slices(store)[1]
    path = store.root / piece.key
    data = path.read_bytes()
    changed = {
        "flip": data.replace(b"truth 5", b"truth 4"),
        "truncate": data[: data.index(b"\n") + 1],
        "append": data + data.splitlines(keepends=True)[0],
        "empty": b"",
    }[change]
    assert changed != data
    path.write_bytes(changed)
    with pytest.raises(DamagedError, match=rf"{path.name}.*slice 2 was changed"):
        read_questions(store, piece)
    assert list(read_questions(store, read_slices(store)[0])) == CUT[0]
