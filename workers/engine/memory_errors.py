"""Which exceptions say that memory ran out, the device's or the machine's. Knows no torch: by names and messages.

Beside each message: who raises it. They are matched as they are written, since "cannot allocate memory in static TLS block",
for one, is a library that cannot be loaded.
"""

from __future__ import annotations

import errno

_CLASSES = {"OutOfMemoryError", "_ArrayMemoryError"}  # torch's of CUDA and ROCm, numpy's
_MESSAGES = (
    "DefaultCPUAllocator: can't allocate memory",  # RuntimeError, c10/core/impl/alloc_cpu.cpp on Linux
    "DefaultCPUAllocator: not enough memory",  # the same elsewhere
    "[enforce fail at alloc_cpu.cpp",  # the line before either, where the message is cut
    "std::bad_alloc",  # RuntimeError from a kernel's thread; pybind11 makes MemoryError of it elsewhere
    "Cannot allocate memory",  # strerror(ENOMEM): mmap of weights, fork, shared memory
    "CUDA out of memory",  # torch's caching allocator, also where only the text comes through
    "HIP out of memory",
    "CUDA error: out of memory",  # AcceleratorError, cudaErrorMemoryAllocation: the context lives on
    "HIP error: out of memory",
    "CUDA driver error: out of memory",  # RuntimeError, expandable segments
    "CUBLAS_STATUS_ALLOC_FAILED",  # RuntimeError "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an exception, or what it was raised from, says that memory ran out."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError) or type(seen).__name__ in _CLASSES or any(m in str(seen) for m in _MESSAGES):
            return True
        if isinstance(seen, OSError) and seen.errno == errno.ENOMEM:
            return True
        seen = seen.__cause__
    return False
