"""The benchmarks still run, at a small size, and print the tables that they are for."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.processes import environment

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def tables_of(*call: str) -> list[list[dict[str, str]]]:
    """Run a benchmark; return its Markdown tables, each row by the header's names."""
    result = subprocess.run(
        [sys.executable, str(BENCHMARKS / call[0]), *call[1:]],
        capture_output=True, text=True, timeout=240, env=environment(), check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    tables: list[list[list[str]]] = [[]]
    for line in result.stdout.splitlines():
        if line.startswith("| "):
            tables[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif tables[-1]:
            tables.append([])
    return [[dict(zip(t[0], row, strict=True)) for row in t[2:]] for t in tables if t]


def test_gpu() -> None:
    # Peaks of an imaginary device far above any CPU, so that the roofline's columns are there.
    peaks = ("--peak-tflops", "1000", "--peak-gbps", "1000000")
    ways, stages, invariance, small, busy, sizes = tables_of("gpu.py", "--config", "tiny", "--quick", *peaks)
    answers = ("3", "0", "mix")
    assert [(row["way"], row["answer tokens"]) for row in ways] == [
        ("reference: three forwards", "3"), ("one pass", "3"), ("one pass", "0"), ("one pass", "mix"),
        ("one pass, cuDNN off, a shape each", "4"), ("one pass, cuDNN on, a shape each", "4"),
        *[(f"engine, {n} an image", tokens) for tokens in answers for n in (1, 6)],
        ("engine, 1 an image, no graph", "3"),
        *[(f"padded, {n} an image", tokens) for tokens in ("3", "0") for n in (1, 6)],
        ("padded, 1 an image, cuDNN off", "4"), ("padded, 1 an image, cuDNN on", "4"),
    ]  # fmt: skip
    for row in ways:
        assert 0.1 < float(row["samples/s"]) < 10_000
        assert 1e-6 < float(row["TFLOP/sample"]) < 1e-3
        assert 0 <= float(row["of the roofline"].rstrip("%")) <= 100
    work = {(row["way"], row["answer tokens"]): float(row["TFLOP/sample"]) for row in ways}
    for tokens in ("3", "0"):
        assert work["engine, 6 an image", tokens] < 0.6 * work["engine, 1 an image", tokens]  # prefixes are shared
    assert [(row["engine"], row["answer tokens"]) for row in stages] == [
        (row["way"], row["answer tokens"]) for row in ways[6:12]
    ]
    for row in stages:
        vision, prefix, suffix, decode = (float(row[f"{s}, s"].split()[0]) for s in ("vision", "prefix", "suffix", "decode"))
        assert vision + prefix + suffix > 0  # in hundredths of a second: one alone may round to none
        assert (decode > 0) == (row["answer tokens"] != "0")
    assert [row["same answers"] for row in invariance] == ["4 of 4"] * 3
    assert all(float(row["largest drift"]) < 0.1 for row in invariance)
    ours, plain = (float(row["mean error"]) for row in small)
    assert 0.001 < ours < 1.5 * plain < 0.1
    assert [(row["engine"], row["answer tokens"]) for row in busy] == [
        (f"{n} an image", tokens) for n in (1, 6) for tokens in ("3", "0")
    ]
    work = [float(row["TFLOP/sample"]) for row in sizes]
    assert len(work) == 3
    assert work == sorted(work)


def test_gpu_ends_in_time() -> None:
    """What would begin too late is left out, and said to be."""
    ways, *_ = tables_of("gpu.py", "--config", "tiny", "--quick", "--sections", "engine", "invariance", "--minutes", "0")
    assert {row["samples/s"] for row in ways} == {"not measured: out of time"}


def names_in(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[^A-Za-z0-9_-]", one)[0].lower().replace("-", "_") for one in requirements if "extra ==" not in one}


def with_what_they_need(packages: set[str]) -> set[str]:
    found: set[str] = set()
    while packages:
        found |= packages
        packages = set().union(*(names_in(requirements_of(name)) for name in packages)) - found
    return found


def requirements_of(package: str) -> list[str]:
    try:
        return importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:  # of another platform
        return []


def test_gpu_needs_torch_and_transformers_alone() -> None:
    """As on a machine for measuring, which has no other package of ours."""
    dependencies = tomllib.loads((BENCHMARKS.parent / "pyproject.toml").read_text())["project"]["dependencies"]
    absent = names_in(dependencies) - with_what_they_need({"torch", "transformers", "torchvision", "pillow"})
    assert {"celery", "h5py", "ml_dtypes"} <= absent
    absent |= {"accelerate", "pydantic", "typer"}  # of which transformers needs the last two for its own command alone
    code = (
        "import importlib.abc, importlib.util, runpy, sys\n"
        f"absent = {sorted(absent)}\n"
        "class Absent(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] in absent: raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, package=None: None if name.split('.')[0] in absent else found(name, package)\n"
        f"sys.path[:0] = [{str(BENCHMARKS)!r}, {str(BENCHMARKS.parent)!r}]\n"
        "sys.argv = ['gpu.py', '--config', 'tiny', '--quick', '--sections', 'engine', 'small']\n"
        "runpy.run_path(sys.path[0] + '/gpu.py', run_name='__main__')\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False, cwd="/")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "| engine, one batch |" in result.stdout


def test_tables() -> None:
    [rows] = tables_of("tables.py", "--rows", "300", "--kilobytes", "20")
    assert [row["questions"] for row in rows] == ["300", "300"]
    assert all(50 < float(row["peak, MB"]) < 300 for row in rows)


def test_engine() -> None:
    [rows] = tables_of("engine.py", "--quick", "--repeats", "1")
    assert [row["questions"] for row in rows] == [
        f"{images}, {answers}"
        for images in ("2 images x 6", "4 images x 1")
        for answers in ("4 answer tokens", "embeddings only")
    ]
    for row in rows:
        assert float(row["engine, samples/s"]) > 1
        assert 0.1 < float(row["against the reference"].rstrip("x")) < 1000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's figures in /proc")
def test_memory() -> None:
    batches, runs = tables_of("memory.py", "--quick")
    assert [row["batch"] for row in batches] == ["1", "4"]
    for row in batches:
        assert 50 < float(row["loaded, MB"]) <= float(row["peak, MB"]) < 5000
    assert [row["questions"] for row in runs] == ["20", "200"]
    for row in runs:
        assert float(row["run, s"]) > 0.5
        for role in ("producer", "collector", "worker", "engine", "queue"):
            assert 1 < float(row[f"{role}, MB"]) < 5000


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's figures in /proc")
def test_queueing() -> None:
    planned, fed, overhead, scaling, small = tables_of("queueing.py", "--quick")
    assert [row["planned questions"] for row in planned] == ["2,000"]
    assert [row["fed questions"] for row in fed] == ["2,000"]
    assert 5 < float(fed[0]["CPU us each"]) < 10_000
    peaks = [float(megabytes) for name, megabytes in fed[0].items() if name.startswith("peak, MB")]
    assert peaks == sorted(peaks)
    assert 10 < peaks[0] < 1000
    assert 0.05 < float(overhead[0]["queue and staging, CPU ms each"]) < 100
    assert [row["workers"] for row in scaling] == ["1", "2"]
    assert all(1 < float(row["each"]) <= 60 for row in scaling)
    assert [row["runs of 3 questions"] for row in small] == ["20"]
    assert 0.5 < float(small[0]["runs/s"]) < 1000
    assert float(small[0]["s to the last"]) <= float(small[0]["s to the last report"])


def test_object_store() -> None:
    [rows] = tables_of("object_store.py", "--samples", "20")
    table = {row["what"]: row for row in rows}
    asked = table["requests of a question: worker"]["object store"].split(", ")
    costs = {kind: float(number) for number, kind in (cost.split() for cost in asked)}
    assert 2 <= costs.pop("HEAD") <= 2.3  # that it is not cancelled, that its part is not published; listings ask once more
    assert costs.pop("PUT") == 1
    assert all(cost <= 0.3 for cost in costs.values())  # the run's and plan's, and listings
    assert "1.1 GET" in table["requests of a question: packing"]["object store"]  # 20 results, whose run it is, its model
    for place in ("object store", "directory"):
        assert 1 < float(table["packing"][place].split()[0]) < 100_000
    assert re.fullmatch(r"\d+ GET, 2 HEAD, 3 LIST", table["read one layer: requests"]["object store"])
    assert "read every vector: ranges" not in table  # it is fetched whole


def test_families() -> None:
    [rows] = tables_of("families.py", "--quick", "--repeats", "1", "llava", "mllama")
    assert [row["family"] for row in rows] == ["llava", "mllama"]
    for row in rows:
        assert row["answers"] == "12/12"
        assert max(float(row["image token"]), float(row["prompt token"])) < 1e-4
        assert float(row["ratio"].removesuffix("x")) > 0.2


def test_flower() -> None:
    [[row]] = tables_of("flower.py", "--quick")
    assert (row["tasks"], row["remembered"]) == ("1,000", "500")
    assert float(row["events/s"].replace(",", "")) > 10
    assert 30 < float(row["memory, MB"]) < 1000


def test_images() -> None:
    (table,) = tables_of("images.py", "--rounds", "1", "--sizes", "0.3", "--other", str(BENCHMARKS.parent))
    assert [row["format"] for row in table] == ["jpg", "progressive.jpg", "png", "webp", "tif", "gif"]
    for row in table:
        assert 1 < float(row["here, images/s"]) < 10_000
        assert 0.1 < float(row["other, best ms"]) < 1000


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    """Some of it is imported only when a section runs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in {"producer", "workers", "storage"}:
            module = importlib.import_module(str(node.module))
            assert [a.name for a in node.names if not hasattr(module, a.name)] == []
