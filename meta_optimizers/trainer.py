"""The outer loop: lifetimes that never all begin at once, one estimate a step, one optimizer of the meta-parameters."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from learned_rl.component import Hyper, Objective
from learned_rl.lifetimes import Lifetimes, under
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.spaces import LogUniform, searched
from learned_rl.tasks.base import TaskFamily
from learned_rl.types import Tree, UserError, at_least, stream
from meta_optimizers.agent_bandit import AgentBandit, AgentBanditConfig
from meta_optimizers.outer_critic import OuterCritic, OuterCriticConfig
from meta_optimizers.truncated import Estimate, TruncatedConfig, TruncatedMetaGradient


def _agent_config() -> PPOConfig:
    """Tabular agents. A step's norm is at most 60 * 0.03: see docs/meta_optimizers/truncated.md on why so little."""
    hyper = Hyper(learning_rate=60.0, prediction_coef=0.5, max_grad_norm=0.03)
    return PPOConfig(n_envs=16, n_steps=20, n_epochs=1, n_minibatches=1, optimizer="sgd", hyper=hyper)


@dataclass(frozen=True)
class MetaTrainConfig:
    """Settings of meta-training."""

    lifetimes: int = 64
    """P: agents that learn side by side"""
    horizon: int | tuple[int, int] = 150
    """agent updates in a lifetime; a pair (low, high) draws each log-uniformly"""
    learning_rate: float = field(default=1e-3, metadata=searched(LogUniform(1e-4, 1e-2)))
    """of the outer Adam"""
    max_grad_norm: float = field(default=0.5, metadata=searched(LogUniform(0.003, 3.0)))
    """bound on the norm of the meta-gradient"""
    agent: PPOConfig = field(default_factory=_agent_config)
    """the agents' algorithm around the learned part"""
    estimator: TruncatedConfig = field(default_factory=TruncatedConfig)
    """how the meta-gradient is estimated"""
    critic: OuterCriticConfig = field(default_factory=OuterCriticConfig)
    """the outer critic"""
    bandit: AgentBanditConfig = field(default_factory=AgentBanditConfig)
    """which agent step sizes and prediction weights the lifetimes try"""

    def __post_init__(self) -> None:
        shortest, longest = self.horizon if isinstance(self.horizon, tuple) else (self.horizon, self.horizon)
        at_least(1, lifetimes=self.lifetimes, horizon=shortest)
        at_least(0, learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm)
        at_least(shortest, **{"the upper end of horizon": longest})


class MetaTrainer:
    """Meta-trains an objective on a task family.

    Lifetimes begin at staggered ages, so that every window sees all phases of learning; a lifetime that ends, or whose
    numbers are no longer finite, restarts alone with a fresh task and a fresh agent.

    Args:
        family:    where tasks come from (its training side).
        objective: the component; its parameters are trained in place.
        config:    settings.
        seed:      all random streams derive from it.
    """

    def __init__(
        self,
        family: TaskFamily,
        objective: Objective,
        config: MetaTrainConfig | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.config = c = config or MetaTrainConfig()
        self.objective = objective.to(device=device, dtype=dtype)
        self.eta = list(objective.parameters())
        if not self.eta:
            raise UserError(f"Component {objective.name!r} has no parameters: there is nothing to meta-train.")
        self.algorithm = Algorithm(c.agent, Slots.fill(c.agent, objective=objective))
        self.lifetimes = Lifetimes(family, self.algorithm, c.lifetimes, c.horizon, seed, device=device, dtype=dtype)
        self.lifetimes.stagger(c.estimator.window)
        self.critic = OuterCritic(c.critic, family, c.lifetimes, seed, self.lifetimes.device, dtype)
        self.bandit = AgentBandit(c.bandit, c.agent.hyper, c.lifetimes, stream("bandit", seed))
        self.estimator = TruncatedMetaGradient(c.estimator, objective)
        self.optimizer = torch.optim.Adam(self.eta, lr=c.learning_rate)
        self.steps = self.environment_steps = self.restarts = self.broken = 0
        self._begin(torch.ones(c.lifetimes, dtype=torch.bool, device=device))

    def step(self) -> dict[str, float]:
        """One update of the meta-parameters; returns what to log."""
        estimate = self.estimator(self.lifetimes, self.critic, self.eta, self.steps)
        metrics = estimate.metrics | self._descend(estimate)
        returns, count = (sum(getattr(e, k) for e in estimate.episodes) for k in ("returns", "count"))
        mean_return = returns / count  # [P]; not a number where no episode ended
        ended = self.lifetimes.finished()
        self.bandit.record(ended | estimate.broken, mean_return, estimate.broken)
        if bool(ended.any()):
            metrics["final_return"] = mean_return[ended].nanmean().item()
        metrics["return"] = mean_return.nanmean().item()
        metrics["broken"] = float(estimate.broken.sum())
        self._restart(ended | estimate.broken)
        self.steps += 1
        self.broken += int(estimate.broken.sum())
        c = self.config
        self.environment_steps += (c.estimator.window + 1) * c.lifetimes * c.agent.n_envs * c.agent.n_steps
        return metrics

    def _descend(self, estimate: Estimate) -> dict[str, float]:
        """Move eta; a gradient that is not finite is skipped, and shows in the metrics."""
        if estimate.grads is None or not all(bool(g.isfinite().all()) for g in estimate.grads):
            return {"grad_norm": float("nan"), "skipped": 1.0}
        for p, g in zip(self.eta, estimate.grads, strict=True):
            p.grad = g
        norm = torch.nn.utils.clip_grad_norm_(self.eta, self.config.max_grad_norm)
        before = [p.detach().clone() for p in self.eta]  # stop: only to measure the update
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        moved = sum(float((p.detach() - b).square().sum()) for p, b in zip(self.eta, before, strict=True))  # stop: same
        return {"grad_norm": float(norm), "update_norm": moved**0.5, "skipped": 0.0}

    def _restart(self, which: torch.Tensor) -> None:
        if bool(which.any()):
            self.lifetimes.restart(which)
            self.critic.restart(which, self.lifetimes.life)
            self.restarts += int(which.sum())
            self._begin(which)

    def _begin(self, which: torch.Tensor) -> None:
        self.bandit.assign(which)
        self.lifetimes.hyper = self.bandit.hyper(self.config.agent.hyper, self.lifetimes.population.theta)

    # --- save and resume ---------------------------------------------------------------------------------------

    def state_dict(self) -> Tree:
        """Everything that the next step depends on; tensors only."""
        counters = torch.tensor([self.steps, self.environment_steps, self.restarts, self.broken])
        state: Tree = {"counters": counters} | {f"eta/{k}": v.clone() for k, v in self.objective.state_dict().items()}
        for i, p in enumerate(self.eta):
            state |= {f"optimizer/{i}/{k}": v.clone() for k, v in self.optimizer.state[p].items()}
        for name in ("lifetimes", "critic", "bandit"):
            state |= {f"{name}/{k}": v for k, v in getattr(self, name).state_dict().items()}
        return state

    def load_state_dict(self, state: Tree) -> None:
        """Continue from a saved state: the same numbers follow as if there had been no break."""
        self.steps, self.environment_steps, self.restarts, self.broken = state["counters"].tolist()
        self.objective.load_state_dict(under("eta", state))
        for i, p in enumerate(self.eta):
            self.optimizer.state[p] = {
                k: v.clone() if k == "step" else v.clone().to(p.device)
                for k, v in under(f"optimizer/{i}", state).items()
            }
        for name in ("lifetimes", "critic", "bandit"):
            getattr(self, name).load_state_dict(under(name, state))
        self.lifetimes.hyper = self.bandit.hyper(self.config.agent.hyper, self.lifetimes.population.theta)
