"""The figure: AUROC by layer, a panel for each probe, the baselines as lines behind."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from storage.errors import UserError
from storage.fields import QUERY_TOKEN, VISION_ENCODER, VISION_ONLY, VISION_TOKEN, answer_field, in_words
from storage.probing.experiment import Experiment
from storage.probing.finding import Finding
from storage.probing.judge import Scored
from storage.reading.source import is_home
from storage.stores.location import join, resolve_location
from storage.stores.store import open_store

# Okabe and Ito's palette, told apart with any colour vision; the marks differ too.
_STYLES = {
    QUERY_TOKEN.name: ("#0072B2", "o"),
    VISION_TOKEN.name: ("#D55E00", "s"),
    VISION_ONLY.name: ("#009E73", "D"),
    VISION_ENCODER.name: ("#CC79A7", "^"),
    answer_field("last"): ("#E69F00", "v"),
    answer_field("mean"): ("#56B4E9", "P"),
    answer_field("first"): ("#8C8C00", "<"),
}
_FIGURE = "probe.svg"
_LINES = ("dotted", "dashed", "dashdot", (0, (1, 3)), (0, (5, 5)), (0, (3, 1, 1, 1)))


def write_results(experiment: Experiment, body: str, plot: Path | None) -> str:
    """Write probe.json beside the parts, and the figure there too or to `plot`; return the figure's path or URL."""
    place = experiment.directory
    home = place if is_home(place) else place.rpartition("/")[0] or "."
    store = open_store(resolve_location(home), scratch=".")
    with tempfile.TemporaryDirectory(prefix="halp-probe-") as directory:
        figure = plot or Path(directory) / _FIGURE
        draw(experiment, figure)
        if plot is None:
            store.put(_FIGURE, figure.read_bytes())
    store.put("probe.json", f"{body}\n".encode())
    return str(plot or join(home.rstrip("/"), _FIGURE))


def draw(experiment: Experiment, path: Path) -> None:
    """Write the figure; the suffix chooses the format. Raises UserError."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if path.suffix.lower() not in {".svg", ".png", ".pdf"}:
        raise UserError(f"--plot {path}: a figure is .svg, .png or .pdf")
    names = experiment.settings.probes
    # Text as text: small, searchable, and the same file for the same numbers.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "probe", "font.family": "sans-serif", "font.size": 9}):
        figure = Figure(figsize=(4.2 * len(names) + 1, 3.9), layout="constrained")
        panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for panel, name in zip(panels, names):
            _panel(panel, [p for p in experiment.probes if p.probe == name])
            _baselines(panel, experiment)
            panel.set(title={"linear": "linear probe", "mlp": "published MLP"}[name], xlabel="decoder layer")
        panels[0].set_ylabel("AUROC, with 95% interval")
        handles, labels = panels[0].get_legend_handles_labels()
        named = {_label(b.name, experiment) for b in experiment.baselines}
        order = sorted(range(len(labels)), key=lambda i: labels[i] in named)
        figure.suptitle(_headline(experiment.finding), fontsize=9)
        figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside right center", frameon=False)
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else {}
        try:
            figure.savefig(path, dpi=150, metadata=metadata)
        except OSError as error:
            raise UserError(f"--plot {path}: cannot be written ({error.strerror})") from error


def _panel(panel: Any, probes: list[Scored]) -> None:
    layers = sorted({p.layer for p in probes if p.layer is not None})
    place = {layer: k for k, layer in enumerate(layers)}  # the default's five layers are not evenly spaced
    before = [p for p in probes if p.layer is None]  # the vision tower: what comes before the first layer
    for k, scored in enumerate(before):
        _errorbar(panel, [k - len(before)], [scored])
    for name in _STYLES:
        curve = [p for p in probes if p.representation == name and p.layer is not None]
        if curve:
            _errorbar(panel, [place[p.layer] for p in curve if p.layer is not None], curve)
    panel.set_xticks(range(len(layers)), map(str, layers))
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)


def _errorbar(panel: Any, places: list[int], scored: list[Scored]) -> None:
    label = in_words(scored[0].representation)
    colour, mark = _STYLES.get(scored[0].representation, ("#555555", "x"))
    values = [s.auroc.value for s in scored]
    spans = [[s.auroc.value - s.auroc.low for s in scored], [s.auroc.high - s.auroc.value for s in scored]]
    shift = 0.08 * (list(_STYLES).index(scored[0].representation) - 1) if scored[0].representation in _STYLES else 0
    panel.errorbar(
        [place + shift for place in places], values, spans, label=label, color=colour, marker=mark, markersize=4.5,
        linewidth=1.2, elinewidth=0.8, capsize=2,
    )  # fmt: skip
    for place, value, one in zip(places, values, scored):
        if one.chosen:  # a ring: the layer that the validation side chose
            panel.plot(place + shift, value, "o", markersize=10, markerfacecolor="none", markeredgecolor=colour)


def _baselines(panel: Any, experiment: Experiment) -> None:
    for scored, line in zip(experiment.baselines, _LINES):
        best = scored.name == experiment.best_baseline_on_test
        colour, width = ("#222222", 1.4) if best else ("#777777", 0.9)
        label = _label(scored.name, experiment)
        panel.axhline(scored.auroc.value, color=colour, linewidth=width, linestyle=line, label=label, zorder=1)


def _label(baseline: str, experiment: Experiment) -> str:
    """Return a baseline's name with the sides that it is the best on, which the margins are measured from."""
    sides = [
        side
        for side, name in (("test", experiment.best_baseline_on_test), ("validation", experiment.best_baseline))
        if name == baseline and side in experiment.sides
    ]
    return f"{baseline} (best on {' and '.join(sides)})" if sides else baseline


def _headline(finding: Finding) -> str:
    above = finding.margin.above
    margin = f"{above.value:+.3f} ({above.low:+.3f} to {above.high:+.3f})"
    probe = f"{in_words(finding.field)}, {finding.probe}: AUROC {finding.auroc.value:.3f}"
    return f"{probe}\n{margin} over {finding.margin.baseline}"
