from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from workers.engine import process as engine_process
from workers.engine.memory_errors import is_out_of_memory


class AcceleratorError(RuntimeError):
    """Named as torch's."""


REAL = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "67108864000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9"),
    RuntimeError("std::bad_alloc"),
    MemoryError("std::bad_alloc"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("unable to mmap 4976698592 bytes from file <model-00001-of-00005.safetensors>: Cannot allocate memory (12)"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.68 GiB"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]  # fmt: skip
OTHERS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: unspecified launch failure"),
    ImportError("libgomp.so.1: cannot allocate memory in static TLS block"),
    OSError(errno.ENOSPC, "No space left on device"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    ValueError("memory"),
]


@pytest.mark.parametrize("error", REAL, ids=lambda error: str(error)[:40] or type(error).__name__)
def test_memory_ran_out(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not engine_process._is_sticky(error)  # the process lives on, and the batch is halved
    assert engine_process._error(error).out_of_memory


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: str(error)[:40])
def test_something_else(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_what_it_was_raised_from_counts() -> None:
    error = ValueError("the batch failed")
    error.__cause__ = RuntimeError("std::bad_alloc")
    assert is_out_of_memory(error)


def test_the_messages_of_these_versions() -> None:
    """Of torch and numpy as they are installed: asked for more than there can be."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 55, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    with pytest.raises(MemoryError) as numpys:
        np.empty(1 << 55, np.uint8)
    assert is_out_of_memory(numpys.value)
