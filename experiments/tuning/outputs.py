"""What a study leaves behind: a CSV of its trials, figures, and TensorBoard's view of every trial.

Results are trials that were completed or pruned; those that failed, wait or still run are none. Optuna's own pictures
do not wrap, let one outlier flatten all the rest, and change matplotlib's global style: only their data are used.
"""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from experiments.figures import COLOURS, count_axis, panels, save_figure
from learned_rl.evaluation import Array
from learned_rl.files import replacing, speaking

RESULTS = (TrialState.COMPLETE, TrialState.PRUNED)
NOTES = ("seconds", "environment_steps", "worker", "reason", "retry_of")  # attributes of trials, as columns
ENOUGH = 10  # completed trials, below which importances are noise
PARALLEL = 10  # parameters in one row of parallel coordinates
WIDE = 9.2  # inches of a figure of one panel
ORDINARY, BEST, GREY = COLOURS[0], COLOURS[1], "#9aa3ad"
SHADES = LinearSegmentedColormap.from_list("shades", ["#c6dcec", ORDINARY, "#00263d"])


# --- the table -------------------------------------------------------------------------------------------------------


def write_trials(study: optuna.Study, path: Path) -> None:
    """A row for each completed or pruned trial: number, state, metrics, notes, and every setting's true value.

    A pruned trial has costs, but no score. Lists are JSON, and what a trial does not have is empty.

    Raises:
        UserError: the file cannot be written.
    """
    trials, metrics = study.get_trials(deepcopy=False, states=RESULTS), _names(study)
    notes = [note for note in NOTES if note not in metrics]
    paths = sorted({path for trial in trials for path in trial.user_attrs.get("settings", {})})
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["number", "state", *metrics, *notes, *paths])
    for trial in trials:
        known, settings = trial.user_attrs, trial.user_attrs.get("settings", {})
        complete = trial.state == TrialState.COMPLETE
        values = trial.values if complete else [known.get(name) for name in metrics]
        row = [trial.number, trial.state.name, *values, *map(known.get, notes), *map(settings.get, paths)]
        writer.writerow(map(_cell, row))
    with replacing(path) as file:
        file.write(table.getvalue().encode())


def _names(study: optuna.Study) -> list[str]:
    return study.metric_names or [f"value {i}" for i in range(len(study.directions))]


def _cell(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return repr(value) if isinstance(value, float) else json.dumps(value)


# --- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Scale:
    """An axis of a search space or of a metric; positions are 0 at its low end and 1 at its high end."""

    name: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    choices: tuple[Any, ...] = ()

    @classmethod
    def of(cls, name: str, trials: Sequence[FrozenTrial]) -> _Scale:
        """The scale of a parameter: the range that is searched, and any value outside that was tried nevertheless."""
        kind: Any = next(t.distributions[name] for t in reversed(trials) if name in t.distributions)
        if isinstance(kind, CategoricalDistribution):
            return cls(name, -0.5, len(kind.choices) - 0.5, choices=kind.choices)
        tried = [t.params[name] for t in trials if name in t.params]
        whole = isinstance(kind, IntDistribution)
        return cls(name, min(kind.low, *tried), max(kind.high, *tried), kind.log, whole)

    def read(self, trial: FrozenTrial) -> float:
        """Position of the trial's value; NaN where it has none."""
        if self.name not in trial.params:
            return math.nan
        value = trial.params[self.name]
        return self.at([self.choices.index(value) if self.choices else value]).item()

    def at(self, values: Iterable[float]) -> Array:
        """Positions [n] of values [n], within 0 and 1."""
        x, ends = np.array([*values], dtype=float), np.array([self.low, self.high], dtype=float)
        if self.log:
            x, ends = np.log(x), np.log(ends)
        return np.clip((x - ends[0]) / (np.ptp(ends) or 1.0), 0, 1)

    def ticks(self) -> dict[float, str]:
        """Position -> label."""
        if self.choices:
            return dict(zip(self.at(range(len(self.choices))).tolist(), map(str, self.choices), strict=True))
        if self.whole and not self.log and self.high - self.low <= 12:
            marks: Sequence[float] = range(int(self.low), int(self.high) + 1)
        elif self.log:
            few = (1,) if self.high > 50 * self.low else (1, 2, 5)
            marks = LogLocator(subs=few, numticks=5).tick_values(self.low, self.high)
        else:
            marks = MaxNLocator(4, integer=self.whole).tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        inside = [mark for mark in marks if self.low - slack <= mark <= self.high + slack]
        return dict(zip(self.at(inside).tolist(), map(_number, inside), strict=True))


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.6g}"
    factor, exponent = f"{value:.3e}".split("e")
    factor = "" if float(factor) == 1 else rf"{float(factor):g}\cdot "
    return f"${factor}10^{{{int(exponent)}}}$"


def _window(values: Iterable[float], sign: float) -> tuple[float, float]:
    """What to show of values of which the larger (sign 1) or the smaller (-1) are better: all, and a margin.

    Of the worst fifth, those are left out that lie further from the others than twice the range of these.
    """
    good = sign * np.array([v for v in values if math.isfinite(v)])
    usual, best = np.quantile(good, 0.2, method="higher"), good.max()
    worst = good[good >= usual - 2 * (best - usual)].min() if best > usual else good.min()
    margin = 0.06 * (best - worst) or 0.1 * abs(best) or 0.5
    low, high = sorted((sign * (worst - margin), sign * (best + margin)))
    return float(low), float(high)


@dataclass(frozen=True)
class _Metric:
    """One metric of the completed trials in which all metrics are finite."""

    index: int
    name: str
    sign: float  # 1: the larger, the better; -1: the smaller
    values: Array  # [n]

    def window(self) -> tuple[float, float]:
        return _window(self.values, self.sign)


def _points(ax: Axes, x: Array, y: Array, window: tuple[float, float], size: float, **style: Any) -> None:
    """Dots at x [n], y [n]; triangles at the edge for what lies outside of the window. `c` [n] in [0, 1]: shades."""
    low, high = window
    shades, label = style.pop("c", None), style.pop("label", None)
    for marker, chosen in (("o", (y >= low) & (y <= high)), ("v", y < low), ("^", y > high)):
        shade = {} if shades is None else {"c": shades[chosen], "cmap": SHADES, "norm": Normalize(0, 1)}
        s, named = (size, label) if marker == "o" else (2 * size, None)
        x_, y_ = x[chosen], np.clip(y[chosen], low, high)
        ax.scatter(x_, y_, s, marker=marker, label=named, lw=0, clip_on=False, **shade, **style)
    ax.set_ylim(low, high)


def study_figures(study: optuna.Study) -> dict[str, Figure]:
    """The figures that the finished trials suffice for, by name; `experiments.report.STUDY_FIGURES` explains them."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = [t for t in complete if all(map(math.isfinite, t.values))]
    signs = [_sign(direction) for direction in study.directions]
    values = np.array([t.values for t in trials]).reshape(-1, len(signs)).T
    metrics = [_Metric(i, *each) for i, each in enumerate(zip(_names(study), signs, values, strict=True))]
    numbers = [t.number for t in trials]
    front = {numbers[np.argmax(signs[0] * values[0])]} if numbers else set()
    if len(metrics) > 1:
        front = {t.number for t in study.best_trials}
        metrics = [metrics[0], *(each for each in metrics[1:] if len(set(each.values)) > 1)]  # constants tell nothing
    best = np.isin(numbers, [*front])
    scales = [_Scale.of(name, trials) for name in sorted({name for t in trials for name in t.params})]
    enough = len(trials) > 1
    figures = {
        "history": _history(study, numbers, metrics) if enough else None,
        "importances": _importances(study, metrics, len(scales)),
        "slice": _slice(trials, metrics, scales, best) if enough and scales else None,
        "parallel": _parallel(trials, metrics, scales, best) if enough and len(scales) > 1 else None,
        "pareto": _pareto(trials, metrics, best) if enough and len(metrics) > 1 else None,
        "curves": _curves(study, signs[0], front),
    }
    return {name: figure for name, figure in figures.items() if figure is not None}


def _sign(direction: StudyDirection) -> float:
    return 1.0 if direction == StudyDirection.MAXIMIZE else -1.0


def _history(study: optuna.Study, numbers: Sequence[int], metrics: Sequence[_Metric]) -> Figure:
    """A panel for each metric: every trial, and the best so far."""
    figure, axes = panels(len(metrics), width=WIDE if len(metrics) == 1 else 4.6)
    pruned = [t.number for t in study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))]
    for ax, each in zip(axes, metrics, strict=True):
        so_far = each.sign * np.maximum.accumulate(each.sign * each.values)
        _points(ax, np.array(numbers), each.values, each.window(), 16, color=ORDINARY, alpha=0.8, label="trial")
        ax.step(numbers, so_far, where="post", color=BEST, lw=1.8, label="best so far")
        if pruned:
            foot = ax.get_xaxis_transform()
            ax.plot(pruned, [0.02] * len(pruned), "x", color=GREY, ms=5, transform=foot, label="pruned", zorder=1)
        count_axis(ax)
        ax.set(xlabel="trial", ylabel=each.name)
    _legend(figure, axes[0])
    return figure


def _importances(study: optuna.Study, metrics: Sequence[_Metric], parameters: int) -> Figure | None:
    """A panel of bars for each metric in which trials differ."""
    found = {each.name: shares for each in metrics if (shares := importances(study, each.index))}
    if not found:
        return None
    figure, axes = panels(len(found), columns=2, width=WIDE if len(found) == 1 else 6.9, height=0.6 + 0.27 * parameters)
    for ax, (name, shares) in zip(axes, found.items(), strict=True):
        bars = ax.barh([*shares][::-1], [*shares.values()][::-1], color=ORDINARY, height=0.65)
        ax.bar_label(bars, fmt="%.2f", padding=4, fontsize=9)
        ax.margins(x=0.1, y=0.02)
        ax.grid(visible=False, axis="y")
        ax.tick_params(left=False)
        ax.set(xlabel=f"importance for {name}")
    return figure


def importances(study: optuna.Study, metric: int = 0) -> dict[str, float]:
    """Parameter -> share of the importance for one metric, the largest first; empty where trials do not tell.

    PED-ANOVA (Watanabe, Bansal and Hutter, 2023) compares where the better trials lie with where all of them do: the
    better half, since Optuna's best tenth of some dozens is noise, or all that are above the worst if those are fewer.
    """
    sign = _sign(study.directions[metric])
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    losses = np.array([-sign * t.values[metric] for t in complete])
    losses = losses[np.isfinite(losses)]
    better = int((losses < losses.max()).sum()) if len(losses) else 0
    if len(losses) < ENOUGH or not better or len({name for t in complete for name in t.params}) < 2:
        return {}
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, (better - 0.5) / len(losses)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a target is minimised, as this one is to be
        shares = get_param_importances(study, evaluator=evaluator, target=lambda t: -sign * t.values[metric])
    return shares if len(set(shares.values())) > 1 else {}


def _slice(trials: Sequence[FrozenTrial], metrics: Sequence[_Metric], scales: Sequence[_Scale], best: Array) -> Figure:
    """A panel for each metric and parameter; metrics begin new rows."""
    columns = min(5, len(scales))
    places = math.ceil(len(scales) / columns) * columns
    figure, axes = panels(len(metrics) * places, columns, width=2.76, height=2.6)
    order, spare = np.linspace(0, 1, len(trials)), []
    for i, ax in enumerate(axes):
        metric, place = divmod(i, places)
        if place >= len(scales):
            spare.append(ax)
            continue
        each, scale = metrics[metric], scales[place]
        x, window, ticks = np.array([scale.read(t) for t in trials]), each.window(), scale.ticks()
        _points(ax, x, each.values, window, 18, c=order)
        _points(ax, x[best], each.values[best], window, 34, color=BEST, zorder=3, label=_chosen(best))
        crowded = scale.choices and len(ticks) * max(map(len, ticks.values())) > 22
        tilted: dict[str, Any] = {"rotation": 25, "ha": "right"} if crowded else {}
        ax.set_xticks([*ticks], [*ticks.values()], **tilted)
        ax.set(xlabel=scale.name, xlim=(-0.04, 1.04), ylabel=each.name if place % columns == 0 else "")
        ax.tick_params(labelleft=place % columns == 0)
    for ax in spare:
        ax.remove()
    shades = ScalarMappable(Normalize(trials[0].number, trials[-1].number), SHADES)
    pad = 0.3 / figure.get_figheight()
    bar = figure.colorbar(shades, ax=figure.axes, location="bottom", aspect=40, shrink=0.4, pad=pad, label="trial")
    bar.locator = MaxNLocator(5, integer=True)
    _legend(figure, axes[0])
    return figure


def _chosen(best: Array) -> str:
    return "best trial" if best.sum() == 1 else "Pareto front"


def _legend(figure: Figure, ax: Axes) -> None:
    """Below the panels: what the labels of one of them mean."""
    shown = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend([*shown.values()], [*shown], loc="outside lower center", ncols=4, frameon=False)


def _parallel(
    trials: Sequence[FrozenTrial], metrics: Sequence[_Metric], scales: Sequence[_Scale], best: Array
) -> Figure:
    """Rows of upright axes, a few parameters after all metrics."""
    rows = [[*row] for row in np.array_split(np.array(scales, dtype=object), math.ceil(len(scales) / PARALLEL))]
    heads = [_Scale(each.name, *each.window()) for each in metrics]
    figure, axes = panels(len(rows), columns=1, width=max(WIDE, 1.15 * (len(rows[0]) + len(heads))), height=4.2)
    scores = heads[0].at(metrics[0].values)
    shades = SHADES(scores if metrics[0].sign > 0 else 1 - scores)
    order = np.lexsort([metrics[0].sign * metrics[0].values, best])  # the best on top
    for ax, row in zip(axes, rows, strict=True):
        tops = [scale.at(each.values) for scale, each in zip(heads, metrics, strict=True)]
        lines = np.array([*tops, *([scale.read(t) for t in trials] for scale in row)])  # [axes, n]
        for i in order:
            style = {"color": BEST, "lw": 1.8, "label": _chosen(best)} if best[i] else {"color": shades[i], "lw": 0.9}
            ax.plot(lines[:, i], alpha=1 if best[i] else 0.75, **style)
        for x, scale in enumerate([*heads, *row]):
            _upright(ax, x, scale)
        names = [textwrap.fill(s.name.replace("_", "_ "), 12).replace("_ ", "_") for s in [*heads, *row]]
        ax.grid(visible=False)
        ax.spines[:].set_visible(False)
        ax.set_xticks(range(len(names)), names)
        ax.set(ylim=(-0.03, 1.03), xlim=(-0.55, len(names) - 0.8), yticks=[])
        ax.tick_params(length=0, pad=6)
    _legend(figure, axes[0])
    return figure


def _upright(ax: Axes, x: float, scale: _Scale) -> None:
    """An axis of parallel coordinates, its labels on a white ground over the lines."""
    ax.plot([x, x], [0, 1], color="black", lw=0.9, zorder=3)
    for y, label in scale.ticks().items():
        ax.plot([x - 0.03, x], [y, y], color="black", lw=0.9, zorder=3)
        ground: dict[str, Any] = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.8}
        ax.text(x - 0.06, y, label, ha="right", va="center", fontsize=8.5, zorder=4, bbox=ground)


def _pareto(trials: Sequence[FrozenTrial], metrics: Sequence[_Metric], best: Array) -> Figure:
    """The first metric over each of the others, and the front, with the trials' numbers."""
    first, *costs = metrics
    edges = [*first.window(), *first.values[best]]
    window = min(edges), max(edges)
    figure, axes = panels(len(costs), width=WIDE if len(costs) == 1 else 4.6, height=4.0)
    for ax, cost in zip(axes, costs, strict=True):
        low, high = cost.values.min(), cost.values.max()
        scale = _Scale(cost.name, low, high, log=low > 0 and high > 10 * low)
        x = scale.at(cost.values)
        _points(ax, x[~best], first.values[~best], window, 20, color=ORDINARY, alpha=0.7, label="trial")
        front = np.flatnonzero(best)[np.argsort(x[best], kind="stable")]
        if len(costs) == 1:
            ax.step(x[front], first.values[front], where="post" if cost.sign < 0 else "pre", color=BEST, lw=1.2)
        _points(ax, x[front], first.values[front], window, 34, color=BEST, zorder=3, label="Pareto front")
        for i in front[:: len(front) // 12 + 1]:  # more numbers than a dozen would lie on each other
            place = (x[i], first.values[i])
            ax.annotate(str(trials[i].number), place, (5, -10), textcoords="offset points", fontsize=8, color=BEST)
        ticks = scale.ticks()
        ax.set_xticks([*ticks], [*ticks.values()])
        ax.set(xlabel=cost.name, ylabel=first.name, xlim=(-0.04, 1.04))
    _legend(figure, axes[0])
    return figure


def _curves(study: optuna.Study, sign: float, best: set[int]) -> Figure | None:
    """What trials reported along the way; None unless some reported twice."""
    found = {}
    for trial in study.get_trials(deepcopy=False, states=RESULTS):
        steps, values = np.array(sorted(trial.intermediate_values.items())).reshape(-1, 2).T
        if (finite := np.isfinite(values)).any():
            found[trial.number] = (trial.state == TrialState.PRUNED, steps[finite], values[finite])
    if not any(len(steps) > 1 for _, steps, _ in found.values()):
        return None
    figure, (ax,) = panels(1, width=WIDE)
    for number, (pruned, steps, values) in sorted(found.items(), key=lambda item: (item[0] in best, not item[1][0])):
        if number in best:
            ax.plot(steps, values, color=BEST, lw=2.2, label="best trial")
        elif pruned:
            ax.plot(steps, values, color=GREY, lw=1, marker="x", markevery=[-1], ms=5, label="pruned")
        else:
            ax.plot(steps, values, color=ORDINARY, lw=1, alpha=0.45, label="completed")
    extremes = [pick(sign * values) for *_, values in found.values() for pick in (np.min, np.max)]
    low, high = sorted(sign * v for v in _window([*extremes[::2], max(extremes)], 1))
    count_axis(ax)
    ax.set(xlabel="report", ylabel=_names(study)[0], ylim=(low, high))
    _legend(figure, ax)
    return figure


def save_figures(study: optuna.Study, folder: Path) -> list[Path]:
    """The figures as `folder/figures/study_{name}.png`; those that the trials do not suffice for are left out.

    Raises:
        UserError: a file cannot be written.
    """
    figures = study_figures(study)
    return [save_figure(figure, folder / "figures" / f"study_{name}.png") for name, figure in figures.items()]


# --- TensorBoard -----------------------------------------------------------------------------------------------------


class TrialEvents:
    """One trial in TensorBoard: its scalars as they come, and at the end a line of the HPARAMS tab.

    Args:
        folder: the run's; events go to `tensorboard/trial-0007` in it.
        number: of the trial.

    Raises:
        UserError: the folder cannot be written, now or later.
    """

    def __init__(self, folder: Path, number: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and tables and figures need none

        self._step, self.path = 0, folder / "tensorboard" / f"trial-{number:04}"
        with speaking(self.path):
            self._writer: Any = SummaryWriter(str(self.path), flush_secs=10)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Record numbers by tag; NaN and infinities cannot be drawn and are left out."""
        self._step = max(self._step, int(step))
        with speaking(self.path):
            for tag, value in values.items():
                if math.isfinite(value):
                    self._writer.add_scalar(tag, float(value), int(step))

    def finish(self, settings: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Write the trial's settings and what it came to, and close.

        Args:
            settings: name -> number or text; anything else, such as a list, is shown as text.
            metrics:  tag -> value, recorded at the latest step.
        """
        from torch.utils.tensorboard.summary import hparams

        shown = {k: v if type(v) in (int, float) and math.isfinite(v) else _cell(v) for k, v in settings.items()}
        # The first summary would name the columns of the table for all trials, whatever others have: TensorBoard itself
        # collects them from the trials if it is missing.
        _, *session = hparams(shown, {})
        self.add(self._step, metrics)
        with speaking(self.path):
            for summary in session:
                self._writer.file_writer.add_summary(summary)
            self._writer.close()
