"""Two colours: every rule against a plain account of it, the swaps, the saved clock, and the averages per step."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from experiments.oracles.two_colours import solve
from learned_rl.tasks.two_colours import (
    ACTIONS,
    CELLS,
    COST,
    FREE,
    NEVER,
    TwoColoursFamily,
    TwoColoursVectorEnv,
    tables,
)
from learned_rl.types import UserError

P, B = 3, 4


def make(preset: str = "100k", lifetimes: int = P, copies: int = B, seed: int = 0) -> TwoColoursVectorEnv:
    family = TwoColoursFamily(preset)
    env = family.make(family.sample_split("train", lifetimes), copies, seed)
    env.reset()
    return env


def cells(obs: torch.Tensor) -> list[list[int]]:
    """Agent, first and second object of each copy, as `5 * row + column`, read from observations [N, 30]."""
    assert obs.unflatten(1, (6, 5)).sum(2).eq(1).all()
    x, y = obs.unflatten(1, (3, 2, 5)).argmax(-1).unbind(-1)
    return (5 * y + x).tolist()


def moved(cell: int, action: int) -> int:
    row, column = divmod(cell, 5)
    dy, dx = [(-1, 0), (1, 0), (0, -1), (0, 1)][action]
    return 5 * min(max(row + dy, 0), 4) + min(max(column + dx, 0), 4)


def actions(env: TwoColoursVectorEnv, steps: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(ACTIONS, (steps, env.num_envs), generator=torch.Generator().manual_seed(seed))


# --- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["11", "11-respawn"])
def test_every_step_is_what_the_rules_say(preset):
    env = make(preset)
    obs = env._observe()
    reached, everything = 0, list(itertools.permutations(range(25), 3))
    for t, action in enumerate(actions(env, 600)):
        draws = torch.Generator()
        draws.set_state(env.generator.get_state())
        before = cells(obs)
        obs, reward, terminated, truncated, info = env.step(action)
        luck = torch.randint(len(everything) if "-" in preset else FREE, (env.num_envs,), generator=draws).tolist()
        assert obs is info["final_obs"] and not (terminated | truncated).any()
        sign = 1 if t // 11 % 2 == 0 else -1
        for i, (agent, *objects) in enumerate(before):
            at = moved(agent, int(action[i]))
            expected, paid = [at, *objects], -COST
            if at in objects:
                which, reached = objects.index(at), reached + 1
                paid = sign * (1 if which == 0 else -1)
                if "-" in preset:
                    expected = list(everything[luck[i]])
                else:
                    expected[1 + which] = [c for c in range(25) if c not in (at, objects[1 - which])][luck[i]]
            assert cells(obs)[i] == expected
            assert float(reward[i]) == pytest.approx(paid)
    assert reached > 200


def test_an_object_comes_back_to_every_free_cell_alike():
    rules = tables(torch.device("cpu"))
    assert len(rules.start) == 25 * 24 * 23
    pair = (rules.start[:, None] * ACTIONS + torch.arange(ACTIONS)).flatten()
    placement = rules.successor.view(-1, FREE)[pair]
    agent, first, second = placement // CELLS**2, placement // CELLS % CELLS, placement % CELLS
    assert (agent != first).all() and (agent != second).all() and (first != second).all()
    several = torch.tensor([len(row.unique()) for row in placement[::7]])
    assert torch.equal(several, torch.where(rules.reaches[pair[::7]], FREE, 1))


def test_streams_begin_on_every_placement_alike():
    env = make(lifetimes=1, copies=20_000)
    rows = torch.tensor(cells(env._observe()))
    for of in rows.T:
        share = of.bincount(minlength=CELLS) / len(rows)
        assert ((share - 1 / CELLS).abs() < 5 * math.sqrt(1 / CELLS / len(rows))).all()
    assert (rows[:, 0] != rows[:, 1]).all() and (rows[:, 0] != rows[:, 2]).all() and (rows[:, 1] != rows[:, 2]).all()


# --- the clock -----------------------------------------------------------------------------------------------------


def assignment(env: TwoColoursVectorEnv) -> list[bool]:
    """For each copy: does the first object pay now? Found out on a copy of the stream."""
    other = TwoColoursFamily().make({"period": torch.ones(env.lifetimes, dtype=torch.int64)}, env.copies, 0)
    beside = (0 * CELLS + 1) * CELLS + 24  # the agent in a corner, the first object to the right, the second far away
    other.load_state_dict(env.state_dict() | {"state/placement": torch.full((env.num_envs,), beside)})
    reward = other.step(torch.full((env.num_envs,), 3))[1]
    assert reward.abs().eq(1).all()
    return (reward > 0).tolist()


def test_lifetimes_have_clocks_of_their_own():
    env = TwoColoursFamily().make({"period": torch.tensor([4, 6, 9])}, 1, 0)
    env.reset()
    ages = [0, 0, 0]
    for t, action in enumerate(actions(env, 60)):
        assert assignment(env) == [age // period % 2 == 0 for age, period in zip(ages, (4, 6, 9), strict=True)]
        env.step(action)
        ages = [age + 1 for age in ages]
        if t == 20:
            env.set_tasks(torch.tensor([1]), {"period": torch.tensor([6])})
            ages[1] = 0
        if t == 33:
            env.reset(seed=1)
            ages = [0, 0, 0]
    assert env.elapsed.tolist() == ages


@pytest.mark.parametrize("preset", ["7", "7-respawn"])
def test_a_restored_stream_goes_on_between_swaps(preset):
    env, todo = make(preset), actions(make(preset), 60)
    for action in todo[:24]:
        env.step(action)
    env.set_tasks(torch.tensor([2]), {"period": torch.tensor([5])})
    env.step(todo[24])
    other = make(preset.replace("7", "100k"), seed=9)
    other.load_state_dict(env.state_dict())
    assert torch.equal(env._observe(), other._observe())
    for action in todo[25:]:
        for ours, theirs in zip(env.step(action)[:4], other.step(action)[:4], strict=True):
            assert torch.equal(ours, theirs)


# --- averages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("respawn", "best", "known"),
    [(False, True, 0.2789), (False, False, -0.0386), (True, True, 0.2693), (True, False, -0.0385)],
)
def test_the_average_reward_is_that_of_the_exact_model(respawn, best, known):
    """After any number of steps, reward and change of value add up to the average per step, but for a martingale."""
    solution, copies, steps = solve(respawn, best=best, tolerance=1e-5), 2000, 400
    assert round(solution.average, 4) == known
    env, draws = make("100k-respawn" if respawn else "100k", 1, copies), torch.Generator().manual_seed(1)
    value = torch.full((CELLS**3,), torch.nan).double().index_put((env.rules.start,), solution.values)
    choose = torch.full((CELLS**3, ACTIONS), torch.nan).index_put((env.rules.start,), solution.policy.float())
    total = -value[env.placement]
    for _ in range(steps):
        total += env.step(choose[env.placement].multinomial(1, generator=draws).squeeze(1))[1]
    mean = (total + value[env.placement]) / steps
    error = float(mean.std()) / math.sqrt(copies)
    assert 0 < error < 5e-4 and abs(float(mean.mean()) - solution.average) < 4 * error


# --- names ---------------------------------------------------------------------------------------------------------


def test_presets_are_periods():
    periods = {"100k": 100_000, "2500": 2500, "25k-respawn": 25_000, "1": 1}
    for preset, period in periods.items():
        family = TwoColoursFamily(preset)
        assert family.period == period and family.sample_split("train", 2)["period"].tolist() == [period] * 2
        assert family.continuing and family.max_episode_steps == NEVER and family.respawn == ("-" in preset)


@pytest.mark.parametrize("preset", ["0", "0k", "-5", "1.5k", "100 k", "100k-", "k", "9999999999999"])
def test_other_presets_are_a_users_mistake(preset):
    with pytest.raises(UserError, match="nearest") as error:
        TwoColoursFamily(preset)
    assert f"'{preset}'" in str(error.value) and "\n" not in str(error.value)
