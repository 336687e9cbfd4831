from __future__ import annotations

from pathlib import Path

import pytest

from producer.dataset.images import check_images
from storage.errors import UserError
from storage.images.lookup import OutsideRootError, resolve_image
from storage.question import Question


@pytest.fixture
def images(tmp_path) -> Path:
    """A directory with ten images; beside it another one with a secret."""
    tmp_path = tmp_path.resolve()
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for i in range(9):
        (tmp_path / "images" / f"{i}.jpg").touch()
    (tmp_path / "images" / "sub" / "9.jpg").touch()
    (tmp_path / "other" / "secret.jpg").touch()
    return tmp_path / "images"


def ask(*image_ids: str) -> list[Question]:
    return [Question(f"q{i}", image_id, "What?", "", i, {}) for i, image_id in enumerate(image_ids, start=1)]


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        check_images(*args, **kwargs)
    return str(caught.value)


ALL = [f"{i}.jpg" for i in range(9)] + ["sub/9.jpg"]


# resolve_image


@pytest.mark.parametrize("image_id", ["0.jpg", "sub/9.jpg", "./0.jpg", "sub/../0.jpg", "../images/0.jpg", "absent.jpg", "a\\b"])
def test_resolves_inside(images, image_id):
    path = Path(resolve_image(image_id, images, ()))
    assert path.is_absolute()
    assert ".." not in path.parts
    assert path.is_relative_to(images)


@pytest.mark.parametrize("image_id", ["../other/secret.jpg", "..", "sub/../../x", "/etc/hostname", "../images2/0.jpg", "/"])
def test_leaving_is_refused(images, image_id):
    with pytest.raises(OutsideRootError, match="is /"):
        resolve_image(image_id, images, ())


def test_absolute_path_inside_is_allowed(images):
    assert resolve_image(str(images / "0.jpg"), images, ()) == str(images / "0.jpg")


def test_links(images):
    other = images.parent / "other"
    (images / "inside.jpg").symlink_to("0.jpg")
    (images / "outside.jpg").symlink_to(other / "secret.jpg")
    (images / "way").symlink_to(other)
    (images / "loop").symlink_to("loop")
    assert resolve_image("inside.jpg", images, ()) == str(images / "0.jpg")
    assert resolve_image("loop", images, ()) == str(images / "loop")
    for image_id in ("outside.jpg", "way/secret.jpg", "way/absent.jpg"):
        with pytest.raises(OutsideRootError):
            resolve_image(image_id, images, ())
        assert Path(resolve_image(image_id, images, (other,))).parent == other


def test_further_roots_admit_absolute_and_relative_paths(images):
    other = images.parent / "other"
    for image_id in (str(other / "secret.jpg"), "../other/secret.jpg"):
        assert resolve_image(image_id, images, (Path("/nowhere"), other)) == str(other / "secret.jpg")


@pytest.mark.parametrize("image_id", ["a\0b", "\ud800"])
def test_what_cannot_be_a_name_is_refused(images, image_id):
    with pytest.raises(OutsideRootError, match="cannot be the name of a file"):
        resolve_image(image_id, images, ())


# check_images


def test_all_there(images):
    assert check_images(ask(*ALL, *ALL), images) == 0
    assert check_images([], images) == 0


def test_directory_given_by_a_link_or_relative(images, monkeypatch):
    (images.parent / "link").symlink_to(images)
    assert check_images(ask(*ALL), images.parent / "link") == 0
    monkeypatch.chdir(images.parent)
    assert check_images(ask(*ALL), Path("images")) == 0


def test_missing_images_are_counted_once(images):
    assert check_images(ask(*ALL, "x.jpg", "x.jpg", "x.jpg"), images) == 1


def test_what_is_no_file_counts_as_missing(images):
    (images / "loop").symlink_to("loop")
    (images / "dangling").symlink_to("nothing")
    odd = ["sub", "n" * 300, "loop", "dangling", "sub\\9.jpg", "0.jpg/x"]
    assert check_images(ask(*ALL, *odd), images, allow_missing=True) == len(odd)


def test_backslash_is_an_ordinary_character(images):
    (images / "..\\x.jpg").touch()
    assert check_images(ask("..\\x.jpg"), images) == 0


def test_a_fifth_may_be_missing_and_no_more(images):
    assert check_images(ask(*ALL[:8], "x.jpg", "y.jpg"), images) == 2
    questions = ask(*ALL[:7], *ALL[:7], "x.jpg", "y.jpg", "é.jpg", "z.jpg")
    assert refusal(questions, images) == (
        f"4 of 11 images are missing in {images}, such as 'x.jpg', 'y.jpg', 'é.jpg': "
        f"is --images-dir right? --allow-missing runs anyway\n"
        f"{images} holds 10 files (10 .jpg), such as '0.jpg', '1.jpg', '2.jpg'"
    )
    assert check_images(questions, images, allow_missing=True) == 4


def test_directory_that_is_none(images):
    hint = "name the directory that holds the images"
    for path, problem in (
        (images / "nowhere", "does not exist"),
        (images / ("n" * 300), "does not exist"),
        (images / "0.jpg", "is not a directory"),
    ):
        assert refusal(ask(*ALL), path) == f"--images-dir {path} {problem}: {hint}"
        assert refusal(ask(*ALL), images, [path]) == f"--image-root {path} {problem}: {hint}"


def test_every_row_that_leaves_is_named(images):
    (images / "link.jpg").symlink_to(images.parent / "other" / "secret.jpg")
    questions = ask("0.jpg", "../x.jpg", "/etc/hostname", "link.jpg", "../x.jpg", "a\0b")
    parent = images.parent
    assert refusal(questions, images, allow_missing=True) == (
        f"5 rows name an image outside {images}: --image-root DIR admits a further root\n"
        f"  data row 2, question 'q2': image '../x.jpg' is {parent}/x.jpg\n"
        "  data row 3, question 'q3': image '/etc/hostname' is /etc/hostname\n"
        f"  data row 4, question 'q4': image 'link.jpg' is {parent}/other/secret.jpg\n"
        f"  data row 5, question 'q5': image '../x.jpg' is {parent}/x.jpg\n"
        "  data row 6, question 'q6': image 'a\\x00b' cannot be the name of a file"
    )


def test_many_rows_that_leave_are_cut(images):
    message = refusal(ask(*["../x.jpg"] * 25), images)
    assert message.count("data row") == 20
    assert message.endswith("\n  … and 5 more")
    assert refusal(ask("../x.jpg"), images).startswith("1 row names an image outside")


def test_further_root_admits(images):
    (images.parent / "link").symlink_to(images.parent / "other")
    questions = ask(*ALL, "../other/secret.jpg", str(images.parent / "other" / "secret.jpg"))
    for root in ("other", "link"):
        assert check_images(questions, images, [images.parent / root]) == 0


# Images in an object store


@pytest.mark.parametrize(
    ("image_id", "url"),
    [
        ("0.jpg", "s3://bucket/set/images/0.jpg"),
        ("./sub/../0.jpg", "s3://bucket/set/images/0.jpg"),
        ("../images/a b%.jpg", "s3://bucket/set/images/a b%.jpg"),
        ("s3://bucket/set/images/0.jpg", "s3://bucket/set/images/0.jpg"),
        ("s3://other/0.jpg", "s3://other/0.jpg"),
        ("../more/0.jpg", "s3://bucket/set/more/0.jpg"),
    ],
)
def test_an_image_below_a_url(image_id, url):
    assert resolve_image(image_id, "s3://bucket/set/images", ("s3://other", "s3://bucket/set/more")) == url


@pytest.mark.parametrize(
    "image_id",
    [
        "../secret.jpg", "../images2/0.jpg", "../../../../x", "/etc/hostname", "s3://bucket/0.jpg", "s3://bucket2/set/images/0",
        "s3://bucket/set/images/../0.jpg", "s3://key:secret@bucket/set/images/0.jpg", "http://bucket/set/images/0.jpg",
        "a\0b", "\ud800",
    ],
)  # fmt: skip
def test_what_is_not_below_the_url_is_refused(image_id):
    with pytest.raises(OutsideRootError):
        resolve_image(image_id, "s3://bucket/set/images", ("/data",))


def test_missing_objects(s3_url, s3_server, images):
    for name in ALL:
        s3_server.write(f"{s3_url}/{name}", b"")
    assert check_images(ask(*ALL), s3_url) == 0
    assert check_images(ask(*ALL, "gone.jpg"), f"{s3_url}/") == 1
    assert check_images(ask(f"{s3_url}/0.jpg", *ALL, "gone.jpg"), images, [s3_url]) == 1
    refused = refusal(ask("0.jpg", "gone.jpg", "s3.jpg"), s3_url)
    assert refused.startswith(f"2 of 3 images are missing in {s3_url}, such as 'gone.jpg', 's3.jpg'")
    assert "outside" in refusal(ask("../0.jpg"), s3_url)
