"""What a study leaves behind, from studies made by hand: its table, its figures, and its trials in TensorBoard."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
import pytest
from matplotlib.colors import to_hex
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from experiments.figures import COLOURS
from experiments.report import STUDY_FIGURES
from experiments.tuning.outputs import TrialEvents, importances, save_figures, study_figures, write_trials
from learned_rl.types import UserError

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")  # names of metrics

SPACE: dict[str, Any] = {
    "learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "log2_n_steps": IntDistribution(3, 11),
    "optimizer": CategoricalDistribution(("sgd", "adam")),
}
COSTS = {"seconds": "minimize", "environment_steps": "minimize"}


def new_study(*metrics: str) -> optuna.Study:
    study = optuna.create_study(directions=[COSTS.get(name, "maximize") for name in metrics])
    study.set_metric_names([*metrics])
    return study


def add(
    study: optuna.Study, values: Any, state: TrialState = TrialState.COMPLETE, curve: Any = (), **about: Any
) -> None:
    """A trial; parameters as named, everything else as attributes."""
    params = {name: about.pop(name) for name in SPACE if name in about}
    trial = create_trial(
        state=state,
        values=values,
        params=params,
        distributions={name: SPACE[name] for name in params},
        user_attrs=about,
        intermediate_values=dict(enumerate(curve, 1)),
    )
    study.add_trial(trial)


def spread(study: optuna.Study, values: Any, **about: Any) -> None:
    """Trials that differ in every parameter, and score as given; the learning rate alone decides the order."""
    for k, value in enumerate(values):
        rate, optimizer = 10 ** -(1 + 4 * k / len(values)), ("sgd", "adam")[k % 2]
        each = value if isinstance(value, list) else [value]
        add(study, each, learning_rate=rate, log2_n_steps=3 + 5 * k % 9, optimizer=optimizer, **about)


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# --- the table -------------------------------------------------------------------------------------------------------


def test_every_result_is_a_row_of_true_values(tmp_path):
    study = new_study("score")
    first = {"hyper.gamma": 0.99, "n_steps": 128, "agent.hidden": [64, 64], "linear_decay": True, "kl": None}
    add(study, [0.1 + 0.2], settings=first, seconds=1.5, environment_steps=2000, worker="a,b", retry_of=0)
    add(study, None, TrialState.FAIL, settings={"unseen": 1})
    add(study, None, TrialState.RUNNING)
    add(study, [7.0], TrialState.PRUNED, settings={"hyper.gamma": 1 / 3}, seconds=0.5, reason='diverged: a "nan"')
    add(study, [-math.inf])
    write_trials(study, tmp_path / "deep" / "trials.csv")
    assert (tmp_path / "deep" / "trials.csv").read_text() == (
        "number,state,score,seconds,environment_steps,worker,reason,retry_of,"
        "agent.hidden,hyper.gamma,kl,linear_decay,n_steps\n"
        '0,COMPLETE,0.30000000000000004,1.5,2000,"a,b",,0,"[64, 64]",0.99,,true,128\n'
        '3,PRUNED,,0.5,,,"diverged: a ""nan""",,,0.3333333333333333,,,\n'
        "4,COMPLETE,-inf,,,,,,,,,,\n"
    )
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["trials.csv"]


def test_metrics_that_are_costs_have_one_column(tmp_path):
    study = new_study("score", "environment_steps")
    add(study, [3.0, 4000.0], seconds=2.0, environment_steps=4000)
    add(study, None, TrialState.PRUNED, environment_steps=1000, reason="infeasible: too large")
    write_trials(study, tmp_path / "trials.csv")
    assert (tmp_path / "trials.csv").read_text() == (
        "number,state,score,environment_steps,seconds,worker,reason,retry_of\n"
        "0,COMPLETE,3.0,4000.0,2.0,,,\n"
        "1,PRUNED,,1000,,,infeasible: too large,\n"
    )


def test_a_study_without_results_is_a_header(tmp_path):
    write_trials(new_study("score"), tmp_path / "trials.csv")
    assert (tmp_path / "trials.csv").read_text() == (
        "number,state,score,seconds,environment_steps,worker,reason,retry_of\n"
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Cannot write"):
        write_trials(new_study("score"), tmp_path / "file" / "trials.csv")


# --- figures ---------------------------------------------------------------------------------------------------------


def test_figures_are_pictures_and_change_nothing_else(tmp_path):
    study = new_study("score")
    spread(study, range(20), curve=[1.0, 2.0])
    add(study, None, TrialState.PRUNED, curve=[0.5])
    before = dict(matplotlib.rcParams)
    paths = save_figures(study, tmp_path)
    assert [path.name for path in paths] == [
        f"study_{name}.png" for name in ("history", "importances", "slice", "parallel", "curves")
    ]
    assert all(path.parent == tmp_path / "figures" and is_picture(path) for path in paths)
    assert dict(matplotlib.rcParams) == before
    both = new_study("score", "seconds")
    spread(both, [[float(k), float(k % 3)] for k in range(20)])
    assert {*study_figures(both)} | {*study_figures(study)} <= {*STUDY_FIGURES}
    assert [*study_figures(both)] == ["history", "importances", "slice", "parallel", "pareto"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], set()),
        ([1.0], set()),
        ([-math.inf, -math.inf], set()),
        ([1.0, 2.0, math.inf], {"history", "slice", "parallel"}),
        ([5.0] * 20, {"history", "slice", "parallel"}),
        ([*range(9)], {"history", "slice", "parallel"}),
        ([*range(10)], {"history", "importances", "slice", "parallel"}),
        ([0.0] * 19 + [1.0], {"history", "importances", "slice", "parallel"}),
    ],
)
def test_figures_that_trials_do_not_suffice_for_are_left_out(tmp_path, values, expected):
    study = new_study("score")
    spread(study, values)
    assert {path.name for path in save_figures(study, tmp_path)} == {f"study_{name}.png" for name in expected}


def test_one_parameter_has_nothing_to_be_compared_with():
    one, none = new_study("score"), new_study("score")
    for k in range(20):
        add(one, [float(k)], log2_n_steps=3 + k % 9)
        add(none, [float(k)])
    assert [*study_figures(one)] == ["history", "slice"] and [*study_figures(none)] == ["history"]


def test_pruned_trials_alone_have_curves_if_they_reported_twice():
    study = new_study("score")
    add(study, None, TrialState.PRUNED, curve=[1.0])
    add(study, None, TrialState.PRUNED)
    assert study_figures(study) == {}
    add(study, None, TrialState.PRUNED, curve=[1.0, math.nan, 3.0])
    assert [*study_figures(study)] == ["curves"]
    (ax,) = study_figures(study)["curves"].axes
    assert [*map(list, ax.lines[1].get_data())] == [[1, 3], [1.0, 3.0]]


def test_the_history_draws_every_value_and_the_best_so_far():
    study = new_study("score", "seconds")
    values = [[3.0, 9.0], [1.0, 8.0], [4.0, 8.5], [2.0, 2.0]]
    spread(study, values)
    score, seconds = study_figures(study)["history"].axes
    for ax, column, best in ((score, 0, [3.0, 3.0, 4.0, 4.0]), (seconds, 1, [9.0, 8.0, 8.0, 2.0])):
        assert [*ax.lines[0].get_ydata()] == best
        assert ax.collections[0].get_offsets().tolist() == [[k, row[column]] for k, row in enumerate(values)]
    assert (score.get_ylabel(), seconds.get_ylabel()) == ("score", "seconds")


def test_an_outlier_does_not_flatten_the_others():
    study = new_study("score")
    spread(study, [100.0, -9000.0, *range(101, 110)])
    (ax,) = study_figures(study)["history"].axes
    low, high = ax.get_ylim()
    assert 99 < low < 100 and 109 < high < 110
    inside, below, above = (collection.get_offsets().tolist() for collection in ax.collections)
    assert len(inside) == 10 and below == [[1.0, low]] and above == []
    better = new_study("score")
    spread(better, [9000.0, *range(10)])
    assert study_figures(better)["history"].axes[0].get_ylim()[1] > 9000  # what is better is never cut off


def test_slices_show_the_searched_range_and_the_best_trial():
    study = new_study("score")
    spread(study, [1.0, 3.0, 2.0])
    rate, steps, optimizer = study_figures(study)["slice"].axes[:3]
    assert [ax.get_xlabel() for ax in (rate, steps, optimizer)] == ["learning_rate", "log2_n_steps", "optimizer"]
    x = rate.collections[0].get_offsets()[:, 0]
    np.testing.assert_allclose(x, [1 - k / 3 for k in range(3)], atol=1e-12)  # of 1e-5 ... 1e-1, by the logarithm
    assert [text.get_text() for text in steps.get_xticklabels()] == [str(n) for n in range(3, 12)]
    assert [text.get_text() for text in optimizer.get_xticklabels()] == ["sgd", "adam"]
    (best,) = rate.collections[3].get_offsets().tolist()
    assert best == [pytest.approx(2 / 3), 3.0] and to_hex(rate.collections[3].get_facecolor()[0]) == COLOURS[1].lower()


def test_many_parameters_wrap():
    study = new_study("score")
    for k in range(3):
        space = {f"parameter_{i:02}": FloatDistribution(0, 1) for i in range(23)}
        study.add_trial(create_trial(value=k, params=dict.fromkeys(space, k / 2), distributions=space))
    figures = study_figures(study)
    panels = [ax for ax in figures["slice"].axes if ax.get_xlabel().startswith("parameter_")]
    assert len(panels) == 23 and len({round(ax.get_subplotspec().rowspan.start) for ax in panels}) == 5
    rows = [[text.get_text() for text in ax.get_xticklabels()] for ax in figures["parallel"].axes]
    assert [len(row) for row in rows] == [1 + 8, 1 + 8, 1 + 7] and {row[0] for row in rows} == {"score"}


def test_the_pareto_front_is_optunas():
    study = new_study("score", "seconds", "environment_steps")
    spread(study, [[float(k), float((k - 8) ** 2), 100.0] for k in range(12)])
    (ax,) = study_figures(study)["pareto"].axes  # the third metric is the same in all trials
    front = {t.number for t in study.best_trials}
    assert {int(text.get_text()) for text in ax.texts} == front == {8, 9, 10, 11}
    assert {y for _, y in ax.collections[3].get_offsets().tolist()} == {float(number) for number in front}


def test_importances_find_what_decides():
    study = new_study("score", "seconds", "environment_steps")
    rng = np.random.default_rng(0)
    for _ in range(40):
        rate, steps = 10 ** rng.uniform(-5, -1), int(rng.integers(3, 12))
        values = [-abs(math.log10(rate) + 3), 7.0, 2.0**steps]
        add(study, values, learning_rate=rate, log2_n_steps=steps, optimizer=("sgd", "adam")[rng.integers(2)])
    score, seconds, cost = (importances(study, i) for i in range(3))
    assert seconds == {}
    assert next(iter(score)) == "learning_rate" and score["learning_rate"] > 0.7
    assert next(iter(cost)) == "log2_n_steps" and cost["log2_n_steps"] > 0.7
    assert sum(score.values()) == pytest.approx(1) and [*score.values()] == sorted(score.values(), reverse=True)
    panels = study_figures(study)["importances"].axes
    assert [ax.get_xlabel() for ax in panels] == ["importance for score", "importance for environment_steps"]
    assert panels[1].get_yticklabels()[-1].get_text() == "log2_n_steps"


# --- TensorBoard -----------------------------------------------------------------------------------------------------


def read(folder: Path, number: int) -> EventAccumulator:
    events = EventAccumulator(str(folder / "tensorboard" / f"trial-{number:04}"))
    events.Reload()
    return events


def settings_of(events: EventAccumulator) -> dict[str, Any]:
    content = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG).plugin_data.content
    found = metadata.parse_session_start_info_plugin_data(content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


def test_tensorboard_has_a_trials_scalars_settings_and_metrics(tmp_path):
    events = TrialEvents(tmp_path, 7)
    events.add(100, {"tune/score": 0.5, "tune/other": math.nan})
    events.add(200, {"tune/score": 0.25})
    settings = {
        "gamma": 0.5,
        "n_steps": 128,
        "hidden": [64, 64],
        "decay": True,
        "kl": None,
        "limit": math.inf,
        "o": "a",
    }
    events.finish(settings, {"tune/seconds": 1.5, "tune/lost": -math.inf})
    back = read(tmp_path, 7)
    assert {*back.Tags()["scalars"]} == {"tune/score", "tune/seconds"}
    assert [(e.step, e.value) for e in back.Scalars("tune/score")] == [(100, 0.5), (200, 0.25)]
    assert [(e.step, e.value) for e in back.Scalars("tune/seconds")] == [(200, 1.5)]
    shown = {"gamma": 0.5, "n_steps": 128.0, "hidden": "[64, 64]", "decay": "true", "kl": "", "limit": "inf", "o": "a"}
    assert settings_of(back) == shown


def test_the_table_of_hparams_has_what_any_trial_has(tmp_path):
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins.base_plugin import TBContext
    from tensorboard.plugins.hparams.backend_context import Context

    TrialEvents(tmp_path, 0).finish({"a": 1.0}, {"tune/score": math.nan})
    TrialEvents(tmp_path, 1).finish({"a": 2.0, "b": [1]}, {"tune/score": 3.0})
    TrialEvents(tmp_path, 2).finish({}, {})  # nothing is known
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    multiplexer.Reload()
    table = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path))))
    request = RequestContext()
    runs = table.hparams_metadata(request, "")
    assert {*runs} == {f"tensorboard/trial-000{n}" for n in range(3)}
    found = table.experiment_from_metadata(request, "", True, runs, [])
    assert {info.name for info in found.hparam_infos} == {"a", "b"}
    assert [info.name.tag for info in found.metric_infos] == ["tune/score"]


def test_scalars_can_be_read_while_the_trial_runs(tmp_path):
    events = TrialEvents(tmp_path, 0)
    events.add(1, {"tune/score": 2.0})
    events._writer.flush()  # as it does by itself every ten seconds
    assert [e.value for e in read(tmp_path, 0).Scalars("tune/score")] == [2.0]
    events.finish({}, {})


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*trial-0003"):
        TrialEvents(tmp_path, 3)
