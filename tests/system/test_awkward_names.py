"""Names with delimiters of our own, of URLs and of markup in them; and those that cannot be written, refused before a run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import producer.cli
import workers.cli
from producer import planning
from producer.local import server
from producer.local.server import EmbeddedServer
from storage.errors import UserError
from storage.naming import part_name
from storage.stores.location import join_roots, split_roots
from tests.support.builders import make_settings
from tests.support.processes import BIN, environment, write_csv
from workers.process.children import on_gpu
from workers.settings import WorkerSettings


@given(st.lists(st.text(min_size=1)))
def test_a_list_of_places_holds_any_names(places):
    assert split_roots(join_roots(places)) == places


def test_a_list_that_a_person_writes_stays_as_it_was():
    assert split_roots("/data:s3://b/x:/more") == ["/data", "s3://b/x", "/more"]
    assert split_roots("[1]:/data") == ["[1]", "/data"]  # no JSON list of texts: two directories
    assert split_roots("[a]") == ["[a]"]
    assert split_roots("[1, 2]") == ["[1, 2]"]


def test_workers_are_handed_names_with_colons(tmp_path, monkeypatch):
    places = [tmp_path / "run 12:30:00", tmp_path / 'a[/b]"\\']
    for place in places:
        place.mkdir(parents=True)
    monkeypatch.setenv("HALP_DATA_ROOTS", "before")
    workers.cli._set_roots(list(map(str, places)))
    assert WorkerSettings().data_roots == tuple(map(str, places))


@pytest.fixture
def dataset(tmp_path: Path) -> list[object]:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "images" / "a.png")
    rows = [{"question_id": f"q{n}", "image_id": "a.png", "question": "What?", "answer": ""} for n in range(3)]
    return [write_csv(tmp_path / "vqa.csv", rows), "--images-dir", tmp_path / "images"]


@pytest.mark.slow
def test_a_run_among_awkward_names(tmp_path, dataset, small_model):
    """The directory, that of temporary files, and the model, which is named by a link with another name than its own."""
    temporary, output = tmp_path / ("50%20?x#y:" + "z" * 90), tmp_path / "a[/b] run 12:30:00 ?#%\n日本"
    temporary.mkdir()
    shutil.copytree(small_model, tmp_path / "model: 1")
    link = tmp_path / "Its-Name"
    link.symlink_to(tmp_path / "model: 1")
    arguments = [*dataset, "--output-dir", output, "--model", link]
    done = subprocess.run(
        [BIN / "producer", "run", *arguments], env=environment(HALP_ENGINE="fake", TMPDIR=str(temporary)),
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with h5py.File(output / part_name("its_name", 1, 3)) as part:
        assert set(part) == {"q0", "q1", "q2"}
    assert [path.name for path in temporary.iterdir()] == [f"halp-{os.getuid()}"]  # where processes note that they live


def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["producer", *map(str, arguments)])
    monkeypatch.setenv("HALP_BROKER_URL", "redis://127.0.0.1:1/0")
    with pytest.raises(SystemExit) as ended:
        producer.cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("command", ["enqueue", "run", "check"])
def test_a_model_whose_parts_have_no_name_is_refused(tmp_path, monkeypatch, capsys, dataset, command):
    output = tmp_path / "out"
    error = call(monkeypatch, capsys, command, *dataset, "--output-dir", output, "--model", f"Org/{'x' * 240}")
    assert error.startswith("error: --model 'Org/xxx") and "characters, of which 246 can be written" in error
    assert not output.exists()


def test_the_longest_name_can_be_written_and_moved_aside(tmp_path, monkeypatch, capsys, dataset):
    longest = "x" * (255 - 9 - len(part_name("", 1, 3)))
    for number, expected in ((0, "cannot reach the broker"), (1, "of which 246 can be written")):
        model = longest + "x" * number
        assert expected in call(
            monkeypatch, capsys, "enqueue", *dataset, "--output-dir", tmp_path / f"o{number}", "--model", model
        )
    (tmp_path / f"01234567-{part_name(longest, 1, 3)}").touch()


def test_what_a_file_system_takes_is_asked_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "pathconf", lambda place, name: 143)  # as where names are encrypted
    assert planning._longest_name(str(tmp_path / "not" / "there")) == 143
    settings = make_settings(model="x" * 120)
    with pytest.raises(UserError, match="134 can be written"):
        planning._refuse_unwritable(type("Options", (), {"model": "x", "output_dir": str(tmp_path)}), settings, 0)


def test_a_path_too_long_for_its_parts_is_refused(monkeypatch):
    monkeypatch.setattr(planning, "is_run", lambda _: False)
    settings, fits = make_settings(model="x"), 4095 - len("/.run/damaged/01234567-" + part_name("x", 1, 3))
    for length, location in ((fits, "/" + "d/" * 3000), (1024 - 4095 + fits, "s3://bucket/" + "d/" * 3000)):
        for number in (length, length + 2):
            place = location[: number - 1] + "d"
            options = type("Options", (), {"model": "x", "output_dir": place})
            if number == length:
                planning._refuse_unwritable(options, settings, 0)
            else:
                with pytest.raises(UserError, match="too long for the parts in it"):
                    planning._refuse_unwritable(options, settings, 0)


def test_an_output_directory_that_cannot_be_is_refused(tmp_path, monkeypatch, capsys, dataset):
    error = call(monkeypatch, capsys, "enqueue", *dataset, "--output-dir", tmp_path / ("x" * 256), "--model", "m")
    assert error.startswith("error: ") and "Traceback" not in error and error.count("\n") == 1


@pytest.mark.parametrize("option", ["the table", "--images-dir", "--model", "--prompt", "--image-root"])
def test_bytes_that_are_no_utf8_are_refused(tmp_path, monkeypatch, capsys, dataset, option):
    """Linux takes any bytes for a name; run.json, which is JSON, does not."""
    other = tmp_path / os.fsdecode(b"caf\xe9")
    arguments = [*dataset, "--output-dir", tmp_path / "out"]
    if option == "the table":
        arguments[0] = arguments[0].rename(other)
    elif option == "--images-dir":
        arguments[2] = arguments[2].rename(other)
    else:
        other.mkdir()
        arguments += [option, f"{{question}} {other}" if option == "--prompt" else other]
        (other / "config.json").write_text("{}")
    if option != "--model":
        arguments += ["--model", "m"]
    for command in ("enqueue", "check"):
        error = call(monkeypatch, capsys, command, *arguments)
        assert error.startswith(f"error: {option} ") and r"caf\udce9: the name has bytes that are not UTF-8" in error
    assert not (tmp_path / "out").exists()


def test_more_columns_than_can_be_kept_are_refused(tmp_path, monkeypatch, capsys, dataset):
    path = tmp_path / "wide.csv"
    arguments = [path, *dataset[1:], "--output-dir", tmp_path / "out", "--model", "m"]
    for number, expected in (
        (66_000, "66,000 further columns, of which 2,000"),
        (2_001, "2,001 further"),
        (2_000, "broker"),
    ):
        names = ["question_id", "image_id", "question", *(f"c{i}" for i in range(number))]
        path.write_text(",".join(names) + "\n" + ",".join(["q", "a.png", "What?", *["x"] * number]) + "\n")
        assert expected in call(monkeypatch, capsys, "enqueue", *arguments)


def test_a_run_that_was_begun_before_goes_on(tmp_path, monkeypatch, capsys, dataset):
    arguments = [*dataset, "--output-dir", tmp_path / "out", "--model", "x" * 230]
    with monkeypatch.context() as earlier:
        earlier.setattr(planning, "_ASIDE", 0)
        assert "cannot reach the broker" in call(monkeypatch, capsys, "enqueue", *arguments)
    assert "cannot reach the broker" in call(monkeypatch, capsys, "enqueue", *arguments)


@pytest.mark.parametrize("name", ["x" * 110, "50%", "a?b", "a#b", "a b", "a\nb", "日本", "a:b"])
def test_the_server_has_a_plain_and_short_address_whatever_tmpdir_is(tmp_path, monkeypatch, name):
    (tmp_path / name).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / name))
    monkeypatch.setattr(server, "_SHORT", ("/not/there", "/dev/shm"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with EmbeddedServer() as embedded:
        assert embedded.directory.parent == Path("/dev/shm")
        assert embedded.directory.stat().st_mode & 0o777 == 0o700
        path = embedded.url.removeprefix("redis+socket://").partition("?")[0]
        assert redis.Redis(unix_socket_path=path).ping()
    assert not embedded.directory.exists()


def test_the_server_stays_in_tmpdir_where_that_can_be(tmp_path, monkeypatch):
    short = Path(tempfile.mkdtemp(dir="/dev/shm"))
    monkeypatch.setattr(tempfile, "tempdir", str(short))
    assert server.private_directory().parent == short
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 110)))
    monkeypatch.setattr(server, "_SHORT", ())
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with pytest.raises(UserError, match="set TMPDIR"):
        server.private_directory()


@pytest.mark.parametrize("name", ["a/b", "50%h", "", "a b", "x" * 101, "a\x1b]0;"])
def test_a_worker_has_a_plain_name(name):
    with pytest.raises(UserError, match="letters, digits"):
        workers.cli._node(name)
    assert workers.cli._node("gpu-0.a_b").startswith("gpu-0.a_b@")


def test_a_share_of_a_gpu_gives_a_plain_name():
    assert on_gpu("worker", "0") == "worker-gpu0"
    assert workers.cli._node(on_gpu("worker", "MIG-GPU-5b0e:1/1/0")).startswith("worker-gpuMIG-GPU-5b0e-1-1-0@")
