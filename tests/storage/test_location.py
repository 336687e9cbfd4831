from __future__ import annotations

import pytest

from storage.errors import UserError
from storage.stores.location import is_within, resolve_location, split_roots, split_url


def test_a_directory_becomes_absolute(tmp_path, monkeypatch):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    assert resolve_location("link/run") == str(tmp_path.resolve() / "real" / "run")
    assert resolve_location(tmp_path / "link") == str(tmp_path.resolve() / "real")


def test_a_url_has_one_spelling():
    assert [resolve_location(url) for url in ("s3://b", "s3://b/", "s3://b/a b/c/")] == [
        "s3://b",
        "s3://b",
        "s3://b/a b/c",
    ]
    assert split_url("s3://b/x/y") == ("s3://b", "x/y")
    assert split_url("s3://b/") == ("s3://b", "")


@pytest.mark.parametrize(
    "url",
    ["s3://", "s3:///x", "http://b/x", "file:///x", "gcs://b/x", "abfss://b/x", "S3://b", "s3://b/../c", "s3://b/a//c",
     "s3://b/./c"],
)  # fmt: skip
def test_other_urls_are_refused(url):
    with pytest.raises(UserError, match=r"s3://|spell the prefix out"):
        resolve_location(url)


def test_credentials_in_a_url_are_refused_and_not_repeated():
    with pytest.raises(UserError, match="carries credentials") as caught:
        resolve_location("s3://KEY:hidden@bucket/run")
    assert "hidden" not in str(caught.value)
    assert "KEY" not in str(caught.value)


def test_within():
    assert is_within("s3://b/runs/1", "s3://b/runs")
    assert is_within("s3://b/runs", "s3://b/runs")
    assert is_within("s3://b/x", "s3://b")
    assert not is_within("s3://b/runs2", "s3://b/runs")
    assert not is_within("s3://b2/x", "s3://b")
    assert not is_within("/s3://b/x", "s3://b")
    assert is_within("/data/run", "/data")
    assert not is_within("/data2/run", "/data")
    assert not is_within("s3://b/x", "/")


def test_roots_are_separated_by_a_colon_that_is_not_of_a_url():
    assert split_roots("/data:s3://b/x:/more:gs://c") == ["/data", "s3://b/x", "/more", "gs://c"]
    assert split_roots("s3://b") == ["s3://b"]
    assert split_roots("a::b:") == ["a", "b"]
