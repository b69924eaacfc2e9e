"""Meta-trainings side by side: held-out scores over what they cost, as a figure, a CSV and a section of a page.

What is compared are the validations in each run's metrics.csv, on tasks of the run's own family. Reports of runs of any
kind, which hold such a section where there are meta-trainings among them, are written by `experiments.report`.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

from experiments.config_file import early_option
from experiments.figures import COLOURS, as_link, distinct_names, legend, panels, rounded, save_figure, shortened
from experiments.runs import CONFIG, flatten, read_json, read_metrics
from learned_rl.evaluation import Array
from learned_rl.files import replacing
from meta_optimizers.estimators import ESTIMATORS

#: What a meta-training logs at each validation, and how the figure calls it.
FINAL, AREA = "meta/heldout_return", "meta/heldout_area"
HELD_OUT = {FINAL: "held-out final score", AREA: "held-out mean over the lifetime"}
ENVIRONMENT_STEPS, MINUTES, META_STEPS = "meta/environment_steps", "meta/minutes", "step"
COSTS = {ENVIRONMENT_STEPS: "environment steps of meta-training", MINUTES: "minutes of meta-training"}
# With COLOURS, twelve that are told apart; a line has a marker of its own as well, for eyes that do not.
MORE_COLOURS = (*COLOURS, "#882255", "#999933", "#332288", "#8C8C8C", "#7A4A21")
MARKERS = "os^DvPX<>ph"  # one fewer than colours: their pairs repeat after 132 lines
MARKED = 15  # markers on a line, at most
DIFFERENCES = 3  # settings in a run's label; where more differ, the folder's name says it shorter
#: Settings that say how long to train and how often to look, which the figure shows, and what labels say anyway.
UNLABELLED = ("name", "about", "train.estimator.name", "meta_steps", "minutes", "checkpoint_every", "validate_every")
META_COLUMNS = (
    *("family", "run", "label", "estimator", "meta_steps", "environment_steps", "minutes"),
    *("best", "best_meta_step", "best_environment_steps", "best_minutes", "last"),
)


@dataclass(frozen=True)
class MetaRun:
    """The validations of one meta-training.

    Attributes:
        name:      of the folder.
        label:     in the figure; distinct from other runs'.
        family:    of the tasks that it learned from; scores of different ones are not comparable.
        estimator: its name; empty where it was not recorded.
        settings:  dotted name -> value, of all that its numbers depend on, seed included.
        values:    tag -> [n] at each validation, of `HELD_OUT` and `COSTS` and of meta-steps under `META_STEPS`; NaN
                   where it was not logged.
    """

    name: str
    label: str
    family: str
    estimator: str
    settings: dict[str, Any]
    values: dict[str, Array]

    @property
    def score(self) -> Array:
        """[n] what the best component is chosen by: the mean of the final score and of that over the lifetime."""
        return (self.values[FINAL] + self.values[AREA]) / 2

    @property
    def costed(self) -> bool:
        """Whether each validation has its costs."""
        return all(bool(np.isfinite(self.values[tag]).all()) for tag in COSTS)

    @property
    def dash(self) -> str:
        """Solid where the estimator differentiates, dashed where it perturbs, dotted where it is not known."""
        return ":" if self.estimator not in ESTIMATORS else "--" if ESTIMATORS[self.estimator].stacked else "-"

    def row(self) -> list[object]:
        """Cells under `META_COLUMNS`; None where there is no number."""
        score, costs = self.score, [self.values[tag] for tag in (META_STEPS, *COSTS)]
        best = int(np.nanargmax(score)) if np.isfinite(score).any() else None
        where = [None if best is None else x[best] for x in (score, *costs)]
        numbers = [*(x[-1] for x in costs), *where, score[-1]]
        known = [None if x is None or not math.isfinite(x) else _whole(x) for x in numbers]
        return [self.family, self.name, self.label, self.estimator, *known]


def _whole(x: float) -> float | int:
    return int(x) if x == int(x) else float(x)


def read_meta_runs(folders: Sequence[Path]) -> list[MetaRun]:
    """Those of the runs that are meta-trainings with a validation, in the order given."""
    runs = []
    for name, folder in zip(distinct_names(folders), folders, strict=True):
        found = read_metrics(folder)
        if FINAL not in found:
            continue
        steps, config = np.unique(found[FINAL][0]), flatten(read_json(folder / CONFIG))
        values = {tag: _at(steps, *found.get(tag, ((), ()))) for tag in (*HELD_OUT, *COSTS)}
        settings = {k: v for k, v in config.items() if k not in UNLABELLED} | {"seed": read_json(folder / "seed")}
        family, estimator = str(config.get("family", "family not recorded")), _estimator(folder, config)
        runs.append(MetaRun(name, name, family, estimator, settings, values | {META_STEPS: steps.astype(float)}))
    return _labelled(runs)


def _at(steps: Array, logged: Iterable[int], values: Iterable[float]) -> Array:
    """[n] the values logged at `steps`; NaN where none was."""
    found = dict(zip(logged, values, strict=True))
    return np.array([found.get(step, math.nan) for step in steps])


def _estimator(folder: Path, config: dict[str, Any]) -> str:
    """The estimator's name: from the config, or from the command of runs that have none there; else empty."""
    if name := config.get("train.estimator.name"):
        return str(name)
    first, *_ = (folder / "command.txt").read_text(encoding="utf-8").splitlines() or [""]
    return early_option("--estimator", "a name", shlex.split(first))[0] or ""


def _labelled(runs: Sequence[MetaRun]) -> list[MetaRun]:
    """The runs with labels that tell them apart: the estimator, and in what runs with the same one differ."""
    labels = []
    for run in runs:
        peers = [peer.settings for peer in runs if peer.estimator == run.estimator]
        shared = [k for k in run.settings if all(k in settings for settings in peers)]
        differing = [k for k in shared if any(settings[k] != run.settings[k] for settings in peers)]
        named = zip(shortened(differing), differing, strict=True)
        words = [f"{short} {rounded(str(run.settings[k]))}" for short, k in named]
        few, where = len(words) <= DIFFERENCES, f"{run.estimator} ({run.name})" if run.estimator else run.name
        labels.append(", ".join([run.estimator, *words]) if few and run.estimator else where)
    taken = Counter(labels)
    unique = [x if taken[x] == 1 else f"{x} ({run.name})" for x, run in zip(labels, runs, strict=True)]
    return [replace(run, label=label) for run, label in zip(runs, unique, strict=True)]


def meta_training_figure(runs: Sequence[MetaRun]) -> Figure:
    """Held-out scores over what they cost: a column for each cost, two rows for each task family, a line for each run.

    Meta-steps, which cost every estimator something else, are a column only where a run has no costs to show.
    """
    families = sorted({run.family for run in runs})
    rows = [(family, tag) for family in families for tag in HELD_OUT]
    columns = {tag: name for tag, name in COSTS.items() if any(np.isfinite(run.values[tag]).any() for run in runs)}
    if not all(run.costed for run in runs):
        columns[META_STEPS] = "meta-steps"
    figure, axes = panels(len(rows) * len(columns), len(columns))
    handles: dict[str, Artist] = {}
    for ax, ((family, quantity), cost) in zip(axes, itertools.product(rows, columns), strict=True):
        for i, run in enumerate(runs):
            if run.family == family:
                colour, marker = MORE_COLOURS[i % len(MORE_COLOURS)], MARKERS[i % len(MARKERS)]
                x, y = run.values[cost], run.values[quantity]
                (line,) = ax.plot(x, y, run.dash, color=colour, marker=marker, markevery=math.ceil(len(x) / MARKED))
                line.set(linewidth=1.4, markersize=5, markeredgewidth=0)
                handles[run.label] = line
        ax.set(xlabel=columns[cost], ylabel=HELD_OUT[quantity], title=family if quantity == FINAL else "")
        if ax.dataLim.width >= 0:  # minus infinity where nothing was drawn
            _cost_axis(ax, cost, [run.values[cost] for run in runs if run.family == family])
        else:
            ax.text(0.5, 0.5, f"no {HELD_OUT[quantity]}\nover {columns[cost]}", transform=ax.transAxes, ha="center")
            ax.set_axis_off()
    legend(figure, {run.label: handles[run.label] for run in runs})
    return figure


def _cost_axis(ax: Axes, cost: str, costs: Iterable[Array]) -> None:
    """Logarithmic where some run went on ten times as long as another, whose line would be a dot otherwise."""
    positive = [x for all_of in costs if len(x := all_of[all_of > 0])]
    lasts = [x[-1] for x in positive]
    if lasts and max(lasts) > 10 * min(lasts):
        spread = max(lasts) / min(x[0] for x in positive)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 200 else (1,)))
        ax.xaxis.set_minor_locator(NullLocator())
    else:
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=cost != MINUTES, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}") if cost == MINUTES else EngFormatter(sep=""))


def write_meta_table(runs: Sequence[MetaRun], path: Path) -> Path:
    """A CSV of a row for each run: what it cost until its last validation, its best score, where it was reached, and
    the last one. Scores are the means of the final one and of that over the lifetime. Without a number: empty."""
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([META_COLUMNS, *(run.row() for run in runs)])
    with replacing(path) as file:
        file.write(table.getvalue().encode())
    return path


def compare_meta_runs(folders: Sequence[Path], out: Path) -> dict[str, Any] | None:
    """What the page `out` says about meta-trainings side by side; None where there are none.

    Table and figure become files too: `{stem}_meta_training.csv` and `.png` beside the page.

    Raises:
        UserError: one of them cannot be written.
    """
    if not (runs := read_meta_runs(folders)):
        return None
    validated = {run.name for run in runs}
    named = zip(distinct_names(folders), folders, strict=True)
    begun = [x for x, f in named if x not in validated and any(tag.startswith("meta/") for tag in read_metrics(f))]
    table = write_meta_table(runs, out.with_name(f"{out.stem}_meta_training.csv"))
    picture = save_figure(meta_training_figure(runs), table.with_suffix(".png"))
    hidden = {"estimator"} if len({run.family for run in runs}) > 1 else {"estimator", "family"}
    shown = [name for name in META_COLUMNS if name not in hidden]
    ranked = sorted(runs, key=lambda run: (run.family, -np.nan_to_num(run.score, nan=-math.inf).max()))
    rows = [dict(zip(META_COLUMNS, run.row(), strict=True)) for run in ranked]
    return {
        "head": [name.replace("_", " ") for name in shown],
        "rows": [[_cell(name, row[name]) for name in shown] for row in rows],
        "begun": begun,
        "uncosted": [run.name for run in runs if not run.costed],
        "unknown": [run.name for run in runs if run.estimator not in ESTIMATORS],
        "files": [table.name, picture.name],
        "png": as_link(picture.read_bytes()),
    }


def _cell(column: str, value: Any) -> str:
    if value is None:
        return "–"
    digits = 3 if column in ("best", "last") else 1 if column.endswith("minutes") else 0
    return value if isinstance(value, str) else f"{value:,.{digits}f}"
