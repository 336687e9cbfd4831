"""The demo's model, its training and the demo itself, as a newcomer runs it."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from producer.demo.gallery import picture
from storage.answers import is_right
from tests.support.browser import chromium, watched_page
from tests.support.processes import command
from workers.demo import model as demo_model
from workers.demo.easy_vqa import MODEL, EasyVqa, read_easy_vqa
from workers.demo.model import SPEC, WEIGHTS, Pupil, TrainingRecipe, train
from workers.demo.pictures import Lesson, Picture, draw_batch
from workers.demo.small_model import FILES, build_small_model

# The demo


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("demo") / "output"
    result = command("producer", "demo", "--questions", 400, "--output-dir", directory, COLUMNS="120")
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


def answers_of(directory: Path) -> list[tuple[str, str, str, str]]:
    """Return (type, question, answer, truth) of every question, with bare h5py."""
    found = []
    for path in sorted(directory.glob("*.h5")):
        with h5py.File(path) as file:
            for group in file.values():
                texts = [group[name].asstr()[()] for name in ("question", "answer", "ground_truth_answer")]
                found.append((group.attrs["answer_type"], *texts))
    return found


def test_the_demo_answers_real_questions(demo: tuple[Path, str]) -> None:
    directory, printed = demo
    answers = answers_of(directory)
    assert len(answers) == 400
    right = sum(is_right(answer, truth) for _, _, answer, truth in answers)
    assert 0.8 * 400 < right < 400  # it was taught, and it makes mistakes
    lines = [line.split("│") for line in printed.splitlines() if "│" in line]
    accuracy = {cells[1].strip(): [cell.strip() for cell in cells[2:5]] for cells in lines if len(cells) == 6}
    assert accuracy["all"] == ["400", str(right), f"{right / 400:.1%}"]
    for kind, number in Counter(kind for kind, *_ in answers).items():
        assert accuracy[kind][0] == str(number)


def test_the_demo_shows_questions_with_their_answers(demo: tuple[Path, str]) -> None:
    directory, printed = demo
    shown = {question for _, question, answer, truth in answers_of(directory) if question in printed}
    assert len(shown) > 10
    assert "✗" in printed
    assert "✓" in printed
    assert "0.png" in printed
    assert "storage probe" in printed


def test_the_demo_can_be_probed(demo: tuple[Path, str]) -> None:
    directory, _ = demo
    wrong = sum(answer != truth for _, _, answer, truth in answers_of(directory))
    result = command("storage", "probe", directory, "--no-mlp", "--by", "answer_type", "--json")
    assert result.returncode == 0, result.stderr
    body = json.loads(result.stdout)
    assert body["labels"]["wrong"] == wrong
    layers = {p["layer"] for p in body["probes"] if p["representation"] == "query_token_representation"}
    assert layers == set(range(SPEC.num_hidden_layers))
    assert (directory / "probe.svg").stat().st_size > 1000


@pytest.mark.slow
def test_the_demo_for_a_script(tmp_path: Path) -> None:
    call = ("producer", "demo", "--questions", 8, "--output-dir", tmp_path / "output")
    first = command(*call, "--json", HALP_ENGINE="fake")
    assert (first.returncode, first.stderr) == (0, "")
    assert json.loads(first.stdout)["written"] == 8
    again = command(*call, "--quiet")
    assert (again.returncode, again.stdout, again.stderr) == (0, "", "")


def test_the_demos_report_in_a_browser(demo: tuple[Path, str], screenshots: Path | None, tmp_path: Path) -> None:
    directory, questions = demo[0], 400
    if screenshots:  # of what `make demo` leaves
        directory, questions = tmp_path / "demo-output", 2000
        assert command("producer", "demo", "--output-dir", directory).returncode == 0
    right = sum(is_right(answer, truth) for _, _, answer, truth in answers_of(directory))
    with chromium() as browser, watched_page(browser) as watched:
        page = watched.page
        page.goto((directory / "report.html").as_uri())
        assert watched.errors == []
        assert page.inner_text("#counts").split()[:4] == [f"{questions:,}", "planned", f"{questions:,}", "written"]
        text = page.inner_text("body")
        told = (r"Of (.+) questions looked into", r"right answers: ([\d,]+)", r"wrong answers: ([\d,]+)")
        looked, equal, different = (int(re.findall(pattern, text)[0].replace(",", "")) for pattern in told)
        assert equal + different == looked
        assert looked < questions or equal == right  # of many questions some are looked into
        assert page.locator("#samples img").count() == 12
        if screenshots:
            page.set_viewport_size({"width": 1200, "height": 740})
            page.screenshot(path=screenshots / "report.png")


def test_a_picture_on_a_terminal(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (10, 20, 30))
    image.paste((200, 0, 0), (0, 0, 64, 32))
    image.save(tmp_path / "a.png")
    text = picture(tmp_path / "a.png")
    assert len(text.plain.splitlines()) == 9
    styles = [str(span.style) for span in text.spans]
    assert styles[0] == "#c80000 on #c80000"
    assert styles[-1] == "#0a141e on #0a141e"


# The shipped checkpoint


def test_the_shipped_checkpoint_is_whole_and_light() -> None:
    size = sum(path.stat().st_size for path in MODEL.iterdir())
    assert size < 12e6
    assert (MODEL / "README.md").is_file()
    model, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert model.dtype == torch.bfloat16
    assert type(AutoProcessor.from_pretrained(MODEL)).__name__ == "Qwen2_5_VLProcessor"


def test_the_shipped_checkpoint_has_the_genuine_files(tmp_path: Path) -> None:
    built = build_small_model(tmp_path / "model", SPEC)
    for name in set(FILES) - {WEIGHTS, "small_model.json"}:
        assert (MODEL / name).read_bytes() == (built / name).read_bytes(), name
    shapes = []
    for directory in (MODEL, built):
        with safe_open(directory / WEIGHTS, "np") as file:
            shapes.append({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    assert shapes[0] == shapes[1]


def test_the_shipped_checkpoint_was_trained_by_the_committed_recipe() -> None:
    facts = json.loads((MODEL / "training.json").read_text())
    assert TrainingRecipe(**facts["recipe"]) == TrainingRecipe()
    assert 0.85 <= facts["accuracy"]["test"]["all"] < 0.98
    card = (MODEL / "README.md").read_text()
    for share in facts["accuracy"]["test"].values():
        assert f"{share:.1%}" in card


# The training


@pytest.fixture(scope="module")
def some_data() -> EasyVqa:
    data = read_easy_vqa("train")
    return replace(data, rows=data.rows[:900])


@pytest.fixture(scope="module")
def pupil(tmp_path_factory: pytest.TempPathFactory) -> Pupil:
    spec = replace(SPEC, expressive=True, dtype="float32")  # whose values show position and mask errors
    return Pupil(build_small_model(tmp_path_factory.mktemp("pupil") / "model", spec), torch.device("cpu"))


def test_a_lesson_is_the_prompt_that_the_reference_sees(pupil: Pupil, some_data: EasyVqa) -> None:
    """Several questions behind one prefix give what each gives alone, in the official way."""
    from workers.checks.reference import Reference

    pictures = [replace(p, lessons=p.lessons[:3]) for p in pupil.pictures(some_data, 1.0)[:3]]
    with torch.inference_mode():
        logits, labels = pupil(pictures)
    first = torch.zeros_like(labels, dtype=torch.bool)
    for row, shown in enumerate(pictures):
        for place, lesson in enumerate(shown.lessons):
            first[row, place, lesson.answer_at - 1] = True
    ours = iter(logits[first[labels >= 0]])
    reference = Reference(pupil.model.config._name_or_path)
    for name in list(dict.fromkeys(row.image_id for row in some_data.rows))[:3]:
        for row in [row for row in some_data.rows if row.image_id == name][:3]:
            inputs = reference.inputs(some_data.images_dir / name, row.question)
            with torch.inference_mode():
                theirs = reference.model(**inputs).logits[0, -1]
            torch.testing.assert_close(next(ours), theirs, atol=1e-4 * float(theirs.abs().max()), rtol=0)


def test_a_moved_picture_holds_the_same_shape() -> None:
    pixels = np.full((64, 64, 3), 250, np.uint8)
    pixels[10:20, 30:50] = (0, 0, 255)
    shown = Picture.of(pixels, [Lesson((1, 2), 1, "shape", 1.0)])
    assert shown.box == (10, 20, 30, 50)
    places = set()
    for seed in range(20):
        moved = Picture.of(shown.moved(np.random.default_rng(seed)), [])
        top, bottom, left, right = moved.box
        assert (bottom - top, right - left) == (10, 20)
        assert (moved.pixels == (0, 0, 255)).all(-1).sum() == 200
        places.add(moved.box)
    assert len(places) > 15


def test_a_shape_cut_by_the_border_stays_there() -> None:
    pixels = np.full((64, 64, 3), 250, np.uint8)
    pixels[0:20, 30:50] = 0
    for seed in range(10):
        assert Picture.of(Picture.of(pixels, []).moved(np.random.default_rng(seed)), []).box[:2] == (0, 20)


def test_a_batch_is_a_function_of_seed_and_step(pupil: Pupil, some_data: EasyVqa) -> None:
    pictures = pupil.pictures(some_data, 3.0)
    kinds = {"size": 8, "lessons": 2}
    first, again = (draw_batch(pictures, 5, seed=0, **kinds) for _ in range(2))
    other = draw_batch(pictures, 5, seed=1, **kinds)
    assert all((a.pixels == b.pixels).all() and a.lessons == b.lessons for a, b in zip(first, again))
    assert any((a.pixels != b.pixels).any() for a, b in zip(first, other))
    assert all(len(set(p.lessons)) == 2 for p in first)
    steps = range(len(pictures) // 8)
    epoch = [p.ground.tobytes() + bytes(p.box) for step in steps for p in draw_batch(pictures, step, seed=0, **kinds)]
    assert len(set(epoch)) == len(epoch)  # each picture once


@pytest.mark.slow
def test_an_interrupted_training_goes_on_to_the_same_bytes(
    some_data: EasyVqa, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_model, "read_easy_vqa", lambda split: some_data)
    monkeypatch.setattr(demo_model, "accuracy", lambda *_: {"all": 0.0})
    monkeypatch.setattr(demo_model, "_SAVE_EVERY", 2)
    recipe = TrainingRecipe(steps=4, images_per_step=8, held_out_images=10)
    train(tmp_path / "whole", recipe)

    steps = demo_model._step

    def stop_at_the_fourth(*arguments: Any) -> float:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt
        return steps(*arguments)

    left = 4
    monkeypatch.setattr(demo_model, "_step", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", recipe)
    assert not (tmp_path / "cut").exists()
    monkeypatch.setattr(demo_model, "_step", steps)
    train(tmp_path / "cut", recipe)
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    assert {path.name for path in (tmp_path / "cut").iterdir()} == {*FILES, "training.json"} - {"small_model.json"}


def test_a_trained_model_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo_model.main([str(tmp_path)])
    assert stopped.value.code == 2
    assert "remove it, or name another directory" in capsys.readouterr().err
