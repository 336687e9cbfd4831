"""`storage probe`: what it finds, what it must not find, and what it refuses."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from sklearn.model_selection import train_test_split

from storage.answers import is_right, normalise
from storage.errors import UserError
from storage.fields import in_words
from storage.probing import experiment, score
from storage.probing.experiment import ProbeSettings, run_experiment
from storage.probing.figure import draw
from storage.probing.finding import Margin, find, too_few
from storage.probing.judge import Scored
from storage.probing.labels import read_labels
from storage.probing.report import closing_lines, experiment_json, finding_words, report_tables
from storage.probing.score import Bootstrap, Estimate, auroc, best_threshold
from storage.probing.split import grouped_split, published_order, published_split
from storage.runs.pack import pack
from tests.support.builders import make_facts, make_questions, make_run, make_sample
from tests.support.processes import command

pytestmark = pytest.mark.slow

WIDTH = 24
MODEL = make_facts(hidden_size=WIDTH, vision_hidden_size=6, layers=(0, 3))
QUERY = "query_token_representation/layer_3"


def write_run(
    directory: Path, number: int, wrong: Callable[[int], bool], *, signal: float = 0.0, shuffled: bool = False
) -> Path:
    """Write a finished run of `number` questions; a wrong answer moves the last query vector by `signal`."""
    direction = np.random.default_rng(5).standard_normal(WIDTH).astype(np.float32)
    questions = [
        replace(q, ground_truth_answer="yes", extra={"kind": "odd" if q.csv_row % 2 else "even"})
        for q in make_questions(number, per_image=3)
    ]
    if shuffled:
        questions = [questions[row] for row in np.random.default_rng(0).permutation(number)]
    run = make_run(directory, questions, model=MODEL, checkpoint_interval=50, dtype="float32")
    for piece in run.slices:
        for sequence, question in enumerate(run.questions(piece.part)):
            bad = wrong(question.csv_row)
            facts = {"image_sha256": f"sha of {question.image_id}", "first_token_entropy": 0.5,
                     "answer_token_logprobs": [-0.25, -0.5]}  # fmt: skip
            sample = make_sample(question, dtype="float32", model=MODEL, answer="No." if bad else "Yes!", **facts)
            sample.vectors[QUERY] += direction * (signal * bad)
            run.stage_sample(piece.part, sequence, sample)
        assert pack(run, piece.part)
    return directory


def at_random(share: float, seed: int = 0) -> Callable[[int], bool]:
    draws = np.random.default_rng(seed).random(10_000) < share
    return lambda row: bool(draws[row])


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("planted"), 600, at_random(0.3), signal=1.5)


# Answers


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Dog.", "dog"),
        ("the  cat, an apple", "cat apple"),
        ("Two", "2"),
        ("twenty-one", "20 1"),
        ("1,000", "1000"),
        ("1, 2", "1 2"),
        ("2.5 m", "2.5 m"),
        ("-5°", "-5°"),
        ("3-5", "3 5"),
        ("don't", "dont"),
        ("don’t", "dont"),
        ("“Yes”!", "yes"),
        ("５0%", "50%"),
        ("no\nway\t", "no way"),
        ("A", ""),
        ("", ""),
    ],
)
def test_normalisation(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("answer", "truth", "right"),
    [
        ("Yes, it is.", "yes", True),
        ("No.", "no", True),
        ("Not really", "no", False),
        ("yes", "no", False),
        ("", "no", False),
        ("three", "3", True),
        ("three dogs", "3", False),
        ("a circle", "Circle", True),
        ("It is a circle", "circle", False),
        ("yes", "yes it is", False),
    ],
)
def test_an_answer_is_right(answer: str, truth: str, right: bool) -> None:
    assert is_right(answer, truth) is right


# Labels


def write_labels(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


ANSWERS = {f"q{i}": "A circle." for i in range(100)}


def labelled(number: int = 100, *, other: int = 0, **columns: Any) -> list[dict[str, Any]]:
    return [
        {
            "question_id": f"q{i}",
            "is_hallucinating_manual": i % 2 == 0,
            "model_answer": "square" if i < other else "circle",
        }
        | columns
        for i in range(number)
    ]


def test_labels_of_the_published_column(tmp_path: Path) -> None:
    labels = read_labels(write_labels(tmp_path / "l.csv", labelled(text="x")), ANSWERS)
    assert labels.wrong == {f"q{i}": i % 2 == 0 for i in range(100)}
    assert labels.agreement == 1


def test_labels_given_to_other_answers_are_left_out(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "l.csv", labelled(other=4))
    labels = read_labels(path, ANSWERS)
    assert labels.agreement == pytest.approx(0.96)
    assert set(labels.mismatched) == {"q0", "q1", "q2", "q3"}
    assert labels.wrong.keys() == ANSWERS.keys() - set(labels.mismatched)
    assert read_labels(path, ANSWERS, keep_mismatches=True).wrong.keys() == ANSWERS.keys()


def test_agreement_below_95_percent_is_refused(tmp_path: Path) -> None:
    path = write_labels(tmp_path / "l.csv", labelled(other=6))
    with pytest.raises(UserError, match=r"94.0% agree.*'q0' was answered 'square' there and 'A circle.' here"):
        read_labels(path, ANSWERS)
    assert len(read_labels(path, ANSWERS, keep_mismatches=True).wrong) == 100


def test_labels_of_a_part_of_the_questions(tmp_path: Path) -> None:
    labels = read_labels(write_labels(tmp_path / "l.csv", labelled(40)), ANSWERS)
    assert (len(labels.wrong), labels.unlabelled, labels.unknown) == (40, 60, 0)


def test_a_blank_label_is_none(tmp_path: Path) -> None:
    rows = labelled()
    rows[7]["is_hallucinating_manual"] = ""
    assert "q7" not in read_labels(write_labels(tmp_path / "l.csv", rows), ANSWERS).wrong


@pytest.mark.parametrize(
    ("rows", "column", "message"),
    [
        (
            [{"question_id": f"00{i}", "bad": 1} for i in range(9)],
            None,
            "0 of its 9 ids.*It has '000'; the run has 'q0'",
        ),
        ([{"id": "q0", "bad": 1}], None, "no column question_id; it has id, bad"),
        ([{"question_id": "q0", "bad": 1}] * 2, None, "row 2: question_id 'q0' is there twice"),
        ([{"question_id": "q0", "bad": "perhaps"}], "bad", "row 1: bad is 'perhaps'"),
        ([{"question_id": "q0", "text": "x"}], None, "no column of true and false"),
        ([{"question_id": "q0", "a": 0, "b": 1}], None, "several columns of true and false: a, b"),
        ([{"question_id": "q0", "bad": 1}], "worse", "--label-column worse: .*question_id, bad"),
    ],
)
def test_labels_that_do_not_fit_are_refused(
    rows: list[dict[str, Any]], column: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_labels(write_labels(tmp_path / "l.csv", rows), ANSWERS, column=column)


# Splits


def test_a_grouped_split_never_shares_an_image() -> None:
    random = np.random.default_rng(0)
    images = [f"image {i}" for i in random.integers(0, 150, 900)]
    wrong = random.random(900) < 0.2
    for seed in range(5):
        split = grouped_split(wrong, images, seed)
        sides = [split.train, split.validation, split.test]
        assert sorted(np.concatenate(sides).tolist()) == list(range(900))
        names = [{images[row] for row in side} for side in sides]
        assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
        assert [len(side) / 900 for side in sides] == pytest.approx([0.6, 0.2, 0.2], abs=0.03)
        assert [wrong[side].mean() for side in sides] == pytest.approx([0.2] * 3, abs=0.05)


def test_the_published_split_is_that_of_parts_in_the_csvs_order_with_sorted_keys() -> None:
    """Against a plain account of what the published scripts do, from a run in another order."""
    rows = np.random.default_rng(0).permutation(2300) + 1  # csv rows, in the run's order
    ids = [f"question_{row}" for row in rows]
    wrong = np.random.default_rng(1).random(2300) < 0.3
    of = dict(zip(ids, wrong.tolist()))
    theirs = []
    for start in range(0, 2300, 1000):
        theirs += sorted(f"question_{row + 1}" for row in range(start, min(start + 1000, 2300)))
    train, test = train_test_split(theirs, test_size=0.2, random_state=42, stratify=[of[name] for name in theirs])

    assert [ids[row] for row in published_order(ids, rows.tolist())] == theirs
    split = published_split(wrong, ids, rows.tolist())
    assert [ids[row] for row in split.train] == train
    assert [ids[row] for row in split.test] == test
    assert not len(split.validation)


# Scores


def test_scores_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    wrong = random.random(500) < 0.3
    scores = np.round(random.random(500) + 0.4 * wrong, 1)  # with many ties
    images = [str(i // 5) for i in range(500)]
    judge = Bootstrap(wrong, images, draws=50, seed=0)
    assert judge.auroc(scores).value == pytest.approx(roc_auc_score(wrong, scores))
    assert judge.auprc(scores).value == pytest.approx(average_precision_score(wrong, scores))
    assert judge.f1(scores, 0.7).value == pytest.approx(f1_score(wrong, scores >= 0.7))
    assert judge.f1(scores, 9.0).value == 0
    assert judge.f1(scores, -1.0).value == pytest.approx(f1_score(wrong, np.ones(500)))
    best = best_threshold(wrong, scores)
    assert f1_score(wrong, scores >= best) == max(f1_score(wrong, scores >= t) for t in set(scores))


def test_a_draw_is_a_resample_of_images() -> None:
    """Weights must give what the repeated questions themselves would."""
    random = np.random.default_rng(0)
    wrong, scores = random.random(60) < 0.4, np.round(random.random(60), 1)
    images = np.array([i // 6 for i in range(60)])
    judge = Bootstrap(wrong, [f"{i:02d}" for i in images], draws=20, seed=3)
    drawn = np.random.default_rng(3).multinomial(10, np.full(10, 0.1), size=20)
    values = []
    for counts in drawn:
        rows = np.concatenate([np.repeat(np.flatnonzero(images == i), n) for i, n in enumerate(counts)])
        values.append(roc_auc_score(wrong[rows], scores[rows]))
    estimate = judge.auroc(scores)
    assert [estimate.low, estimate.high] == pytest.approx(np.percentile(values, [2.5, 97.5]).tolist())


def test_draws_in_small_pieces_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    wrong = random.random(100) < 0.4
    scores = random.random(100)
    judge = Bootstrap(wrong, [str(i // 4) for i in range(100)], draws=30, seed=0)
    whole = judge.auroc(scores), judge.auprc(scores), judge.f1(scores, 0.5)
    monkeypatch.setattr(score, "_AT_ONCE", 700)
    assert (judge.auroc(scores), judge.auprc(scores), judge.f1(scores, 0.5)) == whole


def test_questions_of_an_image_are_no_independent_draws() -> None:
    random = np.random.default_rng(0)
    image = np.repeat(np.arange(40), 10)
    wrong = (random.random(40) < 0.5)[image]  # an image's answers are all right or all wrong
    scores = random.standard_normal(40)[image] + wrong
    clustered = Bootstrap(wrong, list(map(str, image)), draws=500, seed=0).auroc(scores)
    naive = Bootstrap(wrong, list(map(str, range(400))), draws=500, seed=0).auroc(scores)
    assert clustered.high - clustered.low > 2 * (naive.high - naive.low)


def test_a_difference_is_paired() -> None:
    random = np.random.default_rng(0)
    wrong = random.random(400) < 0.5
    scores = random.standard_normal(400) + wrong
    judge = Bootstrap(wrong, list(map(str, range(400))), draws=500, seed=0)
    nearly = scores + 0.01 * random.standard_normal(400)
    assert judge.difference(scores, scores).high == 0
    assert judge.difference(scores, nearly).high < 0.1 * (judge.auroc(scores).high - judge.auroc(scores).low)


def test_auroc_of_a_constant_is_a_half() -> None:
    assert auroc(np.array([True, False, False]), np.zeros(3)) == 0.5


# The whole way


def test_a_planted_signal_is_found_where_it_is(planted: Path) -> None:
    result = run_experiment(planted, ProbeSettings(draws=200))
    found = {(p.name, p.probe): p for p in result.probes}
    for probe in ("linear", "mlp"):
        assert found[QUERY, probe].auroc.value > 0.95
        assert found[QUERY, probe].chosen
        assert found[QUERY, probe].above["question words"].low > 0.2
        assert not found["query_token_representation/layer_0", probe].chosen
        other = found["vision_token_representation/layer_0", probe].auroc
        assert other.low < 0.5 < other.high
    assert {p.name for p in result.probes} == set(MODEL.field_widths())


def test_shuffled_labels_give_a_half(planted: Path, tmp_path: Path) -> None:
    """The vectors know the true labels well; nothing may leak from a side of the split to another."""
    ids = [f"q{row}" for row in range(1, 601)]
    shuffled = np.random.default_rng(7).permutation([at_random(0.3)(row) for row in range(1, 601)])
    rows = [{"question_id": name, "bad": bool(value)} for name, value in zip(ids, shuffled)]
    labels = write_labels(tmp_path / "shuffled.csv", rows)
    result = run_experiment(planted, ProbeSettings(labels=labels, draws=500))
    for probe in ("linear", "mlp"):
        best = next(p for p in result.probes if (p.name, p.probe) == (QUERY, probe))
        assert best.auroc.low < 0.5 < best.auroc.high


def test_the_same_twice(tmp_path: Path) -> None:
    directory = write_run(tmp_path, 240, at_random(0.3), signal=0.3)
    first, second = (run_experiment(directory, ProbeSettings(draws=20)) for _ in range(2))
    assert first.probes == second.probes


def test_the_order_of_a_run_does_not_move_the_published_split(tmp_path: Path) -> None:
    settings = ProbeSettings(split="published", probes=("linear",), draws=20)
    wrong = at_random(0.3)
    first = run_experiment(write_run(tmp_path / "a", 240, wrong, signal=0.3), settings)
    second = run_experiment(write_run(tmp_path / "b", 240, wrong, signal=0.3, shuffled=True), settings)
    assert first.probes == second.probes
    assert "validation" not in first.sides
    assert not any(p.chosen for p in first.probes)


def test_probe_as_a_user_runs_it(planted: Path) -> None:
    result = command("storage", "probe", planted, "--no-mlp", "--by", "kind")
    assert result.returncode == 0, result.stderr
    assert "wrong" in result.stdout
    assert "grouped" in result.stdout
    assert (planted / "probe.svg").read_text().startswith("<?xml")
    body = json.loads((planted / "probe.json").read_text())
    assert {p["probe"] for p in body["probes"]} == {"linear"}
    assert {piece["value"] for piece in body["breakdown"]} == {"odd", "even"}
    assert sum(side["questions"] for side in body["sides"].values()) == 600
    again = command("storage", "probe", planted, "--no-mlp", "--by", "kind", "--json", "--plot", planted / "p.png")
    assert (planted / "p.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(again.stdout)["probes"] == body["probes"]
    quiet = command("storage", "probe", planted, "--no-mlp", "--quiet")
    assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")


def estimate(value: float) -> Estimate:
    return Estimate(value, value - 0.02, value + 0.02)


def scored(name: str, probe: str, validation: float | None, test: float, **above: float) -> Scored:
    margins = {other.replace("_", " "): estimate(margin) for other, margin in above.items()}
    return Scored(name, probe, validation, 0.5, estimate(test), estimate(test), estimate(test), margins)


def test_the_finding_claims_the_lesser_margin() -> None:
    """The baseline that is best on the validation side may be far from the best on the test side."""
    baselines = [scored("question words", "baseline", 0.81, 0.56), scored("first-token entropy", "baseline", 0.8, 0.82)]
    probes = [
        scored(QUERY, "mlp", 0.9, 0.87, **{"question_words": 0.31, "first-token_entropy": 0.05}),
        scored(QUERY, "linear", 0.8, 0.95, **{"question_words": 0.39, "first-token_entropy": 0.13}),
    ]
    found = find(probes, baselines, validated=True)
    assert (found.probe, found.chosen_on) == ("mlp", "validation")
    assert found.over_validation_best == Margin("question words", estimate(0.31))
    assert found.over_test_best == found.margin == Margin("first-token entropy", estimate(0.05))
    assert finding_words(found) == (
        "query token 3, mlp, the best on the validation side, has AUROC 0.870, 0.050 (+0.030 to +0.070) above "
        "first-token entropy, the best baseline on the test side."
    )
    of_test = [replace(p, validation_auroc=None) for p in probes]
    alone = find(of_test, [replace(b, validation_auroc=None) for b in baselines], validated=False)
    assert (alone.probe, alone.chosen_on, alone.over_validation_best) == ("linear", "test", None)


@pytest.mark.parametrize(
    ("margin", "words"),
    [(0.01, "0.010 (-0.010 to +0.030) above, which may be nothing, a,"), (-0.1, "0.100 (-0.120 to -0.080) below a,")],
)
def test_a_finding_that_is_none_says_so(margin: float, words: str) -> None:
    found = find([scored(QUERY, "mlp", 0.9, 0.9, a=margin)], [scored("a", "baseline", 0.9, 0.9)], validated=True)
    assert words in finding_words(found)


@pytest.mark.parametrize(
    ("wrong", "images", "warned"), [(200, 50, []), (199, 50, ["199 wrong"]), (20, 49, ["20 wrong", "49 images"])]
)
def test_few_answers_or_images_are_warned_of(wrong: int, images: int, warned: list[str]) -> None:
    texts = too_few(wrong, images)
    assert len(texts) == len(warned)
    assert all(word in text for word, text in zip(warned, texts))


def test_both_margins_are_shown(tmp_path: Path) -> None:
    """In the table within 80 columns, the JSON and the figure, where two baselines are best on two sides."""
    directory = write_run(tmp_path / "run", 240, at_random(0.3), signal=0.2)
    result = run_experiment(directory, ProbeSettings(draws=20, probes=("linear",)))
    other = next(b.name for b in result.baselines if b.name != result.best_baseline_on_test)
    worst = replace(result, best_baseline=other)
    console = Console(width=80, file=io.StringIO())
    for table in report_tables(worst):
        console.print(table)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "(val.)" in shown
    lines = [line for line in shown.splitlines() if " linear " in line]
    assert [line[3:].split("  ")[0] for line in lines] == [in_words(p.name) for p in worst.probes]
    best = next(p for p in worst.probes if p.name == QUERY)
    row = next(line for line in lines if "query token 3" in line)
    assert f"{best.above[other].value:.3f}".replace("0.", ".") in row.split()
    text = "\n".join(closing_lines(worst))
    assert f"minus that of {other}, the best on the validation side; it claims too much" in text
    assert "finding: query token 3, linear, the best on the validation side" in text
    body = experiment_json(result)
    assert body["finding"]["margin"] == body["finding"]["over_test_best"]
    assert body["warnings"] == list(result.warnings)
    assert [f"{result.sides['test'].images} images" in text for text in result.warnings] == [False, True]
    draw(worst, tmp_path / "f.svg")
    figure = (tmp_path / "f.svg").read_text()
    assert f"{other} (best on validation)" in figure
    assert f"{worst.best_baseline_on_test} (best on test)" in figure
    assert f"over {worst.best_baseline_on_test}" in figure


def test_a_missing_package_is_named(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiment, "find_spec", lambda name: None if name == "sklearn" else object())
    with pytest.raises(UserError, match=r"probing needs sklearn: pip install 'halp-extractor\[probe\]'"):
        run_experiment(planted, ProbeSettings())


@pytest.mark.parametrize(
    ("wrong", "arguments", "message"),
    [
        (lambda row: False, (), "all 60 answers are right"),
        (lambda row: row <= 5, (), "5 wrong and 55 right answers are too few"),
        (lambda row: row <= 30, ("--by", "colour"), "--by colour: the questions carry no such column"),
        (lambda row: row <= 30, ("--plot", "figure.jpg"), "a figure is .svg, .png or .pdf"),
        (lambda row: row <= 30, ("--label-column", "bad"), "add --labels"),
    ],
)
def test_what_is_refused(wrong: Callable[[int], bool], arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = command("storage", "probe", write_run(tmp_path / "run", 60, wrong), "--no-mlp", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
