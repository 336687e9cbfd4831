"""Exporting a run's vectors and answers into one file of another format: whole or not at all, and in bounded memory."""

from __future__ import annotations

import csv
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from rich.progress import track

from storage.errors import UserError
from storage.fields import at_layer
from storage.hdf5.columns import Vectors
from storage.reading.load import Located, load_frame, locate
from storage.reading.source import Source
from storage.reading.stack import Layered, Layers, lengths_of
from storage.screen.console import Console
from storage.stores.store import DirectoryStore, sync

FORMATS = ("npz", "parquet", "safetensors", "csv")
_TEXTS = ("question_id", "image_id", "question", "answer", "ground_truth_answer")
_CSV = {"question_id": "question_id", "image_id": "image_id", "question": "question",
        "ground_truth_answer": "ground_truth_answer", "answer": "model_answer"}  # fmt: skip
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # https://owasp.org/www-community/attacks/CSV_Injection
_AT_ONCE = 32 << 20  # bytes of vectors in memory
_LONGEST_HEADER = 100_000_000  # bytes that a reader of safetensors takes


def export(
    source: str | Path,
    to: str,
    field: str | None,
    layer: Layers,
    output: Path | None,
    *,
    escape_formulas: bool = False,
    progress: bool = False,
) -> Path:
    """Write a run or file in another format; return where. Raises UserError where the target exists.

    `csv` has the answers, in the CSV's order, as labelling scripts take them. `npz` and `safetensors` have one field's vectors
    with ids and texts, in the plan's order; `parquet` the whole frame, and the vectors too where a field is given. The frame is
    in memory, of the vectors some at a time. `escape_formulas`: cells of a CSV that a spreadsheet would compute begin with `'`.
    """
    if to == "csv" and field is not None:
        raise UserError("a CSV has no vectors: leave --field out, or choose --to parquet")
    if field is None and to in {"npz", "safetensors"}:
        raise UserError(f"which vectors? `--to {to}` needs --field, as in: --field query_token_representation --layer 21")
    output = output or Path(f"{'answers' if field is None else _name(field, layer)}.{to}")
    if output.exists():
        raise UserError(f"{output} exists: move it elsewhere, or give another --output")
    if not output.absolute().parent.is_dir():
        raise UserError(f"{output.absolute().parent} is no directory of this machine")
    if escape_formulas and to != "csv":
        raise UserError("--escape-formulas is of --to csv alone: no other format is taken for formulas")
    write = _writer(source, to, field, layer, progress, escape_formulas)
    store = DirectoryStore(output.absolute().parent.resolve(), ".")
    with store.partial() as temporary:
        write(temporary)
        sync(temporary)
        if not store.publish(temporary, output.name):
            raise UserError(f"{output} has appeared in the meantime, and is left as it is")
    return output


def _writer(
    source: str | Path, to: str, field: str | None, layer: Layers, progress: bool, escape_formulas: bool
) -> Callable[[Path], None]:
    """Look at what is exported; return what writes it."""
    if to == "parquet":
        return _parquet(source, field, layer, progress)
    if field is None:
        return lambda path: _write_csv(source, path, progress, escape_formulas)
    found = _locate(source, field, layer, progress)
    write = _write_npz if to == "npz" else _write_safetensors
    return lambda path: write(path, found, progress)


def _write_csv(source: str | Path, path: Path, progress: bool, escape_formulas: bool) -> None:
    frame = load_frame(source, order="file", progress=progress)
    if "csv_row" in frame:
        frame = frame.sort_values("csv_row", kind="stable")
    with path.open("x", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(_CSV.values())
        if len(frame):
            rows = frame[list(_CSV)].itertuples(index=False)
            writer.writerows(([_no_formula(cell) for cell in row] for row in rows) if escape_formulas else rows)


def _no_formula(cell: Any) -> Any:
    """Return a cell as a spreadsheet shows it: by its first character it would take it for a formula."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def _write_npz(path: Path, found: Located, progress: bool) -> None:
    with zipfile.ZipFile(path, "x") as archive:
        _write_npy(archive, "vectors", np.dtype(np.float32), _shape(found), _chunks(found, progress))
        for name, numbers in _numbers(found).items():
            _write_npy(archive, name, numbers.dtype, numbers.shape, [numbers])
        for name, texts in _texts(found).items():
            kind = np.dtype((np.str_, max(map(len, texts), default=1) or 1))
            pieces = (np.array(texts[start : start + 1000], kind) for start in range(0, len(texts), 1000))
            _write_npy(archive, name, kind, (len(texts),), pieces)


def _write_npy(
    archive: zipfile.ZipFile, name: str, kind: np.dtype[Any], shape: tuple[int, ...], pieces: Iterable[npt.NDArray[Any]]
) -> None:
    """Write an array into an archive as `np.savez` does, piece by piece."""
    header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False, "shape": shape}
    entry = zipfile.ZipInfo(f"{name}.npy")  # of a fixed date: the same file for the same run
    with archive.open(entry, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for piece in pieces:
            _write_raw(file, piece)


def _write_safetensors(path: Path, found: Located, progress: bool) -> None:
    """Write the format of https://github.com/huggingface/safetensors: the header's length, the header, the values."""
    texts = {name: json.dumps(values, ensure_ascii=False) for name, values in _texts(found).items()}
    shape = _shape(found)
    at = {name: json.dumps(numbers.tolist()) for name, numbers in _numbers(found).items()}
    header = {
        "__metadata__": {"field": found.field, **at, **texts},
        "vectors": {"dtype": "F32", "shape": shape, "data_offsets": (0, 4 * math.prod(shape))},
    }
    data = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    if len(data) > _LONGEST_HEADER:
        raise UserError("the texts are too many for the header of a safetensors file: choose --to npz or parquet")
    with path.open("xb") as file:
        file.write(len(data).to_bytes(8, "little"))
        file.write(data)
        for vectors in _chunks(found, progress):
            _write_raw(file, vectors)


def _parquet(source: str | Path, field: str | None, layer: Layers, progress: bool) -> Callable[[Path], None]:
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise UserError("parquet needs pyarrow: pip install 'halp-extractor[parquet]'") from None
    if field is None:
        answers = _table(pa, load_frame(source, progress=progress))
        return lambda path: parquet.write_table(answers, path)
    found = _locate(source, field, layer, progress)
    table = _table(pa, found.frame)
    layers = _numbers(found).get("layers")
    names = ["vector"] if layers is None else [f"vector_layer_{k}" for k in layers]
    one = pa.list_(pa.float32(), found.stack.shape[-1])
    kind = one if lengths_of(found.stack, ()) is None else pa.list_(one)
    schema = pa.schema([*table.schema, *(pa.field(name, kind) for name in names)], {"field": found.field})

    def write(path: Path) -> None:
        start = 0
        with parquet.ParquetWriter(path, schema) as writer:
            for number, vectors in _some(found, progress):
                rows = table.slice(start, number)
                for place, name in enumerate(names):
                    values = pa.array(vectors.reshape(len(vectors), len(names), -1)[:, place].reshape(-1))
                    column = pa.FixedSizeListArray.from_arrays(values, type=one)
                    if (lengths := lengths_of(found.stack, found.rows[start : start + number])) is not None:
                        ends = np.cumsum([0, *lengths], dtype=np.int32)
                        column = pa.ListArray.from_arrays(pa.array(ends), column)
                    rows = rows.append_column(name, column)
                writer.write_table(rows.replace_schema_metadata(schema.metadata), row_group_size=number)
                start += number

    return write


def _table(pa: Any, frame: pd.DataFrame) -> Any:
    try:
        return pa.Table.from_pandas(frame.apply(_even), preserve_index=False)
    except pa.ArrowException as error:  # of a stranger's part: numbers and texts in one column
        raise UserError(f"these questions are no table that Parquet can hold: {error}") from error


def _even(values: pd.Series[Any]) -> pd.Series[Any]:
    """Return a column of lists, of which some hold lists, as lists of lists: what one image has once, several have each."""
    if values.dtype != object or not any(isinstance(v, list) and v and isinstance(v[0], list) for v in values):
        return values
    return values.map(lambda v: [v] if isinstance(v, list) and not (v and isinstance(v[0], list)) else v)


def _locate(source: str | Path, field: str, layer: Layers, progress: bool) -> Located:
    opened = Source(source)
    opened.warn_if_unfinished()
    return locate(opened, field, layer, progress=progress)


def _name(field: str, layer: Layers) -> str:
    """Return what a file of these vectors is called."""
    if isinstance(layer, Iterable):
        return "_".join([field, "layers", *map(str, layer)])
    return at_layer(field, layer).replace("/", "_")


def _chunks(found: Located, progress: bool) -> Iterator[Vectors]:
    """Yield all vectors in order, as many at once as memory is meant for."""
    return (vectors for _, vectors in _some(found, progress))


def _some(found: Located, progress: bool) -> Iterator[tuple[int, Vectors]]:
    """Yield the vectors of some questions, or of all their answers' tokens behind one another, and how many questions."""
    lengths = lengths_of(found.stack, found.rows)
    number = max(1, _AT_ONCE // (4 * max(lengths or [1]) * max(1, math.prod(found.stack.shape))))
    starts = range(0, len(found.rows), number)
    for start in track(starts, "exporting", console=Console(stderr=True), disable=not progress, transient=True):
        rows = found.rows[start : start + number]
        vectors: Any = found.stack.read(rows)
        yield len(rows), vectors if lengths is None else np.concatenate(vectors)


def _shape(found: Located) -> tuple[int, ...]:
    lengths = lengths_of(found.stack, found.rows)
    return len(found.rows) if lengths is None else sum(lengths), *found.stack.shape


def _numbers(found: Located) -> dict[str, npt.NDArray[np.int64]]:
    """Return what says how the vectors are to be read: the layers of the second axis, the tokens of each question."""
    numbers = {"layers": np.array(found.stack.layers, np.int64)} if isinstance(found.stack, Layered) else {}
    if (lengths := lengths_of(found.stack, found.rows)) is not None:
        numbers["num_answer_tokens"] = np.array(lengths, np.int64)
    return numbers


def _texts(found: Located) -> dict[str, list[str]]:
    """Return the texts of each question, an empty one where a file has none."""
    names = [name for name in _TEXTS if name in found.frame]
    return {name: [text if isinstance(text, str) else "" for text in found.frame[name]] for name in names}


def _write_raw(file: IO[bytes], values: npt.NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(values).view(np.uint8).data)
