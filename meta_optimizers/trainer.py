"""Meta-training: a component learns from many agents that begin anew, on a task family."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from learned_rl.component import Component, Hyper
from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.streams import Streams
from learned_rl.tasks.base import TaskFamily
from learned_rl.types import UserError, at_least, stream
from meta_optimizers.agent_bandit import AgentBandit, AgentBanditConfig
from meta_optimizers.estimator import EstimatorConfig
from meta_optimizers.estimators import make_estimator
from meta_optimizers.group import Group
from meta_optimizers.learning import Learning, OuterLossConfig
from meta_optimizers.outer_critic import OuterCritic, OuterCriticConfig
from meta_optimizers.outer_loop import OuterConfig, OuterLoop
from meta_optimizers.problem import Eta
from meta_optimizers.truncated import TruncatedConfig


def _agent_config() -> PPOConfig:
    """Tabular agents. A step's norm is at most 60 * 0.03: see docs/meta_optimizers/truncated.md on why so little."""
    hyper = Hyper(learning_rate=60.0, prediction_coef=0.5, max_grad_norm=0.03)
    return PPOConfig(n_envs=16, n_steps=20, n_epochs=1, n_minibatches=1, optimizer="sgd", hyper=hyper)


@dataclass(frozen=True)
class MetaTrainConfig(OuterConfig):
    """Settings of meta-training."""

    lifetimes: int = 64
    """P: agents that learn side by side, over all processes"""
    horizon: int | tuple[int, int] = 150
    """agent updates in a lifetime; a pair (low, high) draws each log-uniformly"""
    agent: PPOConfig = field(default_factory=_agent_config)
    """the agents' algorithm around the learned part"""
    estimator: EstimatorConfig = field(default_factory=TruncatedConfig)
    """how the direction of the meta-parameters is estimated; --estimator NAME chooses another one"""
    loss: OuterLossConfig = field(default_factory=OuterLossConfig)
    """how agents are judged"""
    critic: OuterCriticConfig = field(default_factory=OuterCriticConfig)
    """the outer critic"""
    bandit: AgentBanditConfig = field(default_factory=AgentBanditConfig)
    """which agent step sizes and prediction weights the lifetimes try"""
    stagger: bool = True
    """let lifetimes begin at ages that spread over the horizon, so that every window sees all phases of learning
    (pipeline training); off: all of them begin and end together"""

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest, longest = self.horizon if isinstance(self.horizon, tuple) else (self.horizon, self.horizon)
        at_least(1, lifetimes=self.lifetimes, horizon=shortest)
        at_least(shortest, **{"the upper end of horizon": longest})


class MetaTrainer(OuterLoop):
    """Meta-trains a component, of any slot, on a task family.

    Unless the estimator wants whole lifetimes, or `stagger` is off, they begin at staggered ages, so that every window
    sees all phases of learning; a lifetime that ends, or whose numbers are no longer finite, restarts alone with a
    fresh task and agent.

    Args:
        family:    where tasks come from (its training side).
        component: its parameters are trained in place.
        config:    settings.
        seed:      all random streams derive from it.
        group:     the processes over which the lifetimes are spread.
    """

    problem: Learning

    def __init__(
        self,
        family: TaskFamily,
        component: Component,
        config: MetaTrainConfig | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        group: Group | None = None,
    ) -> None:
        self.config = c = config or MetaTrainConfig()
        self.component = component
        estimator, group = make_estimator(c.estimator, seed), group or Group()
        if not estimator.staggered and isinstance(c.horizon, int) and c.horizon % estimator.updates:
            raise UserError(
                f"window is {estimator.updates} and horizon {c.horizon}: {estimator.name!r} runs all lifetimes "
                f"together; expected a part of the horizon, such as {math.gcd(c.horizon, estimator.updates)}."
            )
        every = estimator.streams(c.lifetimes)
        own = group.own(torch.arange(c.lifetimes))
        streams = Streams(every[own], int(every.max()) + 1)
        algorithm = Algorithm(c.agent, Slots.fill(c.agent, **{component.slot: component}))
        lives = Lifetimes(family, algorithm, len(own), c.horizon, seed, streams=streams, device=device, dtype=dtype)
        component.to(device=device, dtype=dtype)
        if estimator.staggered and c.stagger:
            lives.stagger(estimator.updates)
        problem = Learning(
            lives,
            (component.slot,),
            c.loss,
            None if estimator.stacked else c.critic,
            AgentBandit(c.bandit, c.agent.hyper, streams.total, stream("bandit", seed)),
            together=not estimator.staggered,
            group=group,
        )
        eta = problem.parameters
        if not eta:
            raise UserError(f"Component {component.name!r} has no parameters: there is nothing to meta-train.")
        estimator.check(Eta({k: p.detach() for k, p in eta.items()}), c.lifetimes)  # stop: counted only
        super().__init__(problem, eta, estimator, c)

    @property
    def lifetimes(self) -> Lifetimes:
        """Those of this process."""
        return self.problem.lives

    @property
    def algorithm(self) -> Algorithm:
        """The agents' algorithm with the component as it is now."""
        return self.problem.algorithm

    @property
    def critic(self) -> OuterCritic | None:
        """None where nothing is judged by it."""
        return self.problem.critic

    @property
    def environment_steps(self) -> int:
        """Environment steps of all lifetimes so far."""
        return self.problem.environment_steps
