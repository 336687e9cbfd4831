"""Planning: which run a directory's is, and what of a checkpoint counts for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest

from producer.options import RunOptions, _parameters, _run_options
from producer.planning import plan_run
from storage.computation import Computation
from storage.errors import UserError
from storage.hdf5.part import write_part
from storage.runs.run import Run
from storage.settings import RunSettings
from tests.support.builders import make_facts, make_questions, make_sample, make_settings
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
    return _run_options(table, **fields)


def test_a_note_beside_the_weights_changes_nothing_and_a_changed_file_is_named(
    options: RunOptions, model: Path
) -> None:
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


def test_every_field_of_a_computation_is_an_option_and_in_a_part(tmp_path: Path) -> None:
    parameters = _parameters()
    for name, field in Computation.model_fields.items():
        [option] = parameters[name].annotation.__metadata__
        assert option.help == field.description
        assert parameters[name].default == field.default
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
