"""The outer loop: an estimate a step, and one optimizer of the meta-parameters that follows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from learned_rl.component import Component, Hyper
from learned_rl.lifetimes import Lifetimes, under
from learned_rl.ppo import Algorithm, PPOConfig
from learned_rl.spaces import LogUniform, searched
from learned_rl.streams import Streams
from learned_rl.tasks.base import TaskFamily, check_choices
from learned_rl.types import Tree, UserError, at_least
from meta_optimizers.agent_bandit import AgentBanditConfig
from meta_optimizers.estimator import Estimate, Estimator, EstimatorConfig
from meta_optimizers.estimators import make_estimator
from meta_optimizers.group import Group
from meta_optimizers.learning import Learning, OuterLossConfig
from meta_optimizers.outer_critic import OuterCritic, OuterCriticConfig
from meta_optimizers.problem import Eta, Problem
from meta_optimizers.truncated import TruncatedConfig


@dataclass(frozen=True)
class OuterConfig:
    """How the meta-parameters follow the estimates."""

    learning_rate: float = field(default=1e-3, metadata=searched(LogUniform(1e-4, 1e-2)))
    """of the outer optimizer"""
    max_grad_norm: float = field(default=0.5, metadata=searched(LogUniform(0.003, 3.0)))
    """bound on the norm of the meta-gradient"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """outer optimizer"""
    beta1: float = 0.9
    """decay of the outer Adam's first moment per meta-step"""
    half_life: float = math.inf
    """meta-steps in which the outer learning rate halves"""

    def __post_init__(self) -> None:
        check_choices(self)
        at_least(0, learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm, beta1=self.beta1)
        at_least(1e-6, half_life=self.half_life)
        if self.beta1 >= 1:
            raise UserError(f"beta1 is {self.beta1}: expected less than 1.")


class OuterLoop:
    """Moves meta-parameters by what an estimator says of a problem.

    Args:
        problem:   the inner processes.
        eta:       name -> parameter; moved in place.
        estimator: of the direction.
        config:    how to follow it.
    """

    def __init__(
        self, problem: Problem, eta: Mapping[str, nn.Parameter], estimator: Estimator, config: OuterConfig | None = None
    ) -> None:
        self.problem, self.estimator, self.outer = problem, estimator, config or OuterConfig()
        self.eta = dict(eta)
        c = self.outer
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.Adam(self.eta.values(), lr=c.learning_rate, betas=(c.beta1, 0.999))
            if c.optimizer == "adam"
            else torch.optim.SGD(self.eta.values(), lr=c.learning_rate)
        )
        self.steps = 0
        self._before: Tensor | None = None  # the last gradient, to compare with

    def step(self) -> dict[str, float]:
        """One update of the meta-parameters; returns what to log."""
        self.problem.meta_step = self.steps
        estimate = self.estimator(self.problem, Eta({k: p.detach() for k, p in self.eta.items()}))  # stop: values
        metrics = estimate.metrics | self._follow(estimate)
        anew = self.problem.renew(estimate.broken)
        anywhere, broken = self.problem.group.sum(torch.stack([anew.sum(), estimate.broken.sum()])).tolist()
        self.estimator.begin(anew, elsewhere=anywhere > 0)
        self.steps += 1
        return metrics | {"broken": float(broken)} | self.problem.report()

    def _follow(self, estimate: Estimate) -> dict[str, float]:
        """Move eta; a direction that is not finite is skipped, and shows in the metrics."""
        step = estimate.move if estimate.move is not None else estimate.grads
        if step is None or not all(bool(x.isfinite().all()) for x in step.values()):
            return {"grad_norm": float("nan"), "skipped": 1.0}
        before = self._flat()
        metrics = {"skipped": 0.0}
        if estimate.move is not None:
            with torch.no_grad():
                for name, p in self.eta.items():
                    p.add_(estimate.move[name])
        else:
            metrics |= self._descend(step)
        return metrics | {"update_norm": float((self._flat() - before).norm())}

    def _descend(self, grads: Tree) -> dict[str, float]:
        flat = torch.cat([grads[k].flatten() for k in self.eta])
        metrics = {}
        if self._before is not None:
            metrics["cosine"] = float(torch.cosine_similarity(flat, self._before, dim=0))
        self._before = flat.clone()
        for name, p in self.eta.items():
            p.grad = grads[name].clone()
        metrics["grad_norm"] = float(nn.utils.clip_grad_norm_(self.eta.values(), self.outer.max_grad_norm))
        for group in self.optimizer.param_groups:
            group["lr"] = self.outer.learning_rate * 0.5 ** (self.steps / self.outer.half_life)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return metrics

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.eta.values()])  # stop: only to measure the update

    # --- save and resume ---------------------------------------------------------------------------------------

    def state_dict(self) -> Tree:
        """Everything that the next step depends on, of all processes as a single one would save it; tensors only.

        All processes ask together, and only the first one is answered: elsewhere the state is empty.
        """
        group, estimator = self.problem.group, self.estimator
        carried, problems = group.collected(estimator.state_dict()), group.collected(self.problem.state_dict())
        if not group.first:
            return {}
        axes = {k: estimator.axis(k, self.problem) for k in carried[0]}
        # stop: saved values
        state: Tree = {"steps": torch.tensor(self.steps)} | {
            f"eta/{k}": p.detach().clone() for k, p in self.eta.items()
        }
        state |= {} if self._before is None else {"before": self._before.clone()}
        for i, p in enumerate(self.eta.values()):
            state |= {f"optimizer/{i}/{k}": v.clone() for k, v in self.optimizer.state[p].items() if v is not None}
        for k, axis in axes.items():
            state[f"estimator/{k}"] = carried[0][k] if axis is None else torch.cat([c[k] for c in carried], axis)
        return state | {f"problem/{k}": v for k, v in self.problem.join(problems).items()}

    @torch.no_grad()
    def load_state_dict(self, state: Tree) -> None:
        """Continue from a saved state: the same numbers follow as if there had been no break (to rounding, where the
        number of processes is another one)."""
        self.steps = int(state["steps"])
        self._before = state["before"].clone() if "before" in state else None
        for i, (name, p) in enumerate(self.eta.items()):
            p.copy_(state[f"eta/{name}"])
            self.optimizer.state[p] = {
                k: v.clone() if k == "step" else v.clone().to(p.device)
                for k, v in under(f"optimizer/{i}", state).items()
            }
        group, carried = self.problem.group, under("estimator", state)
        for k, v in carried.items():
            if (axis := self.estimator.axis(k, self.problem)) is not None:
                device = next(iter(self.eta.values())).device
                carried[k] = group.own(v.movedim(axis, 0)).movedim(0, axis).clone().to(device)
        self.estimator.load_state_dict(carried)
        self.problem.load_state_dict(self.problem.part(under("problem", state)))


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

    def __post_init__(self) -> None:
        super().__post_init__()
        shortest, longest = self.horizon if isinstance(self.horizon, tuple) else (self.horizon, self.horizon)
        at_least(1, lifetimes=self.lifetimes, horizon=shortest)
        at_least(shortest, **{"the upper end of horizon": longest})


class MetaTrainer(OuterLoop):
    """Meta-trains a component, of any slot, on a task family.

    Unless the estimator wants whole lifetimes, they begin at staggered ages, so that every window sees all phases of
    learning; a lifetime that ends, or whose numbers are no longer finite, restarts alone with a fresh task and agent.

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
        self.component = component.to(device=device, dtype=dtype)
        eta = dict(self.component.named_parameters())
        if not eta:
            raise UserError(f"Component {component.name!r} has no parameters: there is nothing to meta-train.")
        estimator, group = make_estimator(c.estimator, seed), group or Group()
        if not estimator.staggered and isinstance(c.horizon, int) and c.horizon % estimator.updates:
            raise UserError(
                f"window is {estimator.updates} and horizon {c.horizon}: {estimator.name!r} runs all lifetimes "
                f"together; expected a part of the horizon, such as {math.gcd(c.horizon, estimator.updates)}."
            )
        estimator.check(Eta({k: p.detach() for k, p in eta.items()}), c.lifetimes)  # stop: counted only
        streams = estimator.streams(c.lifetimes)
        own = group.own(torch.arange(c.lifetimes))
        problem = Learning(
            family,
            self.component,
            c.agent,
            len(own),
            c.horizon,
            c.loss,
            c.critic,
            c.bandit,
            seed,
            judged=not estimator.stacked,
            streams=Streams(streams[own], int(streams.max()) + 1),
            staggered=estimator.staggered,
            window=estimator.updates,
            group=group,
            device=device,
            dtype=dtype,
        )
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
