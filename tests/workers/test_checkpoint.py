from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from storage.errors import UserError
from workers.checkpoint.files import check_files
from workers.checkpoint.hub import cache_of
from workers.checkpoint.identity import Config, checkpoint_digest, former_digest, read_config, resolve_layers

SAMPLE = 1 << 16
BIG = 40 * SAMPLE + 12_345  # more than sixteen samples cover


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    directory = tmp_path / "Qwen2.5-VL-Big"
    directory.mkdir()
    (directory / "config.json").write_text('{"num_hidden_layers": 28}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(bytes(range(256)) * (BIG // 256) + bytes(BIG % 256))
    return directory


def digest(directory: Path) -> str:
    return checkpoint_digest(str(directory), "main")


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)
        file.seek(place)
        file.write(bytes([byte[0] ^ 1]))


# The digest of local files


def test_copy_elsewhere_is_the_same(checkpoint, tmp_path):
    """The workers of one queue mount the checkpoint where they like, and a copy has other times and another order."""
    copy = tmp_path / "elsewhere" / "under another name"
    copy.mkdir(parents=True)
    for path in sorted(checkpoint.iterdir(), reverse=True):
        shutil.copyfile(path, copy / path.name)
        os.utime(copy / path.name, (1, 1))
    assert digest(copy) == digest(checkpoint)
    assert checkpoint_digest(str(checkpoint), "another revision") == digest(checkpoint)


def test_digest_is_twelve_hexadecimal_digits(checkpoint):
    assert len(digest(checkpoint)) == 12
    int(digest(checkpoint), 16)


def test_relative_path_and_link_are_the_same(checkpoint, tmp_path, monkeypatch):
    expected = digest(checkpoint)
    (tmp_path / "link").symlink_to(checkpoint)
    monkeypatch.chdir(tmp_path)
    assert checkpoint_digest("./link", "main") == checkpoint_digest(checkpoint.name, "main") == expected


def test_directory_of_links_is_its_files(checkpoint, tmp_path):
    """As the hub's cache lays a snapshot out."""
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in checkpoint.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert digest(snapshot) == digest(checkpoint)


SAMPLED = [i * (BIG - SAMPLE) // 15 for i in range(16)]


@pytest.mark.parametrize("place", [0, 7, SAMPLE - 1, SAMPLED[1], SAMPLED[8] + SAMPLE - 1, BIG - SAMPLE, BIG - 1])
def test_changed_byte_in_a_sampled_place(checkpoint, place):
    before = digest(checkpoint)
    flip(checkpoint / "model.safetensors", place)
    assert digest(checkpoint) != before


def test_changed_byte_between_the_samples_is_not_seen(checkpoint):
    """The price of not reading 16 GB at every start. Another training run changes every sample; a bad disk may not."""
    before = digest(checkpoint)
    place = SAMPLED[3] + SAMPLE
    assert place < SAMPLED[4]
    flip(checkpoint / "model.safetensors", place)
    assert digest(checkpoint) == before


@pytest.mark.parametrize("change", [1, -1, -SAMPLE])
def test_changed_size(checkpoint, change):
    before = digest(checkpoint)
    os.truncate(checkpoint / "model.safetensors", BIG + change)
    assert digest(checkpoint) != before


@pytest.mark.parametrize("size", [1, SAMPLE * 16 - 1, SAMPLE * 16])
def test_small_files_are_read_whole(checkpoint, size):
    path = checkpoint / "vocab.txt"
    path.write_bytes(bytes(size))
    before = digest(checkpoint)
    flip(path, size // 3)
    assert digest(checkpoint) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_changed_settings(checkpoint, name):
    before = digest(checkpoint)
    (checkpoint / name).write_text('{"num_hidden_layers": 36}')
    assert digest(checkpoint) != before


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_an_index_of_weights_that_is_none_costs_no_traceback(checkpoint, index):
    (checkpoint / "model.safetensors").rename(checkpoint / "model.safetensors.index.json")
    (checkpoint / "model.safetensors.index.json").write_text(index)
    (checkpoint / "preprocessor_config.json").write_text("{}")
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    assert len(digest(checkpoint)) == 12
    with pytest.raises(UserError, match=r"names no shards|which model\.safetensors\.index\.json names|is damaged"):
        check_files(checkpoint)


def test_renamed_added_and_removed_files(checkpoint):
    digests = [digest(checkpoint)]
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json")
    digests.append(digest(checkpoint))
    (checkpoint / "merges.txt").touch()
    digests.append(digest(checkpoint))
    (checkpoint / "model.safetensors").unlink()
    digests.append(digest(checkpoint))
    assert len(set(digests)) == 4


def test_hidden_files_and_directories_are_no_part_of_it(checkpoint):
    """Such as .gitattributes, and what a download leaves beside the files."""
    before = digest(checkpoint)
    assert former_digest(str(checkpoint), "main") == before
    for name in (
        "README.md",
        "training_log.jsonl",
        "events.out.tfevents.1",
        "optimizer.pt",
        "model.onnx",
        "notes.json",
    ):
        (checkpoint / name).write_text("something")
    assert digest(checkpoint) == before
    assert former_digest(str(checkpoint), "main") != before
    (checkpoint / ".gitattributes").touch()
    (checkpoint / ".cache").mkdir()
    (checkpoint / "figures").mkdir()
    assert digest(checkpoint) == before


def test_contents_cannot_pass_for_another_file(tmp_path):
    """One file whose content is the next one's name and bytes is not those two files."""
    for name, files in {"one": {"config.json": b"{}z 1\n1"}, "two": {"config.json": b"{}", "z": b"1"}}.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
    assert digest(tmp_path / "one") != digest(tmp_path / "two")


def test_small_model_has_a_digest(small_model):
    assert digest(small_model) == digest(small_model)


# Hub names


def test_hub_name_needs_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    digests = {
        checkpoint_digest(name, revision)
        for name in ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct")
        for revision in ("main", "cc594898137f460bfe9f0759e9844b3ce807cfb5")
    }
    assert len(digests) == 4
    assert not list(tmp_path.iterdir())
    assert read_config("Qwen/Qwen2.5-VL-7B-Instruct", "main") is None


def test_digest_of_a_hub_name_does_not_change_between_versions():
    """Producer and workers may be of two versions, and the queue's name holds it."""
    assert checkpoint_digest("Qwen/Qwen2.5-VL-7B-Instruct", "main") == "cf355c79c6e5"


# Bad directories


@pytest.mark.parametrize(
    "model",
    ["/absent/model", "./model", "../model", "models/qwen/Qwen2.5-VL-7B", "checkpoints/Tnyi", "tiny/", "~/model"],
)
def test_directory_that_is_not_there(tmp_path, monkeypatch, model):
    (tmp_path / "checkpoints/Tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=rf"--model {model}: no such directory") as caught:
        checkpoint_digest(model, "main")
    if model == "checkpoints/Tnyi":
        assert str(caught.value).endswith("; checkpoints has Tiny")


def test_the_cache_that_holds_a_revision_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    model, commit = "acme/Tiny", "0" * 39 + "1"

    def put(cache: Path) -> str:
        """Lay a snapshot out as the hub's library does."""
        home = cache / "models--acme--Tiny"
        (home / "snapshots" / commit).mkdir(parents=True)
        (home / "snapshots" / commit / "config.json").touch()
        (home / "refs").mkdir()
        (home / "refs/main").write_text(commit)
        return str(cache)

    assert cache_of(model, "main") == "model_cache"  # it will be fetched into it
    assert cache_of(model, "main", tmp_path / "given") == str(tmp_path / "given")
    assert put(tmp_path / "hub") == cache_of(model, "main") == cache_of(model, commit)
    assert cache_of(model, "another") == "model_cache"
    put(tmp_path / "model_cache")
    assert cache_of(model, "main") == "model_cache"
    assert cache_of(str(tmp_path), "main") == cache_of("", "main") == "model_cache"


def test_directory_without_a_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"holds no checkpoint \(there is no config\.json in it\)") as caught:
        digest(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert read_config(str(tmp_path), "main") is None


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"num_hidden_layers": "many"}', '{"text_config": 1}'])
def test_damaged_config(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged") as caught:
        read_config(str(tmp_path), "main")
    assert str(tmp_path) in str(caught.value)


def test_weights_outside_the_directory_are_refused(tmp_path, small_model):
    model = shutil.copytree(small_model, tmp_path / "model")
    (model / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names \.\./model\.safetensors, which lies in another directory"):
        check_files(model)


# Layers


@pytest.mark.parametrize(
    ("config", "number"),
    [
        ({"num_hidden_layers": 28}, 28),  # as published: flat
        ({"text_config": {"num_hidden_layers": 36}}, 36),  # as transformers 4.52 and later save it
        ({"text_config": {}, "num_hidden_layers": 64}, 64),
        ({}, None),
    ],
)
def test_number_of_layers_of_a_local_checkpoint(tmp_path, config, number):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(str(tmp_path), "main") == Config(None, number)


def test_number_of_layers_of_the_small_model(small_model):
    assert read_config(str(small_model), "main") == Config("qwen2_5_vl", 7)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (28, (0, 7, 14, 21, 27)),  # 7B
        (36, (0, 9, 18, 27, 35)),  # 3B
        (64, (0, 16, 32, 48, 63)),  # 32B
        (80, (0, 20, 40, 60, 79)),  # 72B
        (8, (0, 2, 4, 6, 7)),
        (3, (0, 1, 2)),
        (2, (0, 1)),
        (1, (0,)),
    ],
)
def test_default_layers(number, expected):
    assert resolve_layers(None, number) == expected


def test_chosen_layers_are_sorted_and_single():
    assert resolve_layers((27, 3, 3, 0, 27), 28) == (0, 3, 27)


@pytest.mark.parametrize(("layers", "named"), [((28,), "28"), ((-1, 5), "-1"), ((0, 40, -3), "40, -3")])
def test_layers_out_of_range(layers, named):
    with pytest.raises(UserError, match=rf"--layers: the model has layers 0 to 27; not {named}$"):
        resolve_layers(layers, 28)
