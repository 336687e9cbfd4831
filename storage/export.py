"""Exporting a run's vectors and answers into one file of another format, whole or not at all."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from storage.errors import UserError
from storage.reading import Loaded, field_name, load, load_frame
from storage.store import DirectoryStore

FORMATS = ("npz", "parquet", "safetensors", "csv")
_TEXTS = ("question_id", "image_id", "question", "answer", "ground_truth_answer")
_CSV = {"question_id": "question_id", "image_id": "image_id", "question": "question",
        "ground_truth_answer": "ground_truth_answer", "answer": "model_answer"}  # fmt: skip


def export(
    source: str | Path, to: str, field: str | None, layer: int | None, output: Path | None, *, progress: bool = False
) -> Path:
    """Write a run or file in another format; return where. Raises UserError where the target exists.

    `csv` has the answers, in the CSV's order, as labelling scripts take them. `npz` and `safetensors` have one field's vectors
    with ids and texts, in the plan's order; `parquet` the whole frame, and the vectors too where a field is given. All is in
    memory at once.
    """
    name = None if field is None else field_name(field, layer)
    if to == "csv" and name is not None:
        raise UserError("a CSV has no vectors: leave --field out, or choose --to parquet")
    if name is None and to in {"npz", "safetensors"}:
        raise UserError(
            f"which vectors? `--to {to}` needs --field, as in: --field query_token_representation --layer 21"
        )
    output = output or Path(f"{(name or 'answers').replace('/', '_')}.{to}")
    if output.exists():
        raise UserError(f"{output} exists: move it elsewhere, or give another --output")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output.absolute().parent} is no directory")
    write = _writer(source, to, name, progress)
    store = DirectoryStore(output.absolute().parent, ".")
    with store.partial() as temporary:
        write(temporary)
        if not store.publish(temporary, output.name):
            raise UserError(f"{output} has appeared in the meantime, and is left as it is")
    return output


def _writer(source: str | Path, to: str, name: str | None, progress: bool) -> Callable[[Path], None]:
    """Read what is exported; return what writes it."""
    if to == "csv":
        return lambda path: _write_csv(source, path)
    if to == "parquet":
        return _parquet(source, name, progress)
    assert name is not None
    loaded = load(source, name, progress=progress)
    return lambda path: (_write_npz if to == "npz" else _write_safetensors)(loaded, path)


def _write_csv(source: str | Path, path: Path) -> None:
    frame = load_frame(source, order="file")
    if "csv_row" in frame:
        frame = frame.sort_values("csv_row", kind="stable")
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV.values())
        if len(frame):
            writer.writerows(frame[list(_CSV)].itertuples(index=False))


def _write_npz(loaded: Loaded, path: Path) -> None:
    arrays: dict[str, Any] = {name: np.array(loaded.frame[name].tolist(), np.str_) for name in _texts(loaded)}
    with path.open("xb") as file:  # a name would get `.npz` at its end
        np.savez(file, vectors=loaded.vectors, **arrays)


def _write_safetensors(loaded: Loaded, path: Path) -> None:
    texts = {name: json.dumps(loaded.frame[name].tolist(), ensure_ascii=False) for name in _texts(loaded)}
    save_file({"vectors": loaded.vectors}, path, metadata={"field": loaded.field, **texts})


def _texts(loaded: Loaded) -> list[str]:
    return [name for name in _TEXTS if name in loaded.frame]


def _parquet(source: str | Path, name: str | None, progress: bool) -> Callable[[Path], None]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet needs pyarrow: pip install 'halp-extractor[parquet]'") from None
    loaded = None if name is None else load(source, name, progress=progress)
    frame = load_frame(source) if loaded is None else loaded.frame
    table = pa.Table.from_pandas(frame, preserve_index=False)
    if loaded is not None:
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(loaded.vectors.reshape(-1)), loaded.vectors.shape[1])
        table = table.append_column("vector", vectors).replace_schema_metadata({"field": loaded.field})
    return lambda path: parquet.write_table(table, path)
