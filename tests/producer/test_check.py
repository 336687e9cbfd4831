"""`producer check`: what it finds in a dataset, what it says about cost, and that it writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from producer.check.check import Disk, check
from producer.check.findings import table_findings
from producer.check.survey import ImageSource, survey
from producer.dataset.table import Source
from producer.options import RunOptions
from storage.computation import Computation
from storage.errors import ObjectStoreError
from storage.question import Question
from storage.runs.pack import pack
from storage.stores.object_store import ObjectStore
from tests.support.builders import make_facts, make_questions, make_run, stage
from tests.support.processes import command, write_csv
from tests.support.s3_server import S3Server
from workers.errors import PermanentError, TransientError
from workers.extract.loading import image_header, load_image

LIMITS = (3136, 12845056)
SIZES = {"small.png": (224, 224), "wide.jpg": (1400, 700), "large.jpg": (2800, 2800)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    directory = tmp_path / "images"
    directory.mkdir()
    for name, size in SIZES.items():
        Image.effect_noise(size, 20).convert("RGB").save(directory / name)
    return directory


def table_of(directory: Path, *rows: tuple[str, str, str, str]) -> Path:
    names = ("question_id", "image_id", "question", "answer")
    return write_csv(directory / "vqa.csv", [dict(zip(names, row, strict=True)) for row in rows])


def checked(table: Path, images: Path, *options: object, **variables: str) -> tuple[int, dict[str, Any]]:
    output = table.parent / "output"
    result = command(
        "producer", "check", table, "--images-dir", images, "--output-dir", output, "--json", *options, **variables
    )
    assert result.stderr == ""
    assert not output.exists()
    return result.returncode, json.loads(result.stdout)


def found(body: dict[str, Any]) -> dict[str, tuple[str, int]]:
    return {finding["kind"]: (finding["level"], finding["number"]) for finding in body["findings"]}


def test_a_good_dataset(tmp_path: Path, images: Path) -> None:
    rows = [(f"q{n}", name, f"What is {n}?", "yes") for n, name in enumerate([*SIZES, "wide.jpg"])]
    code, body = checked(table_of(tmp_path, *rows), images)
    assert (code, body["findings"]) == (0, [])
    assert (body["questions"], body["images"], body["questions_per_image"]) == (4, 3, {"1": 2, "2": 1})
    tokens = {"small.png": 8 * 8, "wide.jpg": 50 * 25, "large.jpg": 100 * 100}
    assert body["vision_tokens"]["all_questions"] == sum(tokens[name] for _, name, _, _ in rows)
    assert body["vision_tokens"]["histogram"] == [[64, 1], [128, 0], [256, 0], [512, 0], [1024, 0], [2048, 1],
                                                  [4096, 0], [8192, 0], [None, 1]]  # fmt: skip
    assert body["hours"] is None  # nothing was measured, so nothing is said
    assert body["max_pixels"][1] == {
        "max_pixels": 1280 * 28 * 28,
        "shrunk_images": 1,
        "vision_tokens": 64 + 2 * 1250 + 35 * 35,
    }


def test_max_pixels_is_what_the_tokens_count_by(tmp_path: Path, images: Path) -> None:
    table = table_of(tmp_path, ("q", "large.jpg", "What?", ""))
    _, body = checked(table, images, "--max-pixels", 256 * 28 * 28)
    assert body["vision_tokens"]["all_questions"] == 16 * 16


def test_every_fault_is_found(tmp_path: Path, images: Path) -> None:
    (images / "text.png").write_text("this is a text")
    (images / "empty.png").write_bytes(b"")
    Image.new("RGB", (6000, 20)).save(images / "long.png")
    rows = [
        ("001", "small.png", "What?", "y, e, s"),
        ("1", "small.png", "What?", "['yes']"),
        ("1e2", "text.png", "What?", "nan"),
        ("NA", "empty.png", "What?", "a, or b"),
        ("q5", "long.png", "What?", "12, 13"),
        ("q6", "gone.png", "What?", ""),
        ("q7", "wide.jpg", "What [/b]?", "n,o"),
        ("q8", "large.jpg", "Word " * 100_000, "no"),
    ]
    table = table_of(tmp_path, *rows)
    code, body = checked(table, images)
    assert code == 1
    assert found(body) == {
        "image_unreadable": ("fails", 1),
        "image_empty": ("fails", 1),
        "image_aspect_ratio": ("fails", 1),
        "image_missing": ("fails", 1),
        "prompt_too_long": ("fails", 1),
        "id_changes": ("look", 3),
        "ids_meet": ("look", 1),
        "asked_twice": ("look", 1),
        "answer_looks_broken": ("look", 4),
    }
    examples = {finding["kind"]: finding["examples"] for finding in body["findings"]}
    assert examples["id_changes"] == ["'001' becomes 1", "'1e2' becomes 100.0", "'NA' becomes a missing value"]
    assert examples["answer_looks_broken"] == ["001: 'y, e, s'", "1: \"['yes']\"", "1e2: 'nan'", "q7: 'n,o'"]
    shown = command("producer", "check", table, "--images-dir", images)
    assert shown.returncode == 1
    assert "1 of the images would fail as image_missing, with 1 of the questions\n  gone.png\n" in shown.stdout
    assert "small.png: 'What?'" in shown.stdout
    assert command("producer", "check", table, "--images-dir", images, "--quiet").stdout == ""


def test_images_that_are_stored_turned_are_counted(tmp_path: Path, images: Path) -> None:
    """By EXIF in JPEG and PNG and by XMP; damaged EXIF data, which a run does not read, are no problem."""
    picture, exif = Image.new("RGB", (140, 84), "red"), Image.Exif()
    for orientation in range(1, 9):
        exif[0x0112] = orientation
        picture.save(images / f"o{orientation}.jpg", exif=exif)
    picture.save(images / "exif.png", exif=exif)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
    picture.save(images / "xmp.jpg", xmp=xmp)
    picture.save(images / "damaged.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    picture.save(images / "odd.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0six\0\0\0\0\0")
    names = sorted(path.name for path in images.iterdir() if path.name not in SIZES)
    table = table_of(tmp_path, *((name, name, "What?", "") for name in names))
    for more in ((), ("--decode",)):
        code, body = checked(table, images, *more)
        assert (code, found(body), body["exif_turned"]) == (1, {"exif_turned": ("look", 9)}, 9)
        assert "are taken as stored: --exif-rotation turns them" in body["findings"][0]["message"]
    good = table_of(tmp_path, *((name, name, "What?", "") for name in names if name not in {"damaged.jpg", "odd.jpg"}))
    code, body = checked(good, images, "--exif-rotation")
    assert (code, body["findings"], body["exif_turned"]) == (0, [], 9)


def test_many_missing_images_are_shown_with_what_is_there(tmp_path: Path, images: Path) -> None:
    table = table_of(tmp_path, ("q1", "SMALL.PNG", "What?", ""), ("q2", "gone", "What?", ""))
    code, body = checked(table, images)
    assert code == 2
    [finding] = [f for f in body["findings"] if f["kind"] == "many_missing"]
    assert "holds 3 files (2 .jpg, 1 .png)" in finding["message"]
    assert "for 'SMALL.PNG' there is 'small.png': other letter case" in finding["message"]


def test_special_tokens_in_questions_are_shown(tmp_path: Path, images: Path) -> None:
    """Of a hub model, whose tokenizer is not at hand, those that Qwen2.5-VL has."""
    table = table_of(tmp_path, ("q1", "small.png", "Find <|box_start|>it", ""), ("q2", "small.png", "<image>\nWhat?", ""))
    code, body = checked(table, images)
    assert (code, found(body)) == (1, {"special_tokens": ("look", 1), "image_words": ("look", 1)})
    assert (body["special_tokens"], body["image_words"]) == ({"<|box_start|>": 1}, 1)
    parsed = command("producer", "check", table, "--images-dir", images, "--special-tokens", "parse").stdout
    assert "special tokens in 1 questions, parsed, as the processor does" in parsed


def test_what_a_run_refuses_is_refused(tmp_path: Path, images: Path) -> None:
    table = table_of(tmp_path, ("q1", "small.png", "What?", ""), ("q2", "gone.png", "What?", ""))
    code, body = checked(table, images)
    assert (code, found(body)["many_missing"]) == (2, ("refused", 1))
    assert checked(table, images, "--allow-missing")[0] == 1
    twice = table_of(tmp_path, ("q1", "small.png", "What?", ""), ("q1", "wide.jpg", "What?", ""))
    result = command("producer", "check", twice, "--images-dir", images)
    assert result.returncode == 2
    assert "question_id 'q1' is that of line 2 too" in result.stderr
    good = table_of(tmp_path, ("q1", "small.png", "What?", ""))
    result = command("producer", "check", good, "--images-dir", images, "--model", "./nowhere")
    assert (result.returncode, result.stderr) == (2, "error: --model ./nowhere: no such directory\n")


def test_decoding_finds_what_a_header_hides(tmp_path: Path, images: Path) -> None:
    data = (images / "wide.jpg").read_bytes()
    (images / "half.jpg").write_bytes(data[: len(data) // 2])
    table = table_of(tmp_path, ("q1", "half.jpg", "What?", ""), ("q2", "small.png", "Why?", ""))
    assert checked(table, images)[0] == 0
    code, body = checked(table, images, "--decode")
    assert (code, found(body)) == (1, {"image_corrupt": ("fails", 1)})


@pytest.mark.slow
def test_a_sample_through_the_real_engine(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    rows = [(f"q{n}{k}", p.name, f"What is {k}?", "") for n, p in enumerate(sorted(photographs.iterdir())) for k in "ab"]
    table = table_of(tmp_path, *rows)
    code, body = checked(
        table, photographs, "--model", small_model, "--sample", 6, "--max-new-tokens", 2, HALP_MAX_BATCH_SIZE="2"
    )
    assert code == 0
    trial = body["trial"]
    assert (trial["questions"], trial["images"], trial["device"]) == (6, 3, "cpu")
    assert trial["memory_bytes"] > 50e6
    least, most = body["vision_tokens"]["least"], body["vision_tokens"]["most"]
    assert least <= trial["image_tokens"][0] <= trial["image_tokens"][1] <= most  # by the worker, and by arithmetic
    assert body["hours"] == pytest.approx(24 / trial["questions_per_second"] / 3600)
    assert body["decode_cores"] > 0
    failed = command("producer", "check", table, "--images-dir", photographs, "--model", tmp_path / "none", "--sample", 1)
    assert failed.returncode == 2


def test_a_model_that_cannot_be_loaded_is_a_message(tmp_path: Path, photographs: Path, small_model: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small_model, broken)
    (broken / "chat_template.json").unlink()
    table = table_of(tmp_path, ("q", sorted(photographs.iterdir())[0].name, "What?", ""))
    result = command("producer", "check", table, "--images-dir", photographs, "--model", broken, "--sample", 1)
    assert result.returncode == 2
    assert f"error: --sample 1: cannot load {broken}: it has no chat template" in result.stderr
    (broken / "model.safetensors").write_bytes(b"not a model")
    result = command("producer", "check", table, "--images-dir", photographs, "--model", broken)
    assert result.returncode == 2
    assert f"error: --model {broken}: model.safetensors is damaged" in result.stderr


def options(images: Path, **changes: Any) -> RunOptions:
    return RunOptions(
        source=Source(images.parent / "vqa.csv"),
        images_dir=str(images),
        output_dir=str(images.parent / "o"),
        image_roots=(),
        model="Qwen/Qwen2.5-VL-7B-Instruct",
        revision="main",
        computation=Computation(**changes),
        checkpoint_interval=1000,
        order="image",
        limit=None,
        test=False,
        allow_missing=False,
    )


@pytest.mark.parametrize("per_image", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_disk_that_is_expected_is_what_parts_take(tmp_path: Path, images: Path, per_image: int, dtype: str) -> None:
    model = make_facts(num_hidden_layers=28, hidden_size=3584, vision_hidden_size=1280, layers=(0, 7, 14, 21, 27))
    questions = make_questions(60, per_image=per_image)
    run = make_run(tmp_path / "run", questions, model=model, dtype=dtype, checkpoint_interval=60)
    stage(run, 1)
    staged = sum(path.stat().st_size for path in (run.output_dir / ".run" / "staging").rglob("*.safetensors"))
    assert pack(run, 1)
    for question in questions:
        shutil.copy(images / "small.png", images / question.image_id)
    table_of(tmp_path, *[(q.question_id, q.image_id, q.question, "") for q in questions])
    found = check(options(images, dtype=dtype), decode=False, sample=0, cache_dir=tmp_path)
    assert isinstance(found.disk, Disk)
    assert found.disk.parts == pytest.approx(run.part_path(1).stat().st_size, rel=0.2)
    assert found.disk.staging == pytest.approx(staged, rel=0.2)


def ids(*names: str) -> dict[str, tuple[str, ...]]:
    questions = [Question(name, f"{n}.jpg", "What?", "", n, {}) for n, name in enumerate(names)]
    return {finding.kind: finding.examples for finding in table_findings(questions)}


def test_ids_read_as_numbers() -> None:
    assert ids("1", "20", "-3", "a1", "1_000", "2.5", "x") == {}
    assert ids("+5", " 7", "1.50")["id_changes"] == ("'+5' becomes 5", "' 7' becomes 7", "'1.50' becomes 1.5")
    assert ids("9007199254740993.0")["id_changes"] == ("'9007199254740993.0' becomes 9007199254740992.0",)
    assert ids("7", "07", "007")["ids_meet"] == ("7",)


def gallery(images: Path, **changes: Any) -> ImageSource:
    fields: dict[str, Any] = {
        "images_dir": str(images.resolve()), "roots": (), "limits": LIMITS, "factor": 28, "halp_compat": False,
        "exif_rotation": False,
    }  # fmt: skip
    return ImageSource(**(fields | changes))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("turned", [False, True])
def test_a_header_says_what_decoding_shows(images: Path, orientation: int, turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (80, 40)).save(images / "turned.jpg", exif=exif)
    decoded = load_image(images / "turned.jpg", 28, LIMITS, exif_rotation=turned).original_size
    assert image_header(images / "turned.jpg", exif_rotation=turned)[0] == decoded


def test_of_an_object_its_header_is_fetched(
    images: Path, s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Image.effect_noise((900, 700), 60).convert("RGB")
    noise.save(images / "profile.jpg", icc_profile=bytes(200_000))  # it stands before the size
    noise.save(images / "end.tiff", compression="tiff_lzw")  # its directory stands behind the pixels
    for kind in ("webp", "gif", "bmp", "jp2", "tga", "ico"):
        noise.save(images / f"noise.{kind}")
    fetched: dict[str, int] = {}
    for name in ("get_start", "get_range"):

        def counted(store: ObjectStore, key: str, *numbers: int, method: Any = getattr(ObjectStore, name)) -> Any:
            answer = method(store, key, *numbers)
            data = answer[0] if isinstance(answer, tuple) else answer
            fetched[Path(key).name] = fetched.get(Path(key).name, 0) + len(data)
            return answer

        monkeypatch.setattr(ObjectStore, name, counted)
    for path in images.iterdir():
        s3_server.write(f"{s3_url}/{path.name}", path.read_bytes())
        assert image_header(f"{s3_url}/{path.name}")[0] == image_header(path)[0] == load_image(path, 28, LIMITS).original_size
    assert fetched.pop("profile.jpg") in range(200_000, 300_000)
    whole = (images / "noise.webp").stat().st_size
    assert fetched.pop("noise.webp") in range(whole, whole + (1 << 17))  # its decoder wants all of it
    assert fetched["end.tiff"] < 1 << 17 < (images / "end.tiff").stat().st_size
    assert max(fetched.values()) <= 1 << 17
    assert (images / "large.jpg").stat().st_size > 1 << 20
    s3_server.control()
    image_header(f"{s3_url}/large.jpg")[0]
    assert s3_server.control() == {"GET": 1}


def test_objects_that_are_no_images(s3_url: str, s3_server: S3Server) -> None:
    s3_server.write(f"{s3_url}/empty.jpg", b"")
    s3_server.write(f"{s3_url}/text.jpg", b"this is a text")
    for name, reason in [("empty", "image_empty"), ("text", "image_unreadable"), ("gone", "image_missing")]:
        with pytest.raises(PermanentError) as told:
            image_header(f"{s3_url}/{name}.jpg")[0]
        assert told.value.reason == reason


def test_a_network_that_goes_away_blames_no_image(
    images: Path, s3_url: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (50, 40)).save(images / "profile.jpg", icc_profile=bytes(200_000))
    s3_server.write(f"{s3_url}/profile.jpg", (images / "profile.jpg").read_bytes())

    def away(*_: object) -> bytes:
        raise ObjectStoreError("no answer")

    monkeypatch.setattr(ObjectStore, "get_range", away)
    with pytest.raises(TransientError, match="no answer"):
        image_header(f"{s3_url}/profile.jpg")[0]


def test_the_survey_counts_every_image_once(images: Path) -> None:
    seen: list[int] = []
    result = survey(gallery(images), [*SIZES, "../x.jpg", "gone.jpg"], decode=False, done=seen.append)
    assert result.sizes == SIZES
    assert {p.image_id: p.reason for p in result.problems} == {
        "../x.jpg": "image_outside_root",
        "gone.jpg": "image_missing",
    }
    assert seen[-1] == 5
    assert result.file_bytes == sum((images / name).stat().st_size for name in SIZES)
    assert result.decode_seconds is not None
