"""The self-check passes on a model that is computed right, fails on one that is not, and names a user's mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tests.support.mistakes import one_dimensional
from tests.support.processes import command, write_csv
from workers import cli
from workers.checks import selfcheck
from workers.checks.questions import bundled
from workers.checks.report import Comparison, Verdict

pytestmark = pytest.mark.slow

FAMILIES = ["vision_encoder", "vision_only", "vision_token", "query_token"]


def in_process(*arguments: object) -> Any:
    return CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, ["selfcheck", *map(str, arguments)])


def test_it_passes_as_a_user_runs_it(small_model: Path) -> None:
    result = command("workers", "selfcheck", "--model", small_model, "--questions", 7, "--max-new-tokens", 12, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["ok"] is True
    single, half = report["dtypes"]["float32"], report["dtypes"]["bfloat16"]
    for verdict in (single, half):
        assert (verdict["ok"], verdict["questions"], verdict["num_layers"], verdict["checked_layers"]) == (
            True,
            7,
            7,
            7,
        )
        assert verdict["environment"]["device"] == "cpu"
        for way in ("batched", "exact", "noise"):
            assert sorted(verdict[way]["worst"]) == sorted(FAMILIES)
    assert all(single[way]["same_answers"] == 7 for way in ("batched", "exact", "noise"))
    assert max(single["batched"]["worst"].values()) < 1e-4
    assert 1e-4 < max(half["noise"]["worst"].values()) < 0.5  # another kernel rounds otherwise


def test_the_table_has_a_line_for_each_family(small_model: Path) -> None:
    arguments = ("--model", small_model, "--questions", 4, "--max-new-tokens", 4, "--dtype", "float32")
    result = command("workers", "selfcheck", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("float32, all 7 layers, 4 questions: PASS\n")
    rows = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    assert [row[1].strip() for row in rows] == [*FAMILIES, "answers identical"]
    assert {row[-2].strip() for row in rows} == {"pass"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_fails_where_the_engine_is_broken(small_model: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    one_dimensional(monkeypatch)
    monkeypatch.setattr("workers.engine.model.refuse_difference", lambda *_: None)  # it would be found at load
    quiet = ("--quiet",) if dtype == "float32" else ()  # what fails is shown all the same
    result = in_process("--model", small_model, "--questions", 4, "--max-new-tokens", 4, "--dtype", dtype, *quiet)
    assert result.exit_code == 1, result.output
    assert f"{dtype}, all 7 layers, 4 questions: FAIL\n" in result.output
    verdicts = {row[1].strip(): row[-2].strip() for row in (line.split("│") for line in result.output.splitlines()) if row[1:]}
    assert verdicts["vision_token"] == "pass"  # the mistake is in what follows the image
    assert verdicts["query_token"] == "FAIL"


def test_a_model_too_large_is_checked_as_far_as_it_fits(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_SPARE_BYTES", 0)
    weights = (small_model / "model.safetensors").stat().st_size
    monkeypatch.setattr(selfcheck, "free_bytes", lambda: weights)  # a tenth more is wanted
    result = in_process("--model", small_model, "--questions", 4, "--max-new-tokens", 4, "--dtype", "float32")
    assert result.exit_code == 0, result.output
    assert "float32, the first 3 of 7 layers only (it needs 0.0 GB, 0.0 GB are free), 4 questions: PASS\n" in result.output


def test_a_model_that_does_not_fit_at_all_is_not_passed(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "free_bytes", lambda: 1 << 20)
    result = in_process("--model", small_model)
    assert result.exit_code == 1
    for dtype in ("float32", "bfloat16"):
        assert f"{dtype}: NOT CHECKED: not one layer fits (it needs 1.1 GB, 0.0 GB are free)\n" in result.output


def test_questions_of_a_table(small_model: Path, photographs: Path, tmp_path: Path) -> None:
    rows = [{"question_id": str(i), "image_name": "chelsea.jpg", "question": f"What is {i}?"} for i in range(5)]
    arguments = ("--model", small_model, "--csv", write_csv(tmp_path / "vqa.csv", rows), "--images-dir", photographs)
    result = command("workers", "selfcheck", *arguments, "--dtype", "float32", "--max-new-tokens", 0, "--json")
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["dtypes"]["float32"]["questions"] == 5


def test_pictures_that_a_run_converts_with_care_are_compared_as_it_has_them(small_model: Path, tmp_path: Path) -> None:
    """A clear circle on transparent black, and 16 bits that Pillow would clip to white: no fault of the engine's."""
    fade = np.linspace(0, 255, 64 * 64).reshape(64, 64).astype(np.uint8)
    Image.fromarray(np.dstack([fade, fade[::-1], fade, fade.T])).save(tmp_path / "clear.png")
    Image.fromarray((fade.astype(np.uint16) << 8) + 3).save(tmp_path / "deep.png")
    Image.fromarray(np.dstack([fade, fade.T])).save(tmp_path / "grey.png")
    rows = [{"question_id": n, "image_name": n, "question": "What?"} for n in ("clear.png", "deep.png", "grey.png")]
    arguments = ("--model", small_model, "--csv", write_csv(tmp_path / "vqa.csv", rows), "--images-dir", tmp_path)
    result = command("workers", "selfcheck", *arguments, "--dtype", "float32", "--max-new-tokens", 0, "--json")
    assert result.returncode == 0, result.stdout + result.stderr


def test_quiet_says_nothing_where_all_is_well(small_model: Path) -> None:
    arguments = ("--model", small_model, "--questions", 2, "--max-new-tokens", 0, "--dtype", "float32", "--quiet")
    result = in_process(*arguments)
    assert (result.exit_code, result.output) == (0, "")


def test_a_mistake_is_one_message(small_model: Path, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    table = write_csv(tmp_path / "vqa.csv", [{"image_id": "none.jpg", "question": "What?"}])
    foreign = write_csv(tmp_path / "other.csv", [{"image": "none.jpg", "question": "What?"}])
    table_of = ("--model", small_model, "--images-dir", photographs, "--csv")
    mistakes = {
        ("--model", "./nowhere"): "--model ./nowhere: no such directory",
        ("--model", photographs): f"--model {photographs}: the directory holds no checkpoint",
        ("--model", tmp_path): f"--model {tmp_path}: cannot be loaded: it is a bert model, which takes no images",
        ("--model", small_model, "--csv", table): "--csv and --images-dir go together",
        (*table_of, table): f"{photographs}/none.jpg does not exist",
        (*table_of, foreign): f"{foreign} has no column 'image_name'",
    }
    for arguments, message in mistakes.items():
        result = command("workers", "selfcheck", *arguments)
        lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert (result.returncode, result.stdout) == (2, "")
        assert [line[: len(message) + 7] for line in lines] == [f"error: {message}"]
        assert "Traceback" not in result.stderr


def test_help_has_an_example() -> None:
    result = command("workers", "selfcheck", "--help")
    assert (result.returncode, "Example: workers selfcheck" in result.stdout) == (0, True)


def test_the_bundled_questions_are_the_same_everywhere(tmp_path: Path) -> None:
    first, second = (bundled(tmp_path, 32) for _ in range(2))
    assert first == second
    assert (len(first), len({case.path for case in first})) == (30, 12)


def verdict(dtype: str, worst: float, noise: float, same: int = 3) -> Verdict:
    ours, floor = (Comparison({"query_token": e}, {"query_token": e}, same) for e in (worst, noise))
    return Verdict(dtype, 3, 28, 28, "", {}, ours, ours, floor)


def test_the_rules() -> None:
    assert verdict("float32", 9e-5, 0).passes
    assert not verdict("float32", 2e-4, 1).passes  # the noise floor excuses nothing in float32
    assert not verdict("float32", 0, 0, same=2).passes
    assert not verdict("float32", float("inf"), 0).passes
    assert verdict("bfloat16", 0.03, 0.01, same=1).passes
    assert not verdict("bfloat16", 0.05, 0.01).passes
    assert verdict("bfloat16", 0.015, 0).passes  # a rounding is always allowed
    assert not verdict("bfloat16", 0.017, 0).passes
