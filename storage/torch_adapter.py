"""A map-style dataset for PyTorch: vectors read when they are asked for. The only module here that knows torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from storage.columns import Column
from storage.errors import UserError
from storage.reading import field_name, part_frame
from storage.source import Paths, Source

if TYPE_CHECKING:
    from torch.utils.data import Dataset


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where each row lies and what is known of it. No open file: it may be forked and pickled."""

    parts: list[Column]
    starts: list[int]  # of each part among all rows, and their number
    items: list[dict[str, Any]]  # question_id and the chosen columns

    def read(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return some rows, each part's by one read."""
        import torch

        wanted = [range(len(self.items))[number] for number in numbers]  # from the end if negative; IndexError
        found: dict[int, Any] = {}
        of_part: dict[int, list[int]] = {}
        for number in sorted(set(wanted)):
            of_part.setdefault(bisect_right(self.starts, number) - 1, []).append(number)
        for part, some in of_part.items():
            vectors = self.parts[part].read_rows([number - self.starts[part] for number in some])
            found |= dict(zip(some, torch.from_numpy(vectors), strict=True))
        return [self.items[number] | {"vector": found[number]} for number in wanted]


def torch_dataset(
    source: Paths, field: str, layer: int | None = None, *, columns: Sequence[str] = ("answer", "ground_truth_answer")
) -> Dataset[dict[str, Any]]:
    """Return a torch dataset of one field, in file order. `source`, `field` and `layer` are those of `storage.load`.

    An item is a dict: `vector` (float32 [D]), `question_id`, and `columns` of the frame. Vectors stay on the disk until asked
    for; several DataLoader workers, forked or spawned, may read at once.
    """
    opened = Source(source)
    opened.warn_if_unfinished()
    parts: list[Column] = []
    items: list[dict[str, Any]] = []
    for part in opened.parts():
        parts.append(part.column(field_name(field, layer)))
        frame = part_frame(part)
        if absent := [name for name in columns if name not in frame]:
            raise UserError(f"there is no column {', '.join(absent)}; there are {', '.join(map(str, frame.columns))}")
        names = list(dict.fromkeys(["question_id", *columns]))
        items += [dict(zip(names, row, strict=True)) for row in frame[names].itertuples(index=False)]
    if len(widths := {column.width for column in parts}) > 1:
        raise UserError(f"{parts[0].field} has several widths in these files: {', '.join(map(str, sorted(widths)))}")
    return _dataset(_Rows(parts, [0, *accumulate(len(column.ids) for column in parts)], items))


def _dataset(rows: _Rows) -> Dataset[dict[str, Any]]:
    from torch.utils.data import Dataset

    class PartDataset(Dataset[dict[str, Any]]):
        """The rows as torch wants them. Made in a function, as its base is: pickled by that function."""

        def __len__(self) -> int:
            return len(rows.items)

        def __getitem__(self, number: int) -> dict[str, Any]:
            return rows.read([number])[0]

        def __getitems__(self, numbers: list[int]) -> list[dict[str, Any]]:  # what a DataLoader calls for a batch
            return rows.read(numbers)

        def __reduce__(self) -> tuple[Any, ...]:
            return _dataset, (rows,)

    return PartDataset()
