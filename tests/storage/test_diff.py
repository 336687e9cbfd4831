"""`storage diff`: what it says against numpy, and its exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from storage.reading.diff import compare
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.sample import Sample
from tests.support.builders import make_facts, make_questions, make_run, make_sample

QUERY = "query_token_representation/layer_3"


def publish(path: Path, change: Callable[[str, Sample], Sample | None] = lambda _, sample: sample, **settings) -> Run:
    """Publish a run of twelve questions; `change` alters a question's sample or leaves it out."""
    model = settings.pop("model", make_facts())
    questions = [q for q in make_questions(12, per_image=1) if change(q.question_id, make_sample(q)) is not None]
    run = make_run(path, questions, model=model, **{"checkpoint_interval": 5, **settings})
    for piece in run.slices:
        for sequence, question in enumerate(run.questions(piece.part)):
            sample = change(question.question_id, make_sample(question, dtype=run.settings.dtype, model=model))
            assert sample is not None
            run.stage_sample(piece.part, sequence, sample)
        pack(run, piece.part)
    return run


def shifted(ids: set[str], by: float) -> Callable[[str, Sample], Sample]:
    def change(question_id: str, sample: Sample) -> Sample:
        if question_id not in ids:
            return sample
        vectors = sample.vectors | {QUERY: (sample.vectors[QUERY].astype(np.float32) + by).astype(np.float32)}
        return Sample(vectors, sample.answer + "!", sample.facts)

    return change


@pytest.fixture
def diff(storage_command) -> Callable[..., tuple[int, str, str]]:
    return partial(storage_command, "diff")


def test_a_run_is_the_same_as_itself_however_it_is_cut(tmp_path, diff):
    first = publish(tmp_path / "a")
    second = publish(tmp_path / "b", checkpoint_interval=12)
    code, out, err = diff(first.output_dir, second.output_dir)
    assert (code, err) == (0, "")
    assert out.endswith("the same\n")
    body = json.loads(diff(first.output_dir, second.output_dir, "--json")[1])
    assert (body["same"], body["compared"], body["settings"]) == (True, 12, {})
    assert {(f["equal"], f["compared"], f["maximum"]) for f in body["fields"]} == {(12, 12, 0.0)}
    assert all(f["worst"] == [] and f["z_rms"] == 0 and f["cosine_min"] == pytest.approx(1) for f in body["fields"])


def test_the_figures_are_those_of_numpy(tmp_path, diff):
    first = publish(tmp_path / "a")
    second = publish(tmp_path / "b", shifted({"q3", "q7"}, 0.25), checkpoint_interval=4)
    found = compare(first.output_dir, second.output_dir)
    fields = {f.field: f for f in found.fields}
    assert {name for name, f in fields.items() if f.equal < f.compared} == {QUERY}
    x = np.stack([make_sample(q).vectors[QUERY].astype(np.float64) for q in make_questions(12, per_image=1)])
    y = x.copy()
    y[[2, 6]] = (x[[2, 6]].astype(np.float32) + np.float32(0.25)).astype(np.float64)
    z = np.abs(x - y) / x.std(axis=0)
    cosine = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    f = fields[QUERY]
    assert (f.compared, f.equal) == (12, 10)
    np.testing.assert_allclose(
        [f.cosine_mean, f.cosine_min, f.z_rms, f.z_max, f.maximum],
        [cosine.mean(), cosine.min(), np.sqrt((z**2).mean()), z.max(), np.abs(x - y).max()],
        rtol=1e-6,
    )
    assert {w.question_id for w in f.worst} == {"q3", "q7"}
    assert [a.question_id for a in found.answers] == ["q3", "q7"] or [a.question_id for a in found.answers] == [
        "q7",
        "q3",
    ]
    assert (found.answers[0].second, found.same) == (found.answers[0].first + "!", False)
    code, out, _ = diff(first.output_dir, second.output_dir, "--rows", 1)
    assert code == 1
    assert "1 of 2 answers that differ" in out
    assert out.endswith("different\n")


def test_questions_in_one_only_settings_and_fields(tmp_path, diff):
    first = publish(tmp_path / "a", lambda i, s: None if i == "q2" else s)
    second = publish(
        tmp_path / "b", lambda i, s: None if i in {"q5", "q6"} else s, dtype="float32", model=make_facts(layers=(0, 3))
    )
    code, out, _ = diff(first.output_dir, second.output_dir, "--json")
    body = json.loads(out)
    assert code == 1
    assert (body["compared"], body["only_in_first"], body["only_in_second"]) == (9, ["q5", "q6"], ["q2"])
    assert body["settings"] == {"dtype": ["bfloat16", "float32"], "layers": [[0, 1, 3], [0, 3]]}
    assert body["fields_not_compared"] == {
        f"{name}_token_representation/layer_1": "only in the first" for name in ("query", "vision")
    }
    shown = diff(first.output_dir, second.output_dir)[1]
    for text in ("only in the first: 2 of 2 questions", "settings that differ", "only in the first"):
        assert text in shown


def test_widths_that_differ_and_nothing_in_common(tmp_path):
    first = publish(tmp_path / "a")
    second = publish(tmp_path / "b", model=make_facts(hidden_size=9))
    found = compare(first.output_dir, second.output_dir)
    assert found.fields_not_compared[QUERY] == "of different widths: 8, 9"
    assert [f.field for f in found.fields] == ["vision_encoder_representation"]
    half = publish(tmp_path / "c", lambda i, s: s if i in {"q1", "q2"} else None)
    rest = publish(tmp_path / "d", lambda i, s: None if i in {"q1", "q2"} else s)
    found = compare(half.output_dir, rest.output_dir)
    assert (found.compared, found.fields, found.same) == (0, (), False)


def test_mistakes(tmp_path, diff):
    run = publish(tmp_path / "a")
    code, out, err = diff(run.output_dir, tmp_path / "no")
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path / 'no'}: no such file\n"
