"""Questions about several images and about none, from the table to whatever reads the run."""

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

import storage
from tests.support.processes import command, write_csv

pytestmark = pytest.mark.slow

VISION = ("vision_only_representation", "vision_encoder_representation", "vision_token_representation/layer_0")
QUERY = "query_token_representation/layer_3"
IMAGES = 20


def rows() -> list[dict[str, str]]:
    """Of five questions one is about no image, one about two, three about one; ids by what they are about."""
    found = []
    for number in range(100):
        one, other = f"{number % IMAGES}.png", f"{(number + 1) % IMAGES}.png"
        kind, image_id = (("none", ""), ("two", json.dumps([one, other])))[number % 5] if number % 5 < 2 else ("one", one)
        found.append(
            {"question_id": f"{kind}-{number}", "image_id": image_id, "question": f"What is {number}?",
             "answer": "yes" if number % 3 else "no"}
        )  # fmt: skip
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("asked")
    (place / "images").mkdir()
    for number in range(IMAGES):
        Image.new("RGB", (60, 50), (number, 9, 90)).save(place / "images" / f"{number}.png")
    write_csv(place / "t.csv", rows())
    return place


def run(place: Path, name: str, model: Path, *more: str, images: bool = True) -> Path:
    where = ("--images-dir", place / "images") if images else ()
    call = ("producer", "run", place / "t.csv", *where, "--output-dir", place / name, "--model", model)
    result = command(*call, "--checkpoint-interval", "40", *more, HALP_ENGINE="fake:0")
    assert result.returncode == 0, result.stderr
    if "--blind" not in more:
        assert "t.csv: 20 of 100 questions have no image, and are asked without" in result.stderr
    return place / name


@pytest.fixture(scope="module")
def mixed(place: Path, small_model: Path) -> Path:
    return run(place, "mixed", small_model)


@pytest.fixture(scope="module")
def blind(place: Path, small_model: Path) -> Path:
    return run(place, "blind", small_model, "--blind", images=False)


def stored(directory: Path) -> dict[str, dict[str, object]]:
    """Read a run with bare h5py: of each question its vectors, and its attributes."""
    found: dict[str, dict[str, object]] = {}
    for path in sorted(directory.glob("*.h5")):
        with h5py.File(path) as part:
            for key, group in part.items():
                vectors = {field: group[field][()] for field in (*VISION, QUERY) if field in group}
                found[key] = {"vectors": vectors, "image_id": group["image_id"].asstr()[()], **group.attrs}
    return found


def test_the_files(mixed: Path, place: Path) -> None:
    found, asked = stored(mixed), {row["question_id"]: row for row in rows()}
    assert found.keys() == asked.keys()
    digests = {path.name: sha256(path.read_bytes()).hexdigest() for path in (place / "images").iterdir()}
    for key, question in found.items():
        kind, fields = key.partition("-")[0], question["vectors"].keys()  # type: ignore[attr-defined]
        assert fields == ({QUERY} if kind == "none" else {*VISION, QUERY})
        assert question["image_id"] == asked[key]["image_id"]
        if kind == "none":
            assert not {"image_sha256", "image_size", "resized_size", "vision_token_position"} & question.keys()
        elif kind == "one":
            assert question["image_sha256"] == digests[asked[key]["image_id"]]
            assert np.shape(question["image_size"]) == (2,)
        else:
            names = json.loads(asked[key]["image_id"])
            assert question["image_sha256"] == ", ".join(digests[name] for name in names)
            assert np.array_equal(question["image_size"], [[60, 50]] * 2)
            assert np.shape(question["resized_size"]) == (2, 2)
    verified = command("storage", "verify", mixed, "--deep")
    assert verified.returncode == 0, verified.stderr


def test_order_matters_and_equal_images_share(mixed: Path) -> None:
    found = stored(mixed)
    two = {key: q["vectors"]["vision_only_representation"] for key, q in found.items() if key.startswith("two")}  # type: ignore[index]
    assert len(two) == 20
    by_image: dict[object, set[bytes]] = {}
    for key, vector in two.items():
        by_image.setdefault(found[key]["image_id"], set()).add(vector.tobytes())
    assert all(len(vectors) == 1 for vectors in by_image.values())
    assert len(set.union(*by_image.values())) == len(by_image)


def test_reading(mixed: Path) -> None:
    bare = stored(mixed)
    for field, layer, number in (("vision_only_representation", None, 80), ("query_token_representation", 3, 100)):
        loaded = storage.load(mixed, field, layer)
        assert len(loaded.ids) == len(loaded.frame) == len(loaded.vectors) == number
        assert loaded.frame["question_id"].tolist() == loaded.ids
        name = field if layer is None else QUERY
        for question, vector in zip(loaded.ids, loaded.vectors):
            assert np.array_equal(vector, bare[question]["vectors"][name])  # type: ignore[index]
        data = storage.torch_dataset(mixed, field, layer)
        assert {data[n]["question_id"] for n in range(len(data))} == set(loaded.ids)  # type: ignore[arg-type]
    samples = {sample.question_id: sample for sample in storage.iter_samples(mixed)}
    assert samples.keys() == bare.keys()
    for key, sample in samples.items():
        for name, vector in bare[key]["vectors"].items():  # type: ignore[attr-defined]
            assert np.array_equal(sample.vectors[name], vector)
        assert (VISION[0] in sample.vectors) == (not key.startswith("none"))
    assert sum(len(chunk.ids) for chunk in storage.iter_chunks(mixed, VISION[0])) == 80


def test_a_lost_vector_is_found(mixed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(mixed, tmp_path / "copy"))
    part = sorted(copy.glob("*.h5"))[0]
    with h5py.File(part, "r+") as file:
        key = next(key for key in file if key.startswith("two"))
        del file[key][VISION[0]]
        where = sorted(file).index(key)
        index = file.attrs[f"column:{VISION[0]}"]
        index[where] = 0
        file.attrs[f"column:{VISION[0]}"] = index
    (copy / ".run").rename(copy / "run")  # else the sidecar's digest tells
    with pytest.raises(storage.UserError, match=f"question {key}: there is no {VISION[0]}"):
        storage.load(part, VISION[0])


def test_what_is_shown_of_it(mixed: Path, tmp_path: Path) -> None:
    overview = json.loads(command("storage", "inspect", mixed, "--json").stdout)
    numbers = {field["field"]: field["questions"] for field in overview["fields"]}
    assert (numbers[VISION[0]], numbers[QUERY]) == (80, 100)
    shown = json.loads(command("storage", "inspect", mixed, "--question", "two-1", "--json").stdout)
    assert '["1.png", "2.png"]' in json.dumps(shown).replace('\\"', '"')
    assert command("storage", "report", mixed).returncode == 0
    html = (mixed / "report.html").read_text()
    assert "asked without an image" in html
    pictures, without = html.count("data:image/jpeg"), html.count("asked without an image")
    assert pictures + without > html.count('class="card sample"')  # two of some
    for more in ((), ("--field", VISION[0])):  # sizes of one image, and of two
        table = tmp_path / f"answers{len(more)}.parquet"
        export = command("storage", "export", mixed, "--to", "parquet", *more, "--output", table)
        assert export.returncode == 0, export.stderr
        assert len(pq.read_table(table)) == (80 if more else 100)
    plot = command("storage", "inspect", mixed, "--plot", tmp_path / "p.png", "--colour-by", "answer")
    assert plot.returncode == 0, plot.stderr
    export = command("storage", "export", mixed, "--to", "npz", "--field", VISION[0], "--output", tmp_path / "v.npz")
    assert export.returncode == 0, export.stderr
    assert np.load(tmp_path / "v.npz")["vectors"].shape == (80, 8)


def test_a_blind_run(mixed: Path, blind: Path) -> None:
    found, seeing = stored(blind), stored(mixed)
    assert found.keys() == seeing.keys()
    for key, question in found.items():
        assert question["vectors"].keys() == {QUERY}  # type: ignore[attr-defined]
        assert question["image_id"] == seeing[key]["image_id"]  # to compare by, and to split by
        same = np.array_equal(question["vectors"][QUERY], seeing[key]["vectors"][QUERY])  # type: ignore[index]
        assert same == key.startswith("none")
    with h5py.File(next(blind.glob("*.h5"))) as part, h5py.File(next(mixed.glob("*.h5"))) as other:
        assert part.attrs["blind"]
        assert "blind" not in other.attrs
    assert command("storage", "verify", blind, "--deep").returncode == 0
    with pytest.raises(storage.UserError, match="has no vision_only_representation; it has query_token_representation"):
        storage.load(blind, VISION[0])
    difference = json.loads(command("storage", "diff", mixed, blind, "--json").stdout)
    assert difference["fields_not_compared"][VISION[0]] == "only in the first"
    assert difference["settings"]["blind"] == [None, True]
    assert [f["compared"] for f in difference["fields"] if f["field"] == QUERY] == [100]


def test_probing(mixed: Path, blind: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    lines = [f"{row['question_id']},{number % 7 < 3}" for number, row in enumerate(rows())]
    labels.write_text("\n".join(["question_id,hallucination", *lines]) + "\n")
    for directory in (mixed, blind):
        result = command("storage", "probe", directory, "--no-mlp", "--labels", labels)
        assert result.returncode == 0, result.stderr
        body = json.loads((directory / "probe.json").read_text())
        assert {scored["name"].partition("/")[0] for scored in body["probes"]} == {"query_token_representation"}
        left_out = [text for text in body["warnings"] if "some questions have no image" in text]
        assert len(left_out) == (directory is mixed)


def test_what_is_refused(place: Path, small_model: Path, tmp_path: Path) -> None:
    call = ("producer", "enqueue", place / "t.csv", "--images-dir", place / "images", "--output-dir", tmp_path / "run")
    for more, reason in (
        (("--halp-compat",), "--halp-compat: question 'none-0' has no image: the published scripts take one"),
        (("--halp-compat", "--blind"), "leave out --blind"),
        (("--blind", "--max-pixels", "100352"), "--blind reads no image: leave out --min-pixels"),
    ):
        result = command(*call, "--model", small_model, *more)
        assert (result.returncode, reason in result.stderr) == (2, True), result.stderr
    for kind, more in (("paligemma", ()), ("mllama", ("--blind",))):
        model = tmp_path / kind
        shutil.copytree(small_model, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"model_type": kind}))
        for name in ("enqueue", "check"):
            result = command("producer", name, *call[2:], "--model", model, *more)
            assert (result.returncode, "cannot be asked without an image" in result.stderr) == (2, True), result.stderr
    assert not (tmp_path / "run").exists()


def test_the_check(place: Path, small_model: Path) -> None:
    call = ("producer", "check", place / "t.csv", "--images-dir", place / "images", "--model", small_model, "--json")
    checked = json.loads(command(*call, "--sample", "16", HALP_ENGINE="fake:0").stdout)
    assert checked["images"] == 16
    assert [(f["kind"], f["number"]) for f in checked["findings"] if f["kind"] == "no_image"] == [("no_image", 20)]
    assert checked["trial"]["questions"] == 16
    result = command("producer", "check", place / "t.csv", "--model", small_model, "--blind", HALP_ENGINE="fake:0")
    assert "│ images              │ none" in result.stdout, result.stderr
    assert "no_image" not in result.stdout
