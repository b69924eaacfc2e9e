"""Plain training: `PPO(env, objective=...)`, any number of seeds side by side."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Self

import torch
from torch import Tensor

from learned_rl import artifacts
from learned_rl.component import SLOTS, Component, Objective, UpdateRule
from learned_rl.evaluation import episode_returns
from learned_rl.lifetimes import Episodes, Lifetimes, under
from learned_rl.ppo import AgentFactory, Algorithm, PPOConfig, Slots
from learned_rl.registry import make_family
from learned_rl.tasks.base import TaskFamily
from learned_rl.types import Tasks, Tree, UserError, at_least, stream_seed

Plug = Component | str | Path | Callable[[], Component] | None
#: Called after every update with the environment steps of one seed so far and what to log.
Log = Callable[[int, dict[str, float]], None]

WINDOW = 100  # episodes over which the logged return is averaged for each seed, as Stable-Baselines3 does


class PPO:
    """PPO with learned parts plugged in.

    Args:
        env:    a gymnasium id, `family/preset`, or a family.
        config: settings; None takes what suits the objective and the optimizer.
        objective, reward, hyperparameters, auxiliary, optimizer: a component, a registered name, a component file, or
                what makes a component when called; None is the hand-made default of the slot.
        agent:  makes another architecture than the configured one, such as `ModuleAgent` around any `nn.Module`.
        seeds:  agents that learn side by side, each on a task of its own from the family's training side.
        seed:   of the first one.
        tasks:  the agents' tasks, instead of drawn ones.

    Raises:
        UserError: an environment, component or setting that does not exist or does not fit.
    """

    def __init__(
        self,
        env: str | TaskFamily,
        config: PPOConfig | None = None,
        *,
        objective: Plug = None,
        reward: Plug = None,
        hyperparameters: Plug = None,
        auxiliary: Plug = None,
        optimizer: Plug = None,
        agent: AgentFactory | None = None,
        seeds: int = 1,
        seed: int = 0,
        tasks: Tasks | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        at_least(1, seeds=seeds)
        self.family = make_family(env) if isinstance(env, str) else env
        _is_a(TaskFamily, "gymnasium id, a family/preset or a TaskFamily", env=self.family)
        _is_a(PPOConfig | None, "PPOConfig", config=config)
        given = (objective, reward, hyperparameters, auxiliary, optimizer)
        plugged = {slot: _component(slot, plug) for slot, plug in zip(SLOTS, given, strict=True)}
        learned, rule = plugged["objective"], plugged["optimizer"]
        suited = learned if isinstance(learned, Objective) else None
        moving = rule if isinstance(rule, UpdateRule) else None
        self.config = config or PPOConfig.suited(suited, self.family.observation_space, moving)
        slots = Slots.fill(self.config, **plugged)
        self.algorithm = Algorithm(self.config, slots, agent)
        self.lifetimes = Lifetimes(self.family, self.algorithm, seeds, 1, seed, tasks=tasks, device=device)
        self.steps = 0
        self._recent = [deque[tuple[float, float, float]]() for _ in range(seeds)]  # episodes, returns, lengths

    def learn(self, total_steps: int, log: Log | None = None, schedule: int | None = None) -> Self:
        """Train every seed until it has taken `total_steps` environment steps in all, as whole updates.

        Args:
            log:      called after every update.
            schedule: environment steps over which learning-rate schedules run; None: `total_steps`.

        Raises:
            UserError: so few steps that replay does nothing but fill.
        """
        updates = math.ceil((schedule or total_steps) / self.per_update)
        self.config.check_learns(updates)
        self.lifetimes.horizon.fill_(updates)
        while self.steps < total_steps:
            before, earned = self.steps, self.lifetimes.earned
            metrics = self._advance()
            if log is not None:
                metrics["return"], metrics["length"] = self.recent_episodes()
                rate = (self.lifetimes.earned - earned) / (self.steps - before)
                log(self.steps, metrics | {"reward": rate.nanmean().item()})
        return self

    @property
    def per_update(self) -> int:
        """Environment steps of one seed in one update."""
        return self.config.n_steps * self.config.n_envs

    def _advance(self) -> dict[str, float]:
        """Go on by an update; what to log of it, averaged over seeds."""
        record, ended = self.lifetimes.advance(self.lifetimes.plain())
        self._remember(ended)
        if record is None:  # replay only fills, and what was paid in no finite number it does not keep
            return {"broken": float((~self.lifetimes.paid_finite).sum())}
        metrics = {k: v.nanmean().item() for k, v in record.metrics.items()}
        return metrics | {"broken": float((~record.alive).sum())}

    def _remember(self, ended: Episodes) -> None:
        """Count a rollout, and keep, for each seed, the latest ones that hold its last `WINDOW` episodes."""
        self.steps += self.per_update
        rows = torch.stack([ended.count.to(ended.returns), ended.returns, ended.lengths], 1).tolist()
        for kept, (count, returns, lengths) in zip(self._recent, rows, strict=True):
            if count:
                kept.append((count, returns, lengths))
            while len(kept) > 1 and sum(row[0] for row in kept) - kept[0][0] >= WINDOW:
                kept.popleft()

    def recent_episodes(self) -> tuple[float, float]:
        """Mean return and mean length of recent training episodes, averaged over seeds; NaN before the first one."""
        totals = [[sum(column) for column in zip(*kept, strict=True)] for kept in self._recent if kept]
        if not totals:
            return math.nan, math.nan
        return sum(t[1] / t[0] for t in totals) / len(totals), sum(t[2] / t[0] for t in totals) / len(totals)

    def evaluate(self, episodes: int = 20, greedy: bool = False, seed: int | None = None) -> Tensor:
        """[seeds] mean undiscounted return of fresh episodes at the present policies.

        Args:
            seed: of the episodes; None derives it from the agents' seed and how far they have come, so that points of a
                  learning curve, and runs with other seeds, have luck of their own.
        """
        at_least(1, episodes=episodes)
        if seed is None:
            seed = stream_seed("evaluation", self.lifetimes.seed, self.steps)
        theta = self.lifetimes.population.theta.detach()  # stop: acting makes data
        policy = self.lifetimes.population.bind(theta, policy_only=True)
        tasks = self.lifetimes.tasks()
        return episode_returns(policy, self.family, tasks, episodes, seed, greedy, self.lifetimes.device)

    def state_dict(self) -> Tree:
        """Everything that the next update, and what it logs, depends on."""
        recent = torch.zeros(len(self._recent), WINDOW, 3, dtype=torch.float64)  # rows without episodes are empty
        for rows, kept in zip(recent, self._recent, strict=True):
            rows[: len(kept)] = torch.tensor(list(kept), dtype=rows.dtype).reshape(-1, 3)
        return {"steps": torch.tensor(self.steps), "recent": recent} | self._inner_state()

    def load_state_dict(self, state: Tree) -> None:
        self.steps = int(state["steps"])
        self._recent = [deque((c, r, n) for c, r, n in rows[rows[:, 0] > 0].tolist()) for rows in state["recent"]]
        self._load_inner_state(state)

    def _inner_state(self) -> Tree:
        """State of what `_advance` moves."""
        return {f"lifetimes/{k}": v for k, v in self.lifetimes.state_dict().items()}

    def _load_inner_state(self, state: Tree) -> None:
        self.lifetimes.load_state_dict(under("lifetimes", state))


def _component(slot: str, plug: Plug) -> Component | None:
    if plug is None or isinstance(plug, Component):
        return plug
    made = artifacts.get(plug) if isinstance(plug, str | Path) else plug() if callable(plug) else plug
    _is_a(Component, "Component, its name, its file, or what makes one", **{slot: made})
    return made


def _is_a(kind: type | UnionType, expected: str, **given: object) -> None:
    """Checks what was given by these names.

    Raises:
        UserError: it is of another kind.
    """
    for name, value in given.items():
        if not isinstance(value, kind):
            raise UserError(f"{name} is {value!r}: expected a {expected}.")
