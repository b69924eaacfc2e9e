"""What `evaluate`, `train`, `meta-train` and `show` leave behind, and that what is finished is not done again."""

from __future__ import annotations

import dataclasses
import math
import re
import tomllib
from pathlib import Path

import optuna
import pytest
import torch

import experiments.evaluate as module
import experiments.meta_train
from experiments.cli import speaking
from experiments.config_file import read_config
from experiments.evaluate import FIGURE, STUDIES, TUNED, Evaluate, evaluate
from experiments.meta_train import FIGURE as TRAINING
from experiments.meta_train import MetaTrain, meta_train
from experiments.recipes import Recipe
from experiments.report import read_scores
from experiments.runs import ARTIFACT, CONFIG, METRICS, SCORES, plain, read_json, read_metrics
from experiments.show import show
from experiments.train import FIGURE as CURVE
from experiments.train import Train, suited, train
from experiments.tuning.agents import AgentStudy
from experiments.tuning.storage import open_storage
from experiments.tuning.study import FINISHED
from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.evaluation import iqm
from learned_rl.registry import make_component
from learned_rl.tasks.chains import ChainFamily
from learned_rl.types import UserError
from meta_optimizers.trainer import MetaTrainConfig
from meta_optimizers.truncated import TruncatedConfig
from objectives.lpg import LPG

AGENT = PPOConfig(
    n_envs=2,
    n_steps=5,
    n_epochs=1,
    n_minibatches=1,
    optimizer="sgd",
    hyper=Hyper(learning_rate=30.0, max_grad_norm=0.25),
)
SMALL = Evaluate(
    family="chain/short", baselines="a2c,untrained", tasks=3, seeds=2, updates=4, trials=2, tuning_tasks=2,
    checkpoints=2, episodes=2,
)  # fmt: skip
METHODS = ("lpg", "a2c", "untrained")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "lpg.safetensors"
    artifacts.save(LPG(predictions=3, width=4, core="gru"), path, {"family": "grid/small", "agent": plain(AGENT)})
    return path


def is_picture(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_evaluate_leaves_what_every_run_leaves(tmp_path, file):
    out = tmp_path / "run"
    assert evaluate(file, dataclasses.replace(SMALL, out=out), ["evaluate"]) == out / "report.html"
    assert is_picture(out / FIGURE)
    config = read_json(out / CONFIG)
    assert config["family"] == "chain/short" and config["component"] == "lpg" and not {"out", "resume"} & set(config)
    logged, scores = read_metrics(out), read_scores(out / SCORES)
    assert set(logged) == {f"eval/{method}" for method in METHODS} == {f"eval/{each.method}" for each in scores}
    for each in scores:
        assert each.scores is not None
        steps, values = logged[f"eval/{each.method}"]
        assert steps.tolist() == each.scores.steps.tolist() == [0, 20, 40]
        assert values.tolist() == [iqm(at) for at in each.scores.returns]
    assert (out / "report.html").read_text().count("data:image/png") == 2, "no training curves: nothing was trained"


def studies(out: Path) -> dict[str, list[optuna.trial.FrozenTrial]]:
    """Method -> its finished trials."""
    storage = open_storage(f"sqlite:///{out / STUDIES}")
    names = optuna.get_all_study_names(storage)
    return {name: optuna.load_study(study_name=name, storage=storage).get_trials(states=FINISHED) for name in names}


def tuned(out: Path) -> dict[str, dict]:
    """Method -> what its file says."""
    return {path.stem: tomllib.loads(path.read_text()) for path in (out / TUNED).iterdir()}


#: Where an evaluation is interrupted, as (owner, name of a method): whose calls bear the competitors' names.
MOMENTS = {
    "a trial": (AgentStudy, "evaluate", lambda args: args[0].algorithm),
    "a comparison": (module, "learning_curves", lambda args: args[1].slots.objective.name),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_evaluate_resumes_with_what_is_left(tmp_path, file, monkeypatch, moment):
    """Also in the middle of a study, whose finished trials are kept."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    evaluate(file, dataclasses.replace(SMALL, out=whole), ["evaluate"])
    owner, name, method = MOMENTS[moment]
    called, original = [], getattr(owner, name)
    last = {"a trial": 2 + 2, "a comparison": 2}[moment]  # the second trial of the second method; the second method

    def counted(*args, **options):
        called.append(method(args))
        if len(called) == last:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(owner, name, counted)
    with pytest.raises(KeyboardInterrupt) as stop:
        evaluate(file, dataclasses.replace(SMALL, out=broken), ["evaluate"])
    assert stop.value.args == (broken,)
    with pytest.raises(UserError, match="already holds a run: pass --resume"):
        evaluate(file, dataclasses.replace(SMALL, out=broken), ["evaluate"])
    evaluate(file, dataclasses.replace(SMALL, out=broken, resume=True), ["evaluate"])
    every = {"a trial": 2 * 3, "a comparison": 3}[moment]
    assert len(called) == every + 1 and called[last] == called[last - 1], (
        "only the one that was interrupted is repeated"
    )
    for name in (SCORES, METRICS):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    assert tuned(broken) == tuned(whole)
    points = [{k: [t.params for t in trials] for k, trials in studies(out).items()} for out in (broken, whole)]
    assert points[0] == points[1]
    evaluate(file, dataclasses.replace(SMALL, out=broken, resume=True), ["evaluate"])
    assert len(called) == every + 1 and (broken / METRICS).read_bytes() == (whole / METRICS).read_bytes()


def test_every_method_has_as_many_trials(tmp_path, file):
    out = tmp_path / "run"
    evaluate(file, dataclasses.replace(SMALL, trials=3, out=out), ["evaluate"])
    found = studies(out)
    assert {name: len(trials) for name, trials in found.items()} == dict.fromkeys(METHODS, 3)
    assert set(tuned(out)) == {"lpg", "a2c"}, "no file holds the untrained component's random weights"
    searched = {name: set(trials[0].params) for name, trials in found.items()}
    assert searched["lpg"] == searched["untrained"] == {"learning_rate", "max_grad_norm", "prediction_coef"}
    assert searched["a2c"] == {"learning_rate", "max_grad_norm", "one_minus_gae_lambda", "ent_coef"}
    assert all(trials[0].user_attrs["enqueued"] == "defaults" for trials in found.values())
    for name, settings in tuned(out).items():
        best = max(found[name], key=lambda t: t.value)
        for number in ("learning_rate", "max_grad_norm"):
            assert settings["config"]["hyper"][number] == best.params[number]


def test_methods_are_tuned_on_other_tasks_than_those_they_are_compared_on(tmp_path, file, monkeypatch):
    drawn: dict[str, list[int]] = {}
    original = ChainFamily.sample_split

    def noted(self, split, n, seed=0):
        drawn.setdefault(split, []).append(n)
        return original(self, split, n, seed)

    monkeypatch.setattr(ChainFamily, "sample_split", noted)
    evaluate(file, dataclasses.replace(SMALL, out=tmp_path / "run"), ["evaluate"])
    assert {split: set(n) for split, n in drawn.items()} == {"validation": {2}, "test": {3}}


def test_evaluate_does_not_mix_two_files(tmp_path, file):
    args = dataclasses.replace(SMALL, baselines="", trials=0, out=tmp_path / "run")
    evaluate(file, args, ["evaluate"])
    artifacts.save(LPG(predictions=3, width=4, core="gru"), file, {"family": "grid/small"})
    with pytest.raises(UserError, match=r"Cannot resume .*: sha256 was"):
        evaluate(file, dataclasses.replace(args, resume=True), ["evaluate"])


def test_train_leaves_its_curve_and_the_usual_tags(tmp_path):
    config = PPOConfig(n_envs=4, n_steps=32, n_epochs=3, n_minibatches=2, agent=AgentConfig(hidden=(4,)))
    out = tmp_path / "run"
    args = Train(steps=256, seeds=2, checkpoints=2, episodes=1, out=out, config=config)
    train("control/cartpole", args, ["train"])
    assert is_picture(out / CURVE)
    logged = read_metrics(out)
    usual = {"rollout/ep_rew_mean", "rollout/ep_len_mean", "time/fps", "train/n_updates", "train/value_loss"}
    assert usual | {"eval/mean_reward"} < set(logged)
    assert not {"train/return", "train/length"} & set(logged)
    assert logged["train/n_updates"][1].tolist() == [3, 6]
    # every step of cart-pole pays one, so that lengths are returns
    assert logged["rollout/ep_len_mean"][1].tolist() == pytest.approx(logged["rollout/ep_rew_mean"][1].tolist())


def test_meta_training_shows_a_first_picture_and_can_be_extended(tmp_path, monkeypatch):
    estimator = TruncatedConfig(window=2)
    recipe = Recipe(
        "tiny", "", "chain/short", "lpg", {"predictions": 3, "width": 4, "core": "gru"},
        MetaTrainConfig(lifetimes=2, horizon=6, agent=AGENT, estimator=estimator),
        meta_steps=3, validate_every=100, validation_tasks=2, checkpoint_every=2,
    )  # fmt: skip
    monkeypatch.setattr("experiments.meta_train.FIRST_FIGURE", 2)
    seen = []

    def validate(session):
        seen.append(session.run.path)
        artifacts.save(session.trainer.component, session.run.path / ARTIFACT, {"meta_steps": 0})
        return 0.0

    monkeypatch.setattr("experiments.meta_train._Session.validate", validate)
    out = tmp_path / "run"
    meta_train(MetaTrain(recipe, out=out), ["meta-train"])
    assert is_picture(out / TRAINING) and seen[0] == out, "drawn before the first validation"
    monkeypatch.undo()

    longer = dataclasses.replace(recipe, meta_steps=5, minutes=40.0, checkpoint_every=1)
    assert meta_train(MetaTrain(longer, out=out, resume=True), ["meta-train"]) == out / ARTIFACT
    assert read_metrics(out)["meta/grad_norm"][0].tolist() == [1, 2, 3, 4, 5]
    assert artifacts.read_header(out / ARTIFACT)["provenance"]["validation"]["updates"] == 6
    assert read_json(out / CONFIG)["meta_steps"] == 5
    with pytest.raises(UserError, match="validate_every was 100 and is 50"):
        meta_train(MetaTrain(dataclasses.replace(longer, validate_every=50), out=out, resume=True), ["meta-train"])


def test_of_components_that_are_level_the_latest_is_kept(tmp_path, capsys):
    """Whose outer steps are no steps at all."""
    recipe = Recipe(
        "tiny", "", "chain/short", "lpg", {"predictions": 3, "width": 4, "core": "gru"},
        MetaTrainConfig(lifetimes=2, horizon=6, agent=AGENT, learning_rate=0.0, estimator=TruncatedConfig(window=2)),
        meta_steps=3, validate_every=1, validation_tasks=2,
    )  # fmt: skip
    file = meta_train(MetaTrain(recipe, out=tmp_path / "run"), ["meta-train"])
    assert artifacts.read_header(file)["provenance"]["meta_steps"] == 3
    assert "best on validation tasks: after 3 meta-steps" in capsys.readouterr().out


def test_a_run_is_not_resumed_with_a_file_that_was_written_anew(tmp_path, file):
    args = Train(objective=str(file), steps=20, checkpoints=1, episodes=1, config=AGENT, out=tmp_path / "run")
    train("chain/short", args, ["train"])
    longer = dataclasses.replace(args, resume=True)
    train("chain/short", longer, ["train"])
    learned = artifacts.load(file)
    for weight in learned.parameters():
        weight.data.add_(0.1)
    artifacts.save(learned, file, learned.provenance)
    with pytest.raises(UserError, match=r"sha256.objective was"):
        train("chain/short", longer, ["train"])


def test_lives_of_a_validation_may_be_shorter_than_those_of_meta_training(tmp_path, monkeypatch):
    recipe = Recipe(
        "tiny", "", "chain/short", "lpg", {"predictions": 3, "width": 4, "core": "gru"},
        MetaTrainConfig(lifetimes=2, horizon=6, agent=AGENT, estimator=TruncatedConfig(window=2)),
        meta_steps=1, validation_tasks=2, validation_updates=3,
    )  # fmt: skip
    lived, original = [], experiments.meta_train.learning_curves

    def noted(family, algorithm, horizon, **options):
        lived.append(horizon)
        return original(family, algorithm, horizon, **options)

    monkeypatch.setattr("experiments.meta_train.learning_curves", noted)
    file = meta_train(MetaTrain(recipe, out=tmp_path / "run"), ["meta-train"])
    assert lived == [3, 3] and artifacts.read_header(file)["provenance"]["validation"]["updates"] == 3


def test_what_has_no_picture_is_still_described(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert show("stac", None) is None
    assert "stac (hyperparameters)" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_file_is_described_by_what_it_was_trained_on(file, tmp_path, capsys):
    renamed = file.rename(tmp_path / "lpg.weights")  # a file is known by what it holds
    assert show(str(renamed), None) == tmp_path / "lpg.png"
    assert "grid/small" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("No."), 2, "demo: No.\n"),
        (KeyboardInterrupt(), 130, "demo: interrupted.\n"),
        (KeyboardInterrupt(Path("a/b")), 130, "demo: interrupted and saved; look into a/b.\n"),
    ],
)
def test_a_program_ends_with_one_sentence(capsys, error, code, said):
    with pytest.raises(SystemExit) as end, speaking("demo", saved="look into {path}"):
        raise error
    assert end.value.code == code and capsys.readouterr().err == said


def test_what_is_compared_is_what_the_tuned_files_say(tmp_path, file, monkeypatch):
    """Whoever gives such a file to `train` gets what was compared: algorithm, objective, length of life."""
    compared = {}
    original = module.learning_curves

    def noted(family, algorithm, horizon, **options):
        objective = algorithm.slots.objective.name
        compared[objective if objective != "ppo_clip" else "a2c"] = (algorithm.config, horizon)
        return original(family, algorithm, horizon, **options)

    monkeypatch.setattr(module, "learning_curves", noted)
    out = tmp_path / "run"
    args = dataclasses.replace(SMALL, baselines="a2c,dpo", trials=3, out=out)
    evaluate(file, args, ["evaluate"])
    assert set(compared) == {"lpg", "a2c", "dpo"}
    objectives = {"lpg": str(file), "a2c": None, "dpo": "dpo"}
    for name, (config, horizon) in compared.items():
        found = read_config(out / TUNED / f"{name}.toml", Train())
        assert found.config == config and found.objective == objectives[name]
        assert found.steps == horizon * config.n_envs * config.n_steps == 4 * AGENT.n_envs * AGENT.n_steps
    train("chain/short", dataclasses.replace(found, checkpoints=1, episodes=1, out=tmp_path / "trained"), ["train"])
    assert read_json(tmp_path / "trained" / CONFIG)["config"] == plain(found.config)


def test_lifetimes_may_have_more_copies_than_in_meta_training(tmp_path, file):
    learned = optimizer_file(tmp_path / "o.safetensors", "optim4rl", 0.02)
    for path, baselines in ((file, "a2c,untrained"), (learned, "adam,untrained")):
        out = tmp_path / path.stem
        evaluate(path, dataclasses.replace(SMALL, baselines=baselines, n_envs=5, trials=0, out=out), ["evaluate"])
        for each in read_scores(out / SCORES):
            assert each.returns.steps[-1] == 4 * 5 * AGENT.n_steps


def test_baselines_may_have_copies_of_their_own_on_as_many_steps(tmp_path, file, monkeypatch):
    compared = []
    original = module.learning_curves

    def noted(family, algorithm, horizon, **options):
        compared.append((algorithm.slots.objective.name, algorithm.config.n_envs, horizon))
        return original(family, algorithm, horizon, **options)

    monkeypatch.setattr(module, "learning_curves", noted)
    args = dataclasses.replace(SMALL, baselines="dpo,untrained", n_envs=1, updates=8, baseline_envs=4, trials=0)
    evaluate(file, dataclasses.replace(args, out=tmp_path / "run"), ["evaluate"])
    assert compared == [("lpg", 1, 8), ("dpo", 4, 2), ("lpg", 1, 8)], "an untrained rule is plugged as the trained one"
    ends = {int(each.returns.steps[-1]) for each in read_scores(tmp_path / "run" / SCORES)}
    assert ends == {8 * AGENT.n_steps}
    with pytest.raises(UserError, match=r"baseline_envs is 3, which does not divide the 8 updates x 1 copies of 'lpg'"):
        evaluate(file, dataclasses.replace(args, baseline_envs=3), ["evaluate"])
    learned = optimizer_file(tmp_path / "o.safetensors", "optim4rl", 0.02)
    with pytest.raises(UserError, match="baseline_envs is 4, but an optimizer's baselines move the same agents"):
        evaluate(learned, dataclasses.replace(args, baselines="adam"), ["evaluate"])


def test_a_file_that_tells_no_lifetime_wants_one_and_every_life_has_its_checkpoints(file):
    sentence = r"lpg\.safetensors does not say how long lifetimes were in its training: say how many --updates\.$"
    with pytest.raises(UserError, match=sentence):
        evaluate(file, dataclasses.replace(SMALL, updates=None), ["evaluate"])
    with pytest.raises(UserError, match=r"^'a2c' lives for 2 updates, too few for 3 checkpoints: expected more"):
        evaluate(file, dataclasses.replace(SMALL, baseline_envs=4, checkpoints=3), ["evaluate"])


def test_a_learned_objective_by_its_name_alone_is_called_untrained(tmp_path, file):
    for name, label in (("lpg", "lpg-untrained"), ("dpo", "dpo"), (str(file), "lpg")):
        args = Train(objective=name, steps=40, checkpoints=1, episodes=1, config=AGENT, out=tmp_path / f"run-{label}")
        train("chain/short", args, ["train"])
        assert [s.method for s in read_scores(args.out / SCORES)] == [label]


CHAIN, VECTORS = "chain/short", "control/cartpole-default"


@pytest.mark.parametrize(
    ("env", "plugged", "path", "value", "reader", "suits"),
    [
        (CHAIN, {"objective": "lpg"}, "hyper.ent_coef", 0.125, "'lpg'", 0.0),
        (CHAIN, {}, "hyper.prediction_coef", 0.125, "'ppo_clip'", 0.5),
        (CHAIN, {"objective": "impala"}, "hyper.aux_coef", 0.125, "the empty auxiliary slot", 1.0),
        (CHAIN, {"objective": "dpo", "preset": "a2c"}, "hyper.clip_range", 0.125, "'dpo'", math.inf),
        (CHAIN, {}, "agent.hidden", (32,), "an agent of kind 'tabular'", (64, 64)),
        (VECTORS, {}, "agent.model", 32, "an agent of kind 'mlp'", 128),
        (VECTORS, {"objective": "lpg"}, "agent.value_support", 10, "'lpg'", 0),
        (CHAIN, {"objective": "dpo"}, "normalize_advantage", False, "'dpo'", True),
        (CHAIN, {"hyperparameters": "schedule"}, "linear_decay", True, "'schedule'", False),
        (CHAIN, {"optimizer": "l2l"}, "optimizer", "momentum", "'l2l'", "adam"),
        (CHAIN, {}, "replay_batch", 32, "an update without replay", 64),
    ],
)
def test_a_setting_that_nothing_reads_is_refused(tmp_path, env, plugged, path, value, reader, suits):
    base = PPOConfig.a2c() if "preset" in plugged else AGENT
    *within, name = path.split(".")
    part = {name: value}
    changed = dataclasses.replace(base, **{k: dataclasses.replace(getattr(base, k), **part) for k in within} or part)
    run = {"steps": base.n_envs * base.n_steps, "checkpoints": 1, "episodes": 1} | plugged
    sentence = f"config.{path} is {value}, but {reader} does not read it: expected {suits}, which changes as little."
    with pytest.raises(UserError, match=re.escape(sentence)):
        train(env, Train(config=changed, out=tmp_path / "refused", **run), ["train"])
    assert not (tmp_path / "refused").exists()


def test_a_decay_that_learned_numbers_in_a_file_do_not_have_is_refused(tmp_path):
    saved = tmp_path / "numbers.safetensors"
    artifacts.save(make_component("self_tuned"), saved)
    args = Train(hyperparameters=str(saved), config=dataclasses.replace(AGENT, linear_decay=True), out=tmp_path / "run")
    with pytest.raises(UserError, match=r"config\.linear_decay is True, but 'self_tuned' does not read it"):
        train(CHAIN, args, ["train"])


def test_a_file_of_settings_that_the_learned_method_does_not_read_is_refused(tmp_path, file):
    config = tmp_path / "settings.toml"
    config.write_text("[config.hyper]\nvf_coef = 0.125\n")
    with pytest.raises(UserError, match=r"config\.hyper\.vf_coef is 0\.125, but 'lpg' does not read it"):
        evaluate(file, dataclasses.replace(SMALL, config=config, out=tmp_path / "run"), ["evaluate"])


def test_rollouts_that_only_fill_a_replay_are_no_updates(tmp_path):
    config = dataclasses.replace(AGENT, replay_capacity=8, replay_batch=6)  # its third rollout of two is the first
    args = Train(steps=50, checkpoints=1, episodes=1, config=config, out=tmp_path / "run")
    train("chain/short", args, ["train"])
    logged = read_metrics(args.out)
    assert logged["train/n_updates"][1].tolist() == [0, 0, 1, 2, 3]
    assert logged["train/value_loss"][0].tolist() == [30, 40, 50]
    short = dataclasses.replace(args, steps=20, out=tmp_path / "short")
    with pytest.raises(
        UserError, match=r"^2 rollouts of 2 trajectories .* draws 6: expected at least 3 rollouts \(30 environment"
    ):
        train("chain/short", short, ["train"])
    assert not short.out.exists()


def test_without_trials_nothing_is_tuned(tmp_path, file):
    for i, changes in enumerate(({"trials": 0}, {"baselines": "", "tune_learned": False})):
        out = tmp_path / str(i)
        evaluate(file, dataclasses.replace(SMALL, out=out, **changes), ["evaluate"])
        assert not (out / TUNED).exists() and not (out / STUDIES).exists()
    out = tmp_path / "baselines"
    evaluate(file, dataclasses.replace(SMALL, baselines="a2c", tune_learned=False, out=out), ["evaluate"])
    assert set(tuned(out)) == set(studies(out)) == {"a2c"}


def test_files_of_other_objectives_are_rivals_and_agents_have_the_settings_of_a_file(tmp_path, file, monkeypatch):
    (tmp_path / "before").mkdir()
    other, earlier = tmp_path / "other.safetensors", tmp_path / "before" / "lpg.safetensors"
    artifacts.save(make_component("ppo_soft_clip"), other)
    artifacts.save(LPG(predictions=5, width=4, core="gru"), earlier, {"agent": plain(AGENT)})
    settings = tmp_path / "settings.toml"
    settings.write_text("[config]\nn_steps = 7\n[config.hyper]\nlearning_rate = 3.0\n")
    compared = []
    original = module.learning_curves

    def noted(family, algorithm, horizon, **options):
        compared.append((algorithm.slots.objective, algorithm.config, horizon))
        return original(family, algorithm, horizon, **options)

    monkeypatch.setattr(module, "learning_curves", noted)
    changes = {"baselines": f"dpo,{other},{earlier}", "config": settings, "trials": 1, "tune_learned": False}
    out = tmp_path / "run"
    evaluate(file, dataclasses.replace(SMALL, out=out, **changes), ["evaluate"])
    assert [s.method for s in read_scores(out / SCORES)] == ["lpg", "dpo", "ppo_soft_clip", "lpg-before"]
    assert [objective.name for objective, *_ in compared] == ["lpg", "dpo", "ppo_soft_clip", "lpg"]
    assert compared[0][0].config.predictions == 3 and compared[3][0].config.predictions == 5
    first = compared[0][1]
    assert (first.n_steps, first.hyper.learning_rate, first.hyper.max_grad_norm) == (7, 3.0, 0.25)
    assert all((c.n_envs, c.n_steps, h) == (2, 7, 4) for _, c, h in compared)
    assert compared[3][1].hyper.learning_rate == 30.0, "that of its own file: the first trial is what there is"
    assert read_config(out / TUNED / "ppo_soft_clip.toml", Train()).objective == str(other)

    optimizer, twin = optimizer_file(tmp_path / "o.safetensors", "l2l", 0.1), earlier.with_name("twin.safetensors")
    artifacts.save(LPG(predictions=5, width=4, core="gru"), twin)
    for wrong, said in {
        "pp0": "unknown baseline 'pp0': the nearest of",
        str(optimizer): "slot 'optimizer': expected an objective",
        f"{earlier},{twin}": "expected each once",
    }.items():
        with pytest.raises(UserError, match=said):
            evaluate(file, dataclasses.replace(SMALL, baselines=wrong), ["evaluate"])


# --- learned optimizers -------------------------------------------------------------------------------------------


def optimizer_file(path: Path, name: str, rate: float) -> Path:
    """Of a rule that was trained on tables with other numbers than the defaults."""
    trained = dataclasses.replace(AGENT, hyper=AGENT.hyper.replace(learning_rate=rate, gamma=0.9))
    torch.manual_seed(7)
    artifacts.save(make_component(name), path, {"family": "chain/short", "agent": plain(trained), "tabular": True})
    return path


def test_a_learned_optimizer_is_compared_with_others_that_move_the_same_agents(tmp_path, monkeypatch):
    learned = optimizer_file(tmp_path / "o.safetensors", "optim4rl", 0.02)
    other = optimizer_file(tmp_path / "other.safetensors", "l2l", 0.3)
    (tmp_path / "before").mkdir()
    earlier = optimizer_file(tmp_path / "before" / "o.safetensors", "optim4rl", 0.7)
    compared = {}
    original = module.learning_curves

    def noted(family, algorithm, horizon, **options):
        rule = algorithm.slots.optimizer
        name = rule.name if rule.name not in compared else "untrained" if "untrained" not in compared else "earlier"
        compared[name] = (algorithm.config, horizon, rule)
        return original(family, algorithm, horizon, **options)

    monkeypatch.setattr(module, "learning_curves", noted)
    out = tmp_path / "run"
    args = dataclasses.replace(SMALL, baselines=f"adam,rmsprop,untrained,{other},{earlier}", out=out)
    evaluate(learned, args, ["evaluate"])
    assert list(compared) == ["optim4rl", "adam", "rmsprop", "untrained", "l2l", "earlier"]
    agents = [
        dataclasses.replace(c, optimizer="sgd", hyper=dataclasses.replace(AGENT.hyper, gamma=c.hyper.gamma))
        for c, _, _ in compared.values()
    ]
    assert all(agent == agents[0] for agent in agents) and agents[0].hyper.gamma == 0.9
    assert {horizon for _, horizon, _ in compared.values()} == {4}
    assert compared["adam"][0].optimizer == "adam" and compared["rmsprop"][0].optimizer == "rmsprop"
    weights = [compared[name][2].m.recurrent for name in ("optim4rl", "untrained")]
    assert (weights[0] != weights[1]).any()
    assert [s.method for s in read_scores(out / SCORES)][-1] == "optim4rl-before"
    for name, source in {"optim4rl": learned, "l2l": other, "adam": None}.items():
        found = read_config(out / TUNED / f"{name}.toml", Train())
        assert found.optimizer == (None if source is None else str(source))
        assert found.config == compared[name][0]
    train("chain/short", dataclasses.replace(found, checkpoints=1, episodes=1, out=tmp_path / "trained"), ["train"])


def test_what_a_learned_optimizer_was_trained_with_is_the_default(tmp_path):
    file = optimizer_file(tmp_path / "o.safetensors", "optim4rl", 0.02)
    assert suited("chain/short", ["--optimizer", str(file)]).config.hyper.gamma == 0.9
    for env, rate in {"chain/short": 0.02, "CartPole-v1": 1e-3}.items():  # tables say nothing of networks
        assert suited(env, ["--optimizer", str(file)]).config.hyper.learning_rate == rate
        assert PPO(env, optimizer=file).config.hyper.learning_rate == rate
    assert suited("CartPole-v1", ["--optimizer", "l2l"]).config.hyper.learning_rate == 0.1
    assert suited("CartPole-v1", ["--optimizer", "adam"]).config == PPOConfig()
    beside = PPO("chain/short", objective=LPG(predictions=3, width=4), optimizer=file).config
    assert beside == dataclasses.replace(
        PPOConfig.suited(LPG(), ChainFamily("short").observation_space),
        hyper=beside.hyper,
    )
    assert beside.hyper.learning_rate == 0.02 and beside.hyper.gamma != 0.9


@pytest.mark.parametrize(
    ("baselines", "said"),
    [
        ("a2c", "unknown baseline 'a2c': the nearest of adam, clipped_adam, momentum, rmsprop"),
        ("missing.safetensors", "There is no component file 'missing.safetensors'"),
        ("{objective}", "holds a component of the slot 'objective': expected an optimizer"),
        ("{again},{twin}", "expected each once"),
    ],
)
def test_wrong_rivals_of_an_optimizer(tmp_path, file, baselines, said):
    learned = optimizer_file(tmp_path / "o.safetensors", "optim4rl", 0.02)
    files = {"objective": file, "again": learned, "twin": optimizer_file(tmp_path / "p.safetensors", "optim4rl", 1.0)}
    args = dataclasses.replace(SMALL, baselines=baselines.format(**files), out=tmp_path / "run")
    with pytest.raises(UserError, match=re.escape(said)):
        evaluate(learned, args, ["evaluate"])
    assert not (tmp_path / "run").exists()


def test_neither_an_objective_nor_an_optimizer(tmp_path):
    path = tmp_path / "stac.safetensors"
    artifacts.save(make_component("stac"), path)
    with pytest.raises(UserError, match="slot 'hyperparameters': expected an objective or an optimizer"):
        evaluate(path, SMALL, ["evaluate"])
