"""The Kubernetes manifests as they are applied: rendered by kubectl's own kustomize, which a package carries."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from tests.support.processes import BIN

ROOT = Path(__file__).parents[2]
FILES = ROOT / "deploy" / "kubernetes"
PAGE = ROOT / "docs" / "kubernetes.md"
Object = dict[str, Any]


def kubectl(*arguments: object) -> str:
    """Return what kubectl prints, without a warning; it asks no cluster."""
    result = subprocess.run([BIN / "kubectl", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


def render(directory: Path) -> list[Object]:
    """Return the objects of a kustomization."""
    return list(yaml.safe_load_all(kubectl("kustomize", directory)))


@lru_cache
def applied(name: str) -> tuple[Object, ...]:
    """Return the objects of one of our kustomizations, or of a file of ours."""
    path = FILES / name
    return tuple(render(path)) if path.is_dir() else tuple(yaml.safe_load_all(path.read_text()))


def of_kind(objects: tuple[Object, ...], *kinds: str) -> dict[str, Object]:
    """Return the objects of some kinds by their names."""
    return {named(item): item for item in objects if item["kind"] in kinds}


def named(item: Object) -> str:
    """Return an object's name, or what its name begins with."""
    metadata = item["metadata"]
    return str(metadata["name"] if "name" in metadata else metadata["generateName"].rstrip("-"))


def pods(objects: tuple[Object, ...]) -> dict[str, Object]:
    """Return what each workload makes its pods of: labels and spec, by the workload's name."""
    return {name: item["spec"]["template"] for name, item in of_kind(objects, "Deployment", "StatefulSet", "Job").items()}


def container_of(pod: Object) -> Object:
    """Return a pod's only container."""
    [container] = pod["spec"]["containers"]
    return dict(container)


def image_environment() -> dict[str, str]:
    """Return what the Dockerfile's image sets, but for its path."""
    last = (ROOT / "Dockerfile").read_text().rsplit("\nFROM ", 1)[1]
    [block] = re.findall(r"^ENV ((?:.*\\\n)*.*)$", last, re.M)
    values = dict(word.split("=", 1) for word in block.replace("\\\n", " ").split())
    del values["PATH"]
    return values


def expand(text: str, values: dict[str, str]) -> str:
    """Return a text with `$(NAME)` replaced, as the kubelet does."""
    return re.sub(r"\$\(([A-Z_]+)\)", lambda match: values.get(match[1], match[0]), text)


def environment_of(pod: Object, objects: tuple[Object, ...], secrets: dict[str, dict[str, str]]) -> dict[str, str]:
    """Return the variables of a pod's container beyond its image's. Raises KeyError where it names what is not there."""
    container = container_of(pod)
    values: dict[str, str] = {}
    settings = of_kind(objects, "ConfigMap")
    for source in container.get("envFrom", []):
        if "configMapRef" in source:
            values |= settings[source["configMapRef"]["name"]]["data"]
        else:
            values |= secrets[source["secretRef"]["name"]]
    for entry in container.get("env", []):
        if "value" in entry:
            values[entry["name"]] = expand(entry["value"], values)
        else:
            key = entry["valueFrom"]["secretKeyRef"]
            if key["key"] in secrets[key["name"]] or not key.get("optional"):
                values[entry["name"]] = secrets[key["name"]][key["key"]]
    return values


def shell_lines(text: str) -> Iterator[str]:
    """Yield the commands in a page's fences, a continued line as one, without their comments."""
    for fence in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in fence.replace("\\\n", " ").splitlines():
            if command := re.sub(r"\s+#.*$|^#.*$", "", line).strip():
                yield re.sub(r"\s+", " ", command)
