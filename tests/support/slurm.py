"""A real Slurm on this machine: its controller, two nodes with a daemon each, and munge, all in one directory."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.processes import wait_for

PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch")
NODES = ("n1", "n2")
GPUS = 4  # of a node, by name alone; as many tasks
KILL_WAIT, GRACE = 15, 5  # seconds

# Two daemons on one machine: Debian builds with --enable-multiple-slurmd. No control groups, no accounting. A credential that
# expires soon: Slurm waits as long before it starts a task that was queued again.
CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool-%n
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait={kill_wait}
GresTypes=gpu
NodeName=DEFAULT CPUs=16 RealMemory=200000 Gres=gpu:{gpus} State=UNKNOWN
NodeName={nodes[0]} NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]}
NodeName={nodes[1]} NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]}
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace} State=UP
PartitionName=high Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
"""


@contextmanager
def cluster() -> Iterator[Slurm]:
    """Yield a cluster that runs; skip the test where its programs are missing, but not in CI."""
    if absent := [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]:
        assert not os.environ.get("CI"), f"no {', '.join(absent)}: make tools"
        pytest.skip(f"no {', '.join(absent)}: make tools")
    directory = Path(tempfile.mkdtemp(prefix="slurm-"))  # of a short name: munge's socket is in it
    directory.chmod(0o711)
    found = Slurm(directory)
    try:
        found.start()
        yield found
    finally:
        found.stop()
        shutil.rmtree(directory, ignore_errors=True)


class Slurm:
    """A cluster; every process of it, and of its jobs, has its configuration's path in its environment."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.configuration = directory / "slurm.conf"
        self.variables = {"SLURM_CONF": str(self.configuration), "PATH": _path()}
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start it, and wait until its nodes are there."""
        (self.directory / "state").mkdir()
        munge = self.directory / "munge"
        munge.mkdir(mode=0o711)
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(secrets.token_bytes(1024))
        self.configuration.write_text(
            CONFIGURATION.format(
                directory=self.directory, host=socket.gethostname().partition(".")[0], ports=_free_ports(3),
                user=pwd.getpwuid(os.getuid()).pw_name, nodes=NODES, gpus=GPUS, kill_wait=KILL_WAIT, grace=GRACE,
            )
        )  # fmt: skip
        for number in range(GPUS):
            (self.directory / f"gpu{number}").touch()
        devices = f"{self.directory}/gpu[0-{GPUS - 1}]"
        (self.directory / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={devices}\n")
        files = {name: f"--{name}-file={munge / name}" for name in ("key", "pid", "log", "seed")}
        self._start("munged", "--foreground", "--force", f"--socket={munge / 'socket'}", *files.values())
        wait_for((munge / "socket").exists, 60, "munge listens")
        self._start("slurmctld", "-D", "-c")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        wait_for(lambda: self.ask("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * 4, 60, "both nodes are idle")

    def ask(self, *command: object) -> str:
        """Return what one of Slurm's commands prints; empty where it fails, as it does while the controller starts."""
        result = subprocess.run(
            list(map(str, command)), env=os.environ | self.variables, capture_output=True, text=True, timeout=60, check=False
        )
        return result.stdout

    def submit(self, *arguments: object, cwd: Path, **variables: str) -> str:
        """Submit a job with an environment; return its number."""
        result = subprocess.run(
            ["sbatch", "--parsable", *map(str, arguments)], cwd=cwd, env=_clean(os.environ) | self.variables | variables,
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def states(self, job: str) -> dict[str, str]:
        """Return the state of each task of a job that has not ended."""
        lines = self.ask("squeue", "-h", "-r", "-j", job, "-o", "%i %T").splitlines()
        return dict(line.split(" ", 1) for line in lines)

    def detail(self, task: str, name: str) -> str:
        """Return what `scontrol show job` has of a task."""
        words = self.ask("scontrol", "show", "job", task).split()
        return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")

    def processes_of_jobs(self) -> list[str]:
        """Return the living processes that this cluster's jobs have begun."""
        return [line for line, variables in self._with_configuration() if "SLURM_JOB_ID" in variables]

    def stop(self) -> None:
        """End everything, jobs too."""
        self.ask("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name)
        deadline = time.monotonic() + 2 * KILL_WAIT + 10
        while self.processes_of_jobs() and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in reversed(self._processes):
            process.terminate()
        for process in reversed(self._processes):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start(self, *command: object) -> None:
        with (self.directory / f"{command[0]}.out").open("ab") as log:
            self._processes.append(
                subprocess.Popen(
                    list(map(str, command)), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    env=_clean(os.environ) | self.variables, start_new_session=True, cwd=self.directory,
                )
            )  # fmt: skip

    def _with_configuration(self) -> list[tuple[str, Mapping[str, str]]]:
        found = []
        for process in psutil.process_iter():
            try:
                variables = process.environ()
                if variables.get("SLURM_CONF") == str(self.configuration) and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((" ".join(process.cmdline()), variables))
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        return found


def _clean(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in variables.items() if not name.startswith(("HALP_", "SLURM_", "SBATCH_"))}


def _path() -> str:
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"


def _free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
