"""Scores of evaluations as one CSV, summarised in tables and learning curves; a self-contained HTML page about runs.

The page holds scores, training curves, trials of studies and, from `experiments.meta_report`, meta-trainings side by
side. What its figures share is in `experiments.figures`.

The raw scores are rows `suite, method, task, seed, step, return, score`: `suite` is an environment or task family,
`step` counts environment steps of one lifetime, `return` is undiscounted and per episode, `score` is the return on a
scale where two references are 0 and 1 (empty where there is none). Aggregates are interquartile means over tasks and
seeds with 95 % two-level bootstrap intervals, as `learned_rl.evaluation` explains.
"""

from __future__ import annotations

import csv
import difflib
import io
import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import jinja2
import numpy as np
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.figures import (
    COLOURS,
    as_link,
    count_axis,
    distinct_names,
    embedded,
    legend,
    panels,
    rounded,
    save_figure,
    shortened,
)
from experiments.meta_report import COSTS, HELD_OUT, compare_meta_runs
from experiments.runs import CONFIG, METRICS, SCORES, flatten, read_json, read_metrics
from learned_rl.evaluation import Array, Curves, Interval, iqm_interval, ratio_interval
from learned_rl.files import replacing
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError

Unit = Literal["score", "return"]

COLUMNS = ("suite", "method", "task", "seed", "step", "return", "score")
DASHES = ("-", "--", ":")  # one more for each time COLOURS are used up
QUANTITY = {"score": "normalised score", "return": "return per episode"}
BASELINE = "a2c"
PANELS = 12  # of a run's training curves
TUNED, LOW, HIGH = "tuned/", "_low", "_high"  # tags of what is learned online: means and quartiles
EARNED = {"rollout/ep_rew_mean": "return per episode", "train/reward": "reward per environment step"}  # the first known
FIRST = ("inner/return", "eval/mean_reward", *HELD_OUT, "meta/loss", "meta/grad_norm")
TRIALS, BEST = "trials.csv", "best.toml"
BEST_TRIALS, UNSHOWN = 10, ("state", "worker", "reason", "retry_of")  # rows of their table, and columns left out of it
#: What the figures of a study show, in the order of the page; `figures/study_{name}.png` of a run's folder.
STUDY_FIGURES = {
    "history": "Every trial's score in the order of the trials, and the best so far. Crosses at the foot are trials "
    "that were pruned, diverged or were infeasible; triangles lie outside of the picture.",
    "importances": "How differently the better half of the completed trials and all of them are spread over each "
    "parameter's range (PED-ANOVA; shares of one whole). What the search settled early has a short bar too.",
    "slice": "Every completed trial over each of its parameters, in the range and on the scale that are searched. "
    "Later trials are darker. A best trial at the edge of a range asks for a wider range.",
    "parallel": "A line for each completed trial through its parameters; the better, the darker.",
    "pareto": "What each trial gains and costs. No trial is better than those of the front in everything.",
    "schedule": "The numbers that the best member of a population and its ancestors learned with, over those of all "
    "other members.",
    "curves": "What trials reported along the way. Grey lines end where a trial was pruned.",
}


# --- scores as a CSV -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What one method scored on one suite.

    Attributes:
        returns: curves [C, tasks, seeds] of the return.
        scores:  the same on the normalised scale, of the tasks kept [C, kept, seeds]; None: there is no such scale.
        kept:    [tasks] bool, which tasks are scored.
        label:   the method's name in tables and figures, made distinct where runs disagree about one method.
        runs:    names of the run folders that these numbers come from.
    """

    suite: str
    method: str
    returns: Curves
    scores: Curves | None
    kept: Array
    label: str
    runs: tuple[str, ...] = ()

    def curves(self, unit: Unit) -> Curves | None:
        return self.returns if unit == "return" else self.scores

    def rows(self) -> Iterator[tuple[object, ...]]:
        """Rows of the CSV."""
        column = np.cumsum(self.kept) - 1
        for (c, task, seed), value in np.ndenumerate(self.returns.returns):
            score = ""
            if self.scores is not None and self.kept[task]:
                score = repr(float(self.scores.returns[c, column[task], seed]))
            yield self.suite, self.method, task, seed, int(self.returns.steps[c]), repr(float(value)), score


def append_scores(
    path: Path, suite: str, method: str, curves: Curves, scores: Curves | None = None, kept: Array | None = None
) -> None:
    """Add one method's curves on one suite; rows of the same two names are replaced, so that repeating is harmless.

    Args:
        curves: of returns [C, tasks, seeds].
        scores: normalised, [C, kept, seeds]; None: there is no such scale.
        kept:   [tasks] bool, the tasks that are scored; None: all.

    Raises:
        UserError: the file holds something else, or cannot be written.
    """
    kept = np.ones(curves.returns.shape[1], dtype=bool) if kept is None else kept
    if scores is not None and scores.returns.shape != curves.returns[:, kept].shape:
        raise ValueError(f"scores of {scores.returns.shape} do not fit returns of {curves.returns[:, kept].shape}")
    new = Scores(suite, method, curves, scores, kept, method)
    others = [old for old in read_scores(path) if (old.suite, old.method) != (suite, method)] if path.exists() else []
    table = io.StringIO()
    rows = (row for each in [*others, new] for row in each.rows())
    csv.writer(table, lineterminator="\n").writerows([COLUMNS, *rows])
    with replacing(path) as file:
        file.write(table.getvalue().encode())


def read_scores(path: Path) -> list[Scores]:
    """The curves in a CSV of scores, in the order of first appearance.

    Raises:
        UserError: it cannot be read, has other columns, a cell that is no number, or gaps.
    """
    groups: dict[tuple[str, str], list[list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.reader(file)
            if (header := tuple(next(table, ()))) != COLUMNS:
                raise UserError(f"{path} has the columns {', '.join(header)}: expected {', '.join(COLUMNS)}.")
            for suite, method, task, seed, step, value, score in table:
                row = [float(cell) for cell in (task, seed, step, value, score or "0", score != "")]
                groups.setdefault((suite, method), []).append(row)
    except ValueError as error:
        raise UserError(f"{path}, line {table.line_num}: expected names, then numbers ({error}).") from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    return [_scores(path, suite, method, np.array(rows)) for (suite, method), rows in groups.items()]


def _scores(path: Path, suite: str, method: str, rows: Array) -> Scores:
    """Curves from rows [n, (task, seed, step, return, score, whether scored)] in any order."""
    axes = [np.unique(rows[:, i], return_inverse=True) for i in (2, 0, 1)]
    shape = tuple(len(values) for values, _ in axes)
    if len(np.unique(rows[:, :3], axis=0)) != len(rows) or len(rows) != math.prod(shape):
        raise UserError(
            f"{path}: {method!r} on {suite!r} has {len(rows)} rows, expected one for each of {shape[0]} steps x "
            f"{shape[1]} tasks x {shape[2]} seeds."
        )
    grids = np.zeros((3, *shape))
    grids[:, axes[0][1], axes[1][1], axes[2][1]] = rows.T[3:]
    steps, kept = axes[0][0].astype(int), grids[2].any((0, 2))
    if not grids[2][:, kept].all():
        raise UserError(f"{path}: {method!r} on {suite!r} has tasks of which only some rows have a score.")
    scores = Curves(steps, grids[1][:, kept]) if kept.any() else None
    return Scores(suite, method, Curves(steps, grids[0]), scores, kept, method)


def merge_scores(folders: Sequence[Path]) -> list[Scores]:
    """Scores of several runs. A method whose numbers differ between runs is kept apart, with the run in its label."""
    groups: dict[tuple[str, str], list[Scores]] = {}
    for name, folder in zip(distinct_names(folders), folders, strict=True):
        for new in read_scores(folder / SCORES) if (folder / SCORES).exists() else []:
            group = groups.setdefault((new.suite, new.method), [])
            twin = next((i for i, old in enumerate(group) if [*old.rows()] == [*new.rows()]), None)
            if twin is None:
                group.append(replace(new, runs=(name,)))
            else:
                group[twin] = replace(group[twin], runs=(*group[twin].runs, name))
    for group in groups.values():
        if len(group) > 1:
            group[:] = [replace(each, label=f"{each.method} ({', '.join(each.runs)})") for each in group]
    return [each for group in groups.values() for each in group]


# --- their summary as a table ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One line of a summary: interquartile means, and their ratios to a baseline's on the same tasks and seeds."""

    suite: str
    method: str
    tasks: int
    seeds: int
    final: Interval
    area: Interval
    final_ratio: Interval | None
    area_ratio: Interval | None

    def cells(self) -> list[str]:
        """What a table shows. A single run has no interval, and a ratio that means nothing is a dash."""
        single = self.tasks * self.seeds == 1
        intervals = (self.final, self.area, self.final_ratio, self.area_ratio)
        shown = [_text(x, digits, single) for x, digits in zip(intervals, (3, 3, 2, 2), strict=True)]
        return [self.suite, self.method, f"{self.tasks} × {self.seeds}", *shown]


def _text(x: Interval | None, digits: int, single: bool) -> str:
    """The interval with `digits` decimals, fewer for numbers above ten."""
    if x is None:
        return "–"
    places = max(0, digits - math.floor(math.log10(max(abs(x.point), 1)))) if math.isfinite(x.point) else 0
    point, low, high = (f"{value:.{places}f}" for value in (x.point, x.low, x.high))
    return f"{point} (one run)" if single else f"{point} [{low}, {high}]"


def summary_table(scores: Sequence[Scores], baseline: str | None = None, unit: Unit = "return") -> list[Row]:
    """A row for each suite and method that was measured in `unit`.

    Ratios are given where the baseline was measured on as many tasks and seeds and its interval lies above zero.

    Raises:
        UserError: `baseline` names none of the methods.
    """
    methods = {each.method for each in scores}
    if baseline is not None and methods and baseline not in methods:
        raise unknown("baseline", baseline, methods)
    rows = []
    for each in scores:
        if (curves := each.curves(unit)) is None:
            continue
        other = _baseline(each, scores, baseline)
        against = None if other is None else other.curves(unit)
        final, area = _whole_life(curves)
        tasks, seeds = final.shape
        base = (None, None) if against is None else _whole_life(against)
        ratios = (_ratio(final, base[0]), _ratio(area, base[1]))
        rows.append(Row(each.suite, each.label, tasks, seeds, iqm_interval(final), iqm_interval(area), *ratios))
    return sorted(rows, key=lambda row: row.suite)


def _whole_life(curves: Curves) -> tuple[Array, Array]:
    """Final value and mean over the lifetime, [tasks, seeds] each; the same where there is only one checkpoint."""
    return curves.final, curves.area if len(curves.steps) > 1 else curves.final


def _baseline(each: Scores, scores: Sequence[Scores], name: str | None) -> Scores | None:
    """The baseline on the same suite: of the same run where runs disagree, and none where that leaves a choice."""
    found = [x for x in scores if x.suite == each.suite and x.method == name]
    found = [x for x in found if set(x.runs) & set(each.runs)] or found
    return found[0] if len(found) == 1 and each.method != name else None


def _ratio(values: Array, baseline: Array | None) -> Interval | None:
    if baseline is None or baseline.shape != values.shape or not iqm_interval(baseline).low > 0:
        return None
    return ratio_interval(values, baseline)


def headings(baseline: str | None, unit: Unit) -> list[str]:
    """Names of the columns of `Row.cells`."""
    versus = baseline or "baseline"
    means = [f"final {QUANTITY[unit]}", "mean over the lifetime"]
    return ["suite", "method", "tasks × seeds", *means, f"final / {versus}", f"mean / {versus}"]


def print_table(
    rows: Sequence[Row], baseline: str | None = None, unit: Unit = "return", console: Console | None = None
) -> None:
    """The summary on the console; columns of ratios only where there are any."""
    end = 7 if any(row.final_ratio or row.area_ratio for row in rows) else 5
    table = Table(caption="interquartile mean [95 % interval over tasks and seeds]", box=SIMPLE, padding=0)
    for heading in headings(baseline, unit)[1:end]:
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=heading != "method", overflow="fold")
    table.columns[0].justify = "left"
    for suite, group in itertools.groupby(rows, lambda row: row.suite):
        table.add_row(Text(suite, style="bold"))
        for row in group:  # intervals go under their numbers, so that all columns fit a terminal
            table.add_row(*(Text(cell.replace(" [", "\n[")) for cell in row.cells()[1:end]))
        table.add_section()
    (console or Console()).print(table)


# --- curves ----------------------------------------------------------------------------------------------------------


def learning_curve_figure(scores: Sequence[Scores], unit: Unit = "return") -> Figure:
    """A panel for each suite: interquartile mean over tasks and seeds along the lifetime, with its 95 % interval.

    Raises UserError if nothing was measured in `unit`.
    """
    shown = [(each, curves) for each in scores if (curves := each.curves(unit)) is not None]
    if not shown:
        raise UserError(f"No {unit} to draw: expected at least one method that was measured.")
    suites, labels = sorted({s.suite for s, _ in shown}), [*dict.fromkeys(s.label for s, _ in shown)]
    figure, axes = panels(len(suites))
    handles: dict[str, Artist] = {}
    for each, curves in shown:
        ax, i = axes[suites.index(each.suite)], labels.index(each.label)
        colour, dash = COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]
        low, point, high = np.array([(p.low, p.point, p.high) for p in map(iqm_interval, curves.returns)]).T
        (handles[each.label],) = ax.plot(curves.steps, point, dash, color=colour, lw=1.8, marker="o"[len(point) > 1 :])
        ax.fill_between(curves.steps, low, high, color=colour, alpha=0.18, lw=0)
    for ax, suite in zip(axes, suites, strict=True):
        count_axis(ax)
        ax.set(title=suite, xlabel="environment steps of one lifetime", ylabel=f"{QUANTITY[unit]} (IQM)")
    legend(figure, handles)
    return figure


def metrics_figure(run_folder: Path) -> Figure:
    """Training curves out of metrics.csv, a panel for each tag; raises UserError if nothing was logged."""
    found = read_metrics(run_folder)
    if not found:
        raise UserError(f"No metrics in {run_folder / METRICS}: expected a run that has logged at least one step.")
    shown = [tag for tag in found if tag not in COSTS and not tag.startswith(TUNED)]
    order = sorted(
        shown, key=lambda tag: (FIRST.index(tag) if tag in FIRST else len(FIRST), tag.startswith("inner/"), tag)
    )
    outer = any(tag.startswith(("meta/", "es/")) for tag in found)
    figure, axes = panels(min(len(order), PANELS))
    for ax, tag in zip(axes, order, strict=False):
        steps, values = found[tag]
        smooth = len(values) >= 50
        ax.plot(steps, values, color=COLOURS[0], alpha=0.3 if smooth else 1, lw=1, marker="" if len(steps) > 1 else "o")
        if smooth:
            ax.plot(steps, running_mean(values, len(values) // 25), color=COLOURS[0], lw=1.8)
        count_axis(ax)
        ax.set(title=tag, xlabel="meta-steps" if outer else "environment steps")
    if len(order) > PANELS:
        figure.supxlabel(f"{PANELS} of {len(order)} logged numbers; the others are in {METRICS}", fontsize=9)
    return figure


def tuned_figure(run_folder: Path) -> Figure | None:
    """The course of every number that was learned online, mean and middle half of the seeds, beside what the agents
    earned meanwhile; None where none was."""
    found = read_metrics(run_folder)
    names = [tag for tag in found if tag.startswith(TUNED) and not tag.endswith((LOW, HIGH))]
    if not names:
        return None
    earned = next(tag for tag in EARNED if tag in found and np.isfinite(found[tag][1]).any())
    figure, axes = panels(1 + len(names))
    for ax, tag in zip(axes, (earned, *names), strict=True):
        steps, values = found[tag]
        width = max(len(values) // 100, 1)
        ax.plot(steps, running_mean(values, width), color=COLOURS[0], lw=1.6)
        if tag in names:
            low, high = (running_mean(found[tag + end][1], width) for end in (LOW, HIGH))
            ax.fill_between(steps, low, high, color=COLOURS[0], alpha=0.2, lw=0)
        count_axis(ax)
        ax.set(title=EARNED.get(tag, tag.removeprefix(TUNED)), xlabel="environment steps of one lifetime")
    figure.supxlabel("mean over seeds; the band holds the middle half of them", fontsize=9)
    return figure


def running_mean(values: Array, width: int) -> Array:
    """Mean of the finite values [n] within `width // 2 < n / 2` of each place; NaN where there is none."""
    finite, window = np.isfinite(values), np.ones(width // 2 * 2 + 1)
    total, count = (np.convolve(x, window, "same") for x in (np.where(finite, values, 0.0), finite))
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


# --- the page --------------------------------------------------------------------------------------------------------


def _checked(folder: Path) -> Path:
    """The folder, if it holds a run."""
    if (folder / CONFIG).exists():
        return folder
    others = [p.parent.name for p in folder.parent.glob(f"*/{CONFIG}")]
    near = difflib.get_close_matches(folder.name, others, n=1)
    hint = f"did you mean {folder.parent / near[0]}?" if near else "expected a folder that a command wrote with --out."
    raise UserError(f"{folder} holds no run (no {CONFIG} in it): {hint}")


def _trained(folder: Path) -> bool:
    """Whether more was logged than evaluations, which have figures of their own."""
    return any(not tag.startswith("eval/") for tag in read_metrics(folder))


def _described(folder: Path, out: Path) -> dict[str, Any]:
    """What the page says about one run."""
    try:
        text = {name: (folder / f"{name}.txt").read_text(encoding="utf-8").strip() for name in ("command", "git")}
    except OSError as error:
        raise UserError(f"Cannot read {error.filename}: {error.strerror}.") from error
    data = [folder / name for name in (SCORES, METRICS, TRIALS, BEST)]
    files = [os.path.relpath(path, out.parent) for path in data if path.exists()]
    return text | {
        "name": folder.resolve().name,
        "seed": read_json(folder / "seed"),
        "versions": read_json(folder / "versions.json"),
        "config": flatten(read_json(folder / CONFIG)),
        "files": [Path(file).as_posix() for file in files],
        "training": embedded(metrics_figure(folder)) if _trained(folder) else None,
        "tuned": embedded(tuned) if (tuned := tuned_figure(folder)) is not None else None,
        "study": _study(folder),
    }


def _study(folder: Path) -> dict[str, Any] | None:
    """What the page says about the trials of a study; None where the run was none."""
    pictures = {folder / "figures" / f"study_{name}.png": caption for name, caption in STUDY_FIGURES.items()}
    shown = [(as_link(path.read_bytes()), caption) for path, caption in pictures.items() if path.exists()]
    if not shown and not (folder / TRIALS).exists():
        return None
    return {"figures": shown, "ends": {}, "head": [], "rows": []} | _trials(folder)


def _trials(folder: Path) -> dict[str, Any]:
    """How many trials ended how, and the best ones as a table; nothing without a CSV of trials."""
    path = folder / TRIALS
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        trials = [dict(zip(head, row, strict=True)) for row in rows]
        ended = Counter("completed" if t["state"] == "COMPLETE" else _reason(t["reason"]) for t in trials)
        metric, complete = head[2], [t for t in trials if t["state"] == "COMPLETE"]
        sign = 1 if read_json(folder / CONFIG).get("metrics", {}).get(metric) == "minimize" else -1
        best = sorted(complete, key=lambda t: sign * float(t[metric]))[:BEST_TRIALS]
    except (OSError, ValueError, LookupError) as error:
        raise UserError(f"Cannot read {path}, expected a table as `learned-rl tune` writes it: {error}.") from error
    names = [name for name in head if name not in UNSHOWN and any(t[name] for t in best)]
    ends = {kind: ended[kind] for kind in ("completed", "pruned", "diverged", "infeasible") if ended[kind]}
    return {"ends": ends, "head": shortened(names), "rows": [[rounded(t[name]) for name in names] for t in best]}


def _reason(text: str) -> str:
    """Why a trial has no score: its reason's first word, if that says more than that it was pruned."""
    word = text.partition(":")[0]
    return word if word in ("diverged", "infeasible") else "pruned"


def conclude(folder: Path, figure: Path, baseline: str | None = None, unit: Unit | None = None) -> Path:
    """Print the summary of a run's scores, draw them into the folder, and write its page; returns the page.

    Args:
        figure: where the learning curves go, within the folder.
        unit:   None: normalised scores where there are any.
    """
    scores = read_scores(folder / SCORES)
    unit = unit or ("score" if any(each.scores is not None for each in scores) else "return")
    print_table(summary_table(scores, baseline, unit), baseline, unit)
    save_figure(learning_curve_figure(scores, unit), folder / figure)
    if (tuned := tuned_figure(folder)) is not None:
        save_figure(tuned, (folder / figure).with_name("tuned.png"))
    return write_report([folder], folder / "report.html", baseline)


def write_report(folders: Sequence[Path], out: Path, baseline: str | None = None) -> Path:
    """An HTML page without outside parts about one or several runs: what was run, tables, figures, where the data are.

    Args:
        out:      the page to write.
        baseline: method to whose numbers the others' are related; None: `BASELINE` where it was measured.

    Raises:
        UserError: no folder, a folder that is no run, an unknown baseline, or a page that cannot be written.
    """
    if not folders:
        raise UserError("A report needs at least one run folder: none was given.")
    folders = [_checked(folder) for folder in dict.fromkeys(folders)]
    scores = merge_scores(folders)
    baseline = baseline or (BASELINE if BASELINE in {each.method for each in scores} else None)
    results = []
    for unit in get_args(Unit):
        if rows := summary_table(scores, baseline, unit):
            picture = embedded(learning_curve_figure(scores, unit))
            results.append({"quantity": QUANTITY[unit], "head": headings(baseline, unit), "rows": rows, "png": picture})
    source = (Path(__file__).parent / "templates" / "report.html.j2").read_text(encoding="utf-8")
    template = jinja2.Template(source, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    described, compared = [_described(folder, out) for folder in folders], compare_meta_runs(folders, out)
    page = template.render(runs=described, results=results, compared=compared, baseline=baseline)
    with replacing(out) as file:
        file.write(page.encode())
    return out
