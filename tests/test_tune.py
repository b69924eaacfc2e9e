"""`learned-rl tune`: what it leaves, that it goes on where it was, and that every mistake is one sentence."""

from __future__ import annotations

import csv
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
from collections import defaultdict
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import experiments.tune
from experiments.recipes import Recipe, recipes
from experiments.report import read_scores
from experiments.runs import CONFIG, SCORES, read_json
from experiments.tune import BEST, FRONT, TRIALS, Tune
from experiments.tuning.agents import AgentStudy
from experiments.tuning.storage import open_storage
from experiments.tuning.study import FINISHED
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from learned_rl.registry import components
from learned_rl.tasks.bandits import BanditFamily
from meta_optimizers.trainer import MetaTrainConfig
from meta_optimizers.truncated import TruncatedConfig

BANDIT = "bandit/bernoulli-5"
PPO = shlex.split(
    f"tune ppo --env {BANDIT} --steps 2048 --parameters learning_rate,gamma --tasks 3 --episodes 2 --checkpoints 2 "
    "--test-tasks 2 --test-seeds 2 --out run"
)

STUDY = """
    import time
    from dataclasses import dataclass, field
    from pathlib import Path

    import numpy as np

    from experiments.tuning.study import Study, Tested
    from learned_rl.evaluation import Curves
    from learned_rl.spaces import PowersOfTwo, Uniform, searched


    @dataclass(frozen=True)
    class Settings:
        x: float = field(default=0.125, metadata=searched(Uniform(-1.0, 1.0)))
        size: int = field(default=8, metadata=searched(PowersOfTwo(1, 64)))
        note: str = "fixed"


    def score(settings, trial):
        if Path("hang").exists() and trial.number == 3:
            Path("hangs").touch()
            time.sleep(600)
        time.sleep(float(Path("seconds").read_text()) if Path("seconds").exists() else 0)
        return settings.x + (100 if Path("bonus").exists() else 0) - (100 if Path("malus").exists() else 0)


    def test(settings):
        with open("tested", "a") as file:
            file.write(f"{settings.x}\\n")
        if Path("stop").exists():
            raise KeyboardInterrupt
        returns = np.full((2, 3, 2), settings.x) + np.arange(3.0)[:, None]
        return Tested(Curves(np.array([0, 10]), returns))


    STUDY = Study("hill", Settings(), score, test=test)
"""


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nothing here is to outlast a power cut."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def undrawn(monkeypatch):
    """Saves the time that figures of studies take."""
    monkeypatch.setattr(experiments.tune, "save_figures", lambda *_: [])


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my_study.py"
    path.write_text(textwrap.dedent(STUDY))
    return path


def opened(file: Path | str, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=open_storage(str(file)))


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(states=FINISHED)


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / TRIALS).open(newline="") as file:
        return list(csv.DictReader(file))


# --- what it leaves -------------------------------------------------------------------------------------------------


def test_a_study_of_an_algorithm_leaves_all_that_it_found(say, tmp_path, monkeypatch):
    drawn: dict[str, list] = defaultdict(list)
    sample_split = BanditFamily.sample_split

    def noted(self, split, n, seed=0):
        tasks = sample_split(self, split, n, seed)
        drawn[split] += tasks["mean"].tolist()
        return tasks

    monkeypatch.setattr(BanditFamily, "sample_split", noted)
    code, out, err = say(*PPO, "--trials", "3")
    assert code == 0 and "best: run/best.toml" in out and "report: run/report.html" in out, err
    run = tmp_path / "run"
    study = opened(run / "study.db", "ppo-bandit-bernoulli-5")
    assert len(finished(study)) == 3 == len(table(run))
    assert set(study.best_params) == {"learning_rate", "one_minus_gamma"}
    best = tomllib.loads((run / BEST).read_text())
    assert best["config"]["hyper"]["learning_rate"] == study.best_params["learning_rate"]
    assert best["config"]["hyper"]["gamma"] == 1 - study.best_params["one_minus_gamma"]
    assert best["steps"] == 2048 and best["config"]["n_envs"] == 8
    assert (run / BEST).read_text().startswith(f"# ppo on {BANDIT}: trial {study.best_trial.number} of study ppo-")
    scores = {each.method: each for each in read_scores(run / SCORES)}
    assert set(scores) == {"default", "tuned"} and {each.suite for each in scores.values()} == {BANDIT}
    assert all(each.scores is not None and each.returns.returns.shape[1:] == (2, 2) for each in scores.values())
    assert "<html" in (run / "report.html").read_text() and "learned-rl tune ppo" in (run / "report.html").read_text()
    assert (run / "figures" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    for number in range(3):
        events = EventAccumulator(str(run / "tensorboard" / f"trial-{number:04}")).Reload()
        steps = [e.step for e in events.Scalars("tune/score")]
        assert steps[:2] == [1024, 2048]
    assert {p.name for p in run.iterdir()} >= {CONFIG, "command.txt", "git.txt", "seed", "versions.json"}
    assert read_json(run / CONFIG)["name"] == "ppo-bandit-bernoulli-5"
    assert set(drawn) == {"validation", "test"}
    assert not {*map(tuple, drawn["validation"])} & {*map(tuple, drawn["test"])}


def test_what_was_found_is_trained_with(say, tmp_path, undrawn):
    """From the study of an objective to agents with that objective and the numbers of its best trial."""
    words = (
        f"tune dpo --env {BANDIT} --steps 2048 --tasks 2 --episodes 1 --checkpoints 1 --no-test --trials 2 --out run"
    )
    code, _, err = say(*words.split(), "--parameters", "learning_rate,n_epochs")
    assert code == 0 and not (tmp_path / "run" / SCORES).exists(), err
    best = tomllib.loads((tmp_path / "run" / BEST).read_text())
    assert best["objective"] == "dpo"
    code, _, err = say("train", BANDIT, "--config", "run/best.toml", "--checkpoints", "1", "--out", "trained")
    config = read_json(tmp_path / "trained" / CONFIG)
    assert code == 0 and config["objective"] == "dpo" and config["steps"] == 2048, err
    assert config["config"]["n_epochs"] == best["config"]["n_epochs"]
    assert config["config"]["hyper"]["learning_rate"] == best["config"]["hyper"]["learning_rate"]


AGENT = PPOConfig(n_envs=2, n_steps=5, n_epochs=1, n_minibatches=1, optimizer="sgd", hyper=Hyper(learning_rate=30.0))
TINY = Recipe(
    "tiny", "", "chain/short", "lpg", {"predictions": 4, "width": 4, "core": "gru"},
    MetaTrainConfig(lifetimes=2, horizon=4, agent=AGENT, estimator=TruncatedConfig(window=2)), validation_tasks=2,
)  # fmt: skip


def test_a_study_of_a_recipe_leaves_a_recipe(say, tmp_path, monkeypatch, undrawn):
    for module in ("experiments.tune", "experiments.recipes"):
        monkeypatch.setattr(f"{module}.get_recipe", lambda name: TINY)
    monkeypatch.setattr("experiments.tune.recipes", lambda: {"tiny": TINY})
    words = "tune tiny --meta-steps 3 --trials 2 --checkpoints 2 --test-tasks 2 --test-seeds 2 --out run"
    code, _, err = say(*words.split(), "--parameters", "train.learning_rate,window")
    assert code == 0, err
    assert {each.method for each in read_scores(tmp_path / "run" / SCORES)} == {"default", "tuned"}
    study = opened(tmp_path / "run" / "study.db", "tiny")
    best = tomllib.loads((tmp_path / "run" / BEST).read_text())["recipe"]["train"]
    params = study.best_params
    assert len(finished(study)) == 2 and set(params) == {"learning_rate", "window"}
    assert (best["learning_rate"], best["estimator"]["window"]) == (params["learning_rate"], params["window"])
    words = "--config run/best.toml --recipe.meta-steps 1 --recipe.validate-every 1 --out trained"
    code, _, err = say("meta-train", "tiny", *words.split())
    trained = read_json(tmp_path / "trained" / CONFIG)
    assert code == 0 and trained["train"]["estimator"]["window"] == params["window"] and trained["meta_steps"] == 1, err


COSTLY = """
    def cost(settings, trial):
        return {"score": settings.x, "environment_steps": 20 + 10 * settings.x + settings.size}


    METRICS = {"score": "maximize", "environment_steps": "minimize"}
    STUDY = Study("costly hill", Settings(), cost, metrics=METRICS)
"""


def test_several_metrics_leave_a_front(say, tmp_path, own, undrawn):
    own.write_text(own.read_text() + textwrap.dedent(COSTLY))
    code, _, err = say("tune", own, "--trials", "6", "--out", "run")
    assert code == 0, err
    front = opened(tmp_path / "run" / "study.db", "my_study").best_trials
    files = {p.stem: tomllib.loads(p.read_text()) for p in (tmp_path / "run" / FRONT).iterdir()}
    assert {f"trial-{t.number}": t.params["x"] for t in front} == {name: values["x"] for name, values in files.items()}
    assert tomllib.loads((tmp_path / "run" / BEST).read_text())["x"] == max(t.params["x"] for t in front)


def test_score_is_traded_against_environment_steps(say, tmp_path, undrawn):
    """Lifetimes of trials differ then, and what they took is what they took."""
    words = (
        f"tune ppo --env {BANDIT} --steps 4096 --tasks 2 --episodes 1 --checkpoints 1 --no-test --trials 4 --out run"
    )
    code, _, err = say(*words.split(), "--parameters", "learning_rate", "--metrics", "score,environment_steps")
    assert code == 0, err
    study = opened(tmp_path / "run" / "study.db", "ppo-bandit-bernoulli-5")
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    assert set(complete[0].params) == {"learning_rate", "steps"} and complete[0].params["steps"] == 4096
    assert all(t.values[1] == t.params["steps"] // 1024 * 1024 for t in complete)
    assert all("infeasible: steps is" in t.user_attrs["reason"] for t in study.get_trials(states=(TrialState.PRUNED,)))
    assert {row["environment_steps"] for row in table(tmp_path / "run")} >= {str(t.values[1]) for t in complete}


# --- a study of one's own, and going on -----------------------------------------------------------------------------


def settings_tested(tmp_path: Path) -> list[float]:
    """Settings that were tested since this was last asked."""
    file = tmp_path / "tested"
    found = [float(line) for line in file.read_text().split()] if file.exists() else []
    file.unlink(missing_ok=True)
    return found


def test_a_study_of_ones_own(say, own, tmp_path):
    code, out, err = say("tune", own.name, "--trials", "5")
    run = tmp_path / "runs" / "tune-my_study"
    assert code == 0 and f"best: {run.relative_to(tmp_path)}/best.toml" in out, err
    study = opened(run / "study.db", "my_study")
    assert len(finished(study)) == 5 and finished(study)[0].params == {"x": 0.125, "log2_size": 3}
    best = tomllib.loads((run / BEST).read_text())
    assert best == {"x": study.best_params["x"], "size": 2 ** study.best_params["log2_size"], "note": "fixed"}
    assert settings_tested(tmp_path) == [0.125, best["x"]]
    assert f"x: 0.125 -> {best['x']:.4g}" in out


def test_the_same_command_goes_on_and_tests_what_is_new(say, own, tmp_path, undrawn):
    words = ("tune", own.name, "--out", "run")

    def run(trials: int) -> tuple[int, int]:
        code, _, err = say(*words, "--trials", str(trials))
        assert code == 0, err
        study = opened(tmp_path / "run" / "study.db", "my_study")
        assert {each.method for each in read_scores(tmp_path / "run" / SCORES)} == {"default", "tuned"}
        assert tomllib.loads((tmp_path / "run" / BEST).read_text())["x"] == study.best_params["x"]
        return len(finished(study)), study.best_trial.number

    first = run(4)
    assert first[0] == 4 and len(settings_tested(tmp_path)) == 2
    scores = (tmp_path / "run" / SCORES).read_bytes()
    assert run(4) == first and settings_tested(tmp_path) == [] and (tmp_path / "run" / SCORES).read_bytes() == scores
    (tmp_path / "malus").touch()  # nothing is better now
    assert (
        run(6) == (6, first[1])
        and settings_tested(tmp_path) == []
        and (tmp_path / "run" / SCORES).read_bytes() == scores
    )
    (tmp_path / "malus").unlink()
    (tmp_path / "bonus").touch()  # whatever comes is better now
    count, best = run(7)
    study = opened(tmp_path / "run" / "study.db", "my_study")
    assert (count, best) == (7, 6) and settings_tested(tmp_path) == [study.best_params["x"]], (
        "the defaults were tested before"
    )
    assert (tmp_path / "run" / "command.txt").read_text().count("learned-rl tune") == 4


def test_an_interrupted_test_is_taken_up(say, own, tmp_path, undrawn):
    (tmp_path / "stop").touch()
    words = ("tune", own.name, "--trials", "3", "--out", "run")
    code, _, err = say(*words)
    assert code == 130 and "interrupted" in err and len(settings_tested(tmp_path)) == 1
    (tmp_path / "stop").unlink()
    assert say(*words)[0] == 0
    assert len(settings_tested(tmp_path)) == 2 and len(finished(opened("run/study.db", "my_study"))) == 3


def test_two_studies_share_a_storage(say, own, tmp_path, undrawn):
    for name in ("one", "two"):
        words = ("--storage", "all.log", "--study-name", name, "--trials", "2", "--no-test", "--seed", "3")
        code, out, err = say("tune", own.name, *words)
        assert code == 0 and f"best: runs/tune-{name}/best.toml" in out, err
    assert sorted(optuna.get_all_study_names(open_storage("all.log"))) == ["one", "two"]
    assert not (tmp_path / "runs" / "tune-one" / "study.db").exists()


def test_where_a_search_may_begin(say, own, tmp_path, undrawn):
    (tmp_path / "a.toml").write_text("x = 0.75\nsize = 2\n")
    (tmp_path / "b.toml").write_text("x = -3.0\n")
    words = ("tune", own.name, "--storage", "all.log", "--no-test", "--trials", "4")
    code, _, err = say(*words, "--study-name", "old", "--enqueue", "a.toml", "b.toml")
    assert code == 0, err
    params = [t.params for t in finished(opened("all.log", "old"))]
    assert params[:3] == [{"x": x, "log2_size": size} for x, size in ((0.125, 3), (0.75, 1), (-1.0, 3))]
    for name, source in (("same", "old"), ("elsewhere", "all.log#old")):
        storage = "all.log" if name == "same" else "new.log"
        words = ("tune", own.name, "--storage", storage, "--study-name", name, "--no-test", "--trials", "3")
        code, _, err = say(*words, "--warm-start", source)
        assert code == 0, err
        best = sorted(finished(opened("all.log", "old")), key=lambda t: -t.value)
        tried = [t.params for t in finished(opened(storage, name))]
        assert tried[0] == {"x": 0.125, "log2_size": 3} and tried[1] == best[0].params


def test_an_algorithms_file_is_where_the_next_search_begins(say, tmp_path, undrawn):
    assert say(*PPO, "--trials", "2", "--no-test")[0] == 0
    words = [word if word != "run" else "next" for word in PPO]
    assert say(*words, "--trials", "2", "--no-test", "--enqueue", "run/best.toml")[0] == 0
    old, new = (opened(f"{run}/study.db", "ppo-bandit-bernoulli-5") for run in ("run", "next"))
    if old.best_trial.number:  # else they are the defaults, which are tried anyway
        assert finished(new)[1].params["learning_rate"] == old.best_params["learning_rate"]
        assert finished(new)[1].user_attrs["enqueued"] == "best.toml"
    else:
        assert finished(new)[0].params == old.best_params


# --- real processes -------------------------------------------------------------------------------------------------

# Where tests run in the background, Ctrl-C is ignored, and so it would be by what they start.
PROGRAM = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from experiments.cli import main; main()"
)


def started(folder: Path, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, "tune", "my_study.py", "--no-test", "--out", "run", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_ctrl_c_puts_the_trial_back_and_the_same_command_goes_on(own, tmp_path, jobs):
    (tmp_path / "hang").touch()
    words = ["--trials", "6", "--jobs", str(jobs)]
    process = started(tmp_path, *words)
    end = time.monotonic() + 120
    while not (tmp_path / "hangs").exists():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    if jobs > 1:
        while len(finished(opened(tmp_path / "run" / "study.db", "my_study"))) < 5:  # the other one waits for it then
            assert process.poll() is None and time.monotonic() < end, process.communicate()
            time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "learned-rl: interrupted and saved; the same command continues the study.\n"
    study = opened(tmp_path / "run" / "study.db", "my_study")
    (waiting,) = study.get_trials(states=(TrialState.WAITING,))
    (failed,) = study.get_trials(states=(TrialState.FAIL,))
    assert waiting.system_attrs["fixed_params"] == failed.params and failed.number == 3
    assert not study.get_trials(states=(TrialState.RUNNING,))
    assert len(table(tmp_path / "run")) == len(finished(study)) and (tmp_path / "run" / BEST).exists()

    (tmp_path / "hang").unlink()
    process = started(tmp_path, *words)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    study = opened(tmp_path / "run" / "study.db", "my_study")
    assert len(finished(study)) == 6 and failed.params in [t.params for t in finished(study)]


@pytest.mark.slow
def test_jobs_share_the_trials(own, tmp_path):
    (tmp_path / "seconds").write_text("0.3")
    process = started(tmp_path, "--trials", "40", "--jobs", "2", "--storage", "study.log", "--sampler", "random")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and not err
    found = finished(opened(tmp_path / "study.log", "my_study"))
    assert len(found) == 40 == len(table(tmp_path / "run")) == len({t.params["x"] for t in found})
    assert len({t.user_attrs["worker"] for t in found}) == 2
    assert {p.name for p in (tmp_path / "run" / "tensorboard").iterdir()} >= {f"trial-{t.number:04}" for t in found}


# --- mistakes -------------------------------------------------------------------------------------------------------


BARE = """
    from dataclasses import dataclass

    from experiments.tuning.study import Study


    @dataclass
    class Bare:
        x: int = 3


    STUDY = Study("bare", Bare(), lambda settings, trial: 0.0)
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tune", ["tune needs a study", "ppo", "lpg-gridworld"]),
        ("tune --env CartPole-v1", ["tune needs a study", "before its options"]),
        ("tune pop --env CartPole-v1", ["unknown study 'pop'", "'ppo'"]),
        ("tune lpg-girdworld", ["unknown study 'lpg-girdworld'", "'lpg-gridworld'"]),
        ("tune adam --env CartPole-v1", ["unknown study 'adam'"]),
        ("tune ppo", ["ppo needs an environment", "--env"]),
        ("tune ppo --env CartPol-v1", ["'CartPol-v1'", "'CartPole-v1'"]),
        ("tune ppo --env bandit/bernouli-5", ["'bernouli-5'", "'bernoulli-5'"]),
        ("tune ppo --env CartPole-v1 --meta-steps 3", ["--meta-steps means nothing to ppo", "an algorithm"]),
        ("tune lpg-gridworld --env CartPole-v1", ["--env means nothing to lpg-gridworld", "a recipe"]),
        ("tune lpg-gridworld --tasks 3", ["--tasks means nothing to lpg-gridworld"]),
        ("tune lpg-gridworld --episodes 3", ["--episodes means nothing"]),
        ("tune lpg-gridworld --steps 3", ["--steps means nothing"]),
        ("tune my_study.py --tasks 3", ["--tasks means nothing to my_study.py", "a study of your own"]),
        ("tune my_study.py --env CartPole-v1", ["--env means nothing"]),
        ("tune my_study.py --parameters x", ["--parameters means nothing"]),
        ("tune my_study.py --test-seeds 2", ["--test-seeds means nothing"]),
        ("tune none.py", ["none.py does not exist", "STUDY"]),
        ("tune empty.py", ["empty.py defines no STUDY", "experiments.tuning.study.Study"]),
        ("tune bare.py", ["Study 'bare' has no search space", "metadata=searched"]),
        ("tune ppo --env CartPole-v1 --parameters gama", ["unknown parameter 'gama'", "gamma"]),
        ("tune ppo --env CartPole-v1 --parameters gamma,", ["unknown parameter ''"]),
        ("tune lpg-gridworld --parameters learning_rate", ["'learning_rate' fits", "recipe.train.learning_rate"]),
        ("tune ppo --env CartPole-v1 --metrics scor", ["unknown metric 'scor'", "'score'"]),
        ("tune ppo --env CartPole-v1 --metrics score,second", ["unknown metric 'second'", "'seconds'"]),
        ("tune ppo --env CartPole-v1 --metrics seconds,score", ["metrics begin with 'seconds'", "score first"]),
        ("tune ppo --env CartPole-v1 --metrics score,seconds --pruner median", ["pruner is 'median'", "'none'"]),
        ("tune ppo --env CartPole-v1 --metrics score,seconds --sampler cmaes", ["sampler is 'cmaes'", "tpe"]),
        ("tune ppo --env CartPole-v1 --sampler tep", ["'tep'", "nearest is 'tpe'"]),
        ("tune ppo --env CartPole-v1 --pruner medain", ["'medain'", "nearest is 'median'"]),
        ("tune ppo --env CartPole-v1 --steps 5", ["steps is 5", "expected at least 1024"]),
        ("tune ppo --env CartPole-v1 --steps 0", ["steps is 0", "at least 1"]),
        ("tune ppo --env CartPole-v1 --trials 0", ["trials is 0", "at least 1"]),
        ("tune ppo --env CartPole-v1 --jobs 0", ["jobs is 0", "at least 1"]),
        ("tune ppo --env CartPole-v1 --seeds 0", ["seeds is 0", "at least 1"]),
        ("tune ppo --env CartPole-v1 --seed -1", ["seed is -1", "at least 0"]),
        ("tune ppo --env CartPole-v1 --timeout -1", ["timeout is -1", "at least 0"]),
        ("tune ppo --env CartPole-v1 --startup-trials 0", ["startup_trials is 0", "at least 1"]),
        ("tune ppo --env CartPole-v1 --device nowhere", ["'nowhere'", "cpu"]),
        ("tune ppo --env CartPole-v1 --trails 3", ["'--trails'", "'--trials'"]),
        ("tune ppo --env CartPole-v1 --storage study.txt", ["'study.txt'", "ends in .db"]),
        ("tune ppo --env CartPole-v1 --storage sqlit:///study.db", ["'sqlit'", "'sqlite'"]),
        ("tune my_study.py --enqueue none.toml", ["Cannot read none.toml"]),
        ("tune my_study.py --enqueue wrong.toml", ["wrong.toml: unknown setting 'y'"]),
        ("tune my_study.py --enqueue my_study.py", ["my_study.py is no TOML file"]),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(refused, own, tmp_path, words, said):
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "wrong.toml").write_text("y = 3")
    (tmp_path / "bare.py").write_text(textwrap.dedent(BARE))
    before = {p.name for p in tmp_path.iterdir()}
    sentence = refused(*shlex.split(words))
    for part in said:
        assert part in sentence
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == before


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--warm-start odl", ["unknown study in all.log 'odl'", "'old'"]),
        ("--warm-start all.log#odl", ["unknown study in all.log 'odl'", "'old'"]),
        ("--warm-start all.txt#old", ["'all.txt'"]),
        ("--warm-start all.log#foreign", ["'foreign' has none of the parameters x, log2_size"]),
        ("--study-name foreign", ["Study 'foreign' was made with", "choose another study name"]),
        ("--out my_study.py/below", ["Cannot write my_study.py/below"]),
        ("--out used", ["Cannot resume used"]),
    ],
)
def test_a_mistake_about_what_is_there(refused, say, own, tmp_path, option, said, undrawn):
    tune = ("tune", own.name, "--storage", "all.log", "--no-test", "--trials", "1")
    assert say(*tune, "--study-name", "old")[0] == 0
    other = tmp_path / "foreign.py"
    other.write_text(own.read_text().replace("size", "width").replace("x:", "y:").replace("settings.x", "settings.y"))
    assert say("tune", other.name, *tune[2:])[0] == 0
    assert say(*tune, "--study-name", "another", "--out", "used")[0] == 0
    sentence = refused(*tune, *shlex.split(option))
    for part in said:
        assert part in sentence


def test_a_server_that_is_not_there(refused, own):
    sentence = refused("tune", own.name, "--storage", "postgresql://me:secret@127.0.0.1:1/studies")
    assert "postgresql://me:***@127.0.0.1:1/studies" in sentence and "secret" not in sentence


def test_a_study_goes_on_only_as_it_began(say, refused, tmp_path, undrawn):
    assert say(*PPO, "--trials", "1", "--no-test")[0] == 0
    assert "was made with tasks 3, and it is 4 now" in refused(*PPO, "--trials", "2", "--tasks", "4")
    assert "was made with" in refused(*PPO, "--trials", "2", "--parameters", "learning_rate")
    assert "was made with seed 0, and it is 1 now" in refused(*PPO, "--trials", "2", "--seed", "1")
    assert say(*PPO, "--trials", "2", "--no-test")[0] == 0
    assert len(finished(opened("run/study.db", "ppo-bandit-bernoulli-5"))) == 2


def test_no_completed_trial_is_a_sentence(refused, own, tmp_path):
    assert "has no completed trial" in refused("tune", own.name, "--timeout", "0", "--out", "run")


def test_tasks_on_which_nothing_can_be_won(refused, monkeypatch):
    monkeypatch.setattr("experiments.scores.WORTH", 2.0)
    assert "On none of the 3 validation tasks can anything be won" in refused(*PPO, "--trials", "2")


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["tune --help", "tune ppo --help"])
def test_help_names_every_option(say, command):
    code, out, err = say(*command.split())
    assert code == 0 and not err and "usage: learned-rl tune" in out
    for f in dataclasses.fields(Tune):
        assert f"--{f.name.replace('_', '-')}" in out, f.name


def test_every_algorithm_and_recipe_has_a_study():
    objectives = {name for name, component in components().items() if component.slot == "objective"}
    assert {"a2c", "a2c-norm", "ppo", "dpo", *recipes()} | objectives == set(experiments.tune.studies())
    for name in experiments.tune.studies():
        recipe = name in recipes()
        study, usual = experiments.tune.make_study(name, Tune() if recipe else Tune(env="CartPole-v1"))
        assert usual == (name if recipe else f"{name}-CartPole-v1")
        assert study.decode(study.coordinates(study.settings)) is not None and len(study.spaces) >= 5


def test_a_gymnasium_id_is_one_task_with_many_seeds():
    for env, shape in (("CartPole-v1", (1, 8, 1, 32)), (BANDIT, (32, 1, 64, 4))):
        agents = AgentStudy.of("ppo", env)
        assert (agents.tasks, agents.seeds, agents.test_tasks, agents.test_seeds) == shape


def test_each_folder_has_the_scores_of_the_best_trial(say, tmp_path):
    """Two folders of one study: the one that was tested first is tested anew once the best is another."""
    words = (
        "--env bandit/bernoulli-10 --steps 2000 --tasks 4 --test-tasks 4 --test-seeds 1 --episodes 2 --storage s.log"
    )
    for trials, out in ((1, "a"), (8, "b"), (8, "a")):
        code, _, err = say("tune", "ppo", *words.split(), "--trials", str(trials), "--out", out)
        assert code == 0, err
    scores = [read_scores(tmp_path / out / SCORES) for out in ("a", "b")]
    assert [[*each.rows()] for each in scores[0]] == [[*each.rows()] for each in scores[1]]


def test_a_file_with_a_learned_optimizer_is_refused(refused, tmp_path):
    (tmp_path / "l2l.toml").write_text('optimizer = "l2l"\n')
    said = refused("tune", "ppo", "--env", "bandit/bernoulli-10", "--config", "l2l.toml")
    assert "l2l.toml has the optimizer 'l2l', which a study of ppo does not plug in: leave it out" in said


def test_a_file_of_another_objective_is_refused(refused, tmp_path):
    (tmp_path / "dpo.toml").write_text('objective = "dpo"\n')
    said = refused("tune", "ppo", "--env", "bandit/bernoulli-10", "--config", "dpo.toml")
    assert "dpo.toml is of the objective 'dpo', and the study of ppo" in said
    assert "given twice" in refused("train", "CartPole-v1", "--config", "a.toml", "--config", "b.toml")
    words = ("--env", "bandit/bernoulli-10", "--warm-start", "typo.db#x", "--steps", "2000")
    assert "does not exist" in refused("tune", "ppo", *words) and not (tmp_path / "typo.db").exists()
