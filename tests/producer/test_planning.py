"""Planning: which run a directory's is, and what of a checkpoint counts for it."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import h5py
import pytest

from producer.options import RunOptions, _parameters, run_options
from producer.planning import plan_run
from storage.computation import Computation
from storage.errors import ReplacedError, UserError
from storage.hdf5.part import write_part
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.settings import RunSettings
from tests.support.builders import make_facts, make_failure, make_questions, make_sample, make_settings
from tests.support.processes import write_csv
from workers.checkpoint.identity import former_digest
from workers.queue.app import model_queues, served_queues
from workers.queue.feed import queues_of
from workers.settings import WorkerSettings


@pytest.fixture
def model(tmp_path: Path, small_model: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "Qwen2.5-VL-Mine"))


@pytest.fixture
def options(tmp_path: Path, photographs: Path, model: Path) -> RunOptions:
    image = next(path.name for path in sorted(photographs.iterdir()))
    row = {"question_id": "q", "image_id": image, "question": "What?", "answer": ""}
    table = write_csv(tmp_path / "vqa.csv", [row])
    fields: dict[str, Any] = {"images_dir": str(photographs), "output_dir": str(tmp_path / "o"), "model": str(model)}
    return run_options(table, **fields)


def test_a_note_beside_the_weights_changes_nothing_and_a_changed_file_is_named(options: RunOptions, model: Path) -> None:
    begun = plan_run(options)
    (model / "training_log.jsonl").write_text("{}")
    assert plan_run(options).run_id == begun.run_id
    generation = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(generation | {"top_k": 3}))
    with pytest.raises(UserError, match=r"the checkpoint's files: generation_config\.json is another one\n"):
        plan_run(options)
    (model / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"the checkpoint's files: generation_config\.json is gone\n"):
        plan_run(options)


def test_a_run_from_before_to_which_notes_counted_goes_on(options: RunOptions, model: Path) -> None:
    begun = plan_run(options)
    (model / "README.md").write_text("how it was trained")
    path = Path(begun.output_dir) / ".run/run.json"
    body = json.loads(path.read_text()) | {"model_digest": former_digest(str(model), "main")}
    del body["model_files"]
    path.write_text(json.dumps(body))
    assert plan_run(options).run_id == begun.run_id
    config = WorkerSettings(model=str(model))
    assert queues_of(Run.open(begun.output_dir)) in served_queues(config)
    assert queues_of(Run.open(begun.output_dir)) != model_queues(config)


# A run that lies there already


def place(options: RunOptions, target: Path) -> RunOptions:
    return replace(options, images_dir=str(shutil.copytree(options.images_dir, target)))


def publish(run: Run, images: Path) -> None:
    [question] = run.questions(1)
    digest = sha256((images / question.image_id).read_bytes()).hexdigest()
    run.pin_model(make_facts())
    run.stage_sample(1, 0, make_sample(question, image_sha256=digest))
    assert pack(run, 1)


def test_a_model_that_lies_elsewhere_is_the_same_by_its_content(options: RunOptions, model: Path, tmp_path: Path) -> None:
    begun = plan_run(options)
    moved = tmp_path / "elsewhere" / model.name
    moved.parent.mkdir()
    model.rename(moved)
    assert plan_run(replace(options, model=str(moved))).run_id == begun.run_id
    renamed = moved.rename(tmp_path / "renamed")
    with pytest.raises(UserError, match="name it by a link called qwen25vl_mine"):
        plan_run(replace(options, model=str(renamed)))
    model.symlink_to(renamed)
    assert plan_run(options).run_id == begun.run_id


def test_images_that_lie_elsewhere_are_taken_from_there_when_that_is_asked_for(options: RunOptions, tmp_path: Path) -> None:
    begun = plan_run(options)
    publish(begun, Path(options.images_dir))
    begun.stage_failure(1, 0, make_failure(begun.questions(1)[0]))
    moved = place(options, tmp_path / "moved")
    with pytest.raises(UserError, match=r"images_dir: .*\nWere the images moved there\? With --relocate"):
        plan_run(moved)
    again = plan_run(replace(moved, relocate=True))
    assert (again.run_id, again.settings.images.images_dir) == (begun.run_id, moved.images_dir)
    assert again.identity(1, 0) == begun.identity(1, 0)  # what was staged before is still this run's
    with pytest.raises(ReplacedError):
        begun.refresh()  # so a worker opens it again
    assert plan_run(moved).run_id == begun.run_id
    with pytest.raises(UserError, match="images_dir"):
        plan_run(options)
    assert plan_run(replace(options, relocate=True)).settings.images.images_dir == options.images_dir


def test_other_images_are_not_taken_for_those_that_were_moved(options: RunOptions, tmp_path: Path) -> None:
    begun = plan_run(options)
    publish(begun, Path(options.images_dir))
    moved = place(options, tmp_path / "moved")
    image = tmp_path / "moved" / begun.questions(1)[0].image_id
    image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(UserError, match=rf"--relocate: {image} is another image than question q was computed from"):
        plan_run(replace(moved, relocate=True))
    with pytest.raises(UserError, match="holds a run with other settings:\n  dtype"):
        plan_run(replace(moved, relocate=True, computation=Computation(dtype="float32")))
    assert Run.open(options.output_dir).settings.images.images_dir == options.images_dir
    with pytest.raises(UserError, match=r"--relocate: .* holds no run"):
        plan_run(replace(options, relocate=True, output_dir=str(tmp_path / "none")))


def test_parts_of_failures_alone_have_no_image_to_compare(options: RunOptions, tmp_path: Path) -> None:
    begun = plan_run(options)
    begun.stage_failure(1, 0, make_failure(begun.questions(1)[0]))
    begun.pin_model(make_facts())
    assert pack(begun, 1)
    moved = place(options, tmp_path / "moved")
    assert plan_run(replace(moved, relocate=True)).run_id == begun.run_id


def test_a_run_of_which_nothing_is_computed_is_replaced(options: RunOptions, capsys: pytest.CaptureFixture[str]) -> None:
    begun = plan_run(options)
    other = replace(options, computation=Computation(dtype="float32"))
    with pytest.raises(UserError, match="Nothing of it is computed yet: after `producer cancel`"):
        plan_run(other)  # its messages may be in a queue
    begun.note_refusal("worker", "another model")
    begun.cancel()
    replaced = plan_run(other)
    assert replaced.run_id != begun.run_id
    assert "nothing was computed of the run that was planned there; it is replaced" in capsys.readouterr().err
    assert (replaced.settings.dtype, len(replaced.slices), replaced.is_cancelled()) == ("float32", 1, False)
    assert (replaced.refusals(), replaced.model_facts()) == ({}, None)


def test_a_run_of_which_nothing_is_computed_can_be_moved(options: RunOptions, tmp_path: Path) -> None:
    begun = plan_run(options)
    begun.cancel()
    moved = place(options, tmp_path / "moved")
    assert plan_run(replace(moved, relocate=True)).run_id == begun.run_id


def test_what_producer_run_left_behind_is_replaced_while_nobody_works_on_it(options: RunOptions) -> None:
    begun = plan_run(options)
    other = replace(options, computation=Computation(dtype="float32"))
    with (Path(begun.output_dir) / ".run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="holds a run with other settings"):
            plan_run(other)
        fcntl.flock(lock, fcntl.LOCK_UN)
        assert plan_run(other).run_id != begun.run_id


def test_where_nobody_can_say_whether_a_run_is_worked_on_it_is_kept(
    options: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = plan_run(options)
    (Path(begun.output_dir) / ".run" / "lock").touch()

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="holds a run with other settings"):
        plan_run(replace(options, computation=Computation(dtype="float32")))
    assert Run.open(options.output_dir).run_id == begun.run_id


@pytest.mark.parametrize("computed", ["staged", "failed", "published"])
def test_a_run_of_which_something_is_computed_is_not_replaced(options: RunOptions, computed: str) -> None:
    begun = plan_run(options)
    if computed == "published":
        publish(begun, Path(options.images_dir))
    elif computed == "staged":
        begun.stage_sample(1, 0, make_sample(begun.questions(1)[0]))
    else:
        begun.stage_failure(1, 0, make_failure(begun.questions(1)[0]))
    begun.cancel()
    with pytest.raises(UserError, match=r"another --output-dir for a new run\.$"):
        plan_run(replace(options, computation=Computation(dtype="float32")))
    assert Run.open(options.output_dir).run_id == begun.run_id


def test_another_kind_of_model_is_refused_before_a_run_is_there(options: RunOptions, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    without = {name: value for name, value in config.items() if not name.startswith(("vision", "image"))}
    (model / "config.json").write_text(json.dumps(without | {"model_type": "llama"}))
    with pytest.raises(UserError, match=rf"--model {model}: it is a llama model, which takes no images"):
        plan_run(options)
    (model / "config.json").write_text(json.dumps(config | {"model_type": "molmo", "auto_map": {"AutoConfig": "x.Y"}}))
    with pytest.raises(UserError, match="no code of a model's repository is run here"):
        plan_run(options)
    assert not Path(options.output_dir).exists()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"max_pixels": 100_000}, "a llava model's own processor sizes images"),
        ({"min_pixels": 100}, "a llava model's own processor sizes images"),
        ({"halp_compat": True}, "--halp-compat: the study has no llava model; it has fast_vlm, gemma3"),
    ],
)
def test_what_another_family_does_not_have_is_refused(
    options: RunOptions, model: Path, asked: dict[str, Any], reason: str
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "llava"}))
    with pytest.raises(UserError, match=reason):
        plan_run(replace(options, computation=Computation(**asked)))
    assert not Path(options.output_dir).exists()


def test_every_field_of_a_computation_is_an_option_and_in_a_part(tmp_path: Path) -> None:
    parameters = _parameters()
    for name, field in Computation.model_fields.items():
        [option] = parameters[name].annotation.__metadata__
        assert option.help == field.description
        assert parameters[name].default == (None if field.default == () else field.default)
    path = tmp_path / "part.h5"
    question = make_questions(1)[0]
    write_part(path, make_settings(), make_facts(), 1, [(question, make_sample(question))], [])
    with h5py.File(path) as file:
        assert set(make_settings().recorded()) <= set(file.attrs)


@pytest.mark.parametrize("option", ["dtype", "layers", "max_new_tokens", "min_pixels", "max_pixels"])
def test_a_run_json_without_an_option_is_damaged(options: RunOptions, option: str) -> None:
    """What every version has written has no default in a run: it would compute something else than it began with."""
    path = Path(plan_run(options).output_dir) / ".run/run.json"
    body = json.loads(path.read_text())
    del body[option]
    with pytest.raises(UserError, match=rf"is damaged, or was written by another version .*: {option}: Field required"):
        RunSettings.decode(json.dumps(body).encode(), "run.json")
