"""deploy/monitoring/: its files by themselves, and with Debian's Prometheus that scrapes a real collector and real workers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.support.clusters import Cluster, finished, table_of
from tests.support.mailbox import Mailbox, text_of
from tests.support.processes import wait_for
from tests.support.prometheus import MONITORING, Prometheus, checker, free_port, hasten
from workers.monitor import run_metrics
from workers.monitor.metrics import REGISTRY

PAGE = (MONITORING.parents[1] / "docs" / "monitoring.md").read_text()
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"]}
RULES = [rule for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"] for rule in group["rules"]]
EXPRESSIONS = {
    **{rule["alert"]: rule["expr"] for rule in RULES},
    **{f"{title}, {t['legendFormat']}": t["expr"] for title, panel in PANELS.items() for t in panel["targets"]},
}
OF_A_HISTOGRAM = ("_bucket", "_sum", "_count")
OF_PROMETHEUS = {"up", "ALERTS"}


def exported() -> set[str]:
    """Return the names of all series that a worker or a collector may serve."""
    names = set()
    for family in REGISTRY.collect():
        suffixes = {"counter": ("_total",), "histogram": OF_A_HISTOGRAM}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    assert set(run_metrics._GAUGES) < names
    return names


def named(expression: str) -> set[str]:
    """Return the metrics that an expression names."""
    bare = re.sub(r'"[^"]*"|\[[^]]*\]|\b(by|on|ignoring|without) *\([^)]*\)|\{[^}]*\}', " ", expression)
    words = set(re.findall(r"\b[A-Za-z_:][\w:]*(?!\w*\s*\()", bare))
    return words - {"or", "and", "unless"}


# The files by themselves


def test_promtool_accepts_the_files() -> None:
    for kind, name in (("config", "prometheus.yml"), ("rules", "rules.yml")):
        checked = checker("promtool", "check", kind, MONITORING / name)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert "SUCCESS" in checked.stdout


def test_amtool_accepts_its_file() -> None:
    checked = checker("amtool", "check-config", MONITORING / "alertmanager.yml")
    assert (checked.returncode, "SUCCESS" in checked.stdout) == (0, True), checked.stdout + checked.stderr


def test_promtool_sees_a_fault(tmp_path: Path) -> None:
    rules = (MONITORING / "rules.yml").read_text()
    (tmp_path / "rules.yml").write_text(rules.replace("sum by (run) (", "sum by run (", 1))
    assert checker("promtool", "check", "rules", tmp_path / "rules.yml").returncode == 1


def test_the_configuration_finds_its_files() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    files = [*config["rule_files"], *(name for entry in job["file_sd_configs"] for name in entry["files"])]
    assert files == ["rules.yml", "targets.yml"]
    assert all((MONITORING / name).is_file() for name in files)
    [entry] = yaml.safe_load((MONITORING / "targets.yml").read_text())
    ports = re.findall(r"HALP_METRICS_PORT=(\d+)", PAGE)
    assert {f"localhost:{port}" for port in ports} == set(entry["targets"])


def test_the_names_of_an_expression_are_found() -> None:
    assert named('sum by (run) (rate(a_b{state="x"}[5m])) / ignoring (kind) c unless on (run) d == 1') == {"a_b", "c", "d"}
    assert named("histogram_quantile(0.5, sum by (le) (rate(a_bucket[5m])))") == {"a_bucket"}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_every_expression_names_metrics_that_there_are(name: str) -> None:
    names = named(EXPRESSIONS[name])
    assert names
    assert names <= exported() | OF_PROMETHEUS


def test_the_dashboard_shows_every_metric_that_an_alert_asks_for() -> None:
    asked = set().union(*(named(rule["expr"]) for rule in RULES))
    shown = set().union(*(named(t["expr"]) for panel in PANELS.values() for t in panel["targets"]))
    # Of runs that wait or were cancelled there is the alert, and no curve.
    assert asked - shown == {"halp_run_waits", "halp_run_cancelled"}


def test_every_panel_has_a_title_a_unit_and_expressions() -> None:
    assert len(PANELS) == len(DASHBOARD["panels"])  # no title twice
    assert len({panel["id"] for panel in PANELS.values()}) == len(PANELS)
    for title, panel in PANELS.items():
        assert title and panel["type"] in {"stat", "timeseries"}
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]
        assert all(target["expr"] and target["legendFormat"] for target in panel["targets"])
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_no_panel_lies_on_another() -> None:
    places = [panel["gridPos"] for panel in PANELS.values()]
    cells = [(x, y) for p in places for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24


def test_the_dashboard_asks_for_its_datasource() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    text = json.dumps(DASHBOARD)
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__all"}
    assert used == set(variables)
    assert "id" not in DASHBOARD  # it would be another dashboard's where it is imported


def lost(given: Any, kept: Any, place: str = "") -> list[str]:
    """Return where something that was given was not kept."""
    if isinstance(given, dict) and isinstance(kept, dict):
        return [fault for key in given for fault in lost(given[key], kept.get(key), f"{place}/{key}")]
    if isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        return [fault for n, (a, b) in enumerate(zip(given, kept)) for fault in lost(a, b, f"{place}/{n}")]
    return [] if given == kept else [place]


def through_grafanas_types(dashboard: dict[str, Any]) -> dict[str, Any]:
    plugins.register_default_plugins()
    kept: dict[str, Any] = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(dashboard)))
    return kept


def test_grafanas_own_types_know_every_field() -> None:
    assert lost(DASHBOARD, through_grafanas_types(DASHBOARD)) == []


@pytest.mark.parametrize(
    ("right", "wrong", "place"),
    [
        ('"legendFormat"', '"legend_format"', "/panels/0/targets/0/legend_format"),
        ('"reduceOptions"', '"reduce"', "/panels/0/options/reduce"),
        ('"gridPos"', '"grid"', "/panels/0/grid"),
        ('"fieldConfig"', '"fields"', "/panels/0/fields"),
        ('"drawStyle"', '"style"', "/fieldConfig/defaults/custom/style"),
    ],
)
def test_a_field_that_grafana_does_not_know_is_seen(right: str, wrong: str, place: str) -> None:
    faulty = json.loads(json.dumps(DASHBOARD).replace(right, wrong))
    assert any(found.endswith(place) for found in lost(faulty, through_grafanas_types(faulty)))


def test_the_page_explains_each_alert() -> None:
    rows = re.findall(r"^\| `(Halp\w+)` \| (\w+) \|", PAGE, re.MULTILINE)
    assert rows == [(rule["alert"], rule["labels"]["severity"]) for rule in RULES]


def test_times_are_hastened() -> None:
    hastened = hasten((MONITORING / "rules.yml").read_text())
    assert re.findall(r"for: (?!3s)|\[(?!10s)[^]{]*\]", hastened) == []
    assert len(re.findall(r"for: 3s", hastened)) == sum("for" in rule for rule in RULES)


# With real processes

QUESTIONS = 2000  # eight a second: more than this test looks at


@pytest.fixture
def ports() -> dict[str, int]:
    return {name: free_port() for name in ("collect", "extract", "other")}


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    mailbox.end()


@pytest.fixture
def prometheus(tmp_path: Path, ports: dict[str, int], mailbox: Mailbox) -> Iterator[Prometheus]:
    targets = [f"127.0.0.1:{ports[name]}" for name in ("collect", "extract")]
    server = Prometheus(tmp_path / "monitoring", targets, mailbox.address)
    try:
        wait_for(server.ready, 60, "Prometheus answers")
        yield server
    finally:
        server.end()


def value_of(prometheus: Prometheus, expression: str) -> list[float]:
    """Return an expression's values, with Grafana's variables filled in, that are numbers."""
    filled = expression.replace("$__rate_interval", "10s").replace("$run", ".*").replace("[15m]", "[10s]")
    return [value for _, value in prometheus.query(filled) if not math.isnan(value)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_processes_are_watched(
    cluster: Cluster, images: Path, prometheus: Prometheus, mailbox: Mailbox, ports: dict[str, int], tmp_path: Path
) -> None:
    """A run that no worker serves stalls; an alert says so, and a mail, until one works. Every expression is asked then."""
    cluster.variables["HALP_VISIBILITY_TIMEOUT"] = "600"
    table, _ = table_of(tmp_path / "vqa.csv", QUESTIONS)
    output = tmp_path / "a run of mine"
    for number in range(0, 40, 6):
        (images / f"{number}.png").unlink()  # of each part some questions fail
    assert cluster.enqueue(table, images, output, "--checkpoint-interval", 100).returncode == 0
    cluster.start("workers", "collect", HALP_METRICS_PORT=str(ports["collect"]))
    wait_for(lambda: prometheus.firing("HalpRunStalls"), 90, "the run stalls")
    assert [labels["run"] for labels in prometheus.firing("HalpRunStalls")] == [str(output)]
    wait_for(lambda: mailbox.with_subject("FIRING", "HalpRunStalls"), 60, "a mail says so")
    [mail] = mailbox.with_subject("FIRING", "HalpRunStalls")
    assert mail["to"] == "you@example.org"
    assert f"The run {output} stalls" in text_of(mail)
    wait_for(lambda: prometheus.firing("HalpProcessGone"), 30, "there is no worker")
    wait_for(lambda: not prometheus.firing("HalpNoCollector"), 30, "there is a collector")

    first = cluster.start("workers", "extract", HALP_METRICS_PORT=str(ports["extract"]), HALP_ENGINE="fake:1")
    wait_for(lambda: not prometheus.firing("HalpRunStalls"), 90, "the run goes on")
    wait_for(lambda: mailbox.with_subject("RESOLVED", "HalpRunStalls"), 60, "a mail says that it goes on")
    assert not finished(output)
    wait_for(lambda: not prometheus.firing("HalpProcessGone"), 30, "the worker is there")
    for name, expression in EXPRESSIONS.items():
        if not name.startswith("Halp"):
            wait_for(lambda text=expression: value_of(prometheus, text), 60, f"{name} has values")  # type: ignore[misc]
    assert not finished(output)
    for rule in RULES:
        value_of(prometheus, rule["expr"])  # raises where Prometheus refuses it
    scraped = set(prometheus.ask("label/__name__/values"))
    assert set().union(*map(named, EXPRESSIONS.values())) <= scraped | {"halp_run_waits"}
    assert prometheus.ask("label/run/values") == [str(output)]

    # Another checkpoint: the worker refuses the run, until it is stopped.
    wait_for((output / ".run" / "model.json").exists, 60, "a worker has recorded its model")
    prometheus.scrape([f"127.0.0.1:{port}" for port in ports.values()])
    variables = {"HALP_METRICS_PORT": str(ports["other"]), "HALP_ENGINE": "fake", "HALP_REVISION": "another"}
    other = cluster.start("workers", "extract", "--name", "other", **variables)
    wait_for(lambda: prometheus.firing("HalpWorkerRefusesRun"), 90, "the worker refuses the run")
    [refused] = prometheus.firing("HalpWorkerRefusesRun")
    assert refused["instance"] == f"127.0.0.1:{ports['other']}"
    other.kill()
    wait_for(lambda: not prometheus.firing("HalpWorkerRefusesRun"), 60, "nobody refuses it")

    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in RULES]
    assert {rule["name"]: rule.get("lastError", "") for rule in rules if rule["health"] != "ok"} == {}
    first.kill()
    wait_for(lambda: prometheus.firing("HalpRunStalls"), 90, "the run stalls again")
    assert cluster.start("producer", "cancel", output).wait(60) == 0
    wait_for(lambda: not prometheus.firing("HalpRunStalls"), 60, "a run that was cancelled does not stall")
