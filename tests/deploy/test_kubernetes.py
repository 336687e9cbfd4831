"""The Kubernetes manifests against Kubernetes' schemas, against each other, and against the code and the page."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from typer.testing import CliRunner

import producer.cli
import workers.cli
from tests.support.manifests import (
    FILES,
    PAGE,
    ROOT,
    Object,
    applied,
    container_of,
    environment_of,
    image_environment,
    named,
    of_kind,
    pods,
    render,
    shell_lines,
)
from workers.monitor import run_metrics
from workers.settings import WorkerSettings

PROGRAMS = {"producer": producer.cli.app, "workers": workers.cli.app}
CLUSTERS = ("base", "overlays/object-store")
EVERYTHING = (*CLUSTERS, "overlays/keda", "enqueue.yaml")
VERSIONS = ("1.29", "1.33", "1.37")
LINES = list(shell_lines(PAGE.read_text()))
SECRETS = {
    "halp": {"redis-password": "hush", "flower-auth": "me:secret"},
    "object-store": {"AWS_REGION": "eu-central-1", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"},
}
PODS = [(name, workload) for name in EVERYTHING for workload in pods(applied(name))]
OURS = [(name, workload) for name, workload in PODS if workload != "redis"]


def pod_of(name: str, workload: str) -> Object:
    return dict(pods(applied(name))[workload])


def known(command: list[str]) -> bool:
    """Whether our command line knows the subcommand and each option of it."""
    program, *arguments = command
    return CliRunner().invoke(PROGRAMS[program], [*arguments, "--help"]).exit_code == 0


def faults(item: Object, version: str) -> list[str]:
    """Return what is wrong with an object by its schema; a field that the schema does not know is wrong too."""
    if item["apiVersion"].startswith("keda.sh/"):
        try:
            seen = ScaledObject.model_validate(item).model_dump(by_alias=True, exclude_unset=True, mode="json")
        except ValueError as error:
            return [str(error)]
        return [] if seen == item else [f"{item} is seen as {seen}"]
    try:
        kubernetes_validate.validate(item, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return [f"{named(item)}: {error.message}"]
    return []


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", EVERYTHING)
def test_what_is_applied_is_valid(name: str, version: str) -> None:
    assert [fault for item in applied(name) for fault in faults(item, version)] == []


@pytest.mark.parametrize(
    ("file", "right", "wrong"),
    [
        ("base/worker.yaml", "terminationGracePeriodSeconds: 300", "terminationGracePeriod: 300"),
        ("base/worker.yaml", "nvidia.com/gpu: 1", "nvidia.com/gpu: [1]"),
        ("base/collector.yaml", "containerPort: 9100", "containerPort: metrics"),
        ("base/redis.yaml", "serviceName: redis", "service: redis"),
        ("base/volumes.yaml", "accessModes: [ReadWriteMany]", "accessModes: ReadWriteMany"),
        ("overlays/keda/worker.yaml", "maxReplicaCount: 8", "maxReplicas: 8"),
        ("overlays/keda/worker.yaml", "cooldownPeriod: 300", "cooldownPeriod: 5m"),
        ("overlays/keda/worker.yaml", "type: metrics-api", "kind: metrics-api"),
    ],
)
def test_a_fault_is_seen(tmp_path: Path, file: str, right: str, wrong: str) -> None:
    shutil.copytree(FILES, tmp_path / "kubernetes")
    faulty = tmp_path / "kubernetes" / file
    text = faulty.read_text()
    assert right in text
    faulty.write_text(text.replace(right, wrong))
    assert [fault for item in render(faulty.parent) for fault in faults(item, VERSIONS[-1])]


def test_the_workloads() -> None:
    for name in CLUSTERS:
        assert set(pods(applied(name))) == {"redis", "collector", "worker", "flower"}
        assert all(item["metadata"].get("namespace", "halp") == "halp" for item in applied(name))
    assert named(applied("enqueue.yaml")[0]) == "enqueue"
    assert applied("enqueue.yaml")[0]["metadata"]["namespace"] == "halp"


def test_images_are_those_of_the_compose_file() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, workload in PODS:
        service = services["redis" if workload == "redis" else "worker"]
        assert container_of(pod_of(name, workload))["image"] == service["image"]


@pytest.mark.parametrize("name", CLUSTERS)
def test_selectors_select(name: str) -> None:
    """A workload its own pods and no others, a Service and a policy the pods of one, by a port that these have."""
    labels = {workload: pod["metadata"]["labels"] for workload, pod in pods(applied(name)).items()}

    def selected(selector: dict[str, str]) -> list[str]:
        return [workload for workload, there in labels.items() if selector.items() <= there.items()]

    for workload, item in of_kind(applied(name), "Deployment", "StatefulSet").items():
        assert selected(item["spec"]["selector"]["matchLabels"]) == [workload]
    services = of_kind(applied(name), "Service")
    assert set(services) == {"redis", "collector"}
    for service, item in services.items():
        assert selected(item["spec"]["selector"]) == [service]
        [port] = item["spec"]["ports"]
        ports = {entry["name"]: entry["containerPort"] for entry in container_of(pod_of(name, service))["ports"]}
        assert ports[port["targetPort"]] == port["port"]
    [policy] = of_kind(applied(name), "NetworkPolicy").values()
    assert selected(policy["spec"]["podSelector"]["matchLabels"]) == ["redis"]
    [rule] = policy["spec"]["ingress"]
    [source] = rule["from"]
    assert set(selected(source["podSelector"]["matchLabels"])) == set(labels)
    job = pod_of("enqueue.yaml", "enqueue")["metadata"]["labels"]
    assert source["podSelector"]["matchLabels"].items() <= job.items()
    assert [entry["port"] for entry in rule["ports"]] == ["redis"]


def references(pod: Object) -> Iterator[tuple[str, str, str]]:
    """Yield what a pod names: the kind, the name and the key."""
    for source in container_of(pod).get("envFrom", []):
        for kind, reference in source.items():
            yield kind, reference["name"], ""
    for entry in container_of(pod).get("env", []):
        if "valueFrom" in entry:
            [(kind, reference)] = entry["valueFrom"].items()
            if not reference.get("optional"):
                yield kind, reference["name"], reference["key"]
    for volume in pod["spec"].get("volumes", []):
        if "persistentVolumeClaim" in volume:
            yield "claim", volume["persistentVolumeClaim"]["claimName"], ""


@pytest.mark.parametrize(("name", "workload"), PODS)
def test_what_a_pod_names_is_there(name: str, workload: str) -> None:
    """It is among what is applied, or a command of the page creates it."""
    objects = applied("base" if name == "enqueue.yaml" else name)
    created = {line.split()[6]: line for line in LINES if "create secret generic" in line}
    assert set(created) == set(SECRETS)
    for kind, what, key in references(pod_of(name, workload)):
        if kind == "claim":
            assert what in of_kind(objects, "PersistentVolumeClaim")
        elif kind.startswith("configMap"):
            assert what in of_kind(objects, "ConfigMap")
        else:
            assert f"--from-literal={key}" in created[what]
    assert "serviceAccountName" not in pod_of(name, workload)["spec"]


def test_every_key_of_the_secrets_is_used() -> None:
    """And the page says of each what it is."""
    used = {key for name, workload in PODS for kind, _, key in references(pod_of(name, workload)) if kind == "secretKeyRef"}
    assert used == set(SECRETS["halp"])
    page = PAGE.read_text()
    optional = re.findall(r"key: (\S+)\n\s+optional: true", (FILES / "base/worker.yaml").read_text())
    assert optional == ["hf-token"]
    assert "`--from-literal=hf-token=" in page


@pytest.mark.parametrize(("name", "workload"), OURS)
def test_variables_make_settings(name: str, workload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = image_environment() | environment_of(pod_of(name, workload), applied(name), SECRETS)
    ours = {variable.removeprefix("HALP_").lower() for variable in values if variable.startswith("HALP_")}
    assert ours <= set(WorkerSettings.model_fields)
    for variable, value in values.items():
        monkeypatch.setenv(variable, value)
    config = WorkerSettings()
    assert config.broker_url == "redis://:hush@redis:6379/0"
    if workload == "enqueue":
        return
    assert config.data_roots == (("/data",) if name == "base" else ("s3://bucket/runs",))
    assert (config.metrics_address, config.metrics_port) == ("0.0.0.0", 9100)
    assert values["HOME"] == "/tmp"


def test_the_job_asks_for_the_model_that_is_served() -> None:
    served = environment_of(pod_of("base", "worker"), applied("base"), SECRETS)["HALP_MODEL"]
    assert f"--model={served}" in container_of(pod_of("enqueue.yaml", "enqueue"))["args"]
    assert served == WorkerSettings.model_fields["model"].default  # of `producer enqueue` as the page has it


@pytest.mark.parametrize(("name", "workload"), OURS)
def test_commands_are_known(name: str, workload: str) -> None:
    container = container_of(pod_of(name, workload))
    assert known([*container["command"], *container.get("args", [])])
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        if "exec" in container.get(kind, {}):
            assert known(container[kind]["exec"]["command"])
    assert not known([*container["command"], "--no-such-option"])


@pytest.mark.parametrize("workload", ["worker", "collector"])
def test_no_worker_is_killed_for_what_is_wrong_with_redis(workload: str) -> None:
    container = container_of(pod_of("base", workload))
    for kind in ("startupProbe", "livenessProbe"):
        assert container[kind]["exec"]["command"] == ["workers", "health", "--without-broker"]
    assert container["readinessProbe"]["exec"]["command"] == ["workers", "health"]


@pytest.mark.parametrize(("name", "workload"), PODS)
def test_pods_meet_the_restricted_standard(name: str, workload: str) -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted; and roots are read-only."""
    spec = pod_of(name, workload)["spec"]
    container = container_of(pod_of(name, workload))
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(spec)
    assert all("hostPort" not in port for port in container.get("ports", []))
    volumes = {volume["name"]: set(volume) - {"name"} for volume in spec.get("volumes", [])}
    assert all(kind in ({"emptyDir"}, {"persistentVolumeClaim"}) for kind in volumes.values())
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(volumes) == set(mounted) - {"redis-data"}
    if workload != "redis":
        assert mounted["tmp"] == "/tmp"


def test_the_namespace_enforces_it() -> None:
    for name in CLUSTERS:
        [namespace] = of_kind(applied(name), "Namespace").values()
        assert namespace["metadata"] == {"name": "halp", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}


def test_only_the_worker_has_a_gpu_and_it_ends_in_its_own_time() -> None:
    for name, workload in PODS:
        pod = pod_of(name, workload)
        limits = container_of(pod)["resources"].get("limits", {})
        assert limits.get("nvidia.com/gpu") == (1 if workload == "worker" else None)
    worker = of_kind(applied("base"), "Deployment")["worker"]["spec"]
    assert worker["template"]["spec"]["terminationGracePeriodSeconds"] == 300
    assert worker["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


def test_nothing_is_shared_where_runs_lie_in_an_object_store() -> None:
    objects = applied("overlays/object-store")
    assert of_kind(objects, "PersistentVolumeClaim") == {}
    assert all(kind != "claim" for pod in pods(objects).values() for kind, _, _ in references(pod))
    claims = of_kind(applied("base"), "PersistentVolumeClaim")
    assert set(claims) == {"data", "model-cache"}
    assert all(claim["spec"]["accessModes"] == ["ReadWriteMany"] for claim in claims.values())


def test_keda_scales_the_workers_by_a_number_that_the_collector_shows() -> None:
    [scaled] = applied("overlays/keda")
    assert scaled["metadata"]["namespace"] == "halp"
    spec: dict[str, Any] = scaled["spec"]
    worker = of_kind(applied("base"), "Deployment")[spec["scaleTargetRef"]["name"]]
    assert named(worker) == "worker"
    assert "replicas" not in worker["spec"]  # or each `apply` would set what KEDA has set
    assert spec["minReplicaCount"] == 0
    [trigger] = spec["triggers"]
    asked = trigger["metadata"]
    assert asked["url"] == "http://collector.halp.svc:9100/metrics"
    assert (trigger["type"], asked["format"]) == ("metrics-api", "prometheus")
    [family] = [family for family in run_metrics._LastSweep().collect() if family.name == asked["valueLocation"]]
    assert [sample.labels for sample in family.samples] == [{}]  # there, and without a label, before any run is
    assert float(asked["targetValue"]) > 0


def test_what_the_page_applies_is_there() -> None:
    named_there = {word for line in LINES for word in line.split() if word.startswith("deploy/kubernetes/")}
    assert named_there == {f"deploy/kubernetes/{name}" for name in ("base", "overlays/keda", "overlays/object-store")}
    assert all((ROOT / place / "kustomization.yaml").exists() for place in named_there)
    assert "`kubectl create -f deploy/kubernetes/enqueue.yaml`" in PAGE.read_text()
    workloads = {word.removeprefix("deploy/") for line in LINES for word in line.split() if re.fullmatch(r"deploy/\w+", word)}
    assert workloads == {"collector", "flower"}
    assert workloads <= set(of_kind(applied("base"), "Deployment"))
