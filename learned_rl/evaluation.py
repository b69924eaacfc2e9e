"""Fresh agents on held-out tasks, and intervals for what they score.

Learning is judged on whole lifetimes: agents begin from scratch on tasks that nobody trained on, and at checkpoints
along the lifetime the present policy plays fresh episodes. Aggregates are interquartile means (Agarwal et al., 2021,
arXiv:2108.13264) with two-level bootstrap intervals: tasks are resampled, then seeds within each task, since the claim
is about the family and not about the tasks that happened to be drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy  # whose `stats` are imported where first used: it takes half as long as torch
import torch
from torch import Tensor

from learned_rl.architecture import AgentOutput
from learned_rl.lifetimes import Lifetimes, rollout
from learned_rl.ppo import Algorithm
from learned_rl.tasks.base import Split, TaskFamily
from learned_rl.types import Tasks, stream_seed

Array = np.ndarray
CHUNK = 50  # environment steps between looks at whether every copy has finished its episode


def episode_returns(
    policy: Callable[[Tensor], AgentOutput],
    family: TaskFamily,
    tasks: Tasks,
    episodes: int,
    seed: int,
    greedy: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Mean undiscounted return of each lifetime's first `episodes` episodes, played at once: `[P]`.

    Args:
        policy: outputs [P, B, ...] from observations [P, B, ...].
        tasks:  of the P lifetimes.
    """
    env_seed = stream_seed("evaluation environment", seed) % 2**31
    env = family.make(tasks, episodes, env_seed, device)
    P = len(next(iter(tasks.values())))
    obs = env.reset(seed=env_seed)[0].unflatten(0, (P, episodes))
    generator = torch.Generator(device).manual_seed(stream_seed("evaluation policy", seed))
    total = torch.zeros(P, episodes, device=device)
    over = torch.zeros(P, episodes, dtype=torch.bool, device=device)
    for begin in range(0, family.max_episode_steps, CHUNK):
        part = rollout(policy, env, obs, min(CHUNK, family.max_episode_steps - begin), generator, greedy)
        # A step counts until the copy's first episode is over: no earlier end in this part or in a part before.
        ended = part.done.cumsum(0) - part.done.long() > 0
        total += (part.reward * ~(ended | over)).sum(0)
        over, obs = over | part.done.any(0), part.obs[-1]
        if bool(over.all()):
            break
    env.close()
    return total.mean(1)


@dataclass(frozen=True)
class Curves:
    """Learning curves of fresh agents.

    Attributes:
        steps:   [C] environment steps of one lifetime at each checkpoint.
        returns: [C, tasks, seeds] mean return of the policy's fresh episodes.
    """

    steps: Array
    returns: Array

    @property
    def final(self) -> Array:
        """[tasks, seeds] at the end of the lifetime."""
        return self.returns[-1]

    @property
    def area(self) -> Array:
        """[tasks, seeds] mean over the lifetime (trapezoids between checkpoints)."""
        return np.trapezoid(self.returns, self.steps, axis=0) / (self.steps[-1] - self.steps[0])


@dataclass(frozen=True)
class Checkpoint:
    """Where fresh agents stand at one moment of their lives.

    Attributes:
        steps:   environment steps of one lifetime so far.
        share:   of the lifetime that is over, from 0 to 1.
        returns: [tasks, seeds] mean return of the present policy's fresh episodes.
        alive:   [tasks, seeds] bool: the agent's parameters are finite.
    """

    steps: int
    share: float
    returns: Array
    alive: Array


def repeat_tasks(tasks: Tasks, times: int) -> Tasks:
    """Every task `times` times in a row."""
    return {k: v.repeat_interleave(times, 0) for k, v in tasks.items()}


def learning_curves(
    family: TaskFamily,
    algorithm: Algorithm,
    horizon: int,
    *,
    tasks: int | Tasks = 64,
    seeds: int = 4,
    split: Split = "test",
    seed: int = 0,
    checkpoints: int = 10,
    episodes: int = 32,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[Checkpoint], None] | None = None,
) -> Curves:
    """Let `tasks * seeds` fresh agents live, and play fresh episodes at `checkpoints + 1` moments of their lives.

    Args:
        horizon:  agent updates in a lifetime.
        tasks:    held-out tasks; a number draws them from `split` with `seed`.
        seeds:    agents on each task.
        episodes: fresh episodes of each agent at each checkpoint.
        progress: called with (updates done, horizon).
        watch:    called at every checkpoint; what it raises ends these lives.

    Raises:
        UserError: lives too short to fill their replay, if they have one.
    """
    algorithm.config.check_learns(horizon)
    drawn = family.sample_split(split, tasks, seed) if isinstance(tasks, int) else tasks
    n = len(next(iter(drawn.values())))
    drawn = repeat_tasks(drawn, seeds)
    lifetimes = Lifetimes(family, algorithm, n * seeds, horizon, seed, tasks=drawn, split=split, device=device)
    per_update = algorithm.config.n_steps * algorithm.config.n_envs
    inner = lifetimes.plain()
    marks = np.unique(np.linspace(0, horizon, checkpoints + 1).round().astype(int))
    returns: list[Array] = []
    for update in range(horizon + 1):
        if update in marks:
            theta = inner.theta.detach()  # stop: acting makes data
            policy = lifetimes.population.bind(theta, policy_only=True)
            # The same episodes' seed at every checkpoint and for every method: common random numbers.
            found = episode_returns(policy, family, drawn, episodes, seed + 1, device=device)
            returns.append(found.cpu().double().numpy().reshape(n, seeds))
            if watch is not None:
                alive = theta.isfinite().all(1).cpu().numpy().reshape(n, seeds)
                watch(Checkpoint(update * per_update, update / horizon, returns[-1], alive))
        if update < horizon:
            lifetimes.advance(inner)
        if progress is not None:
            progress(update, horizon)
    lifetimes.env.close()
    return Curves(marks * per_update, np.stack(returns))


def iqm(scores: Array) -> float:
    """Interquartile mean: the mean of the middle half of all scores."""
    return float(scipy.stats.trim_mean(scores, 0.25, axis=None))


@dataclass(frozen=True)
class Interval:
    """A point estimate with its 95 % interval."""

    point: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.point:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _resamples(shape: tuple[int, int], n: int, seed: int) -> tuple[Array, Array]:
    """Indices of n two-level resamples of [tasks, seeds]: tasks [n, tasks, 1], seeds [n, tasks, seeds]."""
    rng = np.random.default_rng(seed)
    return rng.integers(shape[0], size=(n, shape[0], 1)), rng.integers(shape[1], size=(n, *shape))


def iqm_interval(scores: Array, n: int = 2000, seed: int = 0) -> Interval:
    """Interquartile mean of scores `[tasks, seeds]` with its two-level bootstrap interval."""
    index = _resamples(scores.shape, n, seed)  # type: ignore[arg-type]
    low, high = np.quantile(scipy.stats.trim_mean(scores[index].reshape(n, -1), 0.25, axis=1), [0.025, 0.975])
    return Interval(iqm(scores), float(low), float(high))


def ratio_interval(scores: Array, baseline: Array, n: int = 2000, seed: int = 0) -> Interval:
    """IQM of `scores` over IQM of `baseline`, both `[tasks, seeds]` on the same tasks, which are resampled together."""
    index = _resamples(scores.shape, n, seed)  # type: ignore[arg-type]
    above, below = (scipy.stats.trim_mean(x[index].reshape(n, -1), 0.25, axis=1) for x in (scores, baseline))
    low, high = np.quantile(above / below, [0.025, 0.975])
    return Interval(iqm(scores) / iqm(baseline), float(low), float(high))
