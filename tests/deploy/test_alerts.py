"""Each alert of deploy/monitoring/rules.yml fires on what it is meant for, with its sentence, and clears, in promtool."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.prometheus import MONITORING, checker

RULES = {
    rule["alert"]: rule
    for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
    for rule in group["rules"]
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is scraped each minute, when the alert fires on it, and when it does not."""

    alert: str
    series: dict[str, str]
    fires: int  # minute
    quiet: tuple[int, ...]  # minutes
    summary: str
    labels: dict[str, str] = field(default_factory=dict)


RUN = 'run="/data/a"'
OF_RUN = {"run": "/data/a"}
COLLECTOR = 'job="halp", instance="c:9700"'
OF_COLLECTOR = {"job": "halp", "instance": "c:9700"}
SWEEPS = {f"halp_sweep_seconds_count{{{COLLECTOR}}}": "0+12x300"}


def questions(outstanding: str, staged: str, run: str = RUN) -> dict[str, str]:
    return {
        f'halp_run_questions{{{run}, state="outstanding"}}': outstanding,
        f'halp_run_questions{{{run}, state="staged"}}': staged,
    }


def attempts(written: str, failed: str) -> dict[str, str]:
    names = {"written": written, "failed": failed, "retried": "0+100x300", "refused": "0x300"}
    return {f'halp_questions_total{{instance="w:9701", state="{state}"}}': values for state, values in names.items()}


CASES = {
    # Ten questions a minute, then none for an hour, then ten a minute again.
    "a run stalls": Case(
        "HalpRunStalls", questions("1000-10x20 800x60 800-10x60", "0+10x20 200x60 200+10x60"), 60, (10, 45, 90, 130),
        "The run /data/a stalls", OF_RUN,
    ),
    "a run that nobody begins": Case(
        "HalpRunStalls", questions("1000x60", "0x60"), 31, (29,), "The run /data/a stalls", OF_RUN,
    ),
    "a run whose parts are not packed": Case(
        "HalpRunStalls", questions("0x60", "1000x60"), 31, (29,), "The run /data/a stalls", OF_RUN,
    ),
    "a run that ends": Case(
        "HalpRunStalls", questions("10x60 stale", "0x60 stale"), 59, (70,), "The run /data/a stalls", OF_RUN,
    ),
    "a run that is cancelled": Case(
        "HalpRunStalls",
        questions("10x90", "0x90") | {f"halp_run_cancelled{{{RUN}}}": "0x60 1x30"}
        | questions("10x90", "0x90", 'run="/data/b"') | {'halp_run_cancelled{run="/data/b"}': "1x90"},
        59, (20, 62), "The run /data/a stalls", OF_RUN,
    ),
    "a run waits": Case(
        "HalpRunWaits", {f"halp_run_waits{{{RUN}}}": "1x20 stale"}, 15, (9, 30),
        "The collector cannot bring the run /data/a forward", OF_RUN,
    ),
    "failures rise": Case(
        "HalpFailuresRise", attempts("0+80x120", "0+4x30 120+20x40 920+1x50"), 60, (30, 110), "20% of the questions fail",
    ),
    "a few failures of a few questions": Case(
        "HalpFailuresRise", attempts("0+0.1x60 6+80x60", "0+0.5x60 30+40x60"), 90, (20, 59), "33.33% of the questions fail",
    ),
    "no collector": Case(
        "HalpNoCollector", {f"halp_sweep_seconds_count{{{COLLECTOR}}}": "0+12x30 360x30 360+12x30"}, 60, (10, 40, 80),
        "No collector sweeps",
    ),
    "a worker alone": Case(
        "HalpNoCollector", {'halp_sweep_seconds_count{instance="w:9701"}': "0x30 0+12x30"}, 20, (4, 50), "No collector sweeps",
    ),
    "nothing is scraped": Case("HalpNoCollector", {}, 20, (4,), "No collector sweeps"),
    "a disk is almost full": Case(
        "HalpDiskAlmostFull", {f"halp_disk_free_bytes{{{RUN}}}": "100e9x30 4e9x30 100e9x120"}, 50, (20, 35, 170),
        "The disk of /data/a is almost full", OF_RUN,
    ),
    "a disk that will be full in four hours": Case(
        "HalpDiskAlmostFull", {f"halp_disk_free_bytes{{{RUN}}}": "200e9-1e9x90 110e9x120"}, 80, (14, 170),
        "The disk of /data/a is almost full", OF_RUN,
    ),
    "a worker refuses a run": Case(
        "HalpWorkerRefusesRun", {'halp_questions_total{instance="w:9701", state="refused"}': "0x10 0+2x10 20x30"}, 15, (9, 40),
        "The worker at w:9701 refuses a run", {"instance": "w:9701"},
    ),
    "Redis is almost full": Case(
        "HalpRedisAlmostFull",
        {
            f'halp_redis_memory_bytes{{{COLLECTOR}, kind="used"}}': "1e9x10 9e9x20 1e9x20",
            f'halp_redis_memory_bytes{{{COLLECTOR}, kind="limit"}}': "10e9x50",
        },
        20, (10, 14, 40), "Redis uses 90% of its memory", OF_COLLECTOR,
    ),
    "a process is gone": Case(
        "HalpProcessGone", {f"up{{{COLLECTOR}}}": "1x10 0x20 1x20"}, 25, (15, 40), "No metrics at c:9700", OF_COLLECTOR,
    ),
}  # fmt: skip


def judged(directory: Path, case: Case, rules: str | None = None) -> subprocess.CompletedProcess[str]:
    """Have promtool run a case, against these rules or against ours."""
    (directory / "rules.yml").write_text(rules or (MONITORING / "rules.yml").read_text())
    rule = RULES[case.alert]
    expected: dict[str, Any] = {
        "exp_labels": {**rule["labels"], **case.labels},
        "exp_annotations": {**rule["annotations"], "summary": case.summary},
    }
    times = [(minute, []) for minute in case.quiet] + [(case.fires, [expected])]
    tests = [{"eval_time": f"{minute}m", "alertname": case.alert, "exp_alerts": alerts} for minute, alerts in sorted(times)]
    group = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": tests,
    }
    path = directory / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": ["rules.yml"], "evaluation_interval": "1m", "tests": [group]}))
    return checker("promtool", "test", "rules", path)


@pytest.mark.parametrize("name", CASES)
def test_it_fires_and_clears(tmp_path: Path, name: str) -> None:
    result = judged(tmp_path, CASES[name])
    assert result.returncode == 0, result.stdout + result.stderr


def test_each_alert_has_a_case() -> None:
    assert {case.alert for case in CASES.values()} == set(RULES)


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        ("a run stalls", "for: 30m", "for: 50m"),
        ("a run that is cancelled", "unless on (run) halp_run_cancelled == 1", ""),
        ("failures rise", "> 0.1", "> 0.3"),
        ("a worker alone", " or vector(0)) == 0", ") > 0"),
        ("Redis is almost full", "> 0.85", "> 0.05"),
    ],
)
def test_a_faulty_rule_is_seen(tmp_path: Path, name: str, right: str, wrong: str) -> None:
    rules = (MONITORING / "rules.yml").read_text()
    assert right in rules
    result = judged(tmp_path, CASES[name], rules.replace(right, wrong))
    assert result.returncode == 1
    assert f"alertname: {CASES[name].alert}" in result.stdout + result.stderr
