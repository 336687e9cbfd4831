"""When questions were computed and what certificates cost: kept by the part, shown by the report, inspect and status."""

from __future__ import annotations

import io
import json
import re
import time
from datetime import datetime
from pathlib import Path

import h5py
import numpy as np
import pytest
from rich.console import Console

from producer.show.display import workers_table
from storage.drift import with_certificate
from storage.hdf5.layout import open_part
from storage.hdf5.timing import computed_at, engine_seconds
from storage.naming import group_key
from storage.runs.pack import pack
from storage.runs.run import Run
from storage.sample import Sample
from storage.views.inspect import describe_part, part_tables
from storage.views.report import render
from storage.views.report_data import gather
from tests.producer.test_live import worker
from tests.support.builders import make_run, make_sample, stage
from tests.workers.test_certificate import Computing, ask
from workers.extract import certificate
from workers.extract.certificate import Certifier
from workers.monitor import metrics

HOUR = 3600.0


def timed(run: Run, part: int, first: float, *, spacing: float = 60.0) -> None:
    """Stage a part whose questions were computed from `first` on, the last one earliest, and the first one certified."""
    questions = run.questions(part)
    for sequence, question in enumerate(questions):
        at = first + spacing * (len(questions) - 1 - sequence)
        sample = make_sample(question, computed_at=at, engine_seconds=0.5)
        if sequence == 0:
            exact = make_sample(question, engine_seconds=0.75)
            sample = with_certificate(sample, exact, exact)
        run.stage_sample(part, sequence, sample)


def begun(run: Run) -> float:
    return datetime.fromisoformat(run.settings.created_at).timestamp()


def past_run(path: Path, number: int, **settings: object) -> Run:
    return make_run(path, number, created_at="2026-01-01T00:00:00+00:00", **settings)


def test_a_part_keeps_when_its_questions_were_computed(tmp_path: Path) -> None:
    run = past_run(tmp_path, 6, checkpoint_interval=6)
    timed(run, 1, begun(run))
    assert pack(run, 1)
    with h5py.File(run.part_path(1)) as file:
        sequences = {group_key(question.question_id): n for n, question in enumerate(run.questions(1))}
        assert list(file.attrs["computed_at"]) == [begun(run) + 60.0 * (5 - sequences[key]) for key in file]
        assert file.attrs["engine_seconds"] == 3.0
        assert json.loads(file.attrs["drift"])["seconds"] == 1.5
        of_questions = {name for group in file.values() for name in group.attrs}
        assert not {name for name in of_questions if "seconds" in name or "computed" in name}
    shown = io.StringIO()
    for table in part_tables(describe_part(run.part_path(1))):
        Console(file=shown, width=160).print(table)
    assert "took 1.5 s" in shown.getvalue()
    assert "computed_at" not in shown.getvalue()


def test_the_report_shows_work_and_not_publication(tmp_path: Path) -> None:
    """Two parts, computed with a pause between them long ago, are published now."""
    run = past_run(tmp_path, 8, checkpoint_interval=4)
    for part, first in ((1, HOUR), (2, 5 * HOUR)):
        timed(run, part, begun(run) + first, spacing=600.0)
        assert pack(run, part)
    data = gather(run)
    assert [(round(hours, 6), number) for hours, number in data.progress] == [
        (0.0, 0.0),
        *((round(1 + n / 6, 6), n + 1.0) for n in range(4)),
        *((round(5 + n / 6, 6), n + 5.0) for n in range(4)),
    ]
    page = render(data)
    assert "questions computed, by hours since the plan" in page
    assert "A certificate took 1.5 s on average, 42.9% of the engine&#39;s time." in page


def test_parts_of_an_earlier_version_are_drawn_as_published(tmp_path: Path) -> None:
    """They say neither time; one that was staged by an earlier version in part says what is known."""
    run = make_run(tmp_path, 12, checkpoint_interval=4)
    stage(run, 1)
    timed(run, 2, begun(run))
    mixed = [make_sample(q, **({"computed_at": begun(run), "engine_seconds": 1.0} if n else {})) for n, q in
             enumerate(run.questions(3))]  # fmt: skip
    for sequence, sample in enumerate(mixed):
        run.stage_sample(3, sequence, sample)
    assert all(pack(run, part) for part in (1, 2, 3))
    with open_part(run.part_path(1)) as before, open_part(run.part_path(3)) as both:
        assert (computed_at(before), engine_seconds(before)) == (None, None)
        assert np.isnan(computed_at(both)).sum() == 1  # type: ignore[arg-type]
        assert engine_seconds(both) is None
    data = gather(run)
    assert (len(data.progress), data.progress[-1][1]) == (13, 12)
    assert len(data.certificate_cost) == 1
    assert render(data).count("A certificate took") == 1


@pytest.mark.parametrize("strange", [np.zeros(3), np.zeros((4, 1)), np.zeros(4, np.int32), "soon"], ids=str)
def test_times_that_are_none_leave_the_part_out(tmp_path: Path, strange: object) -> None:
    run = past_run(tmp_path, 8, checkpoint_interval=4)
    for part in (1, 2):
        timed(run, part, begun(run))
        assert pack(run, part)
    with h5py.File(run.part_path(2), "r+") as file:
        file.attrs["computed_at"] = strange
    data = gather(run)
    assert data.progress[-1][1] == 8  # its questions count with those of which the time is known
    render(data)


def test_clocks_that_differ_and_many_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.views.report_data._POINTS", 10)
    run = past_run(tmp_path, 40, checkpoint_interval=40)
    timed(run, 1, begun(run) - 1e6, spacing=1e6)
    assert pack(run, 1)
    points = gather(run).progress
    assert len(points) == 11
    assert points == sorted(points)
    assert 0.0 <= points[1][0] <= points[-1][0] <= (time.time() - begun(run)) / HOUR


def test_the_engine_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tally = metrics.Tally()
    monkeypatch.setattr(metrics, "tally", tally)
    monkeypatch.setattr(certificate, "tally", tally)
    run = make_run(tmp_path, 4)

    def compute(_: object) -> list[Sample]:
        time.sleep(0.1)
        return [make_sample(question) for question in run.questions(1)]

    before = time.time()
    samples = metrics.measured(compute)([ask()] * 4)
    assert {sample.facts["computed_at"] >= before for sample in samples} == {True}
    assert sum(sample.facts["engine_seconds"] for sample in samples) == pytest.approx(tally.seconds)
    assert 0.1 <= tally.seconds < 5
    exact = samples[0].facts["engine_seconds"]
    Certifier(Computing(samples[0])).add(run, 1, ask(), samples[1])
    assert tally.exact_seconds == pytest.approx(2 * exact)


def test_status_shows_what_certificates_take() -> None:
    shown = io.StringIO()
    Console(file=shown, width=200).print(workers_table([worker(engine_seconds=200.0, exact_seconds=9.0), worker()]))
    lines = [line for line in shown.getvalue().splitlines() if "extract-1" in line]
    assert re.search(r"│ 4% of time", lines[0]), lines
    assert "of time" not in lines[1]
