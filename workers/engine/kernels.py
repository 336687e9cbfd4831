"""The plain attention kernel in chunks of queries: the noise floor's other kernel, in bounded memory.

torch's MATH kernel keeps the whole matrix of scores: 67 GB for a photograph of 24 megapixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

_SCORES = 1 << 24  # of a chunk, in all rows and heads: 64 MB in float32, and about three copies of it


_active: list[TorchFunctionMode] = []


def is_plain() -> bool:
    """Tell whether the plain kernel is asked for, so that no other is to be called by its name."""
    return bool(_active)


class PlainAttention(TorchFunctionMode):
    """While this context lasts, every scaled_dot_product_attention runs in the MATH kernel, some queries at a time."""

    def __enter__(self) -> Self:
        """Begin."""
        _active.append(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        """End."""
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _active.pop()

    def __torch_function__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Take attention over; let everything else pass."""
        kwargs = kwargs or {}
        return _in_chunks(*args, **kwargs) if func is scaled_dot_product_attention else func(*args, **kwargs)


def _in_chunks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **more: Any,
) -> Tensor:
    queries, keys = query.shape[-2], key.shape[-2]
    size = max(1, _SCORES // max(1, query[..., 0, 0].numel() * keys))
    if is_causal and attn_mask is None:
        attn_mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril()
    chunks = []
    with sdpa_kernel(SDPBackend.MATH):
        for start in range(0, queries, size):
            rows = slice(start, start + size)
            # A mask may be broadcast over the queries.
            mask = attn_mask if attn_mask is None or attn_mask.shape[-2] == 1 else attn_mask[..., rows, :]
            chunks.append(
                scaled_dot_product_attention(query[..., rows, :], key, value, mask, dropout_p, is_causal=False, **more)
            )
    return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-2)
