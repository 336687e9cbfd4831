"""Whether a checkpoint's files are all there and whole, before anything loads them: seconds instead of a torch traceback.

Transformers goes on without a word where a tokenizer or an adapter is not what it seems, and names no file where weights
were cut. Only headers are read, so 16 GB take milliseconds.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from storage.errors import UserError
from storage.images.filetype import LFS_POINTER

_AGAIN = "copy or download it again"
_JSON = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "chat_template.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
)  # fmt: skip
_TEXT = ("merges.txt", "chat_template.jinja")
# Looked into by the library alone: other processors', and other tokenizers' vocabularies.
_OTHERS = (
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.txt",
)
# The order in which transformers looks for them.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_LARGEST_HEADER = 100_000_000  # safetensors' own bound
_OTHER_FORMS = {
    "*.gguf": "GGUF",
    "global_step*": "DeepSpeed's shards; its zero_to_fp32.py makes weights of them",
    "*.distcp": "a distributed checkpoint",
    "pytorch_model_fsdp*": "FSDP's shards",
    "consolidated*": "the form of another library",
}


def check_files(directory: Path) -> None:
    """Raise UserError for what is missing, cut or not the file itself, with the file's name and what to do."""
    problem = next(_problems(directory), None)
    if problem is not None:
        raise UserError(f"--model {directory}: {problem}")


def loaded_files(directory: Path) -> list[Path]:
    """Return the files that a model and its processor are loaded from: not the notes, logs and other forms beside them."""
    weights = next((name for name in _WEIGHTS if (directory / name).is_file()), None)
    names = {*_JSON, *_TEXT, *_OTHERS, "adapter_config.json", *([weights] if weights else [])}
    if weights is not None and weights.endswith(".index.json"):
        names |= _shards(directory / weights)
    return sorted(path for path in map(directory.joinpath, names) if path.is_file() and path.parent == directory)


def adapter_problem(directory: Path) -> str | None:
    """Return what is wrong with a directory that holds an adapter: it is no model, and is not applied to one."""
    config = directory / "adapter_config.json"
    if not config.is_file() and not any(directory.glob("adapter_model.*")):
        return None
    try:
        base = json.loads(config.read_text())["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = "its base model"
    merge = f"merge it into {base} (PEFT's merge_and_unload), and save the model with its processor"
    if any((directory / name).is_file() for name in _WEIGHTS):
        beside = "adapter_config.json: an adapter (LoRA) lies beside the weights and would not be applied"
        return f"{beside}: {merge}; or move it away"
    return f"it holds an adapter (LoRA; adapter_config.json) and no model: {merge}"


def _problems(directory: Path) -> Iterator[str]:
    if (adapter := adapter_problem(directory)) is not None:
        yield adapter
    for name in (*_JSON, *_TEXT):
        path = directory / name
        if path.is_file() and (problem := _text_problem(path)) is not None:
            yield f"{name} {problem}: {_AGAIN}"
    yield from _missing(directory)
    yield from _weight_problems(directory)


def _missing(directory: Path) -> Iterator[str]:
    """Yield what a checkpoint lacks beside its weights."""
    there = {path.name for path in directory.iterdir()}
    if not any(there.issuperset(names) for names in _TOKENIZERS):
        yield "it has no tokenizer: tokenizer.json (or vocab.json and merges.txt) is missing; copy it from the base checkpoint"
    whole = _read(directory / "processor_config.json") if "processor_config.json" in there else {}
    if "preprocessor_config.json" not in there and "image_processor" not in whole:
        yield "preprocessor_config.json is missing: copy it from the base checkpoint"
    templates = {"chat_template.json", "chat_template.jinja"} & there
    if not templates and not any(
        "chat_template" in _read(directory / name)
        for name in ("tokenizer_config.json", "processor_config.json")
        if name in there
    ):
        yield "it has no chat template (chat_template.json or chat_template.jinja): copy it from the base checkpoint"


def _weight_problems(directory: Path) -> Iterator[str]:
    name = next((name for name in _WEIGHTS if (directory / name).exists()), None)
    if name is None:
        forms = (form for pattern, form in _OTHER_FORMS.items() if any(directory.glob(pattern)))
        other = next((f", but {form}" for form in forms), "")
        yield f"there are no weights in it (model.safetensors, or model.safetensors.index.json and its shards){other}"
        return
    shards = [name]
    if name.endswith(".index.json"):
        if (problem := _text_problem(directory / name)) is not None:
            yield f"{name} {problem}: {_AGAIN}"
            return
        shards = sorted(_shards(directory / name))
        if not shards:
            yield f"{name} names no shards: {_AGAIN}"
    for shard in shards:
        path = directory / shard
        if path.parent != directory:  # its content would not be in the checkpoint's digest
            yield f"{name} names {shard}, which lies in another directory: put all weights beside config.json"
        elif not path.is_file():
            yield f"{shard} is missing, which {name} names: {_AGAIN}"
        elif (problem := _shard_problem(path)) is not None:
            yield f"{shard} {problem}: {_AGAIN}"


def _text_problem(path: Path) -> str | None:
    data = path.read_bytes()
    if (problem := _not_itself(data)) is not None:
        return problem
    if path.suffix != ".json":
        return None
    try:
        return None if isinstance(json.loads(data), dict) else "is damaged (no JSON object)"
    except ValueError as error:
        return f"is damaged ({error})"


def _shard_problem(path: Path) -> str | None:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        if (problem := _not_itself(head)) is not None:
            return problem
        if path.suffix == ".safetensors":
            length = int.from_bytes(head[:8], "little")
            file.seek(8)
            return _header_problem(file.read(length) if length <= _LARGEST_HEADER else b"", length, size)
    cut = head.startswith(b"PK") and not zipfile.is_zipfile(path)
    return f"is cut short ({size:,} bytes)" if cut else None


def _header_problem(header: bytes, length: int, size: int) -> str | None:
    """Tell what is wrong with a safetensors file of `size` bytes whose header, of `length`, begins so."""
    if length > _LARGEST_HEADER:
        return "is damaged: it does not begin as safetensors do"
    if len(header) < length:
        return f"is cut short ({size:,} bytes, within its header)"
    try:
        ends = [tensor["data_offsets"][1] for name, tensor in json.loads(header).items() if name != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return "is damaged: its header is not safetensors'"
    if size < wanted:
        return f"is cut short ({size:,} of {wanted:,} bytes)"
    return f"is damaged ({size - wanted:,} bytes too long)" if size > wanted else None


def _not_itself(head: bytes) -> str | None:
    """Tell from a file's first bytes that it is none of a checkpoint's."""
    if not head.strip(b"\0"):
        return "has nothing in it"
    if head.startswith(LFS_POINTER):
        return "is a Git LFS pointer, not the file itself (`git lfs pull` fetches it)"
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file itself"
    return None


def _shards(index: Path) -> set[str]:
    """Return the files that an index of weights names; none where it is not as transformers writes it."""
    shards = _read(index).get("weight_map")
    return {shard for shard in shards.values() if isinstance(shard, str)} if isinstance(shards, dict) else set()


def _read(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; one that is damaged has been named before."""
    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
