"""The main job as a user runs it: `producer run` on photographs, and what a reader with bare h5py then finds."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from PIL import Image

from tests.support.processes import command, start, wait_for, with_word, write_csv
from workers.checks.reference import Reference

QUESTIONS = ("What is in the image?", "Is there an animal in this picture? Answer yes or no.", "Why?")
ANSWER_LENGTH = 12
LAYERS = (0, 1, 3, 5, 6)  # the defaults for seven layers


def rows_for(photographs: Path) -> list[dict[str, str]]:
    """Two questions a photograph, scattered so that images do not come together in the file."""
    paths = sorted(photographs.iterdir())
    return [
        {
            "question_id": f"{number:03d}",
            "image_id": path.name,
            "question": QUESTIONS[(number + index) % 3],
            "answer": "NA" if number % 5 == 0 else f"truth {number}",
            "category": f"c{index % 3}",
        }
        for number, (index, path) in enumerate([*enumerate(paths), *enumerate(paths)])
    ]


def run_options(table: Path, images: Path, output: Path, model: Path) -> list[Any]:
    return [
        table, "--images-dir", images, "--output-dir", output, "--model", model, "--dtype", "float32",
        "--max-new-tokens", ANSWER_LENGTH, "--checkpoint-interval", 10,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photographs: Path, small_model: Path) -> dict[str, Any]:
    """A run of 24 questions over 12 photographs in float32."""
    directory = tmp_path_factory.mktemp("main-job")
    rows = rows_for(photographs)
    table = write_csv(directory / "vqa.csv", rows)
    options = run_options(table, photographs, directory / "output", small_model)
    result = command("producer", "run", *options)
    assert result.returncode == 0, result.stderr
    return {"rows": rows, "options": options, "output": directory / "output", "stdout": result.stdout, "table": table}


def test_it_says_what_it_did(finished: dict[str, Any]) -> None:
    assert finished["stdout"] == f"24 of 24 questions written into 3 parts: {finished['output']}\n"
    assert sorted(p.name for p in finished["output"].iterdir()) == [
        ".run",
        "qwen25vl_test_embeddings_part_001.h5",
        "qwen25vl_test_embeddings_part_002.h5",
        "qwen25vl_test_embeddings_part_003.h5",
        "report.html",
    ]
    assert not list((finished["output"] / ".run" / "staging").iterdir())
    assert not list((finished["output"] / ".run" / "tmp").iterdir())
    assert with_word(str(finished["output"])) == []


def test_values_equal_the_reference(finished: dict[str, Any], photographs: Path, small_model: Path) -> None:
    """Every vector read from the published files with bare h5py; answers identical."""
    reference = Reference(small_model)
    rows = {row["question_id"]: row for row in finished["rows"]}
    compared = 0
    for path in sorted(finished["output"].glob("*.h5")):
        with h5py.File(path) as part:
            for question_id, group in part.items():
                row = rows.pop(question_id)
                image = photographs / row["image_id"]
                expected = reference(image, row["question"], max_new_tokens=ANSWER_LENGTH, layers=LAYERS)
                names = ["vision_only_representation", "vision_encoder_representation"]
                for field in ("vision_token_representation", "query_token_representation"):
                    assert set(group[field]) == {f"layer_{layer}" for layer in LAYERS}
                    names += [f"{field}/layer_{layer}" for layer in LAYERS]
                for name in names:
                    values = group[name][:]
                    assert (values.ndim, values.dtype) == (1, np.float32)
                    assert np.abs(values - expected[name]).max() <= 1e-4 * np.abs(expected[name]).max()
                    compared += 1
                assert group["answer"].asstr()[()] == expected["answer"]
                assert group["question"].asstr()[()] == row["question"]
                assert group["image_id"].asstr()[()] == row["image_id"]
                assert group["ground_truth_answer"].asstr()[()] == row["answer"]
                assert group.attrs["category"] == row["category"]
                assert group.attrs["seq_len"] == expected["seq_len"]
                assert list(group.attrs["image_size"]) == list(Image.open(image).size)
    assert rows == {}
    assert compared == 24 * 12


def test_the_reference_scripts_readers_keep_working(finished: dict[str, Any]) -> None:
    parts = sorted(finished["output"].glob("*.h5"))
    ids = set()
    for path in parts:
        with h5py.File(path) as part:
            ids |= set(part)
            attributes = dict(part.attrs)
            assert attributes["model_type"] == "qwen2.5-vl-test"
            assert (attributes["device"], attributes["dtype"]) == ("cpu", "float32")
            assert attributes["num_samples"] == len(part)
            assert attributes["model_name"].endswith("Qwen2.5-VL-Test")
            assert attributes["created_at"]
        dump = subprocess.run(["h5dump", str(path)], capture_output=True, text=True, check=False)
        assert dump.returncode == 0, dump.stderr
        assert "vision_only_representation" in dump.stdout
    assert ids == {row["question_id"] for row in finished["rows"]}


def test_the_questions_of_an_image_lie_in_one_part(finished: dict[str, Any]) -> None:
    part_of: dict[str, set[str]] = {}
    for path in finished["output"].glob("*.h5"):
        with h5py.File(path) as part:
            for group in part.values():
                part_of.setdefault(group["image_id"].asstr()[()], set()).add(path.name)
    assert {len(parts) for parts in part_of.values()} == {1}


def test_the_same_command_again_repeats_nothing(finished: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished["output"].glob("*.h5")}
    again = command("producer", "run", *finished["options"])
    assert (again.returncode, again.stdout) == (0, finished["stdout"])
    assert {path: path.stat().st_mtime_ns for path in finished["output"].glob("*.h5")} == before


def test_status_and_verify(finished: dict[str, Any]) -> None:
    status = json.loads(command("producer", "status", finished["output"], "--json").stdout)
    assert (status["planned"], status["written"], status["failed"], status["outstanding"]) == (24, 24, 0, 0)
    assert (status["parts_published"], status["finished"]) == (3, True)
    verified = command("storage", "verify", finished["output"])
    assert verified.returncode == 0
    assert verified.stdout == "24 planned = 24 written + 0 failed + 0 not published; no problem found\n"


def test_other_settings_in_the_same_directory_are_refused(finished: dict[str, Any]) -> None:
    result = command("producer", "run", *finished["options"], "--layers", "1,2")
    assert result.returncode == 2
    assert "layers: the default in the run, (1, 2) now" in result.stderr
    other = write_csv(finished["table"].with_name("other.csv"), finished["rows"][:20])
    result = command("producer", "run", other, *finished["options"][1:])
    assert result.returncode == 2
    assert "the CSV's content (SHA-256)" in result.stderr


def test_a_directory_with_foreign_parts_is_refused(
    finished: dict[str, Any], tmp_path: Path, photographs: Path, small_model: Path
) -> None:
    shutil.copy(next(finished["output"].glob("*_001.h5")), tmp_path / "qwen25vl_7b_embeddings_part_001.h5")
    result = command("producer", "run", *run_options(finished["table"], photographs, tmp_path, small_model))
    assert result.returncode == 2
    assert "holds parts of something else (qwen25vl_7b_embeddings_part_001.h5)" in result.stderr
    assert not (tmp_path / ".run").exists()


def test_bad_images_fail_alone(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    """A missing image, a truncated JPEG and a text called .png: exactly those three fail, each with its reason."""
    images = tmp_path / "images"
    shutil.copytree(photographs, images)
    jpeg = (images / "chelsea.jpg").read_bytes()
    (images / "truncated.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    (images / "text-file.png").write_text("this is a text")
    rows = rows_for(photographs)
    for question_id, image in [("missing", "gone.jpg"), ("truncated", "truncated.jpg"), ("no-image", "text-file.png")]:
        rows.insert(5, {**rows[0], "question_id": question_id, "image_id": image})
    output = tmp_path / "output"
    options = run_options(write_csv(tmp_path / "vqa.csv", rows), images, output, small_model)
    result = command("producer", "run", *options, HALP_ENGINE="fake")
    assert result.returncode == 1
    assert "24 of 27 questions written" in result.stdout
    assert "3 failed" in result.stderr
    with (output / "failures.csv").open(newline="") as file:
        reasons = {row["question_id"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons == {"missing": "image_missing", "truncated": "image_corrupt", "no-image": "image_unreadable"}
    status = json.loads(command("producer", "status", output, "--json").stdout)
    assert status["reasons"] == {"image_missing": 1, "image_corrupt": 1, "image_unreadable": 1}
    written = set()
    for path in output.glob("*.h5"):
        with h5py.File(path) as part:
            written |= set(part)
    assert written == {row["question_id"] for row in rows} - set(reasons)
    assert command("storage", "verify", output).returncode == 0


# Of the fake engine: seconds that a batch takes, so that a run of 300 questions takes several.
SLOWLY = {"HALP_ENGINE": "fake:0.2", "HALP_BATCH_SIZE": "8"}


def long_run(tmp_path: Path, photographs: Path, small_model: Path) -> list[Any]:
    """The options of a run that takes several seconds."""
    image = sorted(photographs.iterdir())[0].name
    rows = [{"question_id": str(n), "image_id": image, "question": f"What is {n}?!", "answer": ""} for n in range(300)]
    options = run_options(write_csv(tmp_path / "vqa.csv", rows), photographs, tmp_path / "output", small_model)
    return options


def has_begun(output: Path) -> bool:
    return any(output.glob("*.h5"))


def test_ctrl_c_and_resume(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    options = long_run(tmp_path, photographs, small_model)
    output = tmp_path / "output"
    process = start("producer", "run", *options, log=tmp_path / "log", **SLOWLY)
    wait_for((output / ".run" / "logs").exists, 90, "the run holds its directory")
    second = command("producer", "run", *options, **SLOWLY)
    assert second.returncode == 2
    assert "another `producer run` is at work" in second.stderr
    wait_for(lambda: has_begun(output), 90, "the first part")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert "the same command resumes" in (tmp_path / "log").read_text()
    assert with_word(str(output)) == []
    first_parts = {path: path.stat().st_mtime_ns for path in output.glob("*.h5")}
    assert len(first_parts) < 30
    resumed = command("producer", "run", *options, HALP_ENGINE="fake")
    assert resumed.returncode == 0, resumed.stderr
    assert {path: path.stat().st_mtime_ns for path in first_parts} == first_parts
    assert "300 of 300 questions written into 30 parts" in resumed.stdout


def test_sigkill_leaves_no_process(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    options = long_run(tmp_path, photographs, small_model)
    output = tmp_path / "output"
    process = start("producer", "run", *options, log=tmp_path / "log", **SLOWLY)
    wait_for(lambda: has_begun(output), 90, "the first part")
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 4  # server, collector, worker, engine
    process.kill()
    process.wait(10)
    wait_for(lambda: not any(child.is_running() for child in family), 10, "every child is gone")
    assert with_word(str(output)) == []


@pytest.mark.slow
def test_a_dead_worker_is_restarted(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    options = long_run(tmp_path, photographs, small_model)
    output = tmp_path / "output"
    process = start("producer", "run", *options, log=tmp_path / "log", **SLOWLY)
    wait_for(lambda: has_begun(output), 90, "the first part")
    [worker] = [p for p in with_word(str(output)) if "worker@" in " ".join(p.cmdline())]
    worker.kill()
    assert process.wait(120) == 0, (tmp_path / "log").read_text()
    assert command("storage", "verify", output).returncode == 0


def test_a_model_that_cannot_be_loaded_is_a_message(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_model, broken)
    (broken / "model.safetensors").write_bytes(b"not a model")
    options = run_options(write_csv(tmp_path / "vqa.csv", rows_for(photographs)), photographs, tmp_path / "o", broken)
    result = command("producer", "run", *options)
    assert result.returncode == 2
    assert f"{broken}: model.safetensors is damaged" in result.stderr
    assert with_word(str(tmp_path / "o")) == []


def test_layers_that_the_model_lacks_are_refused(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    table = write_csv(tmp_path / "vqa.csv", rows_for(photographs))
    result = command("producer", "run", *run_options(table, photographs, tmp_path / "o", small_model), "--layers", "0,99")
    assert (result.returncode, result.stderr) == (2, "error: --layers: the model has layers 0 to 6; not 99\n")
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("options", "attributes"),
    [
        (["--exact"], {"exact": True, "positions": "last_image_token,last_prompt_token"}),
        (
            ["--halp-compat"],
            {"vision_only_definition": "encoder", "positions": "min(patches,seq_len//2),last_prompt_token"},
        ),
        (
            [
                "--layers", "all", "--no-vision-encoder", "--exif-rotation", "--prompt", "{question} Answer in one word.",
                "--repetition-penalty", "1.3", "--max-pixels", "20000",
            ],
            {
                "vision_encoder": False, "layers": list(range(7)), "exif_rotation": True,
                "prompt": "{question} Answer in one word.", "repetition_penalty": 1.3, "max_pixels": 20000,
            },
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)  # fmt: skip
@pytest.mark.slow
def test_options_reach_the_part(
    options: list[str], attributes: dict[str, Any], tmp_path: Path, photographs: Path, small_model: Path
) -> None:
    rows = rows_for(photographs)[:3]
    table = write_csv(tmp_path / "vqa.csv", rows)
    result = command("producer", "run", *run_options(table, photographs, tmp_path / "o", small_model), *options)
    assert result.returncode == 0, result.stderr
    verified = command("storage", "verify", tmp_path / "o")
    assert verified.returncode == 0, verified.stderr
    [path] = (tmp_path / "o").glob("*.h5")
    with h5py.File(path) as part:
        found = {name: part.attrs[name] for name in attributes}
        assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()} == attributes
        certified = "--exact" not in options and "--halp-compat" not in options
        assert ("drift" in part.attrs) == certified
        if certified:
            assert json.loads(part.attrs["drift"])["answers_agree"] is True
        if "--prompt" in options:
            reference = Reference(small_model, repetition_penalty=1.3, max_pixels=20000)
            for group in part.values():
                question = f"{group['question'].asstr()[()]} Answer in one word."
                image = photographs / group["image_id"].asstr()[()]
                expected = reference(image, question, max_new_tokens=ANSWER_LENGTH, layers=LAYERS)
                assert group["answer"].asstr()[()] == expected["answer"]


def test_an_old_refusal_does_not_stop_a_run(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    """Of a worker that had another model then: what counts is what this call's worker says."""
    table = write_csv(tmp_path / "vqa.csv", rows_for(photographs)[:3])
    options = run_options(table, photographs, tmp_path / "o", small_model)
    planned = command("producer", "enqueue", *options, HALP_BROKER_URL="redis://127.0.0.1:1/0")
    assert planned.returncode == 2  # no broker: planned all the same
    refusals = tmp_path / "o" / ".run" / "refusals"
    refusals.mkdir()
    (refusals / "extract-1@elsewhere.json").write_text('"another model"')
    result = command("producer", "run", *options, HALP_ENGINE="fake")
    assert result.returncode == 0, result.stderr


def test_watching_in_json_waits_for_the_end(finished: dict[str, Any]) -> None:
    result = command("producer", "status", finished["output"], "--watch", "--json")
    assert json.loads(result.stdout)["finished"] is True
    assert result.stderr == ""
