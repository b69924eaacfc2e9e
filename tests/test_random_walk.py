"""The random walk with a changing reward: its values, its coins, and when the sign changes."""

from __future__ import annotations

import math

import pytest
import torch

from learned_rl.tasks.random_walk import STATES, RandomWalkFamily, RandomWalkVectorEnv, true_values
from learned_rl.types import UserError


def make(period: int, lifetimes: int, copies: int, seed: int = 0) -> RandomWalkVectorEnv:
    family = RandomWalkFamily(str(period))
    env = family.make(family.sample_split("train", lifetimes), copies, seed)
    env.reset()
    return env


def still(env: RandomWalkVectorEnv) -> torch.Tensor:
    return torch.zeros(env.num_envs, dtype=torch.int64)


def test_true_values_solve_the_walk():
    """v = r + P v with the two ends left out, for each sign."""
    move = torch.diag(torch.full((STATES - 1,), 0.5), 1) + torch.diag(torch.full((STATES - 1,), 0.5), -1)
    for z in (1.0, -1.0):
        reward = torch.zeros(STATES).index_fill(0, torch.tensor([STATES - 1]), 0.5 * z)
        exact = torch.linalg.solve(torch.eye(STATES) - move, reward)
        torch.testing.assert_close(true_values(torch.tensor(z)), exact)
        assert exact.tolist() == pytest.approx([z * (i + 1) / 6 for i in range(5)])
    assert true_values(torch.ones(2, 3)).shape == (2, 3, STATES)


def test_walks_move_by_one_and_are_paid_at_the_right_end_only():
    env, steps, right = make(2, 2, 50), 400, 0
    obs = env._observe()
    assert obs.eq(2).all()
    done_so_far = torch.zeros(100, dtype=torch.int64)
    for _ in range(steps):
        z = 1.0 - 2.0 * (done_so_far // 2 % 2)
        assert torch.equal(env.z, z)
        before = obs
        obs, reward, terminated, truncated, info = env.step(still(env))
        last = info["final_obs"]
        off_right, off_left = terminated & (before == 4), terminated & (before == 0)
        assert torch.equal(terminated, off_right | off_left) and not truncated.any()
        assert ((last - before).abs() == ~terminated).all() and torch.equal(last[terminated], before[terminated])
        assert torch.equal(reward, torch.where(off_right, z, 0.0))
        assert torch.equal(obs, torch.where(terminated, 2, last))
        done_so_far, right = done_so_far + terminated, right + int(off_right.sum())
    ended = int(done_so_far.sum())
    assert abs(ended / (steps * 100) - 1 / 9) < 0.01  # nine steps on average
    assert abs(right / ended - 0.5) < 4 * 0.5 / math.sqrt(ended)


def test_values_are_what_walks_collect():
    """In their first episode, those that ever came to a state; what follows does not depend on what came before."""
    env = make(1000, 1, 4000)
    obs, total = env._observe(), torch.zeros(4000)
    visited, running = torch.zeros(4000, STATES, dtype=torch.bool), torch.ones(4000, dtype=torch.bool)
    while running.any():
        visited |= torch.nn.functional.one_hot(obs, STATES).bool() & running[:, None]
        obs, reward, terminated, _, _ = env.step(still(env))
        total, running = total + reward * running, running & ~terminated
    for state, value in enumerate(true_values(torch.tensor(1.0))):
        returns = total[visited[:, state]]
        assert abs(float(returns.mean() - value)) < 4 * float((value * (1 - value) / len(returns)).sqrt())


def test_lifetimes_count_their_own_episodes():
    env = make(3, 3, 4)
    for _ in range(60):
        env.step(still(env))
    before = env.episodes.clone()
    assert (before > 0).all()
    env.set_tasks(torch.tensor([1]), {"period": torch.tensor([1])})
    assert env.episodes.view(3, 4)[1].eq(0).all() and torch.equal(env.episodes.view(3, 4)[::2], before.view(3, 4)[::2])
    assert env.z.view(3, 4)[1].eq(1).all()
    env.reset()
    assert env.episodes.eq(0).all()


@pytest.mark.parametrize("preset", ["0", "-3", "1k", "1.5"])
def test_other_presets_are_a_users_mistake(preset):
    with pytest.raises(UserError, match="PERIOD") as error:
        RandomWalkFamily(preset)
    assert f"'{preset}'" in str(error.value) and "nearest" in str(error.value)
