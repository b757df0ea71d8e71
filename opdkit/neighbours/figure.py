"""An experiment's figure: means over seeds with bands of 95 %, one panel after another."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from opdkit.base.files import whole
from opdkit.neighbours.outcome import Curves, Outcome, mean_of

# Okabe and Ito: told apart by colour-blind eyes, and in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
FEW = 20  # points that get a dot each


def draw(outcome: Outcome, path: Path) -> None:
    """Writes the figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 3 if len(outcome.panels) % 3 == 0 else min(2, len(outcome.panels))
    rows = math.ceil(len(outcome.panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    names = dict.fromkeys(name for panel in outcome.panels for name in panel.lines)
    looks = {name: (at % len(COLOURS), at % len(STYLES)) for at, name in enumerate(names)}
    for place, panel in zip(places, outcome.panels):
        _draw(place, panel, looks)
    for place in places[len(outcome.panels) :]:
        place.set_axis_off()
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _draw(place: Any, panel: Curves, looks: dict[str, tuple[int, int]]) -> None:
    """One panel in matplotlib's axes; a line looks the same in all of them."""
    for name, seeds in panel.lines.items():
        means = [mean_of(values) for values in zip(*seeds, strict=True)]
        colour, style = COLOURS[looks[name][0]], STYLES[looks[name][1]]
        place.plot(
            panel.x,
            [m.mean for m in means],
            style,
            color=colour,
            label=name,
            linewidth=1.8,
            marker="o" if len(panel.x) <= FEW else None,
            markersize=3,
        )
        if len(seeds) > 1:
            place.fill_between(
                panel.x, [m.low for m in means], [m.high for m in means], color=colour, alpha=0.18
            )
    if panel.log:
        place.set(xscale="log", yscale="log")
    else:
        place.locator_params(axis="x", nbins=5)
    place.set_title(panel.title, fontsize=11)
    place.set_xlabel(panel.x_label)
    place.set_ylabel(panel.y_label)
    place.grid(alpha=0.3)
    place.spines[["top", "right"]].set_visible(False)
    place.legend(frameon=False, fontsize=9)
