"""The report of a run: one HTML page that fetches nothing. Whatever comes from the dataset or the model is escaped."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np
from markupsafe import Markup

from storage.evenly import spread
from storage.fields import in_order, split_layer
from storage.runs.run import Run
from storage.screen.terminal import visible
from storage.views import charts
from storage.views.components import principal_components
from storage.views.page import template
from storage.views.report_data import ReportData, clipped, gather

REPORT = "report.html"
_PCA_LAYERS = 5
_STALLS = 20  # shown
_HIDDEN_SETTINGS = {"format_version", "model_slug", "part_digits"}


def write_report(run: Run) -> str:
    """Write the report of a run as far as it is, in place of an older one. Return its path or URL."""
    run.store.put(REPORT, visible(render(gather(run))).encode())
    return run.store.address(REPORT)


def render(data: ReportData) -> str:
    """Return the page."""
    run, account = data.run, data.account
    return template("report.html.jinja").render(
        title=run.location.rpartition("/")[2] or run.location,
        now=datetime.now(UTC).isoformat(timespec="seconds"),
        settings=_settings(data),
        account=account,
        reasons=account.reasons,
        stalls=[clipped(sentence) for sentence in data.stalls[:_STALLS]],
        figures=[(name, figure) for name, figure in _figures(data) if figure],
        drift=_drift(data),
        answers_equal=data.answers_equal,
        shared=data.shared_prefixes,
        looked=len(data.prompt_tokens),
        vectors=len(data.groups),
        pca=_pca_figures(data),
        pca_groups=sorted(set(data.groups)),
        failures=[
            {"question_id": clipped(f.question_id), "reason": f.reason, "message": clipped(f.message)} for f in data.failures
        ],
        shown=data.shown,
    )


def _settings(data: ReportData) -> dict[str, str]:
    """Return the provenance: what the run was told, what the first worker recorded, what the parts name."""
    rows = {name: value for name, value in data.run.settings_by().model_dump().items() if name not in _HIDDEN_SETTINGS}
    facts = data.run.model_facts()
    if facts is not None:
        rows |= facts.model_dump()
    rows |= {name: ", ".join(sorted(values)) for name, values in data.environments.items()}
    return {name: clipped(_plain(value)) for name, value in rows.items() if value not in (None, "", ())}


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name} {_plain(one)}" for name, one in value.items() if one)
    return ", ".join(map(_plain, value)) if isinstance(value, (list, tuple)) else str(value)


def _figures(data: ReportData) -> list[tuple[str, Markup | None]]:
    def when(values: Any, draw: Any, label: str) -> Markup | None:
        return draw(values, label=label) if values else None

    return [
        ("Throughput", _throughput(data.progress) if len(data.progress) > 1 else None),
        ("Prompt tokens", when(data.prompt_tokens, charts.histogram, "tokens of a prompt, the image's among them")),
        ("Answer length", when(data.answer_tokens, charts.histogram, "tokens of an answer")),
        ("Batch size", when(data.batch_sizes, charts.histogram, "questions computed together")),
        ("Norms by layer", when(_norms(data), charts.means, "decoder layer")),
    ]


def _throughput(progress: list[tuple[float, float]]) -> Markup:
    """Return questions over time, in the largest unit of which there are two."""
    hours = progress[-1][0]
    units = [("hours", 1), ("minutes", 60), ("seconds", 3600)]
    unit, number = next((u for u in units if hours * u[1] >= 2), units[-1])
    return charts.line(
        [(time * number, done) for time, done in progress], label=f"questions computed, by {unit} since the plan"
    )


def _norms(data: ReportData) -> dict[str, list[tuple[float, float, float]]]:
    """Return mean and deviation of the vectors' Euclidean norms, by layer, of the two token representations."""
    groups: dict[str, list[tuple[float, float, float]]] = {}
    for name, vectors in data.vectors.items():
        representation, layer = split_layer(name)
        if layer is not None:
            norms = np.linalg.norm(vectors.astype(np.float64), axis=1)
            norms = norms[np.isfinite(norms)]
            if len(norms):
                groups.setdefault(representation, []).append((float(layer), float(norms.mean()), float(norms.std())))
    return {name: sorted(points) for name, points in groups.items()}


def _pca_figures(data: ReportData) -> list[tuple[str, Markup]]:
    figures = []
    layers = sorted({layer for _, layer in map(split_layer, data.vectors) if layer is not None})
    chosen = {*spread(layers, _PCA_LAYERS - 1), *layers[-1:]}
    for name, vectors in data.vectors.items():
        layer = split_layer(name)[1]
        if (layer is not None and layer not in chosen) or len(vectors) < 3:
            continue
        points, shares = principal_components(vectors)
        groups = {
            group: [tuple(p) for p, g in zip(points.tolist(), data.groups) if g == group] for group in sorted(set(data.groups))
        }
        label = f"first two components, standardised: {shares[0]:.0%} and {shares[1]:.0%} of the variance"
        figures.append((name, charts.scatter(groups, label=label)))
    return figures


def _drift(data: ReportData) -> dict[str, Any] | None:
    """Return the certificates in one row a field: the median over the parts, and the worst; None where there are none."""
    if not data.certificates and not data.uncertified:
        return None
    rows = {}
    for name in sorted({name for c in data.certificates for name in c["fields"]}, key=in_order):
        drifts, floors = [], []
        for certificate in data.certificates:
            found = certificate["fields"].get(name) or {}
            if found.get("drift") and found.get("noise_floor"):
                drifts.append(found["drift"]["rms"])
                floors.append(found["noise_floor"]["rms"])
        if drifts:
            rows[name] = (float(np.median(drifts)), max(drifts), float(np.median(floors)))
    agree = sum(bool(certificate["answers_agree"]) for certificate in data.certificates)
    return {
        "rows": rows,
        "agree": agree,
        "parts": len(data.certificates),
        "absent": data.uncertified.most_common(),
        "cost": _cost(data.certificate_cost),
    }


def _cost(measured: list[tuple[float, float]]) -> str:
    """Say what certificates took of the engine's time; nothing where no part says."""
    if not measured:
        return ""
    certificates, questions = (sum(seconds) for seconds in zip(*measured))
    share = certificates / (certificates + questions) if certificates + questions > 0 else 0.0
    return f"A certificate took {certificates / len(measured):.2g} s on average, {share:.1%} of the engine's time."
