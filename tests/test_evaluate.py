"""What `evaluate`, `train`, `meta-train` and `show` leave behind, and that what is finished is not done again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import experiments.evaluate as module
from experiments.cli import speaking
from experiments.evaluate import FIGURE, TUNED, Evaluate, evaluate
from experiments.meta_train import ARTIFACT, MetaTrain, meta_train
from experiments.meta_train import FIGURE as TRAINING
from experiments.recipes import Recipe
from experiments.report import read_scores
from experiments.runs import CONFIG, METRICS, SCORES, plain, read_json, read_metrics
from experiments.show import show
from experiments.train import FIGURE as CURVE
from experiments.train import Train, train
from learned_rl import PPOConfig, artifacts
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.evaluation import iqm
from learned_rl.types import UserError
from meta_optimizers.trainer import MetaTrainConfig
from meta_optimizers.truncated import TruncatedConfig
from objectives.lpg import LPG

AGENT = PPOConfig(
    n_envs=2, n_steps=5, n_epochs=1, n_minibatches=1, optimizer="sgd", hyper=Hyper(learning_rate=30.0, aux_coef=0.5)
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


@pytest.mark.parametrize("moment", ["tune", "learning_curves"])
def test_evaluate_resumes_with_what_is_left(tmp_path, file, monkeypatch, moment):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    evaluate(file, dataclasses.replace(SMALL, out=whole), ["evaluate"])
    called, original = [], getattr(module, moment)

    def counted(*args, **options):
        called.append(args[1].slots.objective.name)
        if len(called) == 2:
            raise KeyboardInterrupt
        return original(*args, **options)

    monkeypatch.setattr(module, moment, counted)
    with pytest.raises(KeyboardInterrupt) as stop:
        evaluate(file, dataclasses.replace(SMALL, out=broken), ["evaluate"])
    assert stop.value.args == (broken,)
    with pytest.raises(UserError, match="already holds a run: pass --resume"):
        evaluate(file, dataclasses.replace(SMALL, out=broken), ["evaluate"])
    evaluate(file, dataclasses.replace(SMALL, out=broken, resume=True), ["evaluate"])
    assert len(called) == 2 + 2 and called[2] == called[1] != called[0]
    for name in (TUNED, SCORES, METRICS):
        assert (broken / name).read_bytes() == (whole / name).read_bytes()
    evaluate(file, dataclasses.replace(SMALL, out=broken, resume=True), ["evaluate"])
    assert len(called) == 4 and (broken / METRICS).read_bytes() == (whole / METRICS).read_bytes()


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
    monkeypatch.setattr("experiments.meta_train._Session.validate", lambda self: seen.append(self.run.path) or 0.0)
    out = tmp_path / "run"
    meta_train(MetaTrain(recipe, out=out), ["meta-train"])
    assert is_picture(out / TRAINING) and seen[0] == out, "drawn before the first validation"
    monkeypatch.undo()

    longer = dataclasses.replace(recipe, meta_steps=5, minutes=40.0, checkpoint_every=1)
    assert meta_train(MetaTrain(longer, out=out, resume=True), ["meta-train"]) == out / ARTIFACT
    assert read_metrics(out)["meta/grad_norm"][0].tolist() == [1, 2, 3, 4, 5]
    assert read_json(out / CONFIG)["meta_steps"] == 5
    with pytest.raises(UserError, match="validate_every was 100 and is 50"):
        meta_train(MetaTrain(dataclasses.replace(longer, validate_every=50), out=out, resume=True), ["meta-train"])


def test_what_has_no_picture_is_still_described(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert show("adam", None) is None
    assert "adam (optimizer)" in capsys.readouterr().out and not list(tmp_path.iterdir())


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


def test_tuned_numbers_are_plain(tmp_path, file):
    """Whoever reads `tuned.json` finds what `Hyper` is called with."""
    out = tmp_path / "run"
    evaluate(file, dataclasses.replace(SMALL, baselines="a2c", tune_learned=False, out=out), ["evaluate"])
    found = json.loads((out / TUNED).read_text())
    assert set(found) == {"a2c"} and found["a2c"]["trials"] == 2
    assert set(Hyper().replace(**found["a2c"]["hyper"]).__dict__) == set(vars(Hyper()))
