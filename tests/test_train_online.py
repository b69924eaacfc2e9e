"""`learned-rl train` with parts that are learned online: what it writes, logs and shows; recipes of one lifetime."""

from __future__ import annotations

import csv
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import experiments.train
from experiments.cli import main
from experiments.plugs import Plugged, plugs
from experiments.recipes import online_recipes
from experiments.report import append_scores, tuned_figure
from experiments.runs import SCORES, read_metrics
from experiments.single_task import alternating, discounting_chain, lirpg, two_colours
from learned_rl import artifacts
from learned_rl.evaluation import Curves
from learned_rl.types import UserError
from meta_optimizers.self_tuning import SelfTuningConfig
from objectives.disco import Disco
from objectives.lirpg import LIRPG
from objectives.lpg import LPG
from objectives.self_tuned import SelfTuned

TINY = shlex.split(
    "--steps 960 --checkpoints 3 --episodes 1 --config.n-steps 16 --config.n-envs 4 --config.agent.hidden 8"
)


@pytest.fixture
def learned(monkeypatch, tmp_path):
    """Runs the command line in a folder of its own, which is returned."""

    def run(*words: str):
        monkeypatch.setattr(sys, "argv", ["learned-rl", "train", *words, "--out", str(tmp_path / "run")])
        main()
        return tmp_path / "run"

    return run


def scores(folder) -> list[dict[str, str]]:
    with (folder / SCORES).open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_shows_and_keeps_what_was_learned(learned):
    words = "control/cartpole --seeds 3 --self-tune gamma=0.9:1,entropy_cost --reward lirpg --set reward.scale=0.5"
    folder = learned(*words.split(), "--config.hyper.ent-coef", "0.01", "--outer.learning-rate", "0.1", *TINY)
    found = read_metrics(folder)
    for name, base in (("gamma", 0.99), ("ent_coef", 0.01)):
        middle, low, high = (found[f"tuned/{name}{end}"][1] for end in ("", "_low", "_high"))
        assert middle[0] == pytest.approx(base, rel=1e-5) and middle[-1] != middle[0]
        assert (low <= middle + 1e-6).all() and (middle <= high + 1e-6).all() and (high > low)[-1]
    assert tuned_figure(folder) is not None and (folder / "figures" / "tuned.png").exists()
    assert {row["method"] for row in scores(folder)} == {"ppo+lirpg+self_tuned"}
    parts = {path.name for path in (folder / "components").iterdir()}
    assert parts == {f"{slot}-{i}.safetensors" for slot in ("reward", "hyperparameters") for i in range(3)}
    rewards = [artifacts.load(folder / "components" / f"reward-{i}.safetensors") for i in range(3)]
    assert rewards[0].config.scale == 0.5 and rewards[0].provenance["agent"] == 0
    assert not any(torch.equal(a, b) for a, b in zip(rewards[0].parameters(), rewards[1].parameters(), strict=True))


def test_a_run_in_which_nothing_could_be_learned_says_so_and_is_kept(learned, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        learned("control/cartpole", "--self-tune", "gamma", "--config.hyper.learning-rate", "1e30", *TINY)
    assert "none of" in capsys.readouterr().err and (tmp_path / "run" / "report.html").exists()


def test_what_was_learned_serves_as_it_is(learned, tmp_path):
    folder = learned("control/cartpole", "--reward", "lirpg", *TINY)
    file = folder.rename(tmp_path / "first") / "components" / "reward-0.safetensors"
    again = learned("control/cartpole", "--reward", str(file), "--learn", "none", *TINY)
    assert not (again / "components").exists() and tuned_figure(again) is None


def test_where_episodes_do_not_end_the_reward_of_a_step_counts(learned):
    folder = learned("two_colours", "--seeds", "2", "--label", "mine", *TINY)
    rows, steps = scores(folder), read_metrics(folder)["train/reward"]
    assert {row["suite"] for row in rows} == {"two_colours, reward per step"} and {r["method"] for r in rows} == {
        "mine"
    }
    assert sorted({int(row["step"]) for row in rows}) == [320, 640, 960]
    whole = np.mean([float(row["return"]) for row in rows])
    assert whole == pytest.approx(steps[1].mean(), abs=1e-6)  # both are all rewards over all steps


def test_a_long_run_records_means(learned, monkeypatch):
    every = read_metrics(learned("control/cartpole", *TINY))["train/value_loss"]
    monkeypatch.setattr(experiments.train, "ROWS", 3)
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], sys.argv[-1] + "-thin"])
    main()
    thin = read_metrics(Path(sys.argv[-1]))["train/value_loss"]
    assert thin[0].tolist() == [320, 640, 960] and len(every[0]) == 15
    assert thin[1] == pytest.approx(every[1].reshape(3, 5).mean(1), rel=1e-6)


@pytest.mark.parametrize("name", online_recipes())
def test_a_recipe_runs(learned, name):
    folder = learned(name, "--steps", "600", "--seeds", "2", "--checkpoints", "2", "--episodes", "1")
    assert len({row["step"] for row in scores(folder)}) >= 2


def test_discounts_fall_into_noise_and_rise_into_signal():
    """In expectation over many passes, after a few hundred meta-steps; the whole experiment is 10 000 of one pass."""
    trained = alternating.trainer(lifetimes=256, seed=0)
    for _ in range(150):
        trained.step()
    found = alternating.discounts(trained)
    noise, signal = found[1::2], found[0::2]
    assert noise.max() < signal.min()


def test_the_chain_writes_its_curves(tmp_path):
    args = discounting_chain.Chain(exact=4, drawn=2, seeds=2, episodes=8, every=2, out=tmp_path)
    discounting_chain.main(args)
    with (tmp_path / "curves.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * (2 * 1 + 1 * 2) and (tmp_path / "curves.png").exists()


def test_the_weight_around_switches_is_read_from_runs(tmp_path):
    """Two phases of 100 000 steps and a half; the weight is 0.1 but for 20 000 steps after each switch, where it is
    0.2; what was collected is known exactly."""
    steps = np.arange(1000, 250_001, 1000)
    weight = np.where((steps > 100_000) & ((steps - 1) % 100_000 < 20_000), 0.2, 0.1)
    rows = [f"{step},tuned/ent_coef,{w}\n" for step, w in zip(steps, weight, strict=True)]
    curves = Curves(np.array([100_000, 250_000]), np.array([[[0.1, 0.1, 0.1, 0.1]], [[0.2, 0.2, 0.2, 0.4]]]))
    for name in ("fixed", "mg"):
        run = tmp_path / name
        run.mkdir()
        append_scores(run / SCORES, "two_colours, reward per step", name, curves)
        (run / "metrics.csv").write_text("step,tag,value\n" + "".join(rows if name == "mg" else rows[:0]))
        (run / "config.json").write_text('{"env": "two_colours/50k", "config": {"n_envs": 2}}')
    args = two_colours.TwoColours((tmp_path / "fixed", tmp_path / "mg"), out=tmp_path / "out")
    two_colours.main(args)
    with (tmp_path / "out" / "totals.csv").open() as file:
        fixed, learned = csv.DictReader(file)
    assert [float(row["total"]) for row in (fixed, learned)] == [40_000, 40_000] and fixed["weight after"] is None
    assert (learned["weight before"], learned["weight after"], learned["higher"]) == ("0.1000", "0.2000", "2 of 2")
    assert (tmp_path / "out" / "two_colours.png").exists()


def test_lirpg_beside_the_same_agent(learned, tmp_path):
    runs = []
    for words in ([], ["--reward", "lirpg"]):
        folder = learned(
            "delayed/5/control/cartpole", "--seeds", "2", "--config.hyper.learning-rate", "0.003", *words, *TINY
        )
        runs.append(folder.rename(tmp_path / f"run{len(runs)}"))
    lirpg.main(lirpg.Lirpg(tuple(runs), out=tmp_path / "out"))
    with (tmp_path / "out" / "returns.csv").open() as file:
        _, plain, with_lirpg = csv.reader(file)
    assert (plain[1], with_lirpg[1]) == (lirpg.PLAIN, lirpg.LEARNED) and plain[2:5] == ["0.003", "2", "960"]
    returns = [float(row["return"]) for row in scores(runs[0]) if row["step"] != "0"]
    assert float(plain[5]) == pytest.approx(np.mean(returns), abs=0.051)  # of two seeds the middle half is both
    assert (tmp_path / "out" / "lirpg.png").exists()
    with pytest.raises(UserError, match="has ended"):
        lirpg.main(lirpg.Lirpg((tmp_path,), out=tmp_path / "out"))


@pytest.mark.parametrize(
    "words, decays",
    [
        ("--hyperparameters stac", True),
        ("--self-tune gamma", True),
        ("--self-tune gamma --set hyperparameters.linear_decay=false", False),
    ],
)
def test_parts_that_say_numbers_know_that_the_learning_rate_falls(words, decays):
    words = words.split()
    named = dict(zip(words[::2], words[1::2], strict=True))
    settings = {"hyperparameters": named.get("--hyperparameters"), "self_tune": named.get("--self-tune")}
    part = plugs(Plugged(**settings, set=tuple(named[k] for k in ("--set",) if k in named)), linear_decay=True)
    assert part["hyperparameters"]().config.linear_decay == decays


def test_a_part_in_a_file_takes_settings_that_its_weights_fit(tmp_path):
    path = tmp_path / "rule.safetensors"
    artifacts.save(Disco(predictions=3, width=2, lifetime_width=2, embedding=2), path)
    rule = plugs(Plugged(objective=str(path), set=("objective.support=2",)), linear_decay=False)["objective"]()
    assert (rule.config.support, rule.config.predictions) == (2, 3)


@pytest.mark.parametrize(
    ("words", "rate"),
    [
        ("", SelfTuningConfig.learning_rate),
        ("--reward lirpg", LIRPG.outer_rate),
        ("--self-tune gamma", SelfTuned.outer_rate),
        ("--self-tune gamma --reward lirpg", LIRPG.outer_rate),
        ("--self-tune gamma --reward lirpg --learn hyperparameters", SelfTuned.outer_rate),
        ("--objective lpg --learn objective --self-tune gamma", LPG.outer_rate),
    ],
)
def test_the_outer_learning_rate_suits_what_is_learned(words, rate):
    assert experiments.train.suited("control/cartpole", words.split()).outer.learning_rate == rate


@pytest.mark.parametrize(
    "env, ended, sentence",
    [
        ("two_colours", False, "has ended"),
        ("catch/5x5", True, "of 'catch/5x5'"),
        ("two_colours", True, "at least 120000"),
    ],
)
def test_runs_that_say_nothing_about_switches_are_refused(tmp_path, env, ended, sentence):
    (tmp_path / "metrics.csv").write_text("step,tag,value\n50000,tuned/ent_coef,0.1\n")
    (tmp_path / "config.json").write_text(f'{{"env": "{env}", "config": {{"n_envs": 1}}}}')
    if ended:
        append_scores(tmp_path / SCORES, env, "mg", Curves(np.array([50_000]), np.ones((1, 1, 2))))
    with pytest.raises(UserError, match=sentence):
        two_colours.main(two_colours.TwoColours((tmp_path,), out=tmp_path / "out"))
