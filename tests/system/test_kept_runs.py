"""A run that an earlier version planned and half computed is finished by this one. tests/kept holds such runs, as they were."""

from __future__ import annotations

import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from storage.sample import decode_sample
from tests.support.processes import command

KEPT = Path(__file__).parents[1] / "kept"
# Attributes in which two computations of one question may differ.
_OF_A_COMPUTATION = {"batch_size", "image_prefix"}


@pytest.mark.slow
def test_a_run_of_before_the_rooms_is_finished(tmp_path: Path) -> None:
    """b539a72 published part 1, with a failure, and staged three questions of each of the parts 2 and 3; then SIGKILL."""
    place = tmp_path / "kept"
    shutil.copytree(KEPT / "half_computed", place)
    published = {path.name: path.read_bytes() for path in (place / "run").glob("*.h5")}
    assert len(published) == 1
    staged = [decode_sample(path.read_bytes()) for path in (place / "run/.run/staging").glob("*/*.safetensors")]
    assert len(staged) == 6
    assert not any("computed_at" in sample.facts for sample in staged)  # which that version did not write

    refused = run(place, "run")
    assert refused.returncode == 2
    assert "--relocate" in refused.stderr
    finished = run(place, "run", "--relocate")
    assert finished.returncode == 1, finished.stderr  # one question failed, before
    assert "11 of 12 questions written into 3 parts" in finished.stdout
    assert command("storage", "verify", place / "run", "--deep").returncode == 0

    for name, content in published.items():
        assert (place / "run" / name).read_bytes() == content
    old = samples(place / "run")
    computed_now = 0
    for path in sorted((place / "run").glob("*.h5"))[1:]:
        with h5py.File(path) as file:
            computed_now += np.isfinite(file.attrs["computed_at"]).sum()
    assert computed_now == 2  # what was staged was not computed again

    assert run(place, "afresh").returncode == 1
    new = samples(place / "afresh")
    assert old.keys() == new.keys()
    assert len(old) == 11
    for question, (vectors, attributes) in old.items():
        assert vectors.keys() == new[question][0].keys()
        for field, vector in vectors.items():
            np.testing.assert_array_equal(vector, new[question][0][field], err_msg=f"{question} {field}")
        assert attributes.keys() == new[question][1].keys()
        for name in attributes.keys() - _OF_A_COMPUTATION:
            assert str(attributes[name]) == str(new[question][1][name]), (question, name)


def run(place: Path, output: str, *options: str):
    return command(
        "producer", "run", place / "vqa.csv", "--images-dir", place / "images", "--output-dir", place / output,
        "--checkpoint-interval", "4", *options, HALP_ENGINE="fake", HALP_MAX_RETRIES="0",
    )  # fmt: skip


def samples(directory: Path) -> dict[str, tuple[dict[str, np.ndarray], dict[str, object]]]:
    """Return every question's vectors and attributes, read with bare h5py."""
    found = {}
    for path in sorted(directory.glob("*.h5")):
        with h5py.File(path) as file:
            for question, group in file.items():
                vectors: dict[str, np.ndarray] = {}
                group.visititems(
                    lambda name, item, vectors=vectors: (
                        vectors.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
                    )
                )
                found[question] = (vectors, dict(group.attrs))
    return found
