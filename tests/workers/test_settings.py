"""The worker's configuration: what follows the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers import settings as module
from workers.settings import WorkerSettings


@pytest.mark.parametrize(
    ("visible", "device", "size"),
    [(None, True, 128), ("0", True, 128), (None, False, 32), ("", True, 32), ("-1", True, 32)],
)
def test_batches_are_larger_on_a_gpu(
    visible: str | None, device: bool, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(module, "_GPU_DEVICES", (tmp_path / "nvidiactl",))
    if device:
        (tmp_path / "nvidiactl").touch()
    assert WorkerSettings().batch_size == size
    assert WorkerSettings(max_batch_size=5).batch_size == 5
