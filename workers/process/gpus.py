"""The GPUs of this machine, as `nvidia-smi` shows them; where there is no `nvidia-smi` there are none."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from dataclasses import dataclass

from storage.errors import UserError

_TIMEOUT = 30
_WATCH_INTERVAL = 10.0


@dataclass(frozen=True, slots=True)
class GpuUse:
    """What one GPU is doing. Memory in bytes; utilisation from 0 to 1, None where the driver does not say."""

    index: str
    name: str
    memory_used: int
    memory_total: int
    utilisation: float | None


class GpuWatch:
    """Keeps what one GPU is doing, looked up in a thread of its own: the driver's program may take seconds, or hang."""

    def __init__(self) -> None:
        self.last: GpuUse | None = None
        threading.Thread(target=self._watch, name="gpu", daemon=True).start()

    def _watch(self) -> None:
        gpu = next(iter(visible_gpus()), None)
        while uses := gpu_use(gpu):
            self.last = uses[0]
            time.sleep(_WATCH_INTERVAL)
        self.last = None


def visible_gpus() -> list[str]:
    """Return the GPUs that processes of this environment may use, as CUDA names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return [index for (index,) in _ask("index")]


def chosen_gpus(choice: str) -> list[str]:
    """Return the GPUs of `all` or of a list such as `0,2`. Raises UserError where one is not there, or named twice."""
    there = visible_gpus()
    if choice == "all":
        if not there:
            raise UserError("--gpus all: there is no GPU here (`nvidia-smi` lists none); leave --gpus out for the CPU")
        return there
    chosen = [name.strip() for name in choice.split(",") if name.strip()]
    if not chosen or len(set(chosen)) < len(chosen):
        raise UserError(f"--gpus {choice}: give `all`, or different numbers separated by commas, as in 0,2")
    if missing := [name for name in chosen if name not in there]:
        raise UserError(f"--gpus {choice}: there is no GPU {', '.join(missing)} here; there is {', '.join(there) or 'none'}")
    return chosen


def gpu_use(gpu: str | None = None) -> list[GpuUse]:
    """Return what the machine's GPUs, or one of them, are doing; empty where that cannot be known."""
    uses = []
    for index, name, used, total, busy in _ask("index,name,memory.used,memory.total,utilization.gpu", gpu):
        if used.isdecimal() and total.isdecimal():  # a driver that does not know answers [N/A], [Unknown Error] and more
            utilisation = int(busy) / 100 if busy.isdecimal() else None  # [N/A] of a GPU in MIG mode
            uses.append(GpuUse(index, name, int(used) << 20, int(total) << 20, utilisation))
    return uses


def _ask(fields: str, gpu: str | None = None) -> list[list[str]]:
    """Return a row for each GPU. What is none is left out: drivers tell on stdout what is wrong, some with exit code 0.

    `No devices were found` is one such line (https://github.com/gpustack/gpustack/pull/783).
    """
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    if gpu is not None:
        command.append(f"--id={gpu}")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
    return [row for row in rows if len(row) == fields.count(",") + 1 and row[0].isdecimal()]
