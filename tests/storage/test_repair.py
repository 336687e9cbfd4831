"""Damage anywhere in a run's files is found, without a hang, and repaired by computing the part again."""

from __future__ import annotations

import json
import sys

import h5py
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from producer import planning
from storage import cli
from storage.errors import DamagedError, UserError
from storage.hdf5.columns import COLUMN
from storage.hdf5.layout import open_part
from storage.hdf5.rows import ROWS, encode_rows
from storage.runs.pack import _describe, pack
from storage.runs.repair import repair
from storage.runs.run import Run
from storage.runs.verify import verify
from storage.sample import decode_failure, encode_failure
from tests.storage.test_verify import FIRST, SECOND, publish_by_hand
from tests.support.builders import make_failure, make_questions, make_run, stage

PAGE = 4096
FIELD = "query_token_representation/layer_3"
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def run(tmp_path) -> Run:
    run = make_run(tmp_path / "out", 6)
    for part in (1, 2):
        stage(run, part, failed=[part])
        pack(run, part)
    run.write_summary({})
    return run


def damaged(run: Run) -> set[int]:
    return {finding.part for finding in verify(Run.open(run.output_dir)) if finding.part is not None}


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    kind=st.sampled_from(["truncate", "flip", "zero page", "zero", "swap bytes"]),
    where=st.floats(0, 1, exclude_max=True),
)
def test_damage_anywhere_is_found_and_only_that_part_named(run, kind, where):
    path = run.part_path(1)
    whole = path.read_bytes()
    data, at = bytearray(whole), int(len(whole) * where)
    if kind == "truncate":
        del data[at:]
    elif kind == "flip":
        data[at] ^= 1 << at % 8
    elif kind == "zero page":
        start = at // PAGE * PAGE
        data[start : start + PAGE] = bytes(len(data[start : start + PAGE]))
    elif kind == "zero":
        data[at:] = bytes(len(data) - at)
    else:
        data[at], data[at // 2] = data[at // 2], data[at]
    try:
        path.write_bytes(data)
        assert damaged(run) == ({1} if data != whole else set())
    finally:
        path.write_bytes(whole)


def test_every_zeroed_page_and_every_truncation_at_one_is_found(run):
    path = run.part_path(1)
    whole = path.read_bytes()
    unnoticed = []
    for start in range(0, len(whole), PAGE):
        end = min(start + PAGE, len(whole))
        for data in (whole[:start] + bytes(end - start) + whole[end:], whole[:start], whole[: end - 1]):
            path.write_bytes(data)
            if data != whole and damaged(run) != {1}:
                unnoticed.append((start, len(data)))
    assert len(whole) > 4 * PAGE
    assert unnoticed == []


def other_row(file: h5py.File) -> None:
    file.attrs[ROWS] = encode_rows([({}, {"question_id": "q1"}), ({}, {"question_id": "q3"})])


def damaged_rows(file: h5py.File) -> None:
    file.attrs[ROWS] = file.attrs[ROWS][:-3]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (other_row, "differ between the attribute `rows` and the questions' groups"),
        (damaged_rows, "the attribute `rows` is damaged"),
    ],
)
def test_rows_that_are_not_the_questions_are_found(run, edit, problem):
    change(run, 1, edit)
    [line] = found(run, deep=True)
    assert line.startswith(f"{FIRST}: ")
    assert problem in line


def test_damage_is_found_before_hdf5_sees_the_file(run, monkeypatch):
    path = run.part_path(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    opened = []

    def note(path):
        opened.append(path.name)
        return open_part(path)

    monkeypatch.setattr("storage.runs.verify.open_part", note)
    assert damaged(run) == {1}
    assert opened == [SECOND]


# Content that does not fit, under a sidecar that describes it


def change(run: Run, part: int, edit) -> None:
    """Change a part and let the sidecar describe just that."""
    with h5py.File(run.part_path(part), "r+") as file:
        edit(file)
    run.store.delete(run.sidecar_key(part))
    _describe(run, part)


def found(run: Run, *, deep: bool) -> list[str]:
    return [str(finding) for finding in verify(Run.open(run.output_dir), deep=deep)]


def shift_offset(file: h5py.File) -> None:
    index = file.attrs[COLUMN + FIELD]
    index[0, 0] += 1
    file.attrs[COLUMN + FIELD] = index


def wrong_crc(file: h5py.File) -> None:
    index = file.attrs[COLUMN + FIELD]
    index[0, 2] ^= 1
    file.attrs[COLUMN + FIELD] = index


def short_index(file: h5py.File) -> None:
    file.attrs[COLUMN + FIELD] = file.attrs[COLUMN + FIELD][:1]


def other_text(file: h5py.File) -> None:
    file["q1/ground_truth_answer"][()] = "another truth"


@pytest.mark.parametrize(
    ("edit", "deep", "problem"),
    [
        (shift_offset, False, f"{FIRST}, question q1: {FIELD} lies at"),
        (short_index, False, f"{FIRST}: the column index of {FIELD} has the shape (1, 3), not (2, 3)"),
        (wrong_crc, True, f"{FIRST}, question q1: {FIELD} is damaged (CRC-32)"),
        (
            other_text,
            True,
            f"{FIRST}, question q1: ground_truth_answer is 'another truth', but 'truth 1' in the plan",
        ),
    ],
)
def test_content_that_does_not_fit_is_found(run, edit, deep, problem):
    change(run, 1, edit)
    assert found(run, deep=True)[0].startswith(problem)
    assert bool(found(run, deep=False)) is not deep


def test_nothing_is_wrong_with_a_sound_run_when_looked_at_deeply(run):
    assert found(run, deep=True) == []


def test_a_part_of_an_earlier_version_without_an_index_is_sound(run):
    change(run, 1, lambda file: [file.attrs.__delitem__(name) for name in list(file.attrs) if name.startswith(COLUMN)])
    assert found(run, deep=True) == []


def test_verify_deep_on_the_command_line(run, monkeypatch, capsys):
    change(run, 1, other_text)
    monkeypatch.setattr(sys, "argv", ["storage", "verify", str(run.output_dir), "--deep"])
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert exit_.value.code == 1
    assert f"--output-dir {run.output_dir} … --repair" in capsys.readouterr().err


# Repair


def test_repair_of_a_sound_run_changes_nothing(run):
    before = {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*")}
    assert repair(run) == {}
    assert {path: path.stat().st_mtime_ns for path in run.output_dir.rglob("*")} == before
    assert run.is_finished()


def test_values_that_are_not_finite_are_left_where_they_are(tmp_path):
    """The model gave them, and the part is as it was published: the same would come again."""
    run = publish_by_hand(tmp_path, lambda s: s.__class__({k: v * float("nan") for k, v in s.vectors.items()}, "", s.facts))
    assert repair(run) == {}
    assert run.part_path(1).exists()
    assert {finding.part for finding in verify(run)} == {None}


@pytest.mark.parametrize("kind", ["flipped", "gone", "sidecar damaged"])
def test_a_damaged_part_is_moved_aside_and_computed_again(run, kind):
    path, sidecar = run.part_path(1), run.store.path(run.sidecar_key(1))
    if kind == "flipped":
        path.write_bytes(path.read_bytes()[::-1])
    elif kind == "gone":
        path.unlink()
    elif kind == "sidecar damaged":
        sidecar.write_text("{")
    moved = repair(run)
    assert list(moved) == [FIRST]
    assert not path.exists()
    assert not sidecar.exists()
    assert not run.is_finished()
    aside = sorted(p.name.split("-", 1)[1] for p in (run.output_dir / ".run/damaged").iterdir())
    assert aside == (["001.json"] if kind == "gone" else ["001.json", FIRST])
    run = Run.open(run.output_dir)
    assert run.part_path(2).exists()
    stage(run, 1)
    assert pack(run, 1)
    assert found(run, deep=True) == []
    assert repair(run) == {}


def test_values_that_are_not_finite_are_found_and_not_computed_again(tmp_path, monkeypatch, capsys):
    """The same weights would give the same again, whatever the repair costs."""
    run = publish_by_hand(tmp_path, lambda s: s.__class__({k: v * float("nan") for k, v in s.vectors.items()}, "", s.facts))
    assert repair(run) == {}
    assert run.part_path(1).exists()
    monkeypatch.setattr(sys, "argv", ["storage", "verify", str(run.output_dir)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    shown = capsys.readouterr().err
    assert "vision_only_representation has values that are not finite: the model's weights" in shown
    assert "--repair" not in shown


def test_a_repair_that_was_killed_half_way_is_finished_by_the_next(run, monkeypatch):
    run.part_path(1).write_bytes(b"damaged")

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("storage.runs.repair._move_aside", lambda run, key: run.part_path(1).unlink() if key == FIRST else die())
        with pytest.raises(KeyboardInterrupt):
            repair(run)
    assert list(repair(run)) == [FIRST]
    assert not run.is_finished()


def test_repair_keeps_what_is_not_damaged_for_good(run):
    """A part that was never described is not damaged, and nothing is deleted."""
    run.store.delete(run.sidecar_key(2))
    before = run.part_path(2).read_bytes()
    assert repair(run) == {}
    assert run.part_path(2).read_bytes() == before


@pytest.mark.parametrize("kind", ["truncated", "zeroed", "foreign"])
def test_a_part_that_lost_its_sidecar_too_is_moved_aside_only_if_it_is_damaged(run, tmp_path, kind):
    whole = run.part_path(2).read_bytes()
    run.store.delete(run.sidecar_key(2))
    stage(run, 2, failed=[2])  # what was staged is there until the sidecar is
    contents = {"truncated": whole[: len(whole) // 2], "zeroed": bytes(len(whole)), "foreign": b"precious"}
    run.part_path(2).write_bytes(contents[kind])
    found_before = [str(finding) for finding in verify(run)]
    if kind == "foreign":
        assert found_before == [f"{SECOND}: is not a part of this run, but readers will take it for one"]
        assert repair(run) == {}
        assert run.part_path(2).read_bytes() == b"precious"
        return
    assert found_before == [f"{SECOND}: HDF5 cannot read it, and it has no sidecar"]
    with pytest.raises(UserError, match=rf"holds damaged parts of this run \({SECOND}\): .* --repair moves them"):
        planning._refuse_other_content(str(run.output_dir), run.settings)
    with pytest.raises(UserError, match=rf"{SECOND} is damaged, and was not described"):
        pack(run, 2)
    assert list(repair(run)) == [SECOND]
    assert [p.read_bytes() for p in (run.output_dir / ".run/damaged").iterdir()] == [contents[kind]]
    assert pack(run, 2)
    planning._refuse_other_content(str(run.output_dir), run.settings)
    assert found(run, deep=True) == []


def test_repair_refuses_other_settings_before_it_moves_anything(run, capsys):
    run.part_path(1).write_bytes(b"damaged")
    with pytest.raises(UserError, match="other settings"):
        planning._repair(run.output_dir, run.settings.model_copy(update={"dtype": "float32"}))
    assert run.part_path(1).exists()
    planning._repair(run.output_dir, run.settings)
    assert not run.part_path(1).exists()
    assert f"{FIRST} will be computed again" in capsys.readouterr().err


def test_repair_of_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        planning._repair(tmp_path, make_run(tmp_path / "other", 1).settings)


# Staged failures


def test_every_flipped_bit_of_a_staged_failure_is_noticed():
    data = encode_failure(make_failure(make_questions(1)[0], traceback="é"))
    assert json.loads(data)["failure"]["question_id"] == "q1"
    unnoticed = []
    for position in range(len(data) * 8):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        try:
            decode_failure(bytes(flipped))
        except DamagedError:
            continue
        unnoticed.append(position)
    assert unnoticed == []


def test_a_damaged_staged_failure_is_computed_again(tmp_path):
    run = make_run(tmp_path, 3)
    stage(run, 1, failed=[0])
    path = run.output_dir / ".run/staging/001/000000.json"
    path.write_bytes(path.read_bytes().replace(b"does not exist", b"does now exist"))
    with pytest.raises(DamagedError, match=r"000000\.json.*removed"):
        pack(run, 1)
    stage(run, 1, failed=[0])
    assert pack(run, 1)
