"""Scores on disk, their summary, the figures, and a page that needs nothing but itself."""

from __future__ import annotations

import base64
import csv
import io
import math
import os
import re
import struct
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from rich.console import Console

from experiments.figures import COLOURS, save_figure
from experiments.meta_report import (
    AREA,
    ENVIRONMENT_STEPS,
    FINAL,
    META_COLUMNS,
    MINUTES,
    meta_training_figure,
    read_meta_runs,
)
from experiments.meta_train import MetaTrain, meta_train
from experiments.recipes import Recipe
from experiments.report import (
    BEST,
    COLUMNS,
    PANELS,
    STUDY_FIGURES,
    TRIALS,
    append_scores,
    learning_curve_figure,
    merge_scores,
    metrics_figure,
    print_table,
    read_scores,
    running_mean,
    summary_table,
    write_report,
)
from experiments.runs import SCORES, Run
from learned_rl.evaluation import Curves, iqm_interval, ratio_interval
from learned_rl.ppo import PPOConfig
from learned_rl.types import UserError
from meta_optimizers.trainer import MetaTrainConfig


def curves(seed: int = 0, tasks: int = 5, seeds: int = 3, shift: float = 2.0) -> Curves:
    """Five rising checkpoints with noise."""
    noise = np.random.default_rng(seed).normal(size=(5, tasks, seeds))
    return Curves(np.arange(5) * 100, np.arange(5.0)[:, None, None] + shift + noise / 3)


def scored(original: Curves, kept: np.ndarray) -> Curves:
    return Curves(original.steps, original.returns[:, kept] / 7)


def begin(folder: Path, seed: int = 0, config: dict | None = None) -> Run:
    return Run.create(folder, command=["learned-rl", "train", "<b>&"], config=config or {"a": {"b": "<i>"}}, seed=seed)


def test_scores_return_exactly(tmp_path):
    path, kept = tmp_path / SCORES, np.array([True, False, True, True, False])
    one, two = curves(1), curves(2)
    one.returns[0, 0, 0] = math.nan  # a broken agent
    append_scores(path, "grid, dense", "lpg", one, scored(one, kept), kept)
    append_scores(path, "catch", "ppo", two)
    first, second = read_scores(path)
    assert (first.suite, first.method, second.suite, second.method) == ("grid, dense", "lpg", "catch", "ppo")
    np.testing.assert_array_equal(first.returns.returns, one.returns)
    np.testing.assert_array_equal(first.returns.steps, one.steps)
    assert first.scores is not None and second.scores is None
    np.testing.assert_array_equal(first.scores.returns, scored(one, kept).returns)
    np.testing.assert_array_equal(first.kept, kept)
    np.testing.assert_array_equal(second.returns.returns, two.returns)
    lines = path.read_text().splitlines()
    assert lines[0] == "suite,method,task,seed,step,return,score" == ",".join(COLUMNS)
    assert len(lines) == 1 + 2 * one.returns.size and lines[1] == '"grid, dense",lpg,0,0,0,nan,nan'


def test_appending_again_replaces(tmp_path):
    path = tmp_path / SCORES
    for seed in (1, 2):
        append_scores(path, "grid", "lpg", curves(seed))
        append_scores(path, "grid", "ppo", curves(3))
    ppo, lpg = sorted(read_scores(path), key=lambda each: each.method, reverse=True)
    np.testing.assert_array_equal(lpg.returns.returns, curves(2).returns)
    np.testing.assert_array_equal(ppo.returns.returns, curves(3).returns)
    with pytest.raises(ValueError, match="do not fit"):
        append_scores(path, "grid", "lpg", curves(1), curves(1), np.array([True, False, True, True, False]))


def test_the_order_of_rows_does_not_matter(tmp_path):
    path = tmp_path / SCORES
    append_scores(path, "grid", "lpg", curves(1))
    header, *rows = path.read_text().splitlines()
    path.write_text("\n".join([header, *np.random.default_rng(0).permutation(rows)]) + "\n")
    np.testing.assert_array_equal(read_scores(path)[0].returns.returns, curves(1).returns)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: ["a,b", *lines[1:]], r"columns a, b: expected suite, method"),
        (lambda lines: [*lines[:-1], "grid,lpg,0,0,100,much,"], r"line 76: expected names, then numbers .*much"),
        (lambda lines: [*lines[:-1], "grid,lpg,0"], "line 76: expected names"),
        (lambda lines: lines[:-1], r"74 rows, expected one for each of 5 steps x 5 tasks x 3 seeds"),
        (lambda lines: [*lines[:-1], lines[1]], r"75 rows, expected one for each of 5 steps"),
        (lambda lines: [*lines[:-1], lines[-1] + "0.5"], "only some rows have a score"),
        (lambda lines: [], "columns : expected"),
    ],
)
def test_damaged_scores_are_one_sentence(tmp_path, damage, message):
    path = tmp_path / SCORES
    append_scores(path, "grid", "lpg", curves(1))
    path.write_text("".join(line + "\n" for line in damage(path.read_text().splitlines())))
    with pytest.raises(UserError, match=message):
        read_scores(path)


def measured(tmp_path: Path, **methods: Curves) -> Path:
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    begin(folder).close()
    for method, each in methods.items():
        append_scores(folder / SCORES, "grid", method, each)
    return folder


def test_summary_is_the_evaluations_own_intervals(tmp_path):
    path, kept = tmp_path / SCORES, np.array([True, True, False, True, True])
    lpg, ppo = curves(1), curves(2)
    append_scores(path, "grid", "lpg", lpg, scored(lpg, kept), kept)
    append_scores(path, "grid", "ppo", ppo, scored(ppo, kept), kept)
    append_scores(path, "catch", "lpg", lpg)
    rows = summary_table(read_scores(path), baseline="ppo", unit="return")
    assert [(r.suite, r.method, r.tasks, r.seeds) for r in rows] == [
        ("catch", "lpg", 5, 3),
        ("grid", "lpg", 5, 3),
        ("grid", "ppo", 5, 3),
    ]
    catch, row, base = rows
    assert row.final == iqm_interval(lpg.final) and row.area == iqm_interval(lpg.area)
    assert row.final_ratio == ratio_interval(lpg.final, ppo.final)
    assert row.area_ratio == ratio_interval(lpg.area, ppo.area)
    assert base.final_ratio is None and catch.final_ratio is None
    only = summary_table(read_scores(path), baseline="ppo", unit="score")
    assert [(r.suite, r.method, r.tasks) for r in only] == [("grid", "lpg", 4), ("grid", "ppo", 4)]
    assert only[0].final == iqm_interval(lpg.final[kept] / 7)
    assert all(r.final_ratio is None for r in summary_table(read_scores(path)))


def test_ratios_that_mean_nothing_are_left_out(tmp_path):
    path = tmp_path / SCORES
    append_scores(path, "negative", "lpg", curves(1, shift=-20))
    append_scores(path, "negative", "ppo", curves(2, shift=-30))
    append_scores(path, "fewer", "lpg", curves(1))
    append_scores(path, "fewer", "ppo", curves(2, tasks=4))
    assert all(r.final_ratio is None and r.area_ratio is None for r in summary_table(read_scores(path), "ppo"))
    with pytest.raises(UserError, match=r"unknown baseline 'pppo'.*'ppo'"):
        summary_table(read_scores(path), "pppo")


def test_one_checkpoint_and_one_run_have_no_area_and_no_interval(tmp_path):
    path = tmp_path / SCORES
    append_scores(path, "grid", "lpg", Curves(np.array([100]), np.full((1, 1, 1), 12.3456)))
    (row,) = summary_table(read_scores(path))
    assert row.area.point == row.final.point == pytest.approx(12.3456, rel=1e-12)
    assert row.cells() == ["grid", "lpg", "1 × 1", "12.35 (one run)", "12.35 (one run)", "–", "–"]
    figure = learning_curve_figure(read_scores(path))
    assert figure.axes[0].lines[0].get_marker() == "o"  # a line through one point would not show


def test_merging_keeps_apart_what_differs_and_joins_what_agrees(tmp_path):
    shared = curves(9)
    a = measured(tmp_path, ppo=shared, lpg=curves(1))
    b = measured(tmp_path, ppo=shared, lpg=curves(2), dpo=curves(3))
    found = {each.label: each for each in merge_scores([a, b])}
    assert set(found) == {"ppo", f"lpg ({a.name})", f"lpg ({b.name})", "dpo"}
    np.testing.assert_array_equal(found[f"lpg ({b.name})"].returns.returns, curves(2).returns)
    rows = {r.method: r for r in summary_table(merge_scores([a, b]), "ppo")}
    assert rows["dpo"].final_ratio == ratio_interval(curves(3).final, shared.final)


def test_each_run_is_related_to_its_own_baseline(tmp_path):
    a = measured(tmp_path, ppo=curves(4), lpg=curves(1))
    b = measured(tmp_path, ppo=curves(5), lpg=curves(2))
    rows = {r.method: r for r in summary_table(merge_scores([a, b]), "ppo")}
    assert rows[f"lpg ({a.name})"].final_ratio == ratio_interval(curves(1).final, curves(4).final)
    assert rows[f"lpg ({b.name})"].final_ratio == ratio_interval(curves(2).final, curves(5).final)
    assert rows[f"ppo ({a.name})"].final_ratio is None


def test_the_printed_table_fits_a_terminal(tmp_path):
    folder = measured(tmp_path, ppo=curves(4, shift=100), lpg=curves(1, shift=100))
    out = io.StringIO()
    rows = summary_table(merge_scores([folder]), "ppo")
    print_table(rows, "ppo", console=Console(file=out, width=80))
    text = out.getvalue()
    assert f"{rows[1].final.point:.1f}" in text and f"[{rows[1].final.low:.1f}, {rows[1].final.high:.1f}]" in text
    assert f"{rows[1].area_ratio.point:.2f}" in text and "5 × 3" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_learning_curves_draw_the_interquartile_mean_and_its_interval(tmp_path):
    path = tmp_path / SCORES
    lpg, ppo = curves(1), curves(2)
    append_scores(path, "grid", "ppo", ppo)
    append_scores(path, "grid", "lpg", lpg)
    append_scores(path, "catch", "lpg", ppo)
    figure = learning_curve_figure(read_scores(path))
    catch, grid = figure.axes
    assert (catch.get_title(), grid.get_title()) == ("catch", "grid")
    assert "environment steps" in grid.get_xlabel() and grid.get_ylabel() == "return per episode (IQM)"
    points = [iqm_interval(at) for at in lpg.returns]
    np.testing.assert_array_equal(grid.lines[1].get_data(), (lpg.steps, [p.point for p in points]))
    band = grid.collections[1].get_paths()[0].vertices
    assert {p.low for p in points} | {p.high for p in points} <= set(band[:, 1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ppo", "lpg"]
    drawn = {to_hex(catch.lines[0].get_color()), to_hex(grid.lines[1].get_color())}
    assert drawn == {COLOURS[1].lower()}  # a method keeps its colour from panel to panel
    with pytest.raises(UserError, match="No score to draw"):
        learning_curve_figure(read_scores(path), "score")


def test_training_curves_show_what_was_logged(tmp_path):
    with begin(tmp_path / "run") as run:
        with pytest.raises(UserError, match="No metrics"):
            metrics_figure(run.path)
        for step in range(60):
            run.log(step, {"meta/loss": 3.0 if step != 30 else math.nan} | {f"zeta{i}": i for i in range(PANELS)})
        run.log(60, {"inner/return": 5.0})
    figure = metrics_figure(tmp_path / "run")
    assert [ax.get_title() for ax in figure.axes][:3] == ["inner/return", "meta/loss", "zeta0"]
    assert len(figure.axes) == PANELS and "12 of 14" in figure._supxlabel.get_text()
    assert figure.axes[0].lines[0].get_marker() == "o"
    assert {ax.get_xlabel() for ax in figure.axes} == {"meta-steps"}
    raw, smooth = figure.axes[1].lines
    assert np.isnan(raw.get_ydata()[30]) and smooth.get_ydata().tolist() == [3.0] * 60


def test_running_mean_by_hand():
    values = np.array([1.0, 2.0, math.nan, 4.0, 9.0, math.inf, math.nan, math.nan, 5.0])
    expected = [1.5, 1.5, 3.0, 6.5, 6.5, 9.0, math.nan, 5.0, 5.0]
    np.testing.assert_allclose(running_mean(values, 3), expected, rtol=1e-15)


def test_figures_are_saved_at_150_dots_per_inch(tmp_path):
    folder = measured(tmp_path, lpg=curves(1))
    figure = learning_curve_figure(merge_scores([folder]))
    data = save_figure(figure, tmp_path / "deep" / "curves.png").read_bytes()
    assert data[:4] == b"\x89PNG"
    assert struct.unpack(">2I", data[16:24]) == tuple(int(150 * inch) for inch in figure.get_size_inches())


class Links(HTMLParser):
    """Collects where a page points to, and checks that its tags are balanced."""

    def __init__(self) -> None:
        super().__init__()
        self.images: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        found = dict(attrs)
        if tag == "img":
            self.images.append(found["src"])
        if "href" in found:
            self.links.append(found["href"])
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_report_stands_alone(tmp_path):
    a, b = (tmp_path / name for name in ("runs/a", "runs/b"))
    for seed, folder in enumerate((a, b)):
        with begin(folder, seed) as run:
            run.log(0, {"meta/loss": 1.0})
        append_scores(folder / SCORES, "grid", "lpg", curves(seed), scored(curves(seed), np.arange(5) >= 0))
        append_scores(folder / SCORES, "grid", "ppo", curves(7))
    out = write_report([a, b], tmp_path / "pages" / "report.html", baseline="ppo")
    text = out.read_text()
    page = Links()
    page.feed(text)
    assert page.open == [] and not {"script", "link", "iframe"} & set(page.tags) and "url(" not in text
    assert len(page.images) == 2 + 2  # curves in either unit, and training of either run
    for image in page.images:
        kind, data = image.split(",")
        assert kind == "data:image/png;base64" and base64.b64decode(data)[:4] == b"\x89PNG"
    assert page.links == [
        "../runs/a/scores.csv",
        "../runs/a/metrics.csv",
        "../runs/b/scores.csv",
        "../runs/b/metrics.csv",
    ]
    assert all(os.path.exists(out.parent / link) for link in page.links)
    assert str(tmp_path) not in text
    words = re.sub(r"data:image[^\"]*", "", text)
    assert "Ratios to ppo resample" in words
    assert "learned-rl train &#39;&lt;b&gt;&amp;&#39;" in words and "&lt;i&gt;" in words and "<i>" not in words
    assert "a.b" in words and "torch " in words and (a / "git.txt").read_text().strip() in words
    for unit in ("score", "return"):
        for row in summary_table(merge_scores([a, b]), "ppo", unit):
            assert all("<td>{}</td>".format(cell.replace(" [", "\n[")) in words for cell in row.cells())


def test_ratios_refer_to_a2c_unless_told_otherwise(tmp_path):
    folder = measured(tmp_path, lpg=curves(1), ppo=curves(2), a2c=curves(3))
    for named, versus in ((None, "a2c"), ("ppo", "ppo")):
        page = write_report([folder], tmp_path / "report.html", named).read_text()
        assert f"<th>final / {versus}</th>" in page and f"Ratios to {versus} resample" in page
    without = measured(tmp_path, lpg=curves(1), ppo=curves(2))
    assert "<th>final / baseline</th>" in write_report([without], tmp_path / "report.html").read_text()
    with pytest.raises(UserError, match=r"unknown baseline 'a3c'"):
        write_report([folder], tmp_path / "report.html", "a3c")


def test_evaluations_are_not_shown_as_training(tmp_path):
    with begin(tmp_path / "run") as run:
        run.log(0, {"eval/lpg": 1.0})
        path = write_report([run.path], tmp_path / "report.html")
        assert "Nothing was logged while training" in path.read_text()
        run.log(0, {"eval/mean_reward": 1.0, "time/fps": 1.0})
        assert "Nothing was logged" not in write_report([run.path], path).read_text()


def meta_run(
    folder: Path, name: str = "", seed: int = 0, validations: int = 4, tags: tuple[str, ...] = (), **settings: object
) -> Path:
    """A meta-training whose final score is 0.1, 0.2, ... but for a drop at the end; `tags`: costs that are logged."""
    named = {"name": name} if name else {}
    config = {"family": "grid/small", "meta_steps": validations, "train": {"estimator": named | settings}}
    with begin(folder, seed, config) as run:
        for k in range(1, validations + 1):
            final = 0.1 * k if k < validations else 0.0
            costs = {ENVIRONMENT_STEPS: 1000.0 * k, MINUTES: k / 4}
            run.log(5 * k - 1, {"meta/grad_norm": 1.0})
            run.log(5 * k, {FINAL: final, AREA: final / 2} | {tag: costs[tag] for tag in tags})
    return folder


COSTED = (ENVIRONMENT_STEPS, MINUTES)


def test_meta_trainings_are_drawn_over_what_they_cost(tmp_path):
    one = meta_run(tmp_path / "one", "truncated", tags=COSTED)
    two = meta_run(tmp_path / "two", "pes", validations=9, tags=COSTED)
    figure = meta_training_figure(read_meta_runs([one, two]))
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes] == [
        ("environment steps of meta-training", "held-out final score"),
        ("minutes of meta-training", "held-out final score"),
        ("environment steps of meta-training", "held-out mean over the lifetime"),
        ("minutes of meta-training", "held-out mean over the lifetime"),
    ]
    steps, minutes, area, _ = ([line.get_xydata().tolist() for line in ax.lines] for ax in figure.axes)
    assert steps[0] == [[1000.0, 0.1], [2000.0, 0.2], [3000.0, 0.1 * 3], [4000.0, 0.0]]
    assert minutes[0] == [[x / 4000, y] for x, y in steps[0]] and area[0] == [[x, y / 2] for x, y in steps[0]]
    assert len(steps[1]) == 9 and {ax.get_xscale() for ax in figure.axes} == {"linear"}
    assert [line.get_linestyle() for line in figure.axes[0].lines] == ["-", "--"], "differentiates, perturbs"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["truncated", "pes"]


def test_a_run_ten_times_as_long_makes_the_axis_logarithmic(tmp_path):
    short = meta_run(tmp_path / "short", "truncated", validations=2, tags=COSTED)
    for validations, scale in ((20, "linear"), (21, "log")):
        long = meta_run(tmp_path / f"long{validations}", "pes", validations=validations, tags=COSTED)
        assert {ax.get_xscale() for ax in meta_training_figure(read_meta_runs([short, long])).axes} == {scale}
    elsewhere = begin(tmp_path / "elsewhere", config={"family": "grid/medium"})
    elsewhere.log(400, {FINAL: 1.0, ENVIRONMENT_STEPS: 1e6, MINUTES: 900.0})
    figure = meta_training_figure(read_meta_runs([short, elsewhere.path]))
    assert {ax.get_xscale() for ax in figure.axes} == {"linear"}, "another family has panels of its own"
    assert [ax.get_title() for ax in figure.axes[::2]] == ["grid/medium", "", "grid/small", ""]
    assert [len(ax.lines) for ax in figure.axes] == [1] * 8


def test_labels_of_meta_trainings_tell_them_apart(tmp_path):
    folders = [
        meta_run(tmp_path / "a", "truncated", window=1, decay=0.123456),
        meta_run(tmp_path / "b", "truncated", window=5, decay=0.123456, validations=7),
        meta_run(tmp_path / "c", "truncated", window=5, decay=0.123456, later=1),
        meta_run(tmp_path / "d", "es", window=100),
        meta_run(tmp_path / "e", "pes", x={"coef": 1.0}, y={"coef": True}, seed=3),
        meta_run(tmp_path / "f", "pes", x={"coef": 0.5}, y={"coef": False}),
        *(meta_run(tmp_path / f"g{k}", "nres", a=k, b=k, c=k, d=k) for k in range(2)),
        meta_run(tmp_path / "h", window=3),
    ]
    assert [run.label for run in read_meta_runs(folders)] == [
        "truncated, window 1",
        "truncated, window 5 (b)",  # the number of meta-steps is no setting that a label could name
        "truncated, window 5 (c)",
        "es",
        "pes, train.estimator.x.coef 1, train.estimator.y.coef True, seed 3",
        "pes, train.estimator.x.coef 0.5, train.estimator.y.coef False, seed 0",
        "nres (g0)",
        "nres (g1)",
        "h",
    ]


def test_the_estimator_of_a_run_that_has_none_in_its_config_is_in_its_command(tmp_path):
    meta_run(tmp_path / "run", window=3)
    (tmp_path / "run" / "command.txt").write_text("learned-rl meta-train lpg --estimator es --out 'a b'\n--resume\n")
    (run,) = read_meta_runs([tmp_path / "run"])
    assert (run.estimator, run.label, run.dash) == ("es", "es", "--")


@pytest.mark.slow
def test_a_meta_training_records_its_estimator_and_its_costs(tmp_path):
    agent = PPOConfig(n_envs=2, n_steps=4, n_epochs=1, n_minibatches=1)
    train = MetaTrainConfig(lifetimes=2, horizon=4, agent=agent)
    lengths = {"meta_steps": 2, "validate_every": 1, "validation_tasks": 2}
    recipe = Recipe("tiny", "", "grid/small", "lpg", {"predictions": 2, "width": 4}, train, **lengths)
    args = MetaTrain(recipe.estimated_by("rematerialised"), out=tmp_path / "run")
    meta_train(args, ["learned-rl", "meta-train"])
    (run,) = read_meta_runs([tmp_path / "run"])
    assert (run.label, run.family) == ("rematerialised", "grid/small") and run.costed
    assert np.diff(run.values[ENVIRONMENT_STEPS])[0] > 0 and np.diff(run.values[MINUTES])[0] > 0
    with pytest.raises(UserError, match=r"train\.estimator\.name was 'rematerialised' and is 'truncated'"):
        meta_train(replace(args, recipe=recipe.estimated_by("truncated"), resume=True), ["learned-rl"])


def test_twelve_meta_trainings_have_twelve_colours_and_no_two_lines_look_alike(tmp_path):
    folders = [meta_run(tmp_path / f"run{k}", "truncated", validations=2, window=k) for k in range(24)]
    lines = meta_training_figure(read_meta_runs(folders)).axes[0].lines
    assert len({line.get_color() for line in lines[:12]}) == 12
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 24


def test_the_table_of_meta_trainings(tmp_path):
    one = meta_run(tmp_path / "one", "truncated", tags=COSTED)
    better = meta_run(tmp_path / "better", "pes", validations=9, tags=COSTED)
    fresh = begin(tmp_path / "fresh")
    fresh.log(0, {"meta/grad_norm": 1.0})
    out = write_report([one, better, fresh.path], tmp_path / "compared.html")
    with (tmp_path / "compared_meta_training.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    assert tuple(head) == META_COLUMNS
    assert rows[0][:7] == ["grid/small", "one", "truncated", "truncated", "20", "4000", "1"]
    assert [float(x) for x in rows[0][7:]] == pytest.approx([0.225, 15, 3000, 0.75, 0], rel=1e-12)
    assert [row[1] for row in rows] == ["one", "better"]

    page, text = Links(), out.read_text()
    page.feed(text)
    assert page.open == [] and page.links[:2] == ["compared_meta_training.csv", "compared_meta_training.png"]
    assert (tmp_path / "compared_meta_training.png").read_bytes() == base64.b64decode(page.images[0].split(",")[1])
    table = text.partition('<table class="compared">')[2].partition("</table>")[0]
    ranked = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert ranked[0] == ["better", "pes", "45", "9,000", "2.2", "0.600", "40", "8,000", "2.0", "0.000"]
    assert ranked[1] == ["one", "truncated", "20", "4,000", "1.0", "0.225", "15", "3,000", "0.8", "0.000"]
    assert "fresh: no validation yet" in text and "were not logged" not in text and "No evaluation" not in text


@pytest.mark.parametrize("tags", [(), (MINUTES,)])
def test_meta_trainings_that_did_not_log_their_costs_are_drawn_over_meta_steps(tmp_path, tags):
    old = meta_run(tmp_path / "old", tags=tags)
    new = meta_run(tmp_path / "new", "truncated", tags=COSTED)
    axes = meta_training_figure(read_meta_runs([old])).axes
    assert [ax.get_xlabel() for ax in axes[: len(tags) + 1]] == ["minutes of meta-training"] * len(tags) + [
        "meta-steps"
    ]
    assert axes[len(tags)].lines[0].get_xdata().tolist() == [5.0, 10.0, 15.0, 20.0]
    axes = meta_training_figure(read_meta_runs([new, old])).axes
    assert [len(ax.lines) for ax in axes] == [2] * 6 and axes[2].get_xlabel() == "meta-steps"
    assert np.isnan(axes[0].lines[1].get_xdata().astype(float)).all()
    text = write_report([new, old], tmp_path / "report.html").read_text()
    assert "old: environment steps or minutes were not logged at every validation" in text
    assert "<td>old</td><td>old</td><td>20</td><td>–</td>" in text and "dotted" in text


def test_a_meta_training_without_a_mean_over_the_lifetime_has_no_best(tmp_path):
    with begin(tmp_path / "old", config={"a": 1}) as run:
        run.log(10, {FINAL: math.nan})
        run.log(20, {FINAL: 0.5})
    (found,) = read_meta_runs([run.path])
    assert found.row() == ["family not recorded", "old", "old", "", 20, *[None] * 7]
    final, area = meta_training_figure([found]).axes
    assert final.lines[0].get_xydata().tolist()[1] == [20.0, 0.5]
    assert "no held-out mean over the lifetime" in area.texts[0].get_text() and not area.axison
    assert "<td>–</td>" in write_report([run.path], tmp_path / "report.html").read_text()


def test_a_run_without_scores_or_metrics_still_has_a_report(tmp_path):
    begin(tmp_path / "run").close()
    text = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "No evaluation scores yet" in text and "Nothing was logged" in text


PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
TABLE = [
    "number,state,score,seconds,environment_steps,worker,reason,retry_of,agent.hidden,hyper.rate,lpg.rate,n_steps",
    '0,COMPLETE,-0.5,1.23456789,20000.0,w,,,"[64, 64]",0.000123456,1,128',
    "1,PRUNED,,0.5,,w,diverged: the loss is nan,,,0.5,1,64",
    "2,PRUNED,,0.5,,w,pruned at report 3,,,0.5,1,64",
    "3,PRUNED,,0.5,,w,infeasible: too large,,,0.5,1,64",
    *(f'{k},COMPLETE,{k}.0,2.0,20000.0,w,,0,"[32, 32]",0.25,1,{2**k}' for k in range(4, 15)),
]


def a_study(folder: Path, table: list[str], config: dict) -> Path:
    begin(folder, config=config).close()
    (folder / TRIALS).write_text("\n".join(table) + "\n")
    return folder


def cells(page: str) -> list[list[str]]:
    """Rows of the table of trials."""
    table = page.partition('<table class="trials">')[2].partition("</table>")[0]
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in table.split("<tr>")[1:]]


def test_a_study_is_shown_with_its_figures_and_best_trials(tmp_path):
    folder = a_study(tmp_path / "study", TABLE, {"metrics": {"score": "maximize"}})
    (folder / BEST).write_text("")
    (folder / "figures").mkdir()
    for name in ("curves", "history"):
        (folder / "figures" / f"study_{name}.png").write_bytes(PIXEL)
    out = write_report([folder], tmp_path / "report.html")
    text, page = out.read_text(), Links()
    page.feed(text)
    assert page.open == [] and page.links == ["study/trials.csv", "study/best.toml"]
    assert [base64.b64decode(image.split(",")[1]) for image in page.images] == [PIXEL, PIXEL]
    shown = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert shown == [STUDY_FIGURES[name].replace("'", "&#39;") for name in ("history", "curves")]
    assert "15 trials ended: 12 completed, 1 pruned, 1 diverged, 1 infeasible. The best by score:" in text
    assert "Nothing was logged" not in text and "No evaluation scores" not in text
    head, *rows = cells(text)
    settings = ["hidden", "hyper.rate", "lpg.rate", "n_steps"]  # the shortest names that tell them apart
    assert head == ["number", "score", "seconds", "environment_steps", *settings]
    assert [row[0] for row in rows] == [str(k) for k in range(14, 4, -1)]
    assert rows[0] == ["14", "14", "2", "20000", "[32, 32]", "0.25", "1", "16384"]


def test_the_best_trials_are_those_with_the_least_of_what_is_minimised(tmp_path):
    folder = a_study(tmp_path / "study", TABLE[:2] + TABLE[-2:], {"metrics": {"score": "minimize"}})
    _, first, *others = cells(write_report([folder], tmp_path / "report.html").read_text())
    assert first == ["0", "-0.5", "1.235", "20000", "[64, 64]", "0.0001235", "1", "128"]
    assert [row[0] for row in others] == ["13", "14"]


def test_a_study_without_completed_trials_has_counts_but_no_table(tmp_path):
    folder = a_study(tmp_path / "study", TABLE[:1] + TABLE[2:4], {})
    text = write_report([folder], tmp_path / "report.html").read_text()
    assert "2 trials ended: 1 pruned, 1 diverged." in text and "The best by" not in text and cells(text) == []


@pytest.mark.parametrize("table", [[], ["number,state"], [*TABLE[:2], "4,COMPLETE"], ["a,b,c", "1,2,3"]])
def test_a_damaged_table_of_trials_is_one_sentence(tmp_path, table):
    folder = a_study(tmp_path / "study", table, {})
    with pytest.raises(UserError, match=r"Cannot read .*trials\.csv, expected a table"):
        write_report([folder], tmp_path / "report.html")


def test_the_report_of_a_study_needs_no_optuna(tmp_path):
    a_study(tmp_path / "study", TABLE, {})
    code = (
        "import sys; from pathlib import Path; from experiments.report import write_report; "
        f"write_report([Path({str(tmp_path / 'study')!r})], Path({str(tmp_path / 'report.html')!r})); "
        "print('optuna' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_what_is_no_run_is_one_sentence(tmp_path):
    begin(tmp_path / "lpg__seed0").close()
    with pytest.raises(UserError, match=r"lpg_seed0 holds no run .*did you mean .*lpg__seed0\?"):
        write_report([tmp_path / "lpg_seed0"], tmp_path / "report.html")
    with pytest.raises(UserError, match=r"expected a folder that a command wrote"):
        write_report([tmp_path / "lpg__seed0" / "deep"], tmp_path / "report.html")
    with pytest.raises(UserError, match="at least one run folder"):
        write_report([], tmp_path / "report.html")
    (tmp_path / "lpg__seed0" / "git.txt").unlink()
    with pytest.raises(UserError, match=r"Cannot read .*git\.txt"):
        write_report([tmp_path / "lpg__seed0"], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
