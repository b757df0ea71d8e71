"""An experiment's figure: means over seeds with bands of 95 %, one panel after another."""

from __future__ import annotations

import math
from pathlib import Path

from opdkit.base.files import whole
from opdkit.neighbours.outcome import Curves, Outcome, mean_of

# Okabe and Ito: told apart by colour-blind eyes, and in grey
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
COLUMNS = 2
FEW = 20  # points that get a dot each


def draw(outcome: Outcome, path: Path) -> None:
    """Writes the figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(outcome.panels))
    rows = math.ceil(len(outcome.panels) / columns)
    figure = Figure(figsize=(5.2 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for place, panel in zip(places, outcome.panels):
        _draw(place, panel)
    for place in places[len(outcome.panels) :]:
        place.set_axis_off()
    with whole(path) as file:
        figure.savefig(file, format="png", dpi=150)


def _draw(place, panel: Curves) -> None:  # type: ignore[no-untyped-def]
    """One panel in matplotlib's axes."""
    for at, (name, seeds) in enumerate(panel.lines.items()):
        means = [mean_of(values) for values in zip(*seeds, strict=True)]
        colour = COLOURS[at % len(COLOURS)]
        place.plot(
            panel.x,
            [m.mean for m in means],
            STYLES[at % len(STYLES)],
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
    place.set_title(panel.title, fontsize=11)
    place.set_xlabel(panel.x_label)
    place.set_ylabel(panel.y_label)
    place.grid(alpha=0.3)
    place.spines[["top", "right"]].set_visible(False)
    place.legend(frameon=False, fontsize=9)
