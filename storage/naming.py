"""Names: the slug of a model, the file of a part, the HDF5 key of a question id."""

from __future__ import annotations

import re
from urllib.parse import unquote

MAX_SLUG, MAX_DIGITS = 255, 9  # a file's name has 255 bytes at most
MAX_PART = 10**MAX_DIGITS
# What the HALP study calls its files, where no rule gives it.
_PUBLISHED = {
    "gemma-3-12b-it": "gemma3_12b",
    "llama3-llava-next-8b-hf": "llava_next",
    "llama-3.2-11b-vision-instruct": "llama3_2_11b_vision",
    "phi-4-multimodal-instruct": "phi4_multimodal",
    "smolvlm2-2.2b-instruct": "smolvlm_2.2b",
}
_PART = re.compile(r"_embeddings_part_(\d{3,})\.h5$")


def model_type(model: str) -> str:
    """Return the lower-case base name of a hub name or directory: `qwen2.5-vl-7b-instruct`."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()


def model_slug(model: str) -> str:
    """Return the file-name form of a model's name: `Qwen/Qwen2.5-VL-7B-Instruct` is `qwen25vl_7b`."""
    if published := _PUBLISHED.get(model_type(model)):
        return published
    name = model_type(model).removesuffix("-instruct")
    name = re.sub(r"qwen2[.]?5[-_]?vl", "qwen25vl", name)
    return re.sub(r"[^a-z0-9]+", "_", name).strip("_") or "model"


def part_label(part: int, digits: int) -> str:
    """Return a part's zero-padded number, as in its file name and its staging directory."""
    return f"{part:0{digits}d}"


def labelled_part(label: str) -> int | None:
    """Return the part that `part_label` makes a label of, or None where the text is no label."""
    if not (label.isascii() and label.isdecimal() and len(label) <= MAX_DIGITS):
        return None
    return int(label) or None


def part_name(slug: str, part: int, digits: int) -> str:
    """Return a part's file name: `qwen25vl_7b_embeddings_part_001.h5`."""
    return f"{slug}_embeddings_part_{part_label(part, digits)}.h5"


def part_number(name: str) -> int | None:
    """Return the number in a part's file name, or None where the name is not a part's."""
    match = _PART.search(name)
    return int(match[1]) if match else None


def group_key(question_id: str) -> str:
    """Return the HDF5 link name of a question id.

    HDF5 cannot take `/`, NUL, `.`, `..` and the empty name. Those alone are escaped as `%XX`; an id that holds such an
    escape already has its `%` escaped too, so that two ids never meet in one key. Every other id is its own key.
    """
    if question_id in {"", ".", ".."}:
        return "%" if not question_id else "%2E" * len(question_id)
    if re.search(r"[/\0]|%(2F|00|2E|25)", question_id) or question_id == "%":
        return question_id.replace("%", "%25").replace("/", "%2F").replace("\0", "%00")
    return question_id


def question_id(key: str) -> str:
    """Return the question id of an HDF5 link name: the inverse of `group_key`."""
    if key == "%":
        return ""
    return unquote(key) if "%" in key and re.search(r"%(2F|00|2E|25)", key) else key
