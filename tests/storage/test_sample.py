"""Staged bytes: a sample comes back bit for bit, and any change to it is noticed."""

from __future__ import annotations

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save

from storage.errors import DamagedError
from storage.sample import Failure, Sample, decode_failure, decode_sample, encode_failure, encode_sample
from tests.support.builders import make_facts, make_failure, make_questions, make_sample

QUESTION = make_questions(1)[0]
SMALL = make_sample(QUESTION, model=make_facts(hidden_size=4, vision_hidden_size=3, layers=(0, 3)), answer="é\\u00e9")


def assert_same(a: Sample, b: Sample) -> None:
    assert (a.answer, a.facts, set(a.vectors)) == (b.answer, b.facts, set(b.vectors))
    for name, vector in a.vectors.items():
        other = b.vectors[name]
        assert (vector.dtype, vector.shape, vector.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.mark.parametrize(("dtype", "bytes_each"), [("bfloat16", 2), ("float32", 4)])
def test_round_trip_in_the_computed_dtype(dtype, bytes_each):
    sample = make_sample(QUESTION, dtype=dtype, model=make_facts(hidden_size=3584))
    data = encode_sample(sample)
    assert_same(decode_sample(data), sample)
    values = sum(vector.size for vector in sample.vectors.values())
    assert values * bytes_each < len(data) < values * bytes_each + 4000


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_every_value_of_a_dtype_survives(dtype):
    if dtype is np.uint16:
        bits = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    else:  # signs, denormals, infinities, payloads of NaN
        bits = np.arange(0, 2**32, 65_521, dtype=np.uint32).view(np.float32)
    decoded = decode_sample(encode_sample(Sample({"v": bits}, "", {})))
    assert decoded.vectors["v"].tobytes() == bits.tobytes()


def test_a_strided_vector_is_staged_by_its_values():
    wide = np.arange(20, dtype=np.float32)
    decoded = decode_sample(encode_sample(Sample({"v": wide[::2]}, "", {})))
    np.testing.assert_array_equal(decoded.vectors["v"], wide[::2])


@given(
    answer=st.text(),
    facts=st.dictionaries(
        st.text(),
        st.one_of(st.text(), st.integers(), st.floats(allow_nan=False), st.booleans(), st.lists(st.integers())),
    ),
    vectors=st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.lists(st.floats(width=32), min_size=1, max_size=4).map(lambda v: np.array(v, np.float32)),
        max_size=3,
    ),
)
def test_any_sample_round_trips(answer, facts, vectors):
    sample = Sample(vectors, answer, facts)
    assert_same(decode_sample(encode_sample(sample)), sample)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_flipped_bit_is_noticed(dtype):
    vectors = {name: v.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32) for name, v in SMALL.vectors.items()}
    data = encode_sample(replace(SMALL, vectors=vectors))
    unnoticed = []
    for position in range(len(data)):
        for bit in range(8):
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            try:
                decode_sample(bytes(damaged))
            except DamagedError:
                continue
            unnoticed.append((position, bit, data[max(0, position - 9) : position + 9]))
    assert unnoticed == []


def test_every_truncation_is_noticed():
    data = encode_sample(SMALL)
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            decode_sample(data[:length])
    with pytest.raises(DamagedError):
        decode_sample(data + b"\0")


@given(st.binary(max_size=200))
def test_bytes_that_are_no_sample_are_refused(data):
    with pytest.raises(DamagedError):
        decode_sample(data)


@pytest.mark.parametrize(
    "data",
    [
        save({"v": np.zeros(2, np.float32)}),
        save({"v": np.zeros(2, np.float32)}, {"answer": "", "facts": "{}"}),
        save({"v": np.zeros(2, np.float32)}, {"answer": "", "facts": "{}", "crc32": "0"}),
        save({"v": np.zeros(2, np.int64)}, {"answer": "", "facts": "{}", "crc32": "0"}),
        (2**63).to_bytes(8, "little") + b"{}",
    ],
    ids=["no metadata", "no checksum", "wrong checksum", "another dtype", "enormous header"],
)
def test_other_safetensors_are_refused(data):
    with pytest.raises(DamagedError, match=r"not a staged sample|checksum mismatch"):
        decode_sample(data)


def test_swapped_vectors_are_noticed():
    a, b = np.ones(4, np.float32), np.zeros(4, np.float32)
    right = encode_sample(Sample({"a": a, "b": b}, "", {}))
    swapped = encode_sample(Sample({"a": b, "b": a}, "", {}))
    metadata = json.loads(right[8 : 8 + int.from_bytes(right[:8], "little")])["__metadata__"]
    forged = save({"a": b, "b": a}, metadata)
    assert len(forged) == len(swapped)
    with pytest.raises(DamagedError):
        decode_sample(forged)


def test_another_shape_of_the_same_bytes_is_noticed():
    data = encode_sample(Sample({"v": np.zeros(6, np.float32)}, "", {}))
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    with pytest.raises(DamagedError):
        decode_sample(save({"v": np.zeros((2, 3), np.float32)}, metadata))


def test_a_failure_round_trips():
    failure = make_failure(QUESTION, message="日本.jpg: line one\nline two \0 \u2028", attempts=3)
    assert decode_failure(encode_failure(failure)) == failure


@given(st.builds(Failure, *[st.text()] * 4, st.integers(), st.text(), st.text()))
def test_any_failure_round_trips(failure):
    assert decode_failure(encode_failure(failure)) == failure


def test_a_failure_about_a_path_that_is_not_utf8_can_be_recorded():
    failure = make_failure(QUESTION, message="/data/\udcff.jpg does not exist")
    assert decode_failure(encode_failure(failure)).message == "/data/?.jpg does not exist"


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"{", b'{"question_id": "q1"}', b"\xff"])
def test_bytes_that_are_no_failure_are_refused(data):
    with pytest.raises(DamagedError, match="not a staged failure"):
        decode_failure(data)


def test_every_truncation_of_a_failure_is_noticed():
    data = encode_failure(make_failure(QUESTION))
    for length in range(len(data)):
        with pytest.raises(DamagedError):
            decode_failure(data[:length])
