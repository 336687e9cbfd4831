"""Files that are missing, cut, or not what they are called: named, with what to do, before anything is loaded or planned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from storage.errors import UserError
from tests.support.processes import command, write_csv
from workers.checkpoint.files import check_files
from workers.checkpoint.identity import local_directory

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "ab" * 32 + "\nsize 5417064\n"


@pytest.fixture
def model(small_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_model, tmp_path / "Qwen2.5-VL-Copy"))


def sharded(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, own in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in own}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model.safetensors").unlink()


def pickled(model: Path) -> None:
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def cut(name: str, by: int = 1000) -> Callable[[Path], None]:
    return lambda model: (model / name).write_bytes((model / name).read_bytes()[:-by])


def written(name: str, text: str) -> Callable[[Path], None]:
    return lambda model: (model / name).write_text(text)


def gone(*names: str) -> Callable[[Path], None]:
    return lambda model: [(model / name).unlink() for name in names]


def adapter(model: Path) -> None:
    config = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen2.5-VL-7B-Instruct"}
    (model / "adapter_config.json").write_text(json.dumps(config))
    save_file({"base_model.model.x": torch.zeros(2)}, model / "adapter_model.safetensors")


def both(*changes: Callable[[Path], object]) -> Callable[[Path], None]:
    return lambda model: [change(model) for change in changes]


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "weights cut": (cut("model.safetensors"), r"model\.safetensors is cut short \([\d,]+ of [\d,]+ bytes\)"),
    "weights cut in their header": (
        cut("model.safetensors", 5_903_000),
        r"model\.safetensors is cut short \(608 bytes, within its header\)",
    ),
    "weights too long": (lambda m: (m / "model.safetensors").open("ab").write(b"x" * 9), r"damaged \(9 bytes too long\)"),
    "weights empty": (written("model.safetensors", ""), r"model\.safetensors has nothing in it"),
    "weights of zeros": (written("model.safetensors", "\0" * 4096), r"model\.safetensors has nothing in it"),
    "weights a page": (written("model.safetensors", "<!DOCTYPE html><html>"), r"model\.safetensors is a web page"),
    "weights a pointer": (written("model.safetensors", LFS), r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
    "weights noise": (written("model.safetensors", "x" * 4096), r"model\.safetensors is damaged"),
    "shard gone": (
        both(sharded, gone("model-00002-of-00002.safetensors")),
        r"model-00002-of-00002\.safetensors is missing, which model\.safetensors\.index\.json names",
    ),
    "shard cut": (both(sharded, cut("model-00001-of-00002.safetensors")), r"model-00001-of-00002\.safetensors is cut"),
    "shard a pointer": (
        both(sharded, written("model-00002-of-00002.safetensors", LFS)),
        r"model-00002-of-00002\.safetensors is a Git LFS pointer",
    ),
    "index cut": (both(sharded, cut("model.safetensors.index.json", 50)), r"index\.json is damaged"),
    "index empty": (both(sharded, written("model.safetensors.index.json", "{}")), r"index\.json names no shards"),
    "pickle cut": (both(pickled, cut("pytorch_model.bin")), r"pytorch_model\.bin is cut short"),
    "pickle a pointer": (both(pickled, written("pytorch_model.bin", LFS)), r"pytorch_model\.bin is a Git LFS pointer"),
    "no weights": (gone("model.safetensors"), r"there are no weights in it \(model\.safetensors"),
    "DeepSpeed": (
        both(gone("model.safetensors"), lambda m: (m / "global_step100").mkdir()),
        r"no weights in it.*DeepSpeed's shards; its zero_to_fp32\.py",
    ),
    "GGUF": (both(gone("model.safetensors"), written("model-q4.gguf", "GGUF")), r"no weights in it.*GGUF"),
    "adapter beside": (adapter, r"adapter_config\.json: an adapter \(LoRA\) lies beside.*Qwen/Qwen2\.5-VL-7B-Instruct"),
    "adapter and config": (both(adapter, gone("model.safetensors")), r"holds an adapter.*and no model: merge it into Qwen/"),
    "tokenizer gone": (gone("tokenizer.json"), r"no tokenizer: tokenizer\.json \(or vocab\.json and merges\.txt\)"),
    "all of the tokenizer gone": (gone("tokenizer.json", "tokenizer_config.json"), r"no tokenizer: tokenizer\.json"),
    "half of a slow one": (both(gone("tokenizer.json"), written("vocab.json", "{}")), r"no tokenizer"),
    "tokenizer cut": (cut("tokenizer.json"), r"tokenizer\.json is damaged \("),
    "tokenizer a pointer": (written("tokenizer.json", LFS), r"tokenizer\.json is a Git LFS pointer"),
    "tokenizer_config a pointer": (written("tokenizer_config.json", LFS), r"tokenizer_config\.json is a Git LFS pointer"),
    "config a pointer": (written("config.json", LFS), r"config\.json is a Git LFS pointer"),
    "config cut": (cut("config.json", 10), r"config\.json is damaged"),
    "config a list": (written("config.json", "[]"), r"config\.json is damaged"),
    "generation_config cut": (cut("generation_config.json", 10), r"generation_config\.json is damaged"),
    "template a pointer": (written("chat_template.json", LFS), r"chat_template\.json is a Git LFS pointer"),
    "preprocessor gone": (gone("preprocessor_config.json"), r"preprocessor_config\.json is missing"),
    "preprocessor empty": (written("preprocessor_config.json", ""), r"preprocessor_config\.json has nothing in it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, model: Path) -> None:
    change, message = BROKEN[name]
    change(model)
    with pytest.raises(UserError, match=message) as caught:
        check_files(model)
    assert str(caught.value).startswith(f"--model {model}: ")


@pytest.mark.parametrize("change", [lambda _: None, sharded, pickled])
def test_whole_checkpoints_pass(change: Callable[[Path], object], model: Path) -> None:
    change(model)
    check_files(model)


def test_a_tokenizer_of_two_files_passes(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "vocab.json")
    (model / "merges.txt").write_text("#version: 0.2\n")
    check_files(model)


def test_a_processor_in_one_file_passes(model: Path) -> None:
    """As transformers 5 saves it."""
    image = json.loads((model / "preprocessor_config.json").read_text())
    (model / "processor_config.json").write_text(json.dumps({"image_processor": image}))
    (model / "preprocessor_config.json").unlink()
    check_files(model)


def test_an_adapter_alone_is_called_one(tmp_path: Path) -> None:
    adapter(tmp_path)
    with pytest.raises(UserError, match=r"it holds an adapter \(LoRA; adapter_config\.json\) and no model: merge it into"):
        local_directory(str(tmp_path))


def test_nothing_is_planned_for_it(model: Path, tmp_path: Path, photographs: Path) -> None:
    """Else the run would be bound to files that must be replaced."""
    cut("model.safetensors")(model)
    name = sorted(photographs.iterdir())[0].name
    table = write_csv(tmp_path / "q.csv", [{"question_id": "1", "image_id": name, "question": "Why?", "answer": ""}])
    options = ("--images-dir", photographs, "--output-dir", tmp_path / "out", "--model", model)
    result = command("producer", "run", table, *options)
    assert result.returncode == 2
    assert "model.safetensors is cut short" in result.stderr
    assert not (tmp_path / "out").exists()
