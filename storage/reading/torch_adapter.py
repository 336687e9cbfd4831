"""A map-style dataset for PyTorch: vectors read when they are asked for. The only module here that knows torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from storage.reading.load import locate, of_token, selected
from storage.reading.source import Paths, Source
from storage.reading.stack import AnyStack, Layers

if TYPE_CHECKING:
    from torch.utils.data import Dataset


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where each row lies and what is known of it. No open file: it may be forked and pickled."""

    stack: AnyStack
    items: list[dict[str, Any]]  # question_id and the chosen columns

    def read(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Return some rows, each part's by one read."""
        import torch

        wanted = [range(len(self.items))[number] for number in numbers]  # from the end if negative; IndexError
        vectors = map(torch.from_numpy, self.stack.read(wanted))
        return [self.items[number] | {"vector": vector} for number, vector in zip(wanted, vectors, strict=True)]


def torch_dataset(
    source: Paths, field: str, layer: Layers = None, *, token: str | None = None,
    columns: Sequence[str] = ("answer", "ground_truth_answer"),
) -> Dataset[dict[str, Any]]:  # fmt: skip
    """Return a torch dataset of one field, in file order. `source`, `field`, `layer` and `token` are those of `storage.load`.

    An item is a dict: `vector` (float32 [D]; [L, D] of several layers; with token `all` [T, D], which a DataLoader wants a
    `collate_fn` for, such as `list`), `question_id`, and `columns` of the frame. Vectors stay on the disk until asked for;
    several DataLoader workers may read at once, forked or spawned (an object store needs spawned ones).
    """
    opened = Source(source)
    opened.warn_if_unfinished()
    found = locate(opened, of_token(field, token), layer, order="file")
    names = list(dict.fromkeys(["question_id", *columns])) if found.ids else []
    frame = selected(found.frame, names)
    items = [dict(zip(frame.columns, row, strict=True)) for row in frame.itertuples(index=False)]
    return _dataset(_Rows(found.stack, items))


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
