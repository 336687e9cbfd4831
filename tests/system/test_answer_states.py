"""States of answers in a run: in its files, and in whatever reads them."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors import safe_open

import storage
from tests.support.processes import command, write_csv

pytestmark = pytest.mark.slow

KINDS = ("last", "mean")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> tuple[Path, Path]:
    """A run without states of answers, and the same with the last and the mean, by the fake engine."""
    place = tmp_path_factory.mktemp("runs")
    (place / "images").mkdir()
    for number in range(20):
        Image.new("RGB", (60, 50), (number, 9, 90)).save(place / "images" / f"{number}.png")
    rows = [
        {"question_id": f"q{n}", "image_id": f"{n % 20}.png", "question": f"What is {n}?", "answer": "yes" if n % 3 else "no"}
        for n in range(120)
    ]
    table = write_csv(place / "t.csv", rows)
    for name, more in (("off", ()), ("on", ("--answer-states", "mean, last")), ("every", ("--answer-states", "all"))):
        call = (
            "producer",
            "run",
            table,
            "--images-dir",
            place / "images",
            "--output-dir",
            place / name,
            "--model",
            small_model,
        )
        result = command(*call, *more, HALP_ENGINE="fake:0")
        assert result.returncode == 0, result.stderr
    return place / "off", place / "on"


def test_the_files(runs: tuple[Path, Path]) -> None:
    off, on = (next(run.glob("*.h5")) for run in runs)
    with h5py.File(off) as without, h5py.File(on) as part:
        assert part.attrs["answer_states"] == "last, mean"
        assert "answer_states" not in without.attrs
        assert part.attrs.keys() - without.attrs.keys() == {
            "answer_states",
            *(f"column:answer_token_representation/{kind}/layer_{layer}" for kind in KINDS for layer in range(4)),
        }
        for question in part.values():
            assert {*question["answer_token_representation"]} == set(KINDS)
            assert question["answer_token_representation/last/layer_3"].shape == (8,)
            assert question["answer_token_representation/last/layer_3"].dtype == np.float32
        assert not any("answer_token_representation" in question for question in without.values())
    assert command("storage", "verify", runs[1], "--deep").returncode == 0


def test_a_lost_vector_is_found(runs: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs[1], tmp_path / "copy"))
    part = next(copy.glob("*.h5"))
    with h5py.File(part, "r+") as file:
        del file["q7/answer_token_representation/mean/layer_1"]
    found = command("storage", "verify", copy)
    assert found.returncode == 1
    assert part.name in found.stderr


def test_reading(runs: tuple[Path, Path]) -> None:
    on = runs[1]
    loaded = storage.load(on, "answer_token_representation", layer=2, token="last")
    assert loaded.vectors.shape == (120, 8)
    several = storage.load(on, "answer_token_representation/mean", layer=[0, 2])
    assert several.vectors.shape == (120, 2, 8)
    chunk = next(storage.iter_chunks(on, "answer_token_representation", 2, token="last"))
    order = [chunk.ids.index(name) for name in loaded.ids]
    np.testing.assert_array_equal(chunk.vectors[order], loaded.vectors)
    dataset = storage.torch_dataset(on, "answer_token_representation", 2, token="last")
    item = dataset[5]
    np.testing.assert_array_equal(item["vector"].numpy(), loaded.vectors[loaded.ids.index(item["question_id"])])
    sample = next(storage.iter_samples(on))
    vector = sample.vectors["answer_token_representation/last/layer_2"]
    np.testing.assert_array_equal(vector, loaded.vectors[loaded.ids.index(sample.question_id)])
    with pytest.raises(storage.UserError, match="has no answer_token_representation/first/layer_2; it has"):
        storage.load(on, "answer_token_representation", layer=2, token="first")


def test_the_commands(runs: tuple[Path, Path], tmp_path: Path) -> None:
    off, on = runs
    field = ("--field", "answer_token_representation/last", "--layer", "2")
    exported = command("storage", "export", on, "--to", "npz", *field, "--output", tmp_path / "v.npz")
    assert exported.returncode == 0, exported.stderr
    found = np.load(tmp_path / "v.npz")
    assert (120, 8) in {found[name].shape for name in found.files}
    assert command("storage", "diff", on, on).returncode == 0
    assert command("storage", "diff", off, on).returncode in (1, 2)
    shown = command("storage", "inspect", on)
    assert "answer_token_representation/last/layer_3" in shown.stdout
    again = command(
        "producer", "run", on.parent / "t.csv", "--images-dir", on.parent / "images", "--output-dir", on, "--model",
        json.loads((on / ".run/run.json").read_text())["model"], HALP_ENGINE="fake:0",
    )  # fmt: skip
    assert again.returncode == 2
    assert "answer_states: ('last', 'mean') in the run, () now" in again.stderr


def test_the_certificate_has_them(runs: tuple[Path, Path]) -> None:
    with h5py.File(next(runs[1].glob("*.h5"))) as part:
        fields = json.loads(part.attrs["drift"])["fields"]
    assert {f"answer_token_representation/{kind}/layer_{layer}" for kind in KINDS for layer in range(4)} <= fields.keys()
    assert fields["answer_token_representation/last/layer_2"]["drift"]["max"] == 0.0


def test_probing(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """A further representation, and the reader is told that it comes after generation."""
    labels = write_csv(tmp_path / "l.csv", [{"question_id": f"q{n}", "wrong": str(n % 3 == 0)} for n in range(120)])
    call = ("storage", "probe", "--labels", labels, "--no-mlp", "--plot", tmp_path / "p.svg")
    result = command(*call, runs[1])
    assert result.returncode == 0, result.stderr
    assert "answer last 3" in result.stdout
    assert "read after it is generated" in result.stdout
    assert "answer last" in (tmp_path / "p.svg").read_text()
    assert "read after it is generated" not in command(*call, runs[0]).stdout


def test_all_tokens(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """[T, D] of each question, T of its own: in the file, and in whatever reads it."""
    every, field = runs[0].parent / "every", "answer_token_representation"
    bare: dict[str, np.ndarray] = {}
    with h5py.File(next(every.glob("*.h5"))) as part:
        for key, question in part.items():
            bare[key] = question[f"{field}/all/layer_2"][()]
            assert bare[key].shape == (question.attrs["num_answer_tokens"], 8)
            assert question[f"{field}/all/layer_2"].chunks == bare[key].shape
    assert {len(found) for found in bare.values()} == {1, 2, 3, 4}
    assert command("storage", "verify", every, "--deep").returncode == 0

    loaded = storage.load(every, field, 2, token="all")
    assert repr(loaded).startswith(f"Loaded('{field}/all/layer_2', vectors=float32 [120, tokens, 8]")
    assert loaded.ids == loaded.frame["question_id"].tolist()
    for question, vectors in zip(loaded.ids, loaded.vectors, strict=True):
        np.testing.assert_array_equal(vectors, bare[question])
    several = storage.load(every, field, [2, 0], token="all")
    assert [v.shape for v in several.vectors] == [(len(bare[q]), 2, 8) for q in several.ids]
    np.testing.assert_array_equal(several.vectors[7][:, 0], bare[several.ids[7]])
    assert all(len(chunk.vectors) == len(chunk.ids) for chunk in storage.iter_chunks(every, field, 2, token="all"))
    data = storage.torch_dataset(every, field, 2, token="all")
    np.testing.assert_array_equal(data[3]["vector"].numpy(), bare[data[3]["question_id"]])
    for sample in storage.iter_samples(every):
        np.testing.assert_array_equal(sample.vectors[f"{field}/all/layer_2"], bare[sample.question_id])

    whole = np.concatenate([bare[q] for q in loaded.ids])
    options = ("--field", f"{field}/all", "--layer", "2", "--output")
    for to in ("npz", "safetensors", "parquet"):
        exported = command("storage", "export", every, "--to", to, *options, tmp_path / f"v.{to}")
        assert exported.returncode == 0, exported.stderr
    npz = np.load(tmp_path / "v.npz")
    np.testing.assert_array_equal(npz["vectors"], whole)
    assert npz["num_answer_tokens"].tolist() == [len(bare[q]) for q in loaded.ids]
    with safe_open(tmp_path / "v.safetensors", "np") as file:
        np.testing.assert_array_equal(file.get_tensor("vectors"), whole)
        assert json.loads(file.metadata()["num_answer_tokens"]) == npz["num_answer_tokens"].tolist()
    table = pq.read_table(tmp_path / "v.parquet")
    for question, vectors in zip(table["question_id"].to_pylist(), table["vector"].to_pylist(), strict=True):
        np.testing.assert_array_equal(np.array(vectors, np.float32), bare[question])

    overview = json.loads(command("storage", "inspect", every, "--json").stdout)
    assert {f["questions"] for f in overview["fields"]} == {120}
    plot = command("storage", "inspect", every, "--plot", tmp_path / "p.png")
    assert plot.returncode == 0, plot.stderr
    difference = json.loads(command("storage", "diff", every, every, "--json").stdout)
    [same] = [f for f in difference["fields"] if f["field"] == f"{field}/all/layer_2"]
    assert (same["compared"], same["equal"]) == (120, 120)
    with h5py.File(next(every.glob("*.h5"))) as part:
        assert json.loads(part.attrs["drift"])["fields"][f"{field}/all/layer_2"]["drift"]["max"] == 0.0
    assert command("storage", "report", every).returncode == 0
    labels = write_csv(tmp_path / "l.csv", [{"question_id": f"q{n}", "wrong": str(n % 3 == 0)} for n in range(120)])
    assert command("storage", "probe", every, "--labels", labels, "--no-mlp").returncode == 0
    body = json.loads((every / "probe.json").read_text())
    assert not any("answer" in scored["name"] for scored in body["probes"])


def test_tokens_of_another_number_are_found(runs: tuple[Path, Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(runs[0].parent / "every", tmp_path / "copy"))
    part = next(copy.glob("*.h5"))
    with h5py.File(part, "r+") as file:
        [key] = [k for k in file if file[k].attrs["num_answer_tokens"] == 3][:1]
        file[key].attrs["num_answer_tokens"] = 2
    sidecar = next((copy / ".run").rglob("*001*.json"))
    body = json.loads(sidecar.read_text())
    body |= {"size": part.stat().st_size, "sha256": sha256(part.read_bytes()).hexdigest()}
    sidecar.write_text(json.dumps(body))
    found = command("storage", "verify", copy)
    assert found.returncode == 1
    assert f"question {key}: answer_token_representation/all/layer_0 is float32 (3, 8), not float32 (2, 8)" in found.stderr


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ("--answer-states", "last,middle"),
            "--answer-states last,middle: there is no 'middle'; there are first, last, mean, all",
        ),
        (("--answer-states", "last", "--max-new-tokens", "0"), "--answer-states: with --max-new-tokens 0 there is no answer"),
        (
            ("--answer-states", "all", "--layers", "all", "--model", "Qwen/Qwen2.5-VL-72B-Instruct", "--allow-missing"),
            "--answer-states all: an answer of 200 tokens may take 757 MB at so many layers, where a result of 256 MB is read",
        ),
        (("--answer-states", "last", "--halp-compat"), "--halp-compat keeps what was published: leave out --answer-states"),
    ],
)
def test_what_is_refused(options: tuple[str, ...], reason: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question_id,image_id,question\n1,a.png,What?\n")
    result = command("producer", "run", tmp_path / "t.csv", "--images-dir", tmp_path, "--output-dir", tmp_path / "o", *options)
    assert result.returncode == 2
    assert reason in result.stderr
    assert not (tmp_path / "o").exists()
