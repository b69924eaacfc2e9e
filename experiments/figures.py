"""What all figures share: colours, panels, axes, a legend, PNGs; and short names for what they and tables show.

The figures themselves are drawn where their numbers are at home: `experiments.report` (scores and training curves),
`experiments.meta_report` (meta-trainings side by side), `experiments.tuning.outputs` (studies), `experiments.pbt`
(schedules) and `experiments.show` (components).
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from learned_rl.files import replacing

# Okabe and Ito's colours, told apart under every common colour blindness, without the yellow that white paper swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def panels(n: int, columns: int = 3, width: float = 4.6, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    """A figure of `n` panels, `columns` side by side at most, each of so many inches."""
    columns = 2 if (n, columns) == (4, 3) else min(n, columns)
    rows = math.ceil(n / columns)
    figure = Figure(figsize=(width * columns, height * rows + 0.5))
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.12)  # inches
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[n:]:
        spare.remove()
    for ax in axes[:n]:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[:n]


def count_axis(ax: Axes) -> None:
    """Whole numbers, large ones with a letter for thousands or millions, along a panel."""
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def legend(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """What label -> line or marker mean, below the panels, in as many columns as there is room for."""
    room = int(figure.get_figwidth() / (0.7 + 0.075 * max(map(len, handles))))  # inches of handle and letters
    columns = max(1, min(len(handles), room))
    rows = math.ceil(len(handles) / columns)
    figure.set_figheight(figure.get_figheight() + 0.22 * (rows - 1))  # not at the expense of the panels
    figure.legend([*handles.values()], [*handles], loc="outside lower center", ncols=columns, frameon=False)


def save_figure(figure: Figure, path: Path) -> Path:
    """The figure as a PNG of 150 dots per inch; returns the path.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as file:
        file.write(_png(figure))
    return path


def embedded(figure: Figure) -> str:
    """The same PNG as the source of a page's image."""
    return as_link(_png(figure))


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    return png.getvalue()


def as_link(png: bytes) -> str:
    """A PNG as the source of a page's image, which then needs no file."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Distinct names of the folders, without the way there if that is enough."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [folder.as_posix() for folder in folders]


def shortened(names: Sequence[str]) -> list[str]:
    """Dotted names without what is not needed to tell them apart."""
    last = Counter(name.rpartition(".")[2] for name in names)
    return [end if last[end := name.rpartition(".")[2]] == 1 else name for name in names]


def rounded(cell: str) -> str:
    """The cell of a CSV, with four significant digits if it is a number with decimals."""
    try:
        value = float(cell)
    except ValueError:
        return cell
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
