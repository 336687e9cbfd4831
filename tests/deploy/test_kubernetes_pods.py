"""The manifests' containers with their own commands, variables, users, volumes and probes, to a finished run."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.clusters import finished, some_staged, table_of
from tests.support.manifests import PAGE, ROOT, Object, applied, shell_lines
from tests.support.pods import Node, node
from tests.support.processes import BIN, command, wait_for
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.slow

LINES = list(shell_lines(PAGE.read_text()))
FAST = {"HALP_SWEEP_INTERVAL": "0.5"}
# All pods have one address here, where a cluster's have one each: the metrics of the workers have a port of their own.
FAKE = {"HALP_ENGINE": "fake:0.05", "OMP_NUM_THREADS": "1", "HALP_METRICS_PORT": "9101"}
TASKS = """
import sys, urllib.request as u
print(u.urlopen(u.Request("http://127.0.0.1:5555/tasks", headers={"Authorization": sys.argv[1]})).status)
"""
EXEC = """#!{python}
import json, os, sys
words = sys.argv[1:]
assert words[:3] == ["-n", "halp", "exec"], words
[pod] = [word for word in words[3 : words.index("--")] if word.startswith("deploy/")]
enter = json.load(open("{directory}/" + pod.replace("/", "-")))
os.execvp(enter[0], [*enter, *words[words.index("--") + 1 :]])
"""


def secret_of_the_page(name: str) -> dict[str, str]:
    """Return what the page's command makes, by kubectl itself."""
    [line] = [line for line in LINES if f"create secret generic {name} " in line]
    path = f"{BIN}:{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", f"{line} --dry-run=client -o yaml"], env={**os.environ, "PATH": path}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    secret: Object = yaml.safe_load(result.stdout)
    assert (secret["metadata"]["namespace"], secret["metadata"]["name"]) == ("halp", name)
    return {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}


def outstanding(here: Node) -> float:
    """Return what KEDA reads, as it does: one number of a page, the first of that name."""
    asked = applied("overlays/keda")[0]["spec"]["triggers"][0]["metadata"]
    for family in text_string_to_metric_families(here.get(asked["url"])):
        for sample in family.samples:
            if sample.name == asked["valueLocation"]:
                return float(sample.value)
    raise AssertionError("KEDA would find nothing")


class Shell:
    """A person's shell, with a kubectl that reaches the pods."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "bin").mkdir(parents=True)
        program = directory / "bin" / "kubectl"
        program.write_text(EXEC.format(python=sys.executable, directory=directory))
        program.chmod(0o755)

    def reach(self, deployment: str, enter: list[str]) -> None:
        """Let `kubectl exec` find a pod."""
        (self.directory / f"deploy-{deployment}").write_text(json.dumps(enter))

    def run(self, line: str) -> str:
        """Run a line of the page."""
        path = f"{self.directory / 'bin'}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line], cwd=self.directory, env={**os.environ, "PATH": path},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
        return result.stdout


def lines_with(*words: str) -> list[str]:
    return [line for line in LINES if "kubectl -n halp exec" in line and any(word in line for word in words)]


def test_a_run_on_a_shared_volume(tmp_path: Path, images: Path) -> None:
    """The page's commands, each probe, what KEDA reads, the Job, SIGTERM, Flower's password; Redis goes at the end."""
    secrets = {"halp": secret_of_the_page("halp")}
    password, login = secrets["halp"]["redis-password"], secrets["halp"]["flower-auth"]
    objects = (*applied("base"), *applied("enqueue.yaml"))
    shell = Shell(tmp_path / "shell")
    table_of(shell.directory / "vqa.csv", 120)
    images.rename(shell.directory / "images")
    (tmp_path / "node").mkdir()
    with node(tmp_path / "node", objects, secrets) as here:
        broker = here.pod("redis").start()
        wait_for(lambda: broker.passes("readinessProbe") and broker.passes("livenessProbe"), 60, "Redis is ready")
        assert "AuthenticationError" in here.python("import redis; redis.Redis(port=6379).ping()").stderr
        collector = here.pod("collector", **FAST).start()
        flower = here.pod("flower").start()
        for pod in (collector, flower):
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                wait_for(lambda pod=pod, probe=probe: pod.passes(probe), 90, f"{pod.name}: {probe}\n{pod.log}")  # type: ignore[misc]
        assert outstanding(here) == 0
        shell.reach("collector", collector.enter)

        copied, enqueued, watched, fetched = lines_with("/data")
        shell.run(copied)
        shell.run(enqueued)
        wait_for(lambda: outstanding(here) == 120, 30, "KEDA sees the questions")
        output = here.volume("data") / "output"
        evicted = here.pod("worker", **{**FAKE, "HALP_ENGINE": "fake:0.5", "HALP_MAX_BATCH_SIZE": "4"}).start()
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            wait_for(lambda probe=probe: evicted.passes(probe), 90, f"the worker's {probe}")  # type: ignore[misc]
        wait_for(lambda: some_staged(output), 90, "first questions are done")
        assert evicted.stop() == 0, evicted.log
        assert not finished(output)
        worker = here.pod("worker", **FAKE).start()
        assert re.search(r"written +│ +120 ", shell.run(watched))
        wait_for(lambda: outstanding(here) == 0, 30, "KEDA sees that nothing is left")
        assert finished(output)
        assert command("storage", "verify", output).returncode == 0
        shell.run(fetched)
        assert [path.name for path in (shell.directory / "output").glob("*.h5")] == ["qwen25vl_7b_embeddings_part_001.h5"]

        job = here.pod("enqueue").start()  # the same run again
        assert job.wait(90) == 0, job.log
        (here.volume("data") / "vqa.csv").unlink()
        assert here.pod("enqueue").start().wait(90) == 2  # which podFailurePolicy tries no second time

        assert "HTTP Error 401" in here.python(TASKS, "").stderr
        assert here.python(TASKS, f"Basic {base64.b64encode(login.encode()).decode()}").stdout == "200\n"
        assert all(password not in pod.log for pod in (collector, worker, flower))

        broker.end()
        wait_for(lambda: not worker.passes("readinessProbe"), 90, "the worker is not ready without Redis")
        for pod in (worker, collector):
            assert pod.passes("livenessProbe")
        assert not broker.passes("livenessProbe")
        assert worker.stop() == 0, worker.log
        assert collector.stop() == 0, collector.log


def test_a_run_in_an_object_store(tmp_path: Path, images: Path, broker_url: str) -> None:
    """Nothing is shared but the store and Redis, which lie on this machine's own network here."""
    server = S3Server(tmp_path / "s3.log")
    server.start()
    try:
        secrets = {"halp": secret_of_the_page("halp"), "object-store": server.variables}
        shell = Shell(tmp_path / "shell")
        table_of(shell.directory / "vqa.csv", 40)
        for image in images.iterdir():
            server.write(f"s3://bucket/images/{image.name}", image.read_bytes())
        (tmp_path / "node").mkdir()
        others = {"HALP_BROKER_URL": broker_url, "HALP_METRICS_PORT": "0"}
        with node(tmp_path / "node", applied("overlays/object-store"), secrets, network=False) as here:
            collector = here.pod("collector", **{**FAST, **others}).start()
            worker = here.pod("worker", **{**FAKE, **others}).start()
            for pod in (collector, worker):
                wait_for(lambda pod=pod: pod.passes("readinessProbe"), 90, f"{pod.name} is ready")  # type: ignore[misc]
            shell.reach("collector", collector.enter)
            for line in lines_with("/tmp"):
                shell.run(line)
            wait_for(lambda: ".run/summary.json" in server.keys("s3://bucket/runs/first"), 120, "the run's end")
            assert worker.stop() == 0, worker.log
            assert collector.stop() == 0, collector.log
        assert "qwen25vl_7b_embeddings_part_001.h5" in server.keys("s3://bucket/runs/first")
        assert command("storage", "verify", "s3://bucket/runs/first", **server.variables).returncode == 0
        assert not list((tmp_path / "node" / "volumes").glob("*"))
    finally:
        server.stop()


def test_a_real_model_writes_to_its_volumes_alone(tmp_path: Path, images: Path) -> None:
    """torch and transformers find a root that is read-only: what they keep goes to /tmp, or they fail."""
    shell = Shell(tmp_path / "shell")
    table_of(shell.directory / "vqa.csv", 8)
    images.rename(shell.directory / "images")
    (tmp_path / "node").mkdir()
    secrets = {"halp": secret_of_the_page("halp")}
    real = {
        "HALP_MODEL": str(ROOT / "workers" / "data" / "Qwen2.5-VL-Demo"),
        "OMP_NUM_THREADS": "1",
        "HALP_METRICS_PORT": "9101",
    }
    with node(tmp_path / "node", applied("base"), secrets) as here:
        here.pod("redis").start()
        collector = here.pod("collector", **FAST).start()
        worker = here.pod("worker", **real).start()
        wait_for(lambda: collector.passes("readinessProbe"), 90, "the collector is ready")
        shell.reach("collector", collector.enter)
        copied, enqueued, *_ = lines_with("/data")
        shell.run(copied)
        shell.run(f"{enqueued} --model {real['HALP_MODEL']} --max-new-tokens 4")
        wait_for(lambda: finished(here.volume("data") / "output"), 200, f"the run's end\n{worker.log}")
        assert "8 written" in command("storage", "verify", here.volume("data") / "output").stdout
        assert "Read-only file system" not in worker.log
        for pod in (collector, worker):
            touched = subprocess.run([*pod.enter, "touch", "/usr/new", "/new"], capture_output=True, text=True, check=False)
            assert touched.stderr.count("Read-only file system") == 2


@pytest.fixture
def broker_url(broker: object) -> str:
    return f"redis://127.0.0.1:{broker.port}/0"  # type: ignore[attr-defined]


def test_every_line_of_the_page_that_reaches_a_pod_is_run_above() -> None:
    assert lines_with("") == lines_with("/data", "/tmp")
    assert len(lines_with("")) == 6
