"""The worker's configuration: what follows the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers import settings as module
from workers.broker_url import read_broker_url
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


def test_a_runtime_directory_of_another_machine_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch job has the variable of the login node, and may not make the directory."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert WorkerSettings().runtime_dir == tmp_path / "halp"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "1000"))
    assert WorkerSettings().runtime_dir.name.startswith("halp-")
    assert WorkerSettings().runtime_dir.parent != tmp_path


@pytest.mark.parametrize("text", ["rediss://host/0", "redis+socket:///a", "host", ""])
def test_a_file_names_a_server_by_a_plain_url_alone(text: str, tmp_path: Path) -> None:
    file = tmp_path / "broker"
    assert "see-halp-broker-url-file" in WorkerSettings(broker_url_file=file).broker
    file.write_text("redis://:secret@host:7000/0\n")
    assert WorkerSettings(broker_url_file=file).broker == "redis://:secret@host:7000/0"
    assert WorkerSettings(broker_url="redis://other/0").broker == "redis://other/0"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"redis://|URL"):
        read_broker_url(file)
