"""Vectors of a part: their bytes, their place, the column index. Read with bare h5py, zlib, h5dump and PyTables alike."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
import tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from storage.errors import DamagedError, UserError
from storage.hdf5 import placement
from storage.hdf5.chunks import CODEC, ZLIB, decode_chunk, encode_chunk, join_planes, raw, read_planes
from storage.hdf5.columns import COLUMN, column_of
from storage.hdf5.layout import open_part
from storage.hdf5.part import write_part
from storage.naming import group_key
from storage.question import Question
from storage.runs.pack import pack
from storage.sample import Sample
from tests.support.builders import make_facts, make_questions, make_run, make_sample, make_settings, stage

FIELD = "query_token_representation/layer_3"


def read_column(path: Path, field: str) -> tuple[list[str], np.ndarray]:
    """Return the question ids of a part in key order, and one of its fields as float32 [N, D]."""
    with open_part(path) as part:
        column = column_of(part, field)
    return column.ids, column.read()


WIDE = make_facts(hidden_size=3584, vision_hidden_size=1280)
CODECS = pytest.mark.parametrize("codec", [CODEC, ZLIB], ids=lambda codec: codec.name)


def write(path: Path, samples: list[tuple[Question, Sample]], model=WIDE) -> Path:
    write_part(path, make_settings(), model, 1, samples, [])
    return path


def pairs(number: int, *, per_image: int = 1, model=WIDE) -> list[tuple[Question, Sample]]:
    return [(q, make_sample(q, model=model)) for q in make_questions(number, per_image=per_image)]


def of(vectors: dict[str, dict[str, np.ndarray]]) -> list[tuple[Question, Sample]]:
    """Return samples of given vectors: question id to field to vector."""
    questions = make_questions(len(vectors))
    return [
        (replace(q, question_id=question_id), Sample(fields, "", {}))
        for q, (question_id, fields) in zip(questions, vectors.items(), strict=True)
    ]


def index_of(file: h5py.File) -> dict[str, np.ndarray]:
    return {name.removeprefix(COLUMN): file.attrs[name] for name in file.attrs if name.startswith(COLUMN)}


# Chunks

VALUES = st.one_of(
    st.lists(st.floats(width=32), min_size=1, max_size=50).map(lambda v: np.array(v, np.float32)),
    st.binary(min_size=2, max_size=100).map(lambda b: np.frombuffer(b[: len(b) // 2 * 2], ml_dtypes.bfloat16)),
    st.integers(1, 70_000).map(lambda n: np.full(n, 0.5, ml_dtypes.bfloat16)),
    st.integers(1, 70_000).map(lambda n: np.zeros(n, np.float32)),
)


@CODECS
@settings(deadline=None)
@given(values=VALUES)
def test_a_chunk_is_the_shuffled_vector_as_a_zlib_stream(codec, values):
    values = raw(values)
    chunk = encode_chunk(values, codec)
    bits = values.view(np.uint16).astype(np.uint32) << 16 if values.dtype.itemsize == 2 else values.view(np.uint32)
    shuffled = bits.view(np.uint8).reshape(-1, 4).T
    assert zlib.decompress(chunk) == shuffled.tobytes()
    np.testing.assert_array_equal(decode_chunk(chunk, values.size, codec), shuffled)
    rows = [read_planes(memoryview(chunk), values.size, codec)] * 2
    assert join_planes(rows, values.size).tobytes() == bits.tobytes() * 2


@CODECS
def test_a_chunk_longer_than_a_stored_block(codec):
    values = np.random.default_rng(0).standard_normal(150_000, dtype=np.float32)
    assert zlib.decompress(encode_chunk(values, codec)) == values.view(np.uint8).reshape(-1, 4).T.tobytes()


@CODECS
def test_bfloat16_takes_the_same_bytes_as_its_float32(codec):
    values = np.random.default_rng(0).standard_normal(3584).astype(ml_dtypes.bfloat16)
    assert encode_chunk(values, codec) == encode_chunk(values.astype(np.float32), codec)
    assert len(encode_chunk(values, codec)) < 0.4 * 4 * len(values)


@CODECS
def test_a_chunk_of_another_size_or_no_stream_is_refused(codec):
    chunk = encode_chunk(np.ones(5, np.float32), codec)
    for damaged, size in [(chunk, 4), (chunk, 6), (chunk[:-6], 5), (b"", 5), (b"precious", 5)]:
        with pytest.raises(ValueError, match=r"instead of|not a zlib stream"):
            decode_chunk(damaged, size, codec)
        with pytest.raises(ValueError, match=r"instead of|not a zlib stream"):
            read_planes(memoryview(damaged), size, codec)


@CODECS
def test_a_bfloat16_row_is_read_without_the_planes_that_need_no_inflating(codec):
    values = np.random.default_rng(0).standard_normal(3584).astype(ml_dtypes.bfloat16)
    inflated: list[int] = []

    def inflate(data, wbits, size):
        inflated.append(size)
        return codec.inflate(data, wbits, size)

    row = read_planes(memoryview(encode_chunk(values, codec)), 3584, replace(codec, inflate=inflate))
    assert inflated == [3584]
    np.testing.assert_array_equal(join_planes([row], 3584), [values.astype(np.float32)])


@CODECS
def test_a_zlib_stream_of_bfloat16_values_from_elsewhere_is_read_too(codec):
    values = np.random.default_rng(0).standard_normal(3584).astype(ml_dtypes.bfloat16).astype(np.float32)
    chunk = zlib.compress(values.view(np.uint8).reshape(-1, 4).T.tobytes(), 4)
    np.testing.assert_array_equal(join_planes([read_planes(memoryview(chunk), 3584, codec)], 3584), [values])


def test_without_isal_the_standard_library_is_used():
    code = "import sys; sys.modules['isal'] = None; from storage.hdf5.chunks import CODEC; print(CODEC.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "zlib\n"


# Place and index


def test_a_column_is_one_run_of_the_file_and_the_index_says_where(tmp_path):
    path = write(tmp_path / "part.h5", pairs(60, per_image=3))
    data = path.read_bytes()
    with h5py.File(path, "r") as file:
        keys = list(file)
        assert keys == sorted(f"q{n}" for n in range(1, 61))
        columns = index_of(file)
        fields: list[str] = []
        file["q1"].visititems(lambda name, node: fields.append(name) if getattr(node, "ndim", 0) == 1 else None)
        assert sorted(columns) == sorted(fields)
        for field, index in columns.items():
            assert (index.shape, index.dtype) == ((60, 3), np.uint64)
            for key, (offset, size, crc) in zip(keys, index.tolist(), strict=True):
                stored = file[key][field].id.get_chunk_info(0)
                assert (stored.byte_offset, stored.size, stored.filter_mask) == (offset, size, 0)
                assert zlib.crc32(data[offset : offset + size]) == crc
            distinct = np.unique(index[:, :2], axis=0)
            assert len(distinct) == (60 if field.startswith("query") else 20)
            np.testing.assert_array_equal(distinct[1:, 0], distinct[:-1].sum(axis=1))


def test_the_index_is_right_where_a_column_is_in_several_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(placement.Placement, "metadata_size", 2048)  # headers of datasets come to lie between the chunks
    path = write(tmp_path / "part.h5", samples := pairs(60))
    with h5py.File(path, "r") as file:
        index = index_of(file)[FIELD]
        assert (np.diff(index[:, 0].astype(int)) != index[:-1, 1]).any()
        for key, (offset, size, _) in zip(file, index.tolist(), strict=True):
            stored = file[key][FIELD].id.get_chunk_info(0)
            assert (stored.byte_offset, stored.size) == (offset, size)
    by_key = {q.question_id: sample.vectors[FIELD].astype(np.float32) for q, sample in samples}
    ids, values = read_column(path, FIELD)
    np.testing.assert_array_equal(values, [by_key[key] for key in ids])


def test_the_documented_way_to_read_a_column_without_this_package(tmp_path):
    path = write(tmp_path / "part.h5", samples := pairs(5))
    with h5py.File(path, "r") as file:
        keys, index = list(file), file.attrs["column:query_token_representation/layer_3"]
    rows = []
    with open(path, "rb") as raw_file:
        for offset, size, crc in index.tolist():
            raw_file.seek(offset)
            stored = raw_file.read(size)
            assert zlib.crc32(stored) == crc
            rows.append(np.frombuffer(zlib.decompress(stored), np.uint8).reshape(4, -1).T.copy().view("<f4")[:, 0])
    by_key = {q.question_id: sample.vectors[FIELD] for q, sample in samples}
    np.testing.assert_array_equal(rows, [by_key[key].astype(np.float32) for key in keys])


def test_equal_vectors_are_one_dataset_and_different_ones_of_an_image_are_not(tmp_path):
    a, b = np.ones(4, ml_dtypes.bfloat16), np.zeros(4, ml_dtypes.bfloat16)
    samples = of({"x": {"v": a, "w": a}, "y": {"v": a, "w": b}, "z": {"v": b, "w": a}})
    samples = [(replace(question, image_id="same.jpg"), sample) for question, sample in samples]
    with h5py.File(write(tmp_path / "part.h5", samples), "r") as file:
        assert file["x/v"] == file["y/v"]
        assert file["x/v"] != file["z/v"]
        assert file["x/w"] == file["z/w"]
        assert file["x/v"] != file["x/w"]  # columns share nothing: each is one run
        for question, sample in samples:
            for name, vector in sample.vectors.items():
                np.testing.assert_array_equal(file[question.question_id][name][:], vector.astype(np.float32))


def test_vectors_that_are_equal_but_for_the_sign_of_zero_or_the_shape_are_not_one(tmp_path):
    zero = np.zeros(4, np.float32)
    samples = of({"x": {"v": zero}, "y": {"v": -zero}, "z": {"v": zero.reshape(2, 2)}})
    with h5py.File(write(tmp_path / "part.h5", samples), "r") as file:
        assert np.signbit(file["y/v"][:]).all()
        assert not np.signbit(file["x/v"][:]).any()
        assert file["z/v"].shape == (2, 2)


def test_questions_in_any_order_are_indexed_in_the_order_of_the_keys(tmp_path):
    samples = pairs(12, model=make_facts())
    path = write(tmp_path / "part.h5", samples[::-1], make_facts())
    ids, values = read_column(path, FIELD)
    assert ids == sorted(ids)
    expected = {q.question_id: sample.vectors[FIELD].astype(np.float32) for q, sample in samples}
    np.testing.assert_array_equal(values, [expected[i] for i in ids])


def test_an_empty_vector_is_refused_with_its_question_and_field(tmp_path):
    samples = of({"x": {"a/v": np.empty(0, np.float32)}})
    with pytest.raises(ValueError, match=r"question x cannot be written into .*: a/v: the vector is empty"):
        write(tmp_path / "part.h5", samples)


def test_a_chunk_that_is_not_where_the_file_says_is_noticed_before_the_part_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(placement.CODEC.__class__, "crc32", property(lambda _: lambda data: len(data) ^ id(data)))
    with pytest.raises(OSError, match=r"a chunk of .* is not at byte"):
        write(tmp_path / "part.h5", pairs(2))


# Column reads


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    ids=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8), max_size=12, unique=True),
    width=st.integers(1, 40),
    distinct=st.integers(1, 4),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
    seed=st.integers(0, 99),
)
def test_read_column_equals_bare_h5py(tmp_path_factory, ids, width, distinct, dtype, seed):
    pool = np.random.default_rng(seed).standard_normal((distinct, width)).astype(dtype)
    vectors = {question_id: {"a/b": pool[n % distinct], "c": pool[0]} for n, question_id in enumerate(ids)}
    path = write(tmp_path_factory.mktemp("part") / "part.h5", of(vectors))
    for field in ("a/b", "c"):
        found_ids, values = read_column(path, field)
        assert values.dtype == np.float32
        with h5py.File(path, "r") as file:
            assert found_ids == [file[key].attrs["question_id"] for key in file]
            expected = [file[group_key(question_id)][field][:] for question_id in found_ids]
        assert values.shape == (len(ids), width if ids else 0)
        assert values.tobytes() == b"".join(v.tobytes() for v in expected)
        assert sorted(found_ids) == sorted(ids)


@pytest.mark.parametrize("kind", ["no index", "the reference script's"])
def test_a_part_without_an_index_is_read_row_by_row(tmp_path, kind):
    samples = pairs(4, model=make_facts())
    path = write(tmp_path / "part.h5", samples, make_facts())
    expected = read_column(path, FIELD)
    if kind == "no index":
        with h5py.File(path, "r+") as file:
            for name in [name for name in file.attrs if name.startswith(COLUMN)]:
                del file.attrs[name]
    else:
        path = tmp_path / "reference.h5"
        with h5py.File(path, "w") as file:
            for question, sample in samples:
                file.create_dataset(
                    f"{question.question_id}/{FIELD}", data=sample.vectors[FIELD].astype(np.float32), compression="gzip"
                )
    ids, values = read_column(path, FIELD)
    assert ids == expected[0]
    np.testing.assert_array_equal(values, expected[1])


def test_chunks_that_lie_apart_are_read_all_the_same(tmp_path):
    """The index tells the truth wherever the chunks are: here as h5repack lays them out, rewritten by the reader's rule."""
    path = write(tmp_path / "part.h5", pairs(8))
    expected = read_column(path, FIELD)
    data, moved = path.read_bytes(), bytearray()
    with h5py.File(path, "r+") as file:
        index = file.attrs[COLUMN + FIELD]
        start = len(data) + 1_000_000
        for row in index[::-1]:
            offset, size, _ = row.tolist()
            row[0] = start + len(moved)
            moved += data[offset : offset + size] + bytes(100_000)
        file.attrs[COLUMN + FIELD] = index
    with path.open("r+b") as raw_file:
        raw_file.seek(start)
        raw_file.write(moved)
    ids, values = read_column(path, FIELD)
    assert ids == expected[0]
    np.testing.assert_array_equal(values, expected[1])


def test_differing_widths_are_written_and_refused_by_a_column_read(tmp_path):
    samples = of({"x": {"v": np.ones(4, np.float32)}, "y": {"v": np.ones(5, np.float32)}})
    path = write(tmp_path / "part.h5", samples)
    with h5py.File(path, "r") as file:
        assert (file["x/v"].shape, file["y/v"].shape) == ((4,), (5,))
    with pytest.raises(UserError, match="question y: v is not of width 4"):
        read_column(path, "v")


@pytest.mark.parametrize("first", [True, False])
def test_a_field_that_a_question_lacks_is_named(tmp_path, first):
    one = np.ones(4, np.float32)
    path = write(tmp_path / "part.h5", of({"x": {} if first else {"v": one}, "y": {"v": one} if first else {}}))
    with h5py.File(path, "r") as file:
        assert index_of(file)["v"].shape == (2, 3)
    with pytest.raises(UserError, match=f"question {'x' if first else 'y'}: there is no v"):
        read_column(path, "v")
    with pytest.raises(UserError, match="question x: there is no nonsense"):
        read_column(path, "nonsense")


def test_a_damaged_chunk_is_named(tmp_path):
    path = write(tmp_path / "part.h5", pairs(3))
    with h5py.File(path, "r") as file:
        offset = int(file.attrs[COLUMN + FIELD][1, 0])
    data = bytearray(path.read_bytes())
    data[offset + 100] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=f"question q2: {FIELD} is damaged"):
        read_column(path, FIELD)


def test_an_index_beyond_the_end_of_the_file_is_damage(tmp_path):
    path = write(tmp_path / "part.h5", pairs(3))
    with h5py.File(path, "r+") as file:
        index = file.attrs[COLUMN + FIELD]
        index[1, :2] = 2**62
        file.attrs[COLUMN + FIELD] = index
    with pytest.raises(DamagedError, match="is shorter than its column index says"):
        read_column(path, FIELD)


# Other readers


def test_h5dump_reads_every_value(tmp_path):
    assert shutil.which("h5dump"), "h5dump is not installed: apt-get install hdf5-tools"
    path = write(tmp_path / "part.h5", samples := pairs(2), WIDE)
    target = tmp_path / "values"
    for question, sample in samples:
        for field, vector in sample.vectors.items():
            command = ["h5dump", "-d", f"/{question.question_id}/{field}", "-b", "LE", "-o", target, path]
            subprocess.run(command, capture_output=True, check=True)
            assert target.read_bytes() == vector.astype(np.float32).tobytes()
        texts = [f"/{question.question_id}/{name}" for name in ("question", "image_id", "answer", "ground_truth_answer")]
        command = ["h5dump", *(word for text in texts for word in ("-d", text)), path]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        values = [question.question, question.image_id, sample.answer, question.ground_truth_answer]
        assert re.findall(r'\(0\): "(.*)"', shown) == values
    done = subprocess.run(["h5dump", "-pH", "-d", f"/q1/{FIELD}", path], capture_output=True, text=True, check=True)
    assert re.search(r"PREPROCESSING SHUFFLE\s+COMPRESSION DEFLATE", done.stdout)


@pytest.mark.filterwarnings("ignore")  # names that are no Python identifiers, types that it does not know
def test_pytables_reads_vectors_and_attributes_and_texts_in_the_rows(tmp_path):
    questions = make_questions(3, per_image=3, extra={"category": "Farbe 日本"})
    samples = [(q, make_sample(q, answer=f"“{q.question_id}”\n日本", model=WIDE)) for q in questions]
    path = write(tmp_path / "part.h5", samples)
    with tables.open_file(str(path)) as file, h5py.File(path) as truth:
        for question, sample in samples:
            for name, vector in sample.vectors.items():
                values = file.get_node(f"/{question.question_id}/{name}")[:]
                assert values.dtype == np.float32
                assert values.tobytes() == vector.astype(np.float32).tobytes()
            attributes = file.get_node(f"/{question.question_id}")._v_attrs
            for name, value in truth[question.question_id].attrs.items():
                assert np.array_equal(attributes[name], value), name
            assert attributes["category"] == "Farbe 日本"
        unread = {name for name, value in truth.attrs.items() if not np.array_equal(file.root._v_attrs[name], value)}
        assert unread == {"exact", "exif_rotation", "vision_encoder"}  # booleans: None in PyTables
        texts = json.loads(zlib.decompress(file.root._v_attrs["rows"].tobytes()))["texts"]
        assert texts["question"] == [question.question for question, _ in samples]
        assert texts["answer"] == [sample.answer for _, sample in samples]


@pytest.mark.filterwarnings("ignore:Unsupported type")
def test_pytables_knows_no_variable_length_text(tmp_path):
    """What docs/format.md says of it. If this fails, PyTables has learned it: say so there."""
    path = write(tmp_path / "part.h5", pairs(1))
    with tables.open_file(str(path)) as file:
        for name in ("question", "image_id", "answer", "ground_truth_answer"):
            with pytest.warns(UserWarning, match="variable length strings are not supported"):
                node = file.get_node(f"/q1/{name}")
            assert isinstance(node, tables.UnImplemented)


def test_readers_split_on_the_same_order_as_ever(tmp_path):
    """`list(file)` is sorted, as in a file of the reference script: seeded splits stay what they were."""
    run = make_run(tmp_path / "out", 30, checkpoint_interval=30)
    stage(run, 1)
    pack(run, 1)
    with h5py.File(run.part_path(1), "r") as file:
        assert list(file) == sorted(file)
        assert all(isinstance(node, h5py.Group) for node in file.values())
