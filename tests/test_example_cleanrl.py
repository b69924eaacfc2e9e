"""The single-file example: its parts change what it should, it learns, and both layouts of statistics are read."""

import csv
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from learned_rl import save
from learned_rl.types import UserError
from objectives.lirpg import LIRPG, LIRPGConfig

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "ppo_learned.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("ppo_learned", SCRIPT)
    module = sys.modules["ppo_learned"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["ppo_learned"]


def run(example, path, **kwargs):
    """Rows of what a short training wrote."""
    example.main(example.Args(**{"total_timesteps": 2048, "num_envs": 4, "num_steps": 128, "csv": path} | kwargs))
    with path.open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_the_script_runs_and_writes_what_it_did(tmp_path):
    words = ["--total-timesteps", "2000", "--objective", "dpo", "--csv", str(tmp_path / "run.csv")]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step 1024: return ") and "steps/s" in done.stdout
    rows = list(csv.DictReader((tmp_path / "run.csv").open()))
    assert [row["global_step"] for row in rows] == ["1024"]  # whole updates of 8 x 128 steps
    assert 8 < float(rows[0]["episodic_return"]) < 60 and float(rows[0]["mean_reward"]) == 1.0
    assert {"policy_gradient_loss", "value_loss", "entropy", "approx_kl"} <= set(rows[0])


def test_each_part_changes_the_training(example, tmp_path):
    torch.manual_seed(0)
    reward = LIRPG(LIRPGConfig(scale=0.5, hidden=(4,), zero=False))
    reward.fit(gymnasium.spaces.Box(-np.inf, np.inf, (4,)), gymnasium.spaces.Discrete(2), ())
    save(reward, tmp_path / "reward.safetensors")
    plain = run(example, tmp_path / "plain.csv")
    assert plain == run(example, tmp_path / "again.csv") and len(plain) == 4
    assert all(row["mean_paid"] == row["mean_reward"] for row in plain)
    others = {
        "objective": {"objective": "dpo"},
        "whole rollouts": {"objective": "impala"},
        "optimizer": {"optimizer": "rmsprop"},
        "rate": {"learning_rate": 1e-5},
        "reward": {"reward": str(tmp_path / "reward.safetensors")},
    }
    for name, args in others.items():
        rows = run(example, tmp_path / "other.csv", **args)
        assert rows[-1]["value_loss"] != plain[-1]["value_loss"], name
    assert all(abs(row["mean_paid"] - row["mean_reward"]) > 1e-4 and row["mean_reward"] == 1 for row in rows)
    still = run(example, tmp_path / "still.csv", learning_rate=0.0)
    assert max(row["approx_kl"] for row in still) < 1e-6 < max(row["approx_kl"] for row in plain)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ppo_clip", "dpo"])
def test_it_learns(example, objective):
    args = example.Args(total_timesteps=40_000, learning_rate=2.5e-3, objective=objective)
    assert example.main(args) > 150  # at random: about 22


def test_episodes_are_found_in_every_layout(example):
    e = lambda r, n: {"r": np.array([r]), "l": np.array([n])}  # noqa: E731
    assert example.finished({}) == []
    assert example.finished({"final_info": [None, {"episode": e(5.0, 7)}, {"other": 1}, None]}) == [(5.0, 7)]
    objects = np.array([None, {"episode": e(5.0, 7)}], dtype=object)
    assert example.finished({"final_info": objects, "_final_info": np.array([False, True])}) == [(5.0, 7)]
    arrays = {"r": np.array([1.0, 0.0, 3.0]), "l": np.array([4, 0, 6])}
    masked = {"episode": arrays, "_episode": np.array([True, False, True])}
    assert example.finished(masked) == [(1.0, 4), (3.0, 6)]
    assert example.finished({"final_info": masked}) == [(1.0, 4), (3.0, 6)]


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP])
def test_episodes_of_the_installed_gymnasium_are_all_found(example, mode):
    make = lambda: gymnasium.wrappers.RecordEpisodeStatistics(gymnasium.make("CartPole-v1"))  # noqa: E731
    envs = SyncVectorEnv([make] * 3, autoreset_mode=mode)
    envs.reset(seed=0)
    found, running, ended, expected = [], np.zeros(3), np.zeros(3, bool), []
    for k in range(120):
        _, reward, terminated, truncated, infos = envs.step(np.full(3, k % 2))
        found += example.finished(infos)
        running += np.where(ended & (mode == AutoresetMode.NEXT_STEP), 0, reward)  # such a step only resets
        ended = terminated | truncated
        expected += running[ended].tolist()
        running[ended] = 0
    assert [r for r, _ in found] == expected and len(expected) > 3
    assert all(r == n and math.isfinite(r) for r, n in found)


def test_parts_and_spaces_that_do_not_fit_are_refused(example):
    with pytest.raises(UserError, match="'lpg' asks agents for the head 'prediction' of size 30, which those of this"):
        example.main(example.Args(objective="lpg"))
    with pytest.raises(UserError, match=r"Pendulum-v1 has .*: expected vectors and Discrete"):
        example.main(example.Args(env_id="Pendulum-v1"))
