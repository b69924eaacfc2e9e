"""The outer critic: one value function per lifetime, for the advantages of the meta-loss.

It is trained on what the agents collect, restarts with them, and exists only during meta-training. It must be apart
from whatever the agent predicts: the meta-loss judges the agent by the environment's reward alone (Oh et al., 2020,
section 3.2; Bonnet et al., 2022, on why a shared critic biases the meta-gradient).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from learned_rl.agents import AgentConfig, Population, make_agent
from learned_rl.component import Hyper, lifetime_mean
from learned_rl.defaults import normalise
from learned_rl.inner_loop import PlainInner
from learned_rl.lifetimes import under
from learned_rl.returns import gae
from learned_rl.spaces import LogOneMinus, LogUniform, PowersOfTwo, searched
from learned_rl.tasks.base import TaskFamily, check_choices
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, UserError, at_least, stream
from learned_rl.update_rules import Adam, select_rows


@dataclass(frozen=True)
class OuterCriticConfig:
    source: Literal["own", "agent", "auto"] = "own"
    """whose values advantages are made of: an outer critic's own, or those of the agent, which are biased where its
    discount, reward or objective is learned; auto: the agent's where none of them is and discounts are equal (in
    meta-training always its own)"""
    gamma: float = field(default=0.99, metadata=searched(LogOneMinus(1e-3, 0.1)))
    """discount of the meta-loss per environment step"""
    gae_lambda: float = field(default=0.95, metadata=searched(LogOneMinus(1e-3, 1.0)))
    """trace decay of the meta-loss's advantages"""
    learning_rate: float = field(default=0.05, metadata=searched(LogUniform(1e-3, 0.5)))
    """of the critic's Adam; tables like 0.05, networks 1e-3"""
    epochs: int = field(default=4, metadata=searched(PowersOfTwo(1, 16)))
    """gradient steps of the critic on each rollout"""
    normalize: bool = True
    """normalise advantages within each lifetime"""
    late_rewards: bool = False
    """credit each action with the reward and the end of the step before it, as the public code of Disco103 does; what
    a rollout's last step earned is credited to none"""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """the critic's architecture"""

    def __post_init__(self) -> None:
        check_choices(self)
        at_least(1, epochs=self.epochs)
        for name in ("gamma", "gae_lambda"):
            if getattr(self, name) > 1:
                raise UserError(f"{name} is {getattr(self, name)}: expected at most 1.")
        at_least(0, gamma=self.gamma, gae_lambda=self.gae_lambda, learning_rate=self.learning_rate)


def judged(
    trajectory: Trajectory, value_of: Callable[[Tensor], Tensor], config: OuterCriticConfig
) -> tuple[Tensor, Tensor]:
    """Advantages (normalised within each lifetime if configured) and value targets; constants [T, P, B]."""
    if config.late_rewards:
        trajectory = late(trajectory)
    with torch.no_grad():
        value = value_of(trajectory.obs)
        masks = trajectory.next_value(value, value_of), trajectory.terminated, trajectory.truncated
        advantage = gae(trajectory.reward, value[:-1], *masks, config.gamma, config.gae_lambda)
        return normalise(advantage) if config.normalize else advantage, advantage + value[:-1]


def late(trajectory: Trajectory) -> Trajectory:
    """Experience whose rewards and ends come a step late; the first row earns nothing, and every end is final."""
    ended = trajectory.follows
    if ended is None:
        ended = torch.cat([torch.zeros_like(trajectory.done[:1]), trajectory.done[:-1]])
    reward = torch.cat([torch.zeros_like(trajectory.reward[:1]), trajectory.reward[:-1]])
    none = torch.zeros_like(ended)
    return dataclasses.replace(trajectory, reward=reward, terminated=ended, truncated=none, final_obs=None)


class OuterCritic:
    """P value functions that learn beside P agents.

    Args:
        streams: [P] from which random stream each draws its initial weights.
    """

    def __init__(
        self,
        config: OuterCriticConfig,
        family: TaskFamily,
        streams: Tensor,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.seed, self.streams = config, seed, streams.tolist()
        lifetimes = len(self.streams)
        agent = make_agent(config.agent, family.observation_space, None, value=True)
        self.population = Population(agent, lifetimes, dtype).to(device)
        rule = Adam()
        # stop: initial state
        self._inner = PlainInner(self.population, rule, rule.initial_state(self.population.theta.detach()))
        self.restart(torch.ones(lifetimes, dtype=torch.bool, device=device), torch.zeros(lifetimes, dtype=torch.int64))

    def value(self, obs: Tensor) -> Tensor:
        """[T, P, B] from observations [T, P, B, ...]."""
        value = self.population(obs).value
        assert value is not None
        return value

    def judge(self, trajectory: Trajectory) -> tuple[Tensor, Tensor]:
        """See `judged`."""
        return judged(trajectory, self.value, self.config)

    def learn(self, trajectory: Trajectory, target: Tensor) -> Tensor:
        """Move towards the value targets `[T, P, B]` of a rollout; returns the first step's loss `[P]`."""
        hyper = Hyper(learning_rate=self.config.learning_rate, max_grad_norm=float("inf"))
        first = None
        for _ in range(self.config.epochs):
            loss = lifetime_mean(self.population(trajectory.obs[:-1]).value_error(target))
            self._inner.step(loss, hyper)
            first = loss.detach() if first is None else first  # stop: only to look at
        assert first is not None
        return first

    @torch.no_grad()
    def restart(self, which: Tensor, life: Tensor) -> None:
        """Fresh value functions where `which [P]` is true; `life [P]` counts each lifetime's restarts."""
        for p in which.nonzero().flatten().tolist():
            self.population.theta[p] = self.population.initial(
                stream("critic", self.seed, self.streams[p], int(life[p]))
            ).to(which.device)
        fresh = self._inner.rule.initial_state(self.population.theta.detach())  # stop: initial state
        self._inner.state = {k: select_rows(which, fresh[k], v) for k, v in self._inner.state.items()}

    def state_dict(self) -> Tree:
        # stop: saved values
        return {"theta": self.population.theta.detach().clone()} | {
            f"rule/{k}": v.clone() for k, v in self._inner.state.items()
        }

    @torch.no_grad()
    def load_state_dict(self, state: Tree) -> None:
        self.population.theta.copy_(state["theta"])
        self._inner.state = {k: v.to(self.population.theta) for k, v in under("rule", state).items()}
