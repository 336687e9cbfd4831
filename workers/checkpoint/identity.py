"""A checkpoint's identity, from its name or its files, without loading it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from storage.errors import UserError
from workers.checkpoint.files import adapter_problem, loaded_files
from workers.checkpoint.hub import config_of

_SAMPLES, _SAMPLE_SIZE = 16, 1 << 16
_HUB_PARTS, _SHOWN = 2, 3


def checkpoint_digest(model: str, revision: str) -> str:
    """Return twelve hexadecimal digits that two workers share exactly if they serve the same checkpoint.

    Of a hub model: of its revision. Of a local directory: of the files that a model is loaded from, wherever it is mounted;
    files over 1 MiB (the weights) count by size, head and evenly spaced samples, so that 16 GB take milliseconds.
    """
    directory = local_directory(model)
    if directory is None:
        return hashlib.sha256(f"{model}@{revision}".encode()).hexdigest()[:12]
    return _digest(loaded_files(directory))


def former_digest(model: str, revision: str) -> str:
    """Return what earlier versions made of a checkpoint: every file of a local directory counted, notes and logs too."""
    directory = local_directory(model)
    if directory is None:
        return checkpoint_digest(model, revision)
    return _digest(p for p in directory.iterdir() if p.is_file() and not p.name.startswith("."))


def file_digests(model: str) -> dict[str, str]:
    """Return a digest of each file that a local checkpoint is loaded from; nothing for a hub model."""
    directory = local_directory(model)
    return {} if directory is None else {path.name: _digest([path]) for path in loaded_files(directory)}


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
        _update(digest, path)
    return digest.hexdigest()[:12]


def _is_path(model: str) -> bool:
    """Tell whether a name can only be a directory's: a hub name has one slash at most, with words on both sides."""
    parts = model.split("/")
    return len(parts) > _HUB_PARTS or not all(parts) or model[0] in ".~" or (len(parts) > 1 and Path(parts[0]).is_dir())


def _nearest(directory: Path) -> str:
    """Say what is there of a path, and what is called nearly like the first thing that is not."""
    above = next(place for place in directory.parents if place.is_dir())
    wanted = directory.parts[len(above.parts)]
    try:
        names = sorted(path.name for path in above.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:
        return ""
    near = get_close_matches(wanted, names, _SHOWN, 0.6) or (names[:_SHOWN] if above != Path() else [])
    return f"; {above} has {', '.join(near)}" if near else ""


def local_directory(model: str) -> Path | None:
    """Return a local checkpoint's directory; None for a hub model. Raises UserError for a directory without a checkpoint."""
    directory = Path(model)
    if not directory.is_dir():
        if _is_path(model):
            raise UserError(f"--model {model}: no such directory{_nearest(directory)}")
        return None
    if not (directory / "config.json").is_file():
        if (adapter := adapter_problem(directory)) is not None:
            raise UserError(f"--model {model}: {adapter}")
        raise UserError(f"--model {model}: the directory holds no checkpoint (there is no config.json in it)")
    return directory


@dataclass(frozen=True, slots=True)
class Config:
    """What a config.json says of its model; None where it says nothing."""

    model_type: str | None
    num_hidden_layers: int | None
    values: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # all of it


def read_config(model: str, revision: str) -> Config | None:
    """Read a checkpoint's config.json; None for a hub model whose files are not here yet. Raises UserError."""
    path = config_of(model, revision)
    if path is None or not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
        number = config.get("text_config", config).get("num_hidden_layers", config.get("num_hidden_layers"))
        kind = config.get("model_type")
        return Config(None if kind is None else str(kind), None if number is None else int(number), config)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"--model {model}: its config.json is damaged ({error})") from error


def resolve_layers(layers: tuple[int, ...] | Literal["all"] | None, number: int) -> tuple[int, ...]:
    """Return the decoder layers to keep, of `number`: by default 0, n/4, n/2, 3n/4 and n-1. Raises UserError."""
    if layers == "all":
        return tuple(range(number))
    if layers is None:
        return tuple(sorted({0, number // 4, number // 2, 3 * number // 4, number - 1}))
    if wrong := [i for i in layers if not 0 <= i < number]:
        raise UserError(f"--layers: the model has layers 0 to {number - 1}; not {', '.join(map(str, wrong))}")
    return tuple(sorted(set(layers)))


def _update(digest: hashlib._Hash, path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _SAMPLES * _SAMPLE_SIZE:
            digest.update(file.read())
            return
        for sample in range(_SAMPLES):
            file.seek(sample * (size - _SAMPLE_SIZE) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_SIZE))
