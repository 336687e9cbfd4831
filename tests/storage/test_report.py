"""The report of a run: what it says, in a real browser, light and dark; that it fetches nothing and runs nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser

from storage.drift import with_certificate
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.views import report_data
from storage.views.components import principal_components
from storage.views.report import render, write_report
from storage.views.report_data import compare, gather
from tests.support.browser import chromium, watched_page
from tests.support.builders import make_failure, make_questions, make_run, make_sample, stage
from tests.support.processes import command, wait_for, write_csv
from workers.collect.collector import Collector
from workers.collect.reporter import Reporter

HOSTILE = "<script>document.title='run over'</script><img src=x onerror=\"document.title='run over'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 60 questions in three parts, with failures, certificates, images, and texts that a stranger wrote."""
    directory = tmp_path_factory.mktemp("report")
    images = directory / "images"
    images.mkdir()
    questions = [replace(q, question=q.question + HOSTILE) for q in make_questions(60, per_image=3)]
    questions[1] = replace(questions[1], question_id=f"q2 {HOSTILE}", ground_truth_answer=HOSTILE)
    for question in questions[: 3 * 15]:
        Image.new("RGB", (400, 300), (200, 30, 30)).save(images / question.image_id)
    (images / questions[0].image_id).write_bytes(b"no image")
    run = make_run(directory / HOSTILE.replace("/", "_"), questions, checkpoint_interval=20, images_dir=str(images))
    for part in (1, 2, 3):
        for sequence, question in enumerate(run.questions(part)):
            if sequence == 5:
                run.stage_failure(part, sequence, make_failure(question, reason="out_of_memory", message=HOSTILE))
                continue
            answer = question.ground_truth_answer if sequence % 2 else HOSTILE
            facts = {"seq_len": 100 * sequence, "num_answer_tokens": sequence, "batch_size": 4}
            prefix = "computed" if sequence % 3 == 0 else "shared"
            sample = make_sample(question, answer=answer, image_prefix=prefix, **facts)
            if sequence == 0:
                sample = with_certificate(sample, sample, make_sample(questions[1]))
            run.stage_sample(part, sequence, sample)
        assert pack(run, part)
    write_report(run)
    return run


@pytest.mark.parametrize(("scheme", "light"), [("light", True), ("dark", False)])
def test_in_a_browser(finished: Run, browser: Browser, scheme: Literal["light", "dark"], light: bool) -> None:
    url = (finished.output_dir / "report.html").as_uri()
    with watched_page(browser, scheme) as watched:
        page = watched.page
        page.goto(url)
        assert (watched.errors, watched.requests) == ([], [url])
        assert page.title().endswith(": report")  # the texts did not run
        counts = page.inner_text("#counts")
        assert re.findall(r"\d+", counts) == ["60", "57", "3", "3", "3"]
        assert page.inner_text("#reasons").split() == ["out_of_memory", "3"]
        assert page.locator("#failures bdi").nth(1).text_content() == HOSTILE
        names = page.locator(".figure h3").all_inner_texts()
        assert names[:5] == ["Throughput", "Prompt tokens", "Answer length", "Batch size", "Norms by layer"]
        assert "query_token_representation/layer_3" in names
        assert page.locator("#drift tr").count() == 1 + 8
        assert page.locator("#samples .card").count() == 12
        assert page.locator("#samples").inner_text().count(HOSTILE) >= 12
        shown = page.locator("#samples img")
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth == 160)")
        assert 7 <= shown.count() < 12  # the first image is damaged, and the last fifth is not there
        provenance = page.inner_text("#provenance")
        assert "Qwen/Qwen2.5-VL-7B-Instruct" in provenance
        assert "torch 2.14.0" in provenance
        red, green, blue, *_ = map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor")))
        assert (min(red, green, blue) > 200) is light
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_a_narrow_window_does_not_scroll_sideways(finished: Run, browser: Browser) -> None:
    with watched_page(browser, width=400) as watched:
        watched.page.goto((finished.output_dir / "report.html").as_uri())
        assert watched.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_nothing_is_fetched_and_nothing_runs(finished: Run) -> None:
    page = (finished.output_dir / "report.html").read_text()
    assert "<script" not in page
    assert re.findall(r'<[^>]*\b(?:src|href|srcset|action)="(?!data:)', page) == []
    assert "url(" not in page
    assert len(page) < 300_000


def test_a_run_that_is_not_finished(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6, agreed=False)
    assert "not finished yet" in render(gather(run))
    run = make_run(tmp_path / "failed", 3)
    stage(run, 1, failed=[0, 1, 2])
    assert pack(run, 1)
    page = render(gather(run))
    assert "image_missing" in page
    assert "not finished yet" not in page


def test_vectors_that_are_not_finite(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6, dtype="float32", checkpoint_interval=6)
    for sequence, question in enumerate(run.questions(1)):
        sample = make_sample(question, dtype="float32")
        sample.vectors["query_token_representation/layer_0"][:] = np.nan if sequence else np.inf
        run.stage_sample(1, sequence, sample)
    assert pack(run, 1)
    page = render(gather(run))
    assert re.findall(r"\b(nan|inf)\b", page) == []
    assert page.count("<svg") >= 9  # the other fields are drawn


def test_what_is_read_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path, 40, checkpoint_interval=4)
    for piece in run.slices:
        stage(run, piece.part)
        assert pack(run, piece.part)
    monkeypatch.setattr(report_data, "_QUESTIONS", 8)
    monkeypatch.setattr(report_data, "_QUESTION_PARTS", 4)
    monkeypatch.setattr(report_data, "_VECTORS", 5)
    monkeypatch.setattr(report_data, "_PARTS", 3)
    run.part_path(5).unlink()  # one that cannot be read is left out
    data = gather(run)
    assert 3 <= len(data.prompt_tokens) <= 9
    assert len(data.groups) <= 10
    assert {len(vectors) for vectors in data.vectors.values()} == {len(data.groups)}
    assert data.progress[-1][1] == 40  # every published question counts
    assert len(data.shown) <= 12


def test_principal_components_are_those_of_the_standardised_dimensions() -> None:
    """One dimension is a thousand times the others, one does not vary, and one is not finite."""
    vectors = np.random.default_rng(0).standard_normal((30, 50)).astype(np.float32)
    vectors *= np.array([1000, *[1] * 48, 0], np.float32)
    vectors[:, 48] = np.nan
    points, shares = principal_components(vectors)
    counted = vectors[:, :48].astype(np.float64)
    left, singular, _ = np.linalg.svd((counted - counted.mean(0)) / counted.std(0), full_matrices=False)
    assert np.abs(points) == pytest.approx(np.abs(left[:, :2] * singular[:2]), abs=1e-3)
    assert shares == pytest.approx((singular**2 / (singular**2).sum())[:2], abs=1e-4)
    assert principal_components(vectors[:1])[0].shape == (1, 2)
    assert principal_components(np.ones((4, 3)))[1] == (0.0, 0.0)


def test_answers_compared() -> None:
    assert compare(" Yes.", "yes") == compare("Two", "2") == "right answers"
    assert compare("no, it is not", "yes") == "wrong answers"
    assert compare("yes", " ") == "no ground truth"


def test_a_report_that_cannot_be_written_costs_the_others_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    runs = [make_run(tmp_path / name, 3) for name in ("first", "second", "third")]
    for run in runs:
        stage(run, 1)
        pack(run, 1)
    (tmp_path / "first" / "report.html" / "in the way").mkdir(parents=True)
    reporter = Reporter()
    reporter.start()
    for run in runs:
        reporter.add(run.location)
    wait_for((tmp_path / "second" / "report.html").exists, 60, "a report")
    assert reporter._writer is not None
    reporter._writer.kill()  # between two reports, or in the third
    reporter._writer.wait()
    reporter.add(runs[2].location)
    reporter.close()
    assert f"{runs[0].location}: no report.html: IsADirectoryError" in caplog.text
    assert (tmp_path / "third" / "report.html").exists()
    shutil.rmtree(tmp_path / "first" / "report.html")
    assert command("storage", "report", tmp_path / "first").stdout == f"{tmp_path / 'first' / 'report.html'}\n"


def test_no_run_waits_for_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are asked for once a run, when it is finished; and where a collector died before it wrote one."""
    monkeypatch.setattr("workers.collect.collector.feed", lambda run, published: 0)
    ended: list[str] = []
    runs = [make_run(tmp_path / name, 3) for name in ("first", "second")]
    for run in runs:
        stage(run, 1)
    collector = Collector((str(tmp_path),), ended.append)
    for _ in range(2):
        collector.sweep()
    assert ended == [run.location for run in runs]
    assert all(run.is_finished() for run in runs)
    (tmp_path / "first" / "report.html").touch()
    ended.clear()
    collector = Collector((str(tmp_path),), ended.append)
    for _ in range(2):
        collector._next_scan = 0.0
        collector.sweep()
    assert ended == [runs[1].location]


def test_a_run_ends_with_its_report(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    rows = [{"question_id": p.name, "image_id": p.name, "question": "What?", "answer": ""} for p in photographs.iterdir()]
    table, output = write_csv(tmp_path / "vqa.csv", rows), tmp_path / "output"
    options = ["--images-dir", photographs, "--output-dir", output, "--model", small_model]
    assert command("producer", "run", table, *options, HALP_ENGINE="fake").returncode == 0
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 12
    assert re.search("(seconds|minutes) since the plan", page)  # 0.004 hours say little
    written = (output / "report.html").stat().st_mtime_ns
    again = json.loads(command("storage", "report", output, "--json").stdout)
    assert again == {"report": str(output / "report.html")}
    assert (output / "report.html").stat().st_mtime_ns > written
    assert command("storage", "report", tmp_path).returncode == 2
