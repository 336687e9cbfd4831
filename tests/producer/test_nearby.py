"""Missing images: what the refusal shows of the directory, the nearest names, and which of two columns is taken."""

from __future__ import annotations

import os
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from producer.dataset import nearby
from producer.dataset.images import check_images, with_found_images
from producer.dataset.nearby import describe_missing
from storage.errors import UserError
from storage.question import Question
from storage.stores.object_store import ObjectStore

NFC, NFD = (unicodedata.normalize(form, "Zürich 日本ガ.png") for form in ("NFC", "NFD"))


@pytest.fixture
def holding(tmp_path: Path) -> Callable[..., Path]:
    """Make a directory `images` of empty files."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "images" / name).touch()
        return tmp_path / "images"

    return make


def ask(*image_ids: str, **extra: str) -> list[Question]:
    return [Question(f"q{i}", image_id, "What?", "", i, dict(extra)) for i, image_id in enumerate(image_ids, start=1)]


def refusal(image_id: str, images: Path) -> str:
    with pytest.raises(UserError) as caught:
        check_images(ask(image_id), images)
    return str(caught.value)


COCO = "COCO_val2014_000000123456.jpg"


@pytest.mark.parametrize(
    ("there", "image_id", "difference"),
    [
        (COCO, "123456", "the same number, called otherwise"),
        (COCO, "000000123456.jpg", "the same number, called otherwise"),
        ("000000123456.jpg", COCO, "the same number, called otherwise"),
        ("000000123456.jpg", "123456.jpg", "the same number, called otherwise"),
        ("train/VG_00042.png", "42", "in the directory 'train/', the same number, called otherwise"),
        ("a.JPG", "a.jpg", "other letter case"),
        ("Photo.jpg", "photo.JPG", "other letter case"),
        ("a.webp", "a.jpg", "with the extension .webp"),
        ("a.tiff", "a", "with the extension .tiff"),
        ("a", "a.jpg", "without an extension"),
        (NFD, NFC, "the same letters in another Unicode form (NFD)"),
        (NFC, NFD, "the same letters in another Unicode form (NFC)"),
        ("val/a.png", "val\\a.png", "the id has back slashes"),
        ("a.png", "C:\\photos\\a.png", "the id has back slashes"),
        ("a.png", " a.png", "the id has blanks at its ends"),
        ("a.png", "a.png\t", "the id has blanks at its ends"),
        ("a.png", "images/a.png", "without 'images/'"),
        ("val/a.png", "images/val/a.png", "without 'images/'"),
        ("val2014/a.png", "a.png", "in the directory 'val2014/'"),
        ("a.png", "/home/me/photos/a.png", "without '/home/me/photos/'"),
        ("39769.jpg", "http://images.cocodataset.org/val2017/39769.jpg?w=1", "the last part of the URL"),
        ("a b.jpg", "https://host/a%20b.jpg", "the last part of the URL"),
        ("a.jpg", "file:///data/a.jpg", "the last part of the URL"),
    ],
)
def test_the_nearest_name(holding: Callable[..., Path], there: str, image_id: str, difference: str) -> None:
    message = refusal(image_id, holding(there, "other-1.gif"))
    assert f"  for {image_id!r} there is {there!r}: {difference}" in message.split("\n")
    assert "holds 2 files" in message


@pytest.mark.parametrize("image_id", ["dog_1.jpg", "cat.jpg", "", ".", "..\\..", "a\0b", "x" * 300, "http://[/", "é\udcff.jpg"])
def test_what_is_near_nothing(holding: Callable[..., Path], image_id: str) -> None:
    """`dog_1` and `cat_1` have a number in common, and nothing else."""
    assert "there is" not in describe_missing([image_id], str(holding("cat_1.jpg", "sub/2.png")))


def test_a_name_that_leads_elsewhere_is_not_its_own_neighbour(holding: Callable[..., Path]) -> None:
    images = holding("a.png")
    (images / "b.png").symlink_to("/etc/hostname")
    message = refusal("b.png", images)
    assert "--image-root DIR admits" in message
    assert "there is" not in message


def test_the_web_is_not_fetched(holding: Callable[..., Path]) -> None:
    message = refusal("https://host/1.jpg", holding("a.png"))
    assert "download the images" in message
    assert "is a URL: images are not fetched" in message
    assert "--image-root" not in message


def test_what_the_directory_holds(holding: Callable[..., Path]) -> None:
    images = holding(*(f"{i}.jpg" for i in range(1200)), "a.png", "LICENSE", "b.gif", "c.bmp", "d.tif")
    assert describe_missing([], str(images)) == (
        f"{images} holds 1,205 files (1,200 .jpg, 1 without an extension, 1 .png, 1 .gif, …), "
        "such as '0.jpg', '1.jpg', '10.jpg'"
    )


def test_an_empty_directory(tmp_path: Path) -> None:
    assert describe_missing(["a"], str(tmp_path)) == f"{tmp_path} holds no file"


def test_a_large_directory_costs_no_more(holding: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at is bounded; a name that COCO's numbers suggest is found among those that were not listed."""
    monkeypatch.setattr(nearby, "_LISTED", 100)
    images = holding(*(f"COCO_val2014_{i:012d}.jpg" for i in range(3000)))
    looked = 0
    is_file = os.path.isfile

    def counting(path: str) -> bool:
        nonlocal looked
        looked += 1
        return is_file(path)

    monkeypatch.setattr(os.path, "isfile", counting)
    message = describe_missing([str(number) for number in range(2990, 3000)], str(images))
    assert "holds over 100 files (100 .jpg)" in message
    assert message.count("the same number, called otherwise") == 3
    assert looked < 1000


def test_many_directories_are_not_all_entered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearby, "_LISTED", 50)
    for number in range(200):
        (tmp_path / str(number) / "deep").mkdir(parents=True)
    begun = time.monotonic()
    assert describe_missing(["a"], str(tmp_path)) == f"{tmp_path} holds no file among the first that were listed"
    assert time.monotonic() - begun < 5


def test_an_object_store(s3_url: str) -> None:
    store = ObjectStore(s3_url)
    store.put("val/a.JPG", b"1")
    store.put(COCO, b"1")
    with pytest.raises(UserError) as caught:
        check_images(ask("val\\a.jpg", "123456", f"{s3_url}/val/a.JPG/"), s3_url)
    message = str(caught.value)
    assert f"{s3_url} holds 2 files (1 .jpg, 1 .JPG), such as '{COCO}', 'val/a.JPG'" in message
    assert "  for 'val\\\\a.jpg' there is 'val/a.JPG': the id has back slashes, other letter case" in message
    assert f"  for '123456' there is '{COCO}': the same number, called otherwise" in message


# Two columns


def test_the_column_whose_files_exist(holding: Callable[..., Path]) -> None:
    images = holding("COCO_1.jpg", "COCO_2.jpg")
    questions = [Question(f"q{i}", str(i), "What?", "", i, {"a": "x", "image_name": f"COCO_{i}.jpg"}) for i in (1, 2)]
    found = with_found_images(questions, images)
    assert [q.image_id for q in found] == ["COCO_1.jpg", "COCO_2.jpg"]
    assert [list(q.extra.items()) for q in found] == [[("a", "x"), ("image_id", "1")], [("a", "x"), ("image_id", "2")]]
    assert check_images(found, images) == 0


@pytest.mark.parametrize("there", [("1",), ("1", "COCO_1.jpg"), ()])
def test_image_id_is_taken_where_image_name_has_no_more(holding: Callable[..., Path], there: tuple[str, ...]) -> None:
    questions = ask("1", image_name="COCO_1.jpg")
    assert with_found_images(questions, holding("x", *there)) == questions


def test_a_url_beside_a_name(holding: Callable[..., Path]) -> None:
    """An id that could not be an image here does not count, and refuses nothing."""
    found = with_found_images(ask("http://host/1.jpg", image_name="1.jpg"), holding("1.jpg"))
    assert found[0].image_id == "1.jpg"
