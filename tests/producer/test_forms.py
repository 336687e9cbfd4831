"""Tables in all their forms: each gives the questions that the same rows give as CSV, and every fault has its place."""

from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import storage
from producer.dataset.columns import parse_columns
from producer.dataset.forms.row import Embedded
from producer.dataset.table import Source, Table, embedded_images, read_table
from producer.options import RunOptions, run_options
from producer.planning import plan_run
from storage.errors import UserError
from storage.images.lookup import read_image, resolve_image
from storage.runs.run import Run
from tests.support.processes import command

ROWS = [  # id, image, question, answer
    ("17", "a.png", "What is it?", "a cat"),
    ("18", "a.png", 'Is it,\nperhaps, a "dog"?', "no"),
    ("19", "b.jpg", "Où est-il ?", "là 🦆"),
    ("20", "c.webp", "How many?", "3"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    for name, colour in (("a.png", "red"), ("b.jpg", "green"), ("c.webp", "blue")):
        Image.new("RGB", (80, 60), colour).save(directory / name)
    return directory


def content(images: Path, name: str) -> bytes:
    return (images / name).read_bytes()


def as_csv(path: Path, images: Path) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("question_id", "image_id", "question", "answer"), *ROWS])
    return path


def as_vlmeval(path: Path, images: Path) -> Path:
    """A TSV with base64, whose second row names the first one's image."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question", "answer", "A", "B"])
        for number, (key, image, question, answer) in enumerate(ROWS):
            data = base64.b64encode(content(images, image)).decode()
            writer.writerow([key, "17" if number == 1 else data, question, answer, "yes", "no"])
    return path


def as_tsv_of_paths(path: Path, images: Path) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows([("index", "image_path", "question", "answer"), *ROWS])
    return path


def as_pope(path: Path, images: Path) -> Path:
    lines = [{"question_id": int(k), "image": i, "text": q, "label": a} for k, i, q, a in ROWS]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    return path


def as_llava(path: Path, images: Path) -> Path:
    entries = [
        {"id": int(k), "image": i, "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}
        for k, i, q, a in ROWS
    ]
    path.write_text(json.dumps(entries))
    return path


def as_gqa(path: Path, images: Path) -> Path:
    path.write_text(json.dumps({k: {"imageId": i, "question": q, "answer": a, "types": {"a": 1}} for k, i, q, a in ROWS}))
    return path


def as_vqav2(path: Path, images: Path) -> Path:
    questions = [{"question_id": int(k), "image": i, "question": q, "answer": a} for k, i, q, a in ROWS]
    path.write_text(json.dumps({"info": {"year": 2017}, "questions": questions, "license": {"name": "x"}}))
    return path


def hub_rows(images: Path) -> list[dict[str, Any]]:
    """As a hub's dataset has them: an image's number beside the image."""
    return [
        {"question_id": int(k), "image_id": n, "image": {"bytes": content(images, i), "path": i}, "question": q, "answer": a}
        for n, (k, i, q, a) in enumerate(ROWS)
    ]


def as_hub(path: Path, images: Path) -> Path:
    pq.write_table(pa.Table.from_pylist(hub_rows(images)), path, row_group_size=2)
    return path


def as_bytes(path: Path, images: Path) -> Path:
    rows = [{"id": k, "image": content(images, i), "question": q, "answer": a} for k, i, q, a in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_parquet_of_paths(path: Path, images: Path) -> Path:
    rows = [{"id": k, "image": {"bytes": None, "path": i}, "question": q, "answer": a} for k, i, q, a in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_shards(path: Path, images: Path) -> Path:
    path.mkdir()
    for number, rows in enumerate((hub_rows(images)[:3], hub_rows(images)[3:])):
        pq.write_table(pa.Table.from_pylist(rows), path / f"test-{number:05d}-of-00002.parquet")
    return path


def as_tar(path: Path, images: Path) -> Path:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for key, image, question, answer in ROWS:
            files = {
                image.rpartition(".")[2]: content(images, image),
                "json": json.dumps({"question_id": key, "question": question, "answer": answer}).encode(),
            }
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"000/{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


Make = Callable[[Path, Path], Path]
EMBEDDED: dict[str, tuple[Make, str]] = {
    "VLMEvalKit": (as_vlmeval, "t.tsv"), "hub": (as_hub, "t.parquet"), "bytes": (as_bytes, "t.parquet"),
    "shards": (as_shards, "shards"), "tar": (as_tar, "t.tar"), "tar.gz": (as_tar, "t.tar.gz"), "tgz": (as_tar, "t.tgz"),
}  # fmt: skip
PATHS: dict[str, tuple[Make, str]] = {
    "tsv": (as_tsv_of_paths, "t.tsv"), "POPE": (as_pope, "t.jsonl"), "LLaVA": (as_llava, "t.json"), "GQA": (as_gqa, "t.json"),
    "VQAv2": (as_vqav2, "t.json"), "parquet": (as_parquet_of_paths, "t.parquet"),
}  # fmt: skip


def told(table: Table) -> list[tuple[str, str, str, int]]:
    return [(q.question_id, q.question, q.ground_truth_answer, q.csv_row) for q in table.questions]


EXPECTED = [(key, question, answer, number) for number, (key, _, question, answer) in enumerate(ROWS, start=1)]


@pytest.mark.parametrize("form", PATHS)
def test_a_table_of_paths_is_as_its_csv(form: str, images: Path, tmp_path: Path) -> None:
    make, name = PATHS[form]
    table = read_table(make(tmp_path / name, images))
    assert told(table) == EXPECTED
    assert [q.image_id for q in table.questions] == [image for _, image, _, _ in ROWS]
    assert not table.embedded
    assert len(table.sha256) == 64


@pytest.mark.parametrize("form", EMBEDDED)
def test_a_table_of_images_is_as_its_csv(form: str, images: Path, tmp_path: Path) -> None:
    make, name = EMBEDDED[form]
    source = Source(make(tmp_path / name, images))
    table = read_table(source)
    assert told(table) == EXPECTED
    found = dict(embedded_images(source, set(table.embedded), lambda _: None))
    assert {key: len(data) for key, data in found.items()} == table.embedded
    assert [found[q.image_id] for q in table.questions] == [content(images, image) for _, image, _, _ in ROWS]
    assert {key.rpartition(".")[2] for key in found} == {"png", "jpg", "webp"}
    assert read_table(source) == table


SEVERAL: list[tuple[str, list[str], str]] = [
    ("two", ["a.png", "b.jpg"], "Are they alike?"),
    ("one", ["c.webp"], "What is it?"),
    ("none", [], "What colour is a lemon?"),
    ("same", ["b.jpg", "a.png", "b.jpg"], "Which is not like the others?"),
]


def several_as_csv(path: Path, _: Path) -> Path:
    cells = [{0: "", 1: "c.webp"}.get(len(images), json.dumps(images)) for _, images, _ in SEVERAL]
    cells[3] = str(SEVERAL[3][1])  # as Python prints it
    with path.open("w", newline="") as file:
        rows = [(key, cell, question) for (key, _, question), cell in zip(SEVERAL, cells)]
        csv.writer(file).writerows([("question_id", "image_id", "question"), *rows])
    return path


def several_as_jsonl(path: Path, _: Path) -> Path:
    lines = [{"id": key, "images": images or None, "question": question} for key, images, question in SEVERAL]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def several_as_parquet(path: Path, images: Path) -> Path:
    rows = [
        {"id": key, "images": [{"bytes": content(images, name), "path": None} for name in names], "question": question}
        for key, names, question in SEVERAL
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def several_as_tsv(path: Path, images: Path) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["index", "image", "question"])
        for key, names, question in SEVERAL:
            writer.writerow([key, str([base64.b64encode(content(images, n)).decode() for n in names]), question])
    return path


def test_several_images_and_none(images: Path, tmp_path: Path) -> None:
    expected = [("two", ("a.png", "b.jpg")), ("one", ("c.webp",)), ("none", ()), ("same", ("b.jpg", "a.png", "b.jpg"))]
    for make in (several_as_csv, several_as_jsonl):
        found = read_table(make(tmp_path / f"t.{make.__name__.rpartition('_')[2]}", images))
        assert [(q.question_id, q.images) for q in found.questions] == expected
        assert [q.image_id for q in found.questions[:3]] == ['["a.png", "b.jpg"]', "c.webp", ""]
    ids = {f".run/images/{Embedded(content(images, name)).file_name()}": name for name in ("a.png", "b.jpg", "c.webp")}
    for make in (several_as_parquet, several_as_tsv):
        found = read_table(make(tmp_path / f"t.{make.__name__.rpartition('_')[2]}", images))
        assert [(q.question_id, tuple(ids[i] for i in q.images)) for q in found.questions] == expected
        assert found.embedded.keys() == ids.keys()


def test_lists_in_cells(images: Path, tmp_path: Path) -> None:
    """As Python prints them, with an apostrophe; of something else than names; in each other; in a frame."""
    path = tmp_path / "t.csv"
    for cell, expected in (
        (str(["it's.jpg", "b.jpg"]), ("it's.jpg", "b.jpg")),
        ("[]", ()),
        ("[a.png", ("[a.png",)),
        ("[a]", ("[a]",)),
    ):
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("question_id", "image_id", "question"), ("1", cell, "What?")])
        assert read_table(path).questions[0].images == expected
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("question_id", "image_id", "question"), ("1", '["a.png", 3]', "What?")])
    assert refused(path).endswith("line 2: the image is a list of something else than names: name each image's file")
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": 1, "image": [["a.png"]], "question": "What?"}))
    assert refused(tmp_path / "t.jsonl").endswith("line 1: the image is a list of lists: name the images in one")
    frame = pd.read_parquet(several_as_parquet(tmp_path / "t.parquet", images))
    found = read_table(Source(tmp_path / "frame", frame=frame))
    assert [len(q.images) for q in found.questions] == [2, 1, 0, 3]


@pytest.mark.slow
def test_a_blank_cell_beside_a_name_in_the_other_column(images: Path, tmp_path: Path, small_model: Path) -> None:
    path = tmp_path / "t.csv"
    for rows, reason in (
        ([("1", "", "a.png"), ("2", "", "b.jpg")], None),
        ([("1", "a.png", ""), ("2", "", "b.jpg")], "data row 2, question '2': image_id is empty, and images are named there"),
    ):
        with path.open("w", newline="") as file:
            lines = [(key, first, second, "What?") for key, first, second in rows]
            csv.writer(file).writerows([("question_id", "image_id", "image_name", "question"), *lines])
        out = tmp_path / f"out{reason is None}"
        result = command(
            "producer", "run", path, "--images-dir", images, "--output-dir", out, "--model", small_model, HALP_ENGINE="fake:0"
        )
        if reason is None:
            assert result.returncode == 0, result.stderr
            assert [s.image_id for s in storage.iter_samples(out)] == ["a.png", "b.jpg"]
        else:
            assert (result.returncode, reason in result.stderr) == (2, True), result.stderr


def test_an_image_that_is_called_like_a_list(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": 1, "image": ['["a.png"]'], "question": "What?"}))
    [question] = read_table(tmp_path / "t.jsonl").questions
    assert question.images == ('["a.png"]',)
    assert question.image_id == json.dumps(['["a.png"]'])


def test_too_many_images(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text(json.dumps({"id": 1, "image": ["a.png"] * 65, "question": "What?"}))
    assert refused(tmp_path / "t.jsonl").endswith("line 1: 65 images are named: a question takes up to 64")


def test_a_table_without_images_is_asked_blind(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("question_id,question\n1,What?\n")
    assert refused(path).endswith("; --blind asks without images")
    [question] = read_table(Source(path, blind=True)).questions
    assert question.images == ()


def test_compressed_lines(images: Path, tmp_path: Path) -> None:
    plain = as_pope(tmp_path / "t.jsonl", images)
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert told(read_table(packed)) == EXPECTED


def test_a_folder_with_one_question(images: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name, place in (("b.jpg", "more/b.jpg"), ("a.png", "a.PNG"), ("c.webp", "c.webp")):
        (tmp_path / place).write_bytes(content(images, name))
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden.png").write_bytes(b"")
    table = read_table(Source(tmp_path, "Describe the image."))
    assert [(q.question_id, q.image_id, q.question) for q in table.questions] == [
        (name, name, "Describe the image.") for name in ("a.PNG", "c.webp", "more/b.jpg")
    ]


# Which column is what


def test_columns_as_the_user_says(images: Path, tmp_path: Path) -> None:
    """A template too: VQAv2 has numbers where the files' names have them, filled up with zeros."""
    path = tmp_path / "t.json"
    path.write_text(json.dumps([{"n": 1, "image_id": 42, "q": "Why?", "question": "not this", "a": ["x", "y"]}]))
    columns = parse_columns(["question=q,answer=a", "image=COCO_val2014_{image_id:0>12}.jpg"])
    table = read_table(Source(path, columns=columns))
    [question] = table.questions
    assert (question.image_id, question.question) == ("COCO_val2014_000000000042.jpg", "Why?")
    assert question.ground_truth_answer == '["x", "y"]'
    assert question.question_id == "row-000001"
    assert question.extra == {"n": "1", "image_id": "42", "question": "not this"}
    assert table.said == (
        "image from 'COCO_val2014_{image_id:0>12}.jpg', question from 'q', answer from 'a'; question ids are row numbers"
    )


def test_our_own_names_are_not_told_of(images: Path, tmp_path: Path) -> None:
    assert read_table(as_csv(tmp_path / "t.csv", images)).said is None
    assert read_table(as_hub(tmp_path / "t.parquet", images)).said == (
        "question_id from 'question_id', image from 'image', question from 'question', answer from 'answer'"
    )


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (["question"], "write a role and a column"), (["what=x"], "roles: question_id, image, question, answer"),
        (["question=a,question=b"], "question is named twice"), (["answer="], "write a role and a column"),
    ],
)  # fmt: skip
def test_columns_that_say_nothing(asked: list[str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        parse_columns(asked)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"question": "q"}, "--columns question=q: there is no column 'q'; there are 'question_id', "),
        ({"image": "{img}.png"}, r"--columns image=\{img\}\.png: there is no column 'img'"),
        ({"image": "{image_id"}, "--columns image="),
    ],
)
def test_columns_that_are_not_there(columns: dict[str, str], reason: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        read_table(Source(as_csv(tmp_path / "t.csv", images), columns=columns))


def test_a_template_looks_into_nothing(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no column"):
        read_table(Source(as_csv(tmp_path / "t.csv", images), columns={"image": "{image_id.__class__}"}))


@pytest.mark.parametrize(
    ("question", "stripped"),
    [
        ("<image>\nWhat is it?", "What is it?"), ("What is it?\n<image>", "What is it?"),
        ("Is <image 1> as <image_2>?", "Is as ?"),
        ("<|vision_start|><|image_pad|> Why?", "<|vision_start|> Why?"), ("a < image > b", "a < image > b"),
    ],
)  # fmt: skip
def test_placeholders_are_taken_out(question: str, stripped: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "t.jsonl", json.dumps({"id": 1, "image": "a.png", "question": question}))
    assert [q.question for q in read_table(path).questions] == [question]
    assert [q.question for q in read_table(Source(path, strip_placeholders=True)).questions] == [stripped]


def test_a_question_of_placeholders_alone_is_blank(tmp_path: Path) -> None:
    path = _written(tmp_path / "t.jsonl", json.dumps({"id": 1, "image": "a.png", "question": " <image> "}))
    assert "line 1: the question is blank" in refused(Source(path, strip_placeholders=True))


# What is refused, with its place


def refused(source: Source | Path) -> str:
    with pytest.raises(UserError) as caught:
        read_table(source)
    return str(caught.value)


def test_faults_of_json_lines(images: Path, tmp_path: Path) -> None:
    path = as_pope(tmp_path / "t.jsonl", images)
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:-5]
    lines[2] = "[1, 2]"
    lines.append(json.dumps({"question_id": 17, "image": {"x": 1}, "text": "nul \0 byte"}))
    path.write_text("\n".join(lines))
    message = refused(path)
    assert ": 3 faulty lines\n  line 2: it is no JSON (" in message
    assert "\n  line 3: it is no object: write one for each question\n  line 6: the image is dict, neither a path" in message


def test_faults_of_rows_of_every_form(images: Path, tmp_path: Path) -> None:
    rows = hub_rows(images)
    rows[1]["question"] = "a \0 in it"
    rows[2]["question"] = None
    rows[3]["question_id"] = 17
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert refused(tmp_path / "t.parquet").endswith(
        "3 faulty rows\n  row 2: the row holds a NUL character: remove it\n"
        "  row 3: the question is blank: write it or remove the row\n"
        "  row 4: question_id '17' is that of row 1 too: give each row an id of its own"
    )


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("!" * 100, "line 3: the image is no base64 ("),
        (base64.b64encode(b"x" * 100).decode()[:-3], "line 3: the image is no base64 ("),
        ("99", "line 3: the image is that of row '99', which has none: embed it there, or here"),
        ("18", "line 3: the image is that of row '18', which has none"),
        ('["17", "18"]', "line 3: a list of images holds names: embed them all here, or name files in image_path"),
        ("[not a list", "line 3: the image is no list of images in base64"),
    ],
)
def test_images_of_a_tsv_that_are_none(image: str, reason: str, images: Path, tmp_path: Path) -> None:
    path = as_vlmeval(tmp_path / "t.tsv", images)
    with path.open(newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))
    rows[2][1] = image
    rows[2][2] = "one line"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    assert reason in refused(path)


def test_a_table_that_is_cut_or_none(images: Path, tmp_path: Path) -> None:
    for make, name, reason in (
        (as_hub, "t.parquet", "is no Parquet file, or a damaged one ("),
        (as_tar, "t.tar", "is no tar, or a damaged one ("),
        (as_tar, "t.tar.gz", "is damaged gzip ("),
        (as_llava, "t.json", "is no JSON ("),
    ):
        path = make(tmp_path / name, images)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
        assert reason in refused(path), name
    damaged = as_hub(tmp_path / "d.parquet", images)
    data = bytearray(damaged.read_bytes())
    data[30:200] = bytes(170)
    damaged.write_bytes(data)
    assert "is damaged after row" in refused(damaged)
    (tmp_path / "empty").mkdir()
    assert "is a directory without .parquet files" in refused(tmp_path / "empty")
    assert "holds no list of objects" in refused(_written(tmp_path / "n.json", "3"))
    assert "holds 2 lists of objects" in refused(_written(tmp_path / "m.json", '{"a": [{}], "b": [{}]}'))
    assert "one object a line is .jsonl" in refused(_written(tmp_path / "l.json", '{"a": 1}\n{"a": 2}'))
    shutil.copy(as_hub(tmp_path / "p.parquet", images), tmp_path / "p.csv")
    assert "is a Parquet file: give it a name that ends in .parquet" in refused(tmp_path / "p.csv")
    assert "there is no image in it" in refused(Source(tmp_path / "empty", "Why?"))
    listed = _written(tmp_path / "q.json", json.dumps([{"id": 1, "image": "a.png", "question": ["a", "b"]}]))
    assert "entry 1: question is a list or an object: write one text" in refused(listed)
    assert "--question is for a folder of images" in refused(Source(as_csv(tmp_path / "t.csv", images), "Why?"))


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_shards_with_other_columns(images: Path, tmp_path: Path) -> None:
    directory = as_shards(tmp_path / "shards", images)
    pq.write_table(pa.table({"id": ["1"], "question": ["Why?"]}), directory / "z.parquet")
    assert "z.parquet has other columns than test-00000-of-00002.parquet" in refused(directory)


def test_images_and_paths_in_one_table(images: Path, tmp_path: Path) -> None:
    rows = hub_rows(images)
    rows[2]["image"] = {"bytes": None, "path": "b.jpg"}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    assert "some rows hold their image, others name a file" in refused(tmp_path / "t.parquet")


def test_a_table_that_changes_between_its_readings(images: Path, tmp_path: Path) -> None:
    source = Source(as_hub(tmp_path / "t.parquet", images))
    wanted = set(read_table(source).embedded)
    pq.write_table(pa.Table.from_pylist(hub_rows(images)[:1]), source.path)
    with pytest.raises(UserError, match="was changed while it was read"):
        list(embedded_images(source, wanted, lambda _: None))


# In a run


@pytest.fixture
def options(images: Path, tmp_path: Path, small_model: Path) -> Callable[..., RunOptions]:
    def make(form: str, **changes: Any) -> RunOptions:
        write, name = EMBEDDED[form]
        path = tmp_path / form / name
        if not path.exists():
            path.parent.mkdir()
            write(path, images)
        return run_options(path, **{"output_dir": str(tmp_path / "o"), "model": str(small_model)} | changes)

    return make


def test_embedded_images_are_in_the_run_once(options: Callable[..., RunOptions], images: Path, tmp_path: Path) -> None:
    """Also where the run is moved; and the same command finds them."""
    run = plan_run(options("hub"))
    kept = sorted((tmp_path / "o/.run/images").iterdir())
    assert sorted(path.read_bytes() for path in kept) == sorted(content(images, name) for name in ("a.png", "b.jpg", "c.webp"))
    before = [path.stat().st_mtime_ns for path in kept]
    assert plan_run(options("hub")).run_id == run.run_id
    assert [path.stat().st_mtime_ns for path in kept] == before
    moved = Run.open((tmp_path / "o").rename(tmp_path / "elsewhere"))
    for question, (_, name, _, _) in zip(moved.questions(1), ROWS, strict=True):
        place = resolve_image(question.image_id, moved.images.images_dir, moved.images.image_roots)
        assert read_image(place, 1 << 20) == content(images, name)
        assert question.extra["image_path"] == name


def test_a_command_that_was_killed_goes_on(
    options: Callable[..., RunOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After run.json, with one image written and no plan."""
    from storage.stores.directory_store import DirectoryStore

    put_new, written = DirectoryStore.put_new, []

    def killed(self: DirectoryStore, key: str, data: bytes) -> bool:
        if key.startswith(".run/images/"):
            written.append(key)
            if len(written) > 1:
                raise KeyboardInterrupt
        return put_new(self, key, data)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DirectoryStore, "put_new", killed)
        plan_run(options("hub"))
    assert not (tmp_path / "o/.run/plan").exists()
    run = plan_run(options("hub"))
    assert sum(piece.size for piece in run.slices) == len(ROWS)
    assert len(list((tmp_path / "o/.run/images").iterdir())) == 3


def test_only_the_chosen_questions_images_are_written(options: Callable[..., RunOptions], tmp_path: Path) -> None:
    plan_run(options("VLMEvalKit", limit=2))
    assert len(list((tmp_path / "o/.run/images").iterdir())) == 1


def test_no_room_for_the_images(options: Callable[..., RunOptions], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1 << 20))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="the table's images take 0 MB there, and 1 MB are free"):
        plan_run(options("hub"))
    assert not (tmp_path / "o").exists()


def test_another_reading_of_the_table_is_another_run(options: Callable[..., RunOptions]) -> None:
    plan_run(options("hub"))
    with pytest.raises(UserError, match=r"columns: \{\} in the run, \{'answer': 'question_id'\} now"):
        plan_run(options("hub", columns=["answer=question_id"]))
    with pytest.raises(UserError, match="strip_placeholders: False in the run, True now"):
        plan_run(options("hub", strip_placeholders=True))


def test_paths_need_a_directory(images: Path, tmp_path: Path, small_model: Path) -> None:
    options = run_options(as_csv(tmp_path / "t.csv", images), output_dir=str(tmp_path / "o"), model=str(small_model))
    with pytest.raises(UserError, match=r"--images-dir is missing: .* names files, so say what they are relative to"):
        plan_run(options)
    assert not (tmp_path / "o").exists()


def test_suffixes_go_by_the_content() -> None:
    assert Embedded(b"\xff\xd8rest").file_name().endswith(".jpg")
    assert Embedded(b"nothing known").file_name().endswith(".bin")


# Whole runs


def vectors_of(output: Path) -> dict[str, dict[str, bytes]]:
    return {
        sample.question_id: {name: vector.tobytes() for name, vector in sample.vectors.items()}
        for sample in storage.iter_samples(output)
    }


@pytest.mark.slow  # four runs: 35 s
def test_a_run_over_every_form(images: Path, tmp_path: Path, small_model: Path) -> None:
    """Vectors are those of the CSV, in every bit; one image in a cell that is none fails alone."""
    rows = {"csv": (as_csv, "t.csv"), **{form: EMBEDDED[form] for form in ("VLMEvalKit", "hub", "tar")}}
    found = {}
    for form, (make, name) in rows.items():
        (tmp_path / form).mkdir()
        table, output = make(tmp_path / form / name, images), tmp_path / form / "o"
        named = ["--images-dir", images] if form == "csv" else []
        result = command("producer", "run", table, *named, "--output-dir", output, "--model", small_model, HALP_ENGINE="fake:0")
        assert result.returncode == 0, result.stderr
        assert command("storage", "verify", output).returncode == 0
        found[form] = vectors_of(output)
    assert found["csv"].keys() == {key for key, _, _, _ in ROWS}
    assert all(len(vectors) == 10 for vectors in found["csv"].values())
    for form in rows:
        assert found[form] == found["csv"], form


@pytest.mark.slow
def test_bad_images_in_cells_fail_alone(images: Path, tmp_path: Path, small_model: Path) -> None:
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    rows = hub_rows(images)
    rows[0]["image"]["bytes"] = bomb.getvalue()
    rows[2]["image"]["bytes"] = content(images, "b.jpg")[:-200]
    rows[3]["image"]["bytes"] = b"<html>not found</html>"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    result = command(
        "producer", "run", tmp_path / "t.parquet", "--output-dir", tmp_path / "o", "--model", small_model,
        HALP_ENGINE="fake:0", HALP_MAX_RETRIES="0",
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    failures = {row["question_id"]: row["reason"] for row in csv.DictReader((tmp_path / "o/failures.csv").open())}
    assert failures.keys() == {"17", "19", "20"}
    assert failures["17"] == "image_too_large"
    assert vectors_of(tmp_path / "o").keys() == {"18"}


@pytest.mark.slow
def test_the_check_of_a_table_with_images(images: Path, tmp_path: Path, small_model: Path) -> None:
    """Opens each, says what they take, and leaves nothing."""
    table = as_hub(tmp_path / "t.parquet", images)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    call = ("producer", "check", table, "--output-dir", tmp_path / "o", "--model", small_model, "--sample", "3", "--json")
    result = command(*call, HALP_ENGINE="fake:0", TMPDIR=str(scratch))
    assert result.returncode == 0, result.stderr + result.stdout
    body = json.loads(result.stdout)
    sizes = sum(len(content(images, name)) for name in ("a.png", "b.jpg", "c.webp"))
    assert (body["questions"], body["images"], body["disk"]["images"], body["image_file_bytes"]) == (4, 3, sizes, sizes)
    assert body["trial"]["questions"] == 3
    assert not list(scratch.iterdir())
    assert not (tmp_path / "o").exists()
