"""`storage inspect` on a whole run: its tables, its JSON, its picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from PIL import Image

from storage.drift import with_certificate
from storage.runs.pack import pack
from storage.runs.run import Run
from tests.support.builders import make_failure, make_questions, make_run, make_sample

QUERY = "query_token_representation/layer_3"


@pytest.fixture
def run(tmp_path) -> Run:
    """Eleven questions in three parts, the last one not published; one failed; a certificate in each part."""
    run = make_run(tmp_path / "out", make_questions(11, extra={"category": "[b]"}), checkpoint_interval=4)
    for part in (1, 2):
        for sequence, question in enumerate(run.questions(part)):
            sample = make_sample(question)
            if sequence == 0:
                other = make_sample(question, answer="another")
                other.vectors[QUERY] = other.vectors[QUERY] + np.float32(0.01)
                sample = with_certificate(sample, other, make_sample(question))
            if (part, sequence) == (1, 2):
                run.stage_failure(part, sequence, make_failure(question))
            else:
                run.stage_sample(part, sequence, sample)
        pack(run, part)
    return run


@pytest.fixture
def inspect(storage_command) -> Callable[..., tuple[int, str, str]]:
    return partial(storage_command, "inspect")


def test_a_run_as_json(run, inspect):
    code, out, err = inspect(run.output_dir, "--json")
    assert (code, err) == (0, "")
    body = json.loads(out)
    assert (body["questions"], body["parts"]) == (7, 2)
    assert (body["account"]["planned"], body["account"]["failed"], body["account"]["outstanding"]) == (11, 1, 3)
    assert body["account"]["reasons"] == {"image_missing": 1}
    assert body["settings"]["model_name"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    fields = {f["field"]: f for f in body["fields"]}
    assert len(fields) == 8
    written = [q for q in make_questions(8) if q.question_id != "q3"]
    norms = [np.linalg.norm(make_sample(q).vectors[QUERY].astype(np.float64)) for q in written]
    found = fields[QUERY]
    assert (found["width"], found["questions"]) == (8, 7)
    np.testing.assert_allclose(
        [found[f"norm_{name}"] for name in ("mean", "std", "min", "max")],
        [np.mean(norms), np.std(norms), np.min(norms), np.max(norms)],
    )
    drift = {d["field"]: d for d in body["drift"]}
    assert drift[QUERY]["parts"] == 2
    assert drift[QUERY]["drift_max"] >= drift[QUERY]["drift_mean"] > 0
    assert body["answers_disagree"] == 2


def test_a_question_is_found_in_a_run(run, inspect):
    code, out, _ = inspect(run.output_dir, "--question", "q6", "--json")
    body = json.loads(out)
    assert (code, body["file"], body["selected"]["question_id"]) == (0, str(run.part_path(2)), "q6")


def test_a_run_as_tables(run, inspect):
    code, out, _ = inspect(run.output_dir)
    assert code == 0
    for text in ("7 questions in 2 parts", "failed: image_missing", "outstanding", QUERY, "noise floor", "bfloat16",
                 "exact answers that differ: 2 of 2"):  # fmt: skip
        assert text in out


@pytest.mark.parametrize(("source", "colour"), [("run", None), ("run", "csv_row"), ("part", "category")])
def test_a_picture(run, inspect, tmp_path, source, colour):
    target = tmp_path / "run.png"
    what = run.output_dir if source == "run" else run.part_path(1)
    code, _, err = inspect(what, "--plot", target, *(["--colour-by", colour] if colour else []))
    assert (code, err) == (0, "")
    with Image.open(target) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape[0] > 800
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20
    code, _, err = inspect(what, "--plot", target)
    assert (code, err) == (2, f"error: {target} exists: move it elsewhere, or give another name to --plot\n")


def test_a_picture_of_names_that_matplotlib_would_take_for_formulas(inspect, tmp_path):
    formula = r"$\frac{$ \x1b]0;"
    run = make_run(tmp_path / "costs $^$", make_questions(4, extra={formula: formula}), checkpoint_interval=4)
    for sequence, question in enumerate(run.questions(1)):
        run.stage_sample(1, sequence, make_sample(question))
    assert pack(run, 1)
    assert inspect(run.output_dir, "--plot", tmp_path / "run.png", "--colour-by", formula)[0] == 0


def test_mistakes(run, inspect, tmp_path, monkeypatch):
    target = tmp_path / "x.png"
    for arguments, message in [
        (["--colour-by", "category"], "--colour-by needs --plot"),
        (["--question", "q3"], "question 'q3' has failed: image_missing: "),
        (["--question", "q9"], "question 'q9' is not published yet"),
        (["--question", "q99"], "holds no question 'q99'"),
        (["--question", "q1", "--plot", target], "--plot draws a whole part or run"),
        (["--plot", target, "--colour-by", "nonsense"], "there is no column nonsense; there are question_id"),
        (["--plot", tmp_path / "x.nonsense"], "is not supported"),
    ]:
        code, out, err = inspect(run.output_dir, *arguments)
        assert (code, out) == (2, "")
        assert message in err
        assert not target.exists()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = inspect(run.output_dir, "--plot", target)
    assert (code, err) == (2, "error: --plot needs matplotlib: pip install 'halp-extractor[plot]'\n")
    code, _, err = inspect(make_run(tmp_path / "new", 3).output_dir)
    assert (code, err) == (2, f"error: {tmp_path / 'new'}: no part of this run is published yet\n")
