"""The drift certificate: measured against numpy on the whole part, and never left in a part as vectors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from storage.drift import DriftMeter, with_certificate
from storage.runs.pack import pack
from storage.sample import Sample, decode_sample, encode_sample
from tests.support.builders import make_failure, make_run, make_sample

FIELD = "query_token_representation/layer_1"


def shifted(sample: Sample, by: float) -> Sample:
    return replace(sample, vectors={name: (v + by).astype(v.dtype) for name, v in sample.vectors.items()})


def test_a_part_carries_its_drift_and_nothing_else_of_it(tmp_path: Path) -> None:
    run = make_run(tmp_path, 6, checkpoint_interval=6, dtype="float32")
    samples = [make_sample(question, dtype="float32") for question in run.questions(1)]
    certified = with_certificate(samples[0], shifted(samples[0], 0.5), shifted(samples[0], 0.5 + 0.125))
    for sequence, sample in enumerate([certified, *samples[1:]]):
        run.stage_sample(1, sequence, sample)
    assert pack(run, 1)
    with h5py.File(run.part_path(1)) as part:
        drift = json.loads(part.attrs["drift"])
        values = np.stack([group[FIELD][:] for group in part.values()]).astype(np.float64)
        names: set[str] = set()
        part.visit(names.add)
        assert not [name for name in names if "exact" in name]
        assert not [key for group in part.values() for key in group.attrs if "exact" in key]
        np.testing.assert_array_equal(part["q1"][FIELD][:], samples[0].vectors[FIELD])
    z = 0.5 / values.std(axis=0)
    field = drift["fields"][FIELD]
    assert field["drift"] == {
        "rms": pytest.approx(np.sqrt((z**2).mean()), rel=1e-5),
        "max": pytest.approx(z.max(), rel=1e-5),
    }
    assert field["noise_floor"]["max"] == pytest.approx(z.max() / 4, rel=1e-4)
    assert drift["answers_agree"] is True
    assert set(drift["fields"]) == set(samples[0].vectors)


def test_disagreeing_answers_show(tmp_path: Path) -> None:
    run = make_run(tmp_path, 2)
    meter = DriftMeter()
    sample, other = (make_sample(question) for question in run.questions(1))
    meter.take(decode_sample(encode_sample(with_certificate(sample, replace(sample, answer="no"), sample))))
    meter.take(other)
    certificate = meter.certificate()
    assert certificate is not None
    assert certificate["answers_agree"] is False
    assert certificate["fields"][FIELD]["drift"] == {"rms": 0.0, "max": 0.0}


def test_without_spread_there_is_no_measure(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1)
    meter = DriftMeter()
    sample = make_sample(run.questions(1)[0])
    meter.take(with_certificate(sample, sample, sample))
    certificate = meter.certificate()
    assert certificate is not None
    assert certificate["fields"][FIELD] == {"drift": None, "noise_floor": None}


def test_a_part_whose_first_question_failed_has_no_certificate(tmp_path: Path) -> None:
    run = make_run(tmp_path, 2, checkpoint_interval=2)
    first, second = run.questions(1)
    run.stage_failure(1, 0, make_failure(first))
    run.stage_sample(1, 1, make_sample(second))
    assert pack(run, 1)
    with h5py.File(run.part_path(1)) as part:
        assert "drift" not in part.attrs
