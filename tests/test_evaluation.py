"""Scores and their intervals: hand numbers, coverage, and a slow loop over one environment at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from probes import ProbeFamily

from learned_rl.architecture import AgentOutput
from learned_rl.component import Hyper
from learned_rl.distributions import Categorical
from learned_rl.evaluation import (
    Curves,
    episode_returns,
    iqm,
    iqm_interval,
    learning_curves,
    ratio_interval,
    repeat_tasks,
)
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.tasks.chains import ChainFamily
from learned_rl.tasks.grids import GridFamily
from learned_rl.types import stream_seed


def test_iqm_by_hand():
    assert iqm(np.array([[1.0, 2.0, 3.0, 100.0]])) == 2.5  # the middle two of four
    assert iqm(np.arange(8.0).reshape(2, 4)[::-1]) == np.mean([2, 3, 4, 5])
    assert iqm(np.full((3, 2), 7.0)) == 7.0


def test_interval_of_constant_scores_is_a_point():
    interval = iqm_interval(np.full((4, 3), 2.0), n=50)
    assert (interval.point, interval.low, interval.high) == (2.0, 2.0, 2.0)
    assert str(interval) == "2.000 [2.000, 2.000]"


def test_interval_covers_the_truth_about_as_often_as_it_says():
    """Tasks differ (standard deviation 1) and so do seeds within a task (0.5); the family's IQM is 0."""
    rng = np.random.default_rng(0)
    hits, widths, naive = [], [], []
    for i in range(200):
        scores = rng.normal(size=(20, 1)) + 0.5 * rng.normal(size=(20, 4))
        interval = iqm_interval(scores, n=300, seed=i)
        assert interval.low <= interval.point <= interval.high
        hits.append(interval.low <= 0 <= interval.high)
        widths.append(interval.high - interval.low)
        flat = np.sort(rng.choice(scores.ravel(), (300, 80)), axis=1)[:, 20:60].mean(1)
        naive.append(np.ptp(np.quantile(flat, [0.025, 0.975])))
    assert 0.88 <= np.mean(hits) <= 0.99
    assert np.mean(widths) > 1.5 * np.mean(naive)  # scores of one task are not independent evidence


def test_ratio_interval_uses_the_same_tasks_for_both():
    """A method that is always 1.5 times the baseline has no uncertainty, however different the tasks are."""
    baseline = np.exp(np.random.default_rng(1).normal(size=(12, 3)))
    interval = ratio_interval(1.5 * baseline, baseline, n=200)
    assert (interval.point, interval.low, interval.high) == pytest.approx((1.5, 1.5, 1.5))
    noisy = ratio_interval(baseline[::-1].copy(), baseline, n=200)
    assert noisy.low < 1 < noisy.high


def test_curves_by_hand():
    curves = Curves(np.array([0, 1, 3]), np.array([0.0, 2.0, 4.0])[:, None, None] * np.ones((3, 2, 1)))
    assert curves.final.tolist() == [[4.0], [4.0]]
    assert curves.area.tolist() == [[7 / 3], [7 / 3]]  # (1 * 1 + 3 * 2) / 3


def test_repeated_tasks():
    assert repeat_tasks({"a": torch.tensor([1, 2])}, 3)["a"].tolist() == [1, 1, 1, 2, 2, 2]


def fixed_policy(family, P, seed):
    """Deterministic: the most likely action of a random table for each lifetime."""
    table = torch.randn(P, int(family.observation_space.n), int(family.action_space.n), generator=_stream(seed))

    def policy(obs):
        return AgentOutput(Categorical(table[torch.arange(len(obs))[:, None], obs]))

    return table, policy


def _stream(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", [ProbeFamily("delayed"), ProbeFamily("terminated"), ProbeFamily("truncated")])
def test_episode_returns_on_probes(family):
    _, policy = fixed_policy(family, 2, 0)
    expected = {"delayed": 1.0, "terminated": 4.0, "truncated": 4.0}
    (name,) = [n for n, p in expected.items() if family.probe is ProbeFamily(n).probe]
    assert episode_returns(policy, family, family.sample(2, _stream(0)), 3, 0).tolist() == [expected[name]] * 2


def test_episode_returns_equal_a_slow_loop():
    """One environment and one step at a time, on a task whose random draws are those of a single full-size stream."""
    family, P, episodes = GridFamily("small"), 3, 4
    tasks = family.sample(P, _stream(1))
    table, policy = fixed_policy(family, P, 2)
    fast = episode_returns(policy, family, tasks, episodes, seed=5, greedy=True)
    env_seed = stream_seed("evaluation environment", 5) % 2**31
    env = family.make(tasks, episodes, env_seed)
    obs, _ = env.reset(seed=env_seed)
    total, over = [0.0] * env.num_envs, [False] * env.num_envs
    while not all(over):
        action = torch.stack([table[i // episodes, obs[i]].argmax() for i in range(env.num_envs)])
        obs, reward, terminated, truncated, _ = env.step(action)
        for i in range(env.num_envs):
            total[i] += 0.0 if over[i] else float(reward[i])
            over[i] = over[i] or bool(terminated[i] | truncated[i])
    expected = [np.mean(total[p * episodes : (p + 1) * episodes]) for p in range(P)]
    assert fast.tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(expected)) > 1


def test_episode_returns_count_first_episodes_only_beyond_one_chunk(monkeypatch):
    """Episodes shorter and longer than the chunk in which they are played."""
    family = ChainFamily()
    assert family.max_episode_steps > 1
    tasks = family.sample(4, _stream(0))
    _, policy = fixed_policy(family, 4, 1)
    one = episode_returns(policy, family, tasks, 2, seed=3, greedy=True)
    monkeypatch.setattr("learned_rl.evaluation.CHUNK", 1)
    assert torch.equal(one, episode_returns(policy, family, tasks, 2, seed=3, greedy=True))


def test_learning_curves_of_a_probe_that_is_learned():
    family = ProbeFamily("both")
    config = PPOConfig(n_envs=8, n_steps=8, hyper=Hyper(learning_rate=0.05))
    seen = []
    curves = learning_curves(
        family, Algorithm(config, Slots.fill(config)), 20, tasks=2, seeds=3, checkpoints=4, episodes=64,
        progress=lambda done, horizon: seen.append(done / horizon),
    )  # fmt: skip
    assert curves.steps.tolist() == [0, 320, 640, 960, 1280] and curves.returns.shape == (5, 2, 3)
    assert (np.abs(curves.returns[0]) < 0.5).all() and (curves.final > 0.9).all()
    assert seen[0] == 0 and seen[-1] == 1
    again = learning_curves(
        family, Algorithm(config, Slots.fill(config)), 20, tasks=2, seeds=3, checkpoints=4, episodes=64
    )
    assert np.array_equal(curves.returns, again.returns)


def lives(family, **options):
    config = PPOConfig(n_envs=2, n_steps=4, hyper=Hyper(learning_rate=0.05))
    return learning_curves(family, Algorithm(config, Slots.fill(config)), 6, seeds=2, episodes=4, **options)


def test_learning_curves_on_given_tasks_are_those_on_drawn_ones():
    family = ChainFamily()
    drawn = lives(family, tasks=3, split="validation", seed=5, checkpoints=2)
    given = lives(family, tasks=family.sample_split("validation", 3, 5), split="validation", seed=5, checkpoints=2)
    assert np.array_equal(drawn.returns, given.returns) and drawn.steps.tolist() == given.steps.tolist()
    assert drawn.returns.shape == (3, 3, 2)


def test_learning_curves_can_be_watched():
    seen = []
    curves = lives(ChainFamily(), tasks=3, checkpoints=3, watch=seen.append)
    assert [at.steps for at in seen] == curves.steps.tolist() == [0, 16, 32, 48]
    assert [at.share for at in seen] == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert all(np.array_equal(at.returns, returns) for at, returns in zip(seen, curves.returns, strict=True))
    assert all(at.alive.shape == (3, 2) and at.alive.all() for at in seen)


def test_who_watches_may_end_the_lives():
    seen = []

    def watch(at):
        seen.append(at.steps)
        if at.share > 0.4:
            raise StopIteration

    with pytest.raises(StopIteration):
        lives(ChainFamily(), tasks=3, checkpoints=3, watch=watch)
    assert seen == [0, 16, 32]


def test_who_watches_sees_agents_that_broke():
    """Steps so large that parameters overflow."""
    config = PPOConfig(n_envs=2, n_steps=4, n_epochs=1, n_minibatches=1, optimizer="sgd")
    family, seen = ProbeFamily("observed"), []
    huge = dataclasses.replace(config, hyper=Hyper(learning_rate=1e38, max_grad_norm=float("inf"), vf_coef=1e38))
    for settings in (config, huge):
        algorithm = Algorithm(settings, Slots.fill(settings))
        learning_curves(family, algorithm, 3, tasks=2, seeds=2, checkpoints=1, episodes=2, watch=seen.append)
    assert [bool(at.alive.all()) for at in seen] == [True, True, True, False]
