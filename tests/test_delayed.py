"""Delayed rewards: the same episodes, paid every so many steps and at their ends."""

from __future__ import annotations

import warnings

import pytest
import torch

from learned_rl.registry import make_family
from learned_rl.streams import Streams
from learned_rl.tasks.base import TaskFamily
from learned_rl.tasks.delayed import DelayedEnv, DelayedFamily
from learned_rl.types import UserError

P, B = 3, 4
INNER = ["CartPole-v1", "control/pendulum-default", "control/cartpole", "chain/short-noisy", "grid/small"]
SAVED = [name for name in INNER if name != "CartPole-v1"]


def make(family: TaskFamily, seed: int = 5):
    env = family.make(family.sample_split("train", P), B, seed)
    return env, env.reset(seed=seed)[0]


def actions(family: TaskFamily, steps: int) -> list[torch.Tensor]:
    family.action_space.seed(0)
    return [torch.stack([torch.as_tensor(family.action_space.sample()) for _ in range(P * B)]) for _ in range(steps)]


def same(a, b) -> None:
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("inner", INNER)
def test_payments_are_what_was_earned_since_the_last_one(inner, steps):
    plain, delayed = make_family(inner), make_family(f"delayed/{steps}/{inner}")
    assert isinstance(delayed, DelayedFamily) and delayed.max_episode_steps == plain.max_episode_steps
    (ours, obs), (theirs, first) = make(delayed), make(plain)
    assert torch.equal(obs, first)
    owed, age, paid, ended = [0.0] * (P * B), [0] * (P * B), 0, 0
    for action in actions(plain, 210):
        obs, reward, terminated, truncated, info = ours.step(action)
        other = theirs.step(action)
        same([obs, terminated, truncated, info["final_obs"]], [other[0], *other[2:4], other[4]["final_obs"]])
        for i in range(P * B):
            owed[i], age[i] = owed[i] + float(other[1][i]), age[i] + 1
            done = bool(terminated[i] | truncated[i])
            pays = done or age[i] % steps == 0
            assert float(reward[i]) == pytest.approx(owed[i] if pays else 0.0, rel=1e-6, abs=1e-6)
            paid, ended = paid + pays, ended + done
            owed[i], age[i] = 0.0 if pays else owed[i], 0 if done else age[i]
        assert reward.dtype == other[1].dtype
    assert paid > ended > 0
    ours.close(), theirs.close()


@pytest.mark.parametrize("inner", SAVED)
def test_a_restored_environment_pays_what_it_owed(inner):
    family = make_family(f"delayed/7/{inner}")
    (env, _), todo = make(family), actions(family, 60)
    for action in todo[:24]:
        env.step(action)
    saved = env.state_dict()
    assert (saved["waited"] > 0).any()
    future = [env.step(action)[:4] for action in todo[24:]]
    other, _ = make(family, seed=9)
    for again in (other, env):
        assert again.load_state_dict(saved) is None
        for action, expected in zip(todo[24:], future, strict=True):
            same(again.step(action)[:4], expected)


def test_a_gymnasium_environment_begins_anew_and_owes_nothing():
    family = make_family("delayed/50/CartPole-v1")
    env, _ = make(family)
    for action in actions(family, 5):
        env.step(action)
    with pytest.warns(UserWarning, match="new episodes"):
        begun = env.load_state_dict(env.state_dict())
    assert begun is not None and begun.shape == (P * B, 4)
    assert env.owed.eq(0).all() and env.waited.eq(0).all()


@pytest.mark.parametrize("inner", INNER)
def test_restarts_forget_what_was_owed_to_those_that_restart(inner):
    family = make_family(f"delayed/1000/{inner}")
    env, _ = make(family)
    for action in actions(family, 4):
        env.step(action)
    env.owed += 1.0  # nothing happens to be owed for certain after four steps
    owed, waited = env.owed.clone(), env.waited.clone()
    assert waited.eq(4).any() and owed.ne(0).all()
    env.set_tasks(torch.tensor([], dtype=torch.int64), {k: v[:0] for k, v in family.sample_split("test", 1).items()})
    assert torch.equal(env.owed, owed) and torch.equal(env.waited, waited)
    fresh = family.sample_split("test", 1)
    env.set_tasks(torch.tensor([1]), fresh)
    there = torch.arange(P * B) // B == 1
    assert torch.equal(env.owed, owed * ~there) and torch.equal(env.waited, waited * ~there)
    for key, value in fresh.items():
        assert torch.equal(env.task[key][there].cpu(), value.expand(B, *value.shape[1:])), key
    env.reset(seed=0)
    assert env.owed.eq(0).all() and env.waited.eq(0).all()


def test_lifetimes_on_one_stream_are_paid_alike():
    family = make_family("delayed/5/chain/short-noisy")
    one = family.sample_split("train", 1)
    tasks = {k: v.repeat(2) for k, v in one.items()}
    env = family.make(tasks, B, 0, streams=Streams(torch.tensor([0, 0]), 1))
    env.reset()
    rewards = torch.stack([env.step(torch.zeros(2 * B, dtype=torch.int64))[1] for _ in range(60)])
    assert torch.equal(rewards[:, :B], rewards[:, B:]) and rewards.any()


class Stubborn(TaskFamily):
    """A family of somebody who has never heard of streams."""

    def __init__(self) -> None:
        self.inner = make_family("chain/short")

    def sample(self, n, generator):
        return self.inner.sample(n, generator)

    def make(self, tasks, copies, seed, device="cpu"):
        return self.inner.make(tasks, copies, seed, device)


def test_a_family_without_streams_serves():
    family = DelayedFamily("2/chain/short")
    family.inner = Stubborn()
    env = family.make(family.sample(2, torch.Generator()), 3, 0)
    assert isinstance(env, DelayedEnv) and env.reset()[0].shape == (6,)


def test_returns_and_sides_are_those_of_the_family_within():
    plain, delayed = make_family("chain/short"), make_family("delayed/20/chain/short")
    for side in ("train", "validation", "test"):
        assert torch.equal(plain.sample_split(side, 5)["length"], delayed.sample_split(side, 5)["length"])
    assert delayed.optimal_return(delayed.sample_split("test", 3)).tolist() == [1, 1, 1]
    assert make_family("delayed/20/CartPole-v1").optimal_return({"seed": torch.zeros(1)}) is None
    endless = make_family("delayed/20/two_colours/10k")
    assert endless.continuing and not delayed.continuing
    twice = make_family("delayed/2/delayed/3/chain/short")
    assert twice.steps == 2 and twice.inner.steps == 3


@pytest.mark.parametrize("preset", DelayedFamily.presets)
def test_presets_exist(preset):
    env, obs = make(DelayedFamily(preset))
    assert len(obs) == P * B
    env.close()


@pytest.mark.parametrize(
    ("preset", "said"),
    [
        ("0/CartPole-v1", "at least 1 step"),
        ("-2/CartPole-v1", "'-2/CartPole-v1'"),
        ("20", "STEPS/FAMILY"),
        ("20/", "'20/'"),
        ("CartPole-v1", "'20/CartPole-v1'"),
        ("20/CartPole-v99", "nearest"),
        ("20/grid/smal", "'small'"),
    ],
)
def test_mistakes_are_named(preset, said):
    with pytest.raises(UserError) as error, warnings.catch_warnings():
        DelayedFamily(preset)
    assert said in str(error.value) and "\n" not in str(error.value)
