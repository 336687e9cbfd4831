"""The documents say what the code does: every variable with its default, every option, every attribute of a part."""

from __future__ import annotations

import re
from pathlib import Path

import click
import h5py
import pytest
import typer.main

import producer.cli
import storage.cli
import workers.cli
from storage.hdf5.part import QUESTION_ATTRIBUTES
from storage.runs.pack import pack
from tests.support.builders import make_run, stage
from workers.settings import WorkerSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FORMAT = (ROOT / "docs" / "format.md").read_text()


@pytest.mark.parametrize("name", WorkerSettings.model_fields)
def test_every_variable_is_in_the_readme(name: str) -> None:
    [row] = [line for line in README.splitlines() if line.startswith(f"| `HALP_{name.upper()}` |")]
    default = WorkerSettings.model_fields[name].default
    if isinstance(default, (int, float)):
        assert f"| `{default:g}` |" in row
    elif isinstance(default, (str, Path)):
        assert f"| `{default}` |" in row


def options_of(app: typer.Typer, name: str) -> list[str]:
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    return [
        option
        for parameter in group.commands[name].params  # type: ignore[union-attr]
        for option in [*parameter.opts, *parameter.secondary_opts]
        if option.startswith("--")
    ]


PROGRAMS = {"producer": producer.cli.app, "workers": workers.cli.app, "storage": storage.cli.app}


@pytest.mark.parametrize(
    ("program", "name"),
    [(program, name) for program, app in PROGRAMS.items() for name in typer.main.get_command(app).commands],  # type: ignore[attr-defined]
)
def test_every_command_and_option_is_in_the_readme(program: str, name: str) -> None:
    assert re.search(rf"`{program}\s{name}\b|\b{program} {name}\b", README)
    missing = [option for option in options_of(PROGRAMS[program], name) if not re.search(rf"`{option}\b", README)]
    assert missing == []


def test_every_attribute_is_in_the_format_page(tmp_path: Path) -> None:
    run = make_run(tmp_path, 3)
    stage(run, 1)
    assert pack(run, 1)
    with h5py.File(run.part_path(1)) as part:
        roots = {name.partition(":")[0] for name in part.attrs}
    missing = [name for name in sorted(roots | QUESTION_ATTRIBUTES) if f"`{name}" not in FORMAT]
    assert missing == []


def test_links_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
