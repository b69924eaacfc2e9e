"""Population based training: agents learn side by side, and the worst go on from the best with other numbers.

Jaderberg et al., "Population Based Training of Neural Networks", 2017, arXiv:1711.09846. A member is one value of each
searched number, and an agent for every task and seed. At the end of every interval

    score    fresh episodes of every agent; a member's score is the interquartile mean over its tasks and seeds
    exploit  members of the bottom quantile continue with the weights, optimizer state and numbers of a random member
             of the top quantile, task by task and seed by seed (truncation selection)
    explore  each number of such a copy is multiplied by 0.8 or 1.2, or drawn afresh with probability `resample`

All agents are rows of one population, so that to copy one is to index a row. What is found is a schedule: the numbers
of the best member and of its ancestors (`objectives.schedule`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch

from experiments.scores import Scorer
from learned_rl.component import NUMBERS, Hyper
from learned_rl.defaults import Constants
from learned_rl.evaluation import Array, episode_returns, iqm, repeat_tasks
from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm
from learned_rl.spaces import Space
from learned_rl.tasks.base import Split, TaskFamily, unknown
from learned_rl.types import UserError, at_least, stream_seed
from objectives.schedule import Schedule, ScheduleConfig, check_number

Numbers = dict[str, Array]


@dataclass(frozen=True)
class PBTConfig:
    """How a population is selected."""

    population: int = 16
    """M: members, each with numbers of its own"""
    interval: int = 10
    """agent updates between selections"""
    quantile: float = 0.25
    """share of the members that is replaced at each selection, and share that they are replaced by; 0: only members
    that diverged are replaced"""
    resample: float = 0.25
    """probability with which a number of a replaced member is drawn afresh instead of perturbed"""

    def __post_init__(self) -> None:
        at_least(2, population=self.population)
        at_least(1, interval=self.interval)
        for name, most in (("quantile", 0.5), ("resample", 1.0)):
            if not 0 <= (value := getattr(self, name)) <= most:
                raise UserError(f"{name} is {value}: expected a share from 0 to {most:g}.")


def exploit(scores: Array, quantile: float, rng: np.random.Generator) -> Array:
    """Truncation selection: whose agent each member goes on with.

    The worst ceil(quantile M) members (at most half) each go on with a random one of as many best, the others with
    their own. Members whose score is not finite have diverged: they are always replaced and never copied. Equal scores
    are ranked at random. Where nobody's score is finite, everyone stays.

    Args:
        scores: [M], higher is better.

    Returns:
        [M] index of the member that each copies; its own for those that stay.
    """
    M, diverged = len(scores), ~np.isfinite(scores)
    parents = np.arange(M)
    if diverged.all():
        return parents
    worst_first = np.lexsort((rng.permutation(M), np.where(diverged, -np.inf, scores)))
    count = min(math.ceil(quantile * M - 1e-9), M // 2)  # less rounding of the product
    replaced = worst_first[: max(count, diverged.sum())]
    best = worst_first[max(M - max(count, 1), diverged.sum()) :]
    parents[replaced] = rng.choice(best, len(replaced))
    return parents


def explore(
    numbers: Numbers, parents: Array, spaces: Mapping[str, Space], resample: float, rng: np.random.Generator
) -> Numbers:
    """The next interval's numbers, name -> [M]: those of the parents, perturbed or drawn afresh in the copies."""
    found = {name: values[parents] for name, values in numbers.items()}
    for child in np.flatnonzero(parents != np.arange(len(parents))):
        for name, space in spaces.items():
            afresh = rng.random() < resample
            found[name][child] = space.draw(rng) if afresh else space.perturb(found[name][child], rng)
    return found


@dataclass(frozen=True)
class PBTResult:
    """What a population went through, in I intervals.

    Attributes:
        scores:      [I, M] score of each member at the end of each interval; NaN where it had diverged.
        numbers:     name -> [I, M] numbers with which each member learned in each interval.
        parents:     [I, M] whose agent, of the end of the interval before, each member went on with.
        steps:       [I] environment steps of one lifetime at the end of each interval.
        total_steps: environment steps of all lifetimes of all members: what the schedule has cost. Evaluation episodes
                     are not among them.
        evaluation_episodes: how many of those were played, by all lifetimes in all intervals.
    """

    scores: Array
    numbers: Numbers
    parents: Array
    steps: Array
    total_steps: int
    evaluation_episodes: int

    @property
    def best(self) -> int:
        """The member with the best final score."""
        return int(np.nanargmax(self.scores[-1]))

    def lineage(self) -> Array:
        """[I] the member that was the best final member's ancestor in each interval."""
        found = [self.best]
        for parents in self.parents[:0:-1]:
            found.append(int(parents[found[-1]]))
        return np.array(found[::-1])

    def schedule(self) -> Numbers:
        """name -> [I] numbers of the best final member and its ancestors, constant within each interval."""
        at = self.lineage()
        return {name: values[np.arange(len(at)), at] for name, values in self.numbers.items()}

    def component(self) -> Schedule:
        """The schedule, ready for the hyperparameters slot and for `learned_rl.artifacts.save`."""
        boundaries = self.steps[:-1] / self.steps[-1]
        return Schedule(ScheduleConfig(boundaries, self.schedule()))  # type: ignore[arg-type]


def population_based_training(
    family: TaskFamily,
    algorithm: Algorithm,
    horizon: int,
    spaces: Mapping[str, Space],
    config: PBTConfig | None = None,
    *,
    tasks: int = 8,
    seeds: int = 1,
    seed: int = 0,
    split: Split = "validation",
    episodes: int = 8,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> PBTResult:
    """Search a schedule of an algorithm's numbers, with a population of M * tasks * seeds lifetimes.

    Member 0 begins with the configured numbers (the nearest inside the spaces), the others with drawn ones. Everything
    derives from `seed`. Scores are returns, divided by the task's exact best return where the family knows it
    (`experiments.scores.Scorer`).

    Args:
        horizon:  agent updates in a lifetime.
        spaces:   name of a number of `Hyper` -> where it is searched.
        tasks:    drawn from `split` with `seed`.
        seeds:    agents of each member on each task.
        episodes: fresh episodes of each agent at each selection.
        progress: called with (updates done, horizon).

    Raises:
        UserError: something that cannot be scheduled, a value that a number cannot have, nothing to win on any task,
            or every member has diverged.
    """
    config = config or PBTConfig()
    at_least(1, horizon=horizon, tasks=tasks, seeds=seeds, episodes=episodes)
    _check(algorithm, spaces)
    scorer = Scorer(family, split, tasks, seed)
    if not scorer.kept.any():
        raise UserError(f"None of the {tasks} {split} tasks has anything to win: choose more tasks or another seed.")
    lives = tasks * seeds * config.population
    drawn = repeat_tasks(family.sample_split(split, tasks, seed), seeds * config.population)
    lifetimes = Lifetimes(family, algorithm, lives, horizon, seed, tasks=drawn, split=split, device=device)
    rng = np.random.default_rng(stream_seed("population", seed))
    marks = [*range(config.interval, horizon, config.interval), horizon]
    scores, numbers, parents = [], [], []
    with closing(lifetimes.env):
        population, inner = _Population(lifetimes, scorer, spaces, config, rng), lifetimes.plain()
        for update in range(1, horizon + 1):
            lifetimes.advance(inner)
            if update in marks:
                scores.append(population.scores(episodes, stream_seed("population", seed, update)))
                numbers.append(population.numbers)
                parents.append(population.parents)
                if not np.isfinite(scores[-1]).any():
                    raise UserError(f"Every member has diverged after {update} updates: narrow the search spaces.")
                if update < horizon:
                    population.select(scores[-1])
            if progress is not None:
                progress(update, horizon)
    per_update = algorithm.config.n_steps * algorithm.config.n_envs
    return PBTResult(
        scores=np.stack(scores),
        numbers={name: np.stack([n[name] for n in numbers]) for name in spaces},
        parents=np.stack(parents),
        steps=np.array(marks) * per_update,
        total_steps=lives * horizon * per_update,
        evaluation_episodes=lives * len(marks) * episodes,
    )


class _Population:
    """M members as P = tasks * seeds * M lifetimes, members fastest.

    Attributes:
        numbers: name -> [M] with which the members learn at present.
        parents: [M] whose agents they went on with when they were last selected.
    """

    def __init__(
        self,
        lifetimes: Lifetimes,
        scorer: Scorer,
        spaces: Mapping[str, Space],
        config: PBTConfig,
        rng: np.random.Generator,
    ) -> None:
        self.lifetimes, self.scorer, self.spaces, self.config, self.rng = lifetimes, scorer, spaces, config, rng
        self.numbers = _first(lifetimes.hyper, spaces, config.population, rng)
        self.parents = np.arange(config.population)
        self._set_rows()

    def _set_rows(self) -> None:
        """Hand every lifetime the numbers of its member, as rows [P, 1]."""
        for name, values in self.numbers.items():
            for value in values:
                check_number(name, value)
        lifetimes, agents = self.lifetimes, len(self.lifetimes) // self.config.population
        rows = {k: torch.as_tensor(v).repeat(agents)[:, None] for k, v in self.numbers.items()}
        lifetimes.hyper = lifetimes.hyper.replace(
            **{k: v.to(lifetimes.device, lifetimes.dtype) for k, v in rows.items()}
        )

    def scores(self, episodes: int, seed: int) -> Array:
        """[M] interquartile mean over tasks and seeds; NaN for a member of which any agent is not finite."""
        lifetimes, M = self.lifetimes, self.config.population
        theta = lifetimes.population.theta.detach()  # stop: acting makes data
        policy = lifetimes.population.bind(theta, policy_only=True)
        returns = episode_returns(policy, lifetimes.family, lifetimes.tasks(), episodes, seed, device=lifetimes.device)
        by_task = returns.cpu().double().numpy().reshape(len(self.scorer.kept), -1)
        scores = self.scorer.final(by_task).reshape(-1, M)
        alive = theta.isfinite().all(1).cpu().numpy().reshape(-1, M).all(0) & np.isfinite(scores).all(0)
        return np.array([iqm(column) if lives else np.nan for column, lives in zip(scores.T, alive, strict=True)])

    def select(self, scores: Array) -> None:
        """Exploit and explore: a child's agents become copies of its parent's, each on its own task and seed."""
        M = self.config.population
        self.parents = exploit(scores, self.config.quantile, self.rng)
        self.numbers = explore(self.numbers, self.parents, self.spaces, self.config.resample, self.rng)
        children = np.flatnonzero(self.parents != np.arange(M))
        first = np.arange(0, len(self.lifetimes), M)[:, None]  # member 0 on each task and seed
        source, target = (torch.as_tensor((first + x).ravel()) for x in (self.parents[children], children))
        self.lifetimes.copy(source, target)
        self._set_rows()


def _check(algorithm: Algorithm, spaces: Mapping[str, Space]) -> None:
    """Whether the algorithm lets these numbers be scheduled."""
    if not spaces:
        raise UserError(f"There are no numbers to schedule: name at least one of {', '.join(NUMBERS)}.")
    for name in spaces:
        if name not in NUMBERS:
            raise unknown("number of Hyper (nothing else can change while agents learn)", name, NUMBERS)
        if getattr(algorithm.config.hyper, name) is None:
            raise UserError(f"{name} is None, so it cannot be scheduled: configure a number to begin with.")
    slot = algorithm.slots.hyperparameters
    if not isinstance(slot, Constants) or slot.config.linear_decay:
        held = "constants with linear_decay" if isinstance(slot, Constants) else slot.name
        raise UserError(f"The hyperparameters slot holds {held}, and the schedule is to go there: leave it empty.")


def _first(hyper: Hyper, spaces: Mapping[str, Space], members: int, rng: np.random.Generator) -> Numbers:
    """name -> [M]: the configured numbers, then draws."""
    near = {name: space.decode(space.encode(getattr(hyper, name))) for name, space in spaces.items()}
    drawn = [{name: space.draw(rng) for name, space in spaces.items()} for _ in range(members - 1)]
    return {name: np.array([member[name] for member in (near, *drawn)], dtype=float) for name in spaces}
