"""Names: a model's slug, a part's file, and a question id's HDF5 key."""

from __future__ import annotations

import h5py
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storage.naming import group_key, model_slug, model_type, part_name, part_number, question_id

ODD_IDS = [
    "", ".", "..", "...", "/", "//", "a/b", "/a", "a/", "./a", "a/..", "\0", "a\0b", "\0\0",
    "%", "%%", "%2F", "%2f", "%252F", "%00", "%2E", "%2E%2E", "%25", "50%", "50%_off", "50%/a", "%2F/",
    "日本", "日本/東京", "🦆", "é", "e\u0301", " ", " padded ", "a b", "\n", "\t", "a\\b", "'", '"', "#", "x" * 512, "\u2028",
]  # fmt: skip
# Pieces of which escaping could be confused are far likelier than in plain text.
IDS = st.one_of(
    st.text(max_size=30),
    st.lists(st.sampled_from(["%", "2", "F", "f", "0", "E", "5", "/", "\0", ".", "%2F", "%00", "%2E", "%25", "日"])).map(
        "".join
    ),
)


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", "qwen25vl_3b"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "qwen25vl_7b"),
        ("Qwen/Qwen2.5-VL-32B-Instruct", "qwen25vl_32b"),
        ("Qwen/Qwen2.5-VL-72B-Instruct", "qwen25vl_72b"),
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "qwen25vl_7b_instruct_awq"),
        ("/models/Qwen2.5-VL-7B-Instruct", "qwen25vl_7b"),
        ("/models/Qwen2.5-VL-7B-Instruct/", "qwen25vl_7b"),
        ("./qwen2_5-vl mine", "qwen2_5_vl_mine"),
        ("C:\\models\\Qwen2.5-VL-3B-Instruct\\", "qwen25vl_3b"),
        ("small", "small"),
        ("模型", "model"),
        (".", "model"),
    ],
)
def test_model_slug(model, slug):
    assert model_slug(model) == slug


@pytest.mark.parametrize("model", ["Qwen/Qwen2.5-VL-7B-Instruct", "/models/Qwen2.5-VL-7B-Instruct/"])
def test_model_type_is_the_documented_one(model):
    assert model_type(model) == "qwen2.5-vl-7b-instruct"


@given(st.text())
def test_a_slug_is_safe_in_a_file_name(model):
    assert set(model_slug(model)) <= set("abcdefghijklmnopqrstuvwxyz0123456789_")
    assert model_slug(model)


def test_part_name_is_the_documented_one():
    assert part_name("qwen25vl_7b", 1, 3) == "qwen25vl_7b_embeddings_part_001.h5"


@given(st.integers(1, 10**6), st.integers(3, 7))
def test_part_number_is_the_inverse_of_part_name(part, digits):
    assert part_number(part_name("qwen25vl_7b", part, digits)) == part


@pytest.mark.parametrize("name", ["failures.csv", "other.h5", "qwen25vl_7b_embeddings_part_001.h5.partial"])
def test_other_files_have_no_part_number(name):
    assert part_number(name) is None


def test_sorted_names_are_the_order_of_the_plan():
    names = [part_name("m", part, 4) for part in (1, 2, 9, 10, 99, 100, 999, 1000, 9999)]
    assert names == sorted(names)


@given(IDS)
def test_question_id_is_the_inverse_of_group_key(text):
    assert question_id(group_key(text)) == text


@given(IDS, IDS)
def test_two_ids_never_meet_in_one_key(a, b):
    assert (group_key(a) == group_key(b)) == (a == b)


@given(IDS)
def test_a_key_is_one_that_hdf5_can_take(text):
    key = group_key(text)
    assert key not in {"", ".", ".."}
    assert not {"/", "\0"} & set(key)


@pytest.mark.parametrize("text", ["1", "q_17", "50%_off", "日本", "a.b", "...", "100%", "%2f", " ", "e\u0301"])
def test_an_ordinary_id_is_its_own_key(text):
    assert group_key(text) == text


def test_every_odd_id_is_a_group_of_its_own(tmp_path):
    with h5py.File(tmp_path / "keys.h5", "w", libver=("v110", "v110")) as file:
        for text in ODD_IDS:
            file.create_group(group_key(text)).attrs["number"] = ODD_IDS.index(text)
    with h5py.File(tmp_path / "keys.h5", "r") as file:
        assert {question_id(key): int(group.attrs["number"]) for key, group in file.items()} == {
            text: number for number, text in enumerate(ODD_IDS)
        }
        assert all(int(file[group_key(text)].attrs["number"]) == ODD_IDS.index(text) for text in ODD_IDS)


@given(st.lists(IDS, unique=True, max_size=6))
def test_any_ids_come_back_from_hdf5(ids):
    with h5py.File("keys.h5", "w", driver="core", backing_store=False) as file:
        for text in ids:
            file.create_group(group_key(text))
        assert sorted(map(question_id, file)) == sorted(ids)
        assert all(group_key(text) in file for text in ids)
