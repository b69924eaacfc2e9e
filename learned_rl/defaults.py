"""The hand-made default of each slot. With nothing else plugged in, the algorithm is PPO.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347. The objective's verbs
(`policy_loss`, `value_loss`) are separate, so that a published variant overrides one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from learned_rl.architecture import AgentOutput
from learned_rl.component import (
    Auxiliary,
    Batch,
    Context,
    Hyper,
    Hyperparameters,
    Metrics,
    NoConfig,
    Objective,
    Reward,
    lifetime_mean,
    per_lifetime,
)
from learned_rl.returns import gae
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree

#: What the loss of an actor-critic depends on.
ACTOR_CRITIC = ("gamma", "gae_lambda", "pg_coef", "vf_coef", "ent_coef")


@dataclass(frozen=True)
class PPOClipConfig:
    normalize_advantage: bool = True
    """give the advantages of each minibatch and lifetime mean 0 and standard deviation 1"""


class PPOClip(Objective):
    """PPO's clipped surrogate (eq. 7 and 9), with optional value clipping.

        L = -pg_coef mean(min(r A, clip(r, 1 - eps, 1 + eps) A)) + vf_coef mean((V - G)^2) - ent_coef mean(H)

    with the cross-entropy in place of (V - G)^2 where the agents' value is categorical.
    With one epoch and one minibatch r is 1, and this is the advantage actor-critic (A2C; Mnih et al., 2016).
    """

    name: ClassVar[str] = "ppo_clip"
    reports_kl: ClassVar[bool] = True
    Config: ClassVar[Any] = PPOClipConfig
    reads: tuple[str, ...] = (*ACTOR_CRITIC, "clip_range", "clip_range_vf")
    #: a hard bound decides which samples count, and nothing else
    insensitive: tuple[str, ...] = ("clip_range", "clip_range_vf")

    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_value: Tensor | None, hyper: Hyper, context: Context
    ) -> tuple[Batch, Tree]:
        assert out.value is not None and next_value is not None
        tr, value = trajectory, out.value[:-1].detach()  # stop: targets are constants of theta
        next_value = next_value.detach()  # stop: targets are constants of theta
        advantage = gae(tr.reward, value, next_value, tr.terminated, tr.truncated, hyper.gamma, hyper.gae_lambda)
        return {"advantage": advantage, "returns": advantage + value, "value": value}, {}

    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
        advantage = batch["advantage"]
        if self.config.normalize_advantage:
            advantage = normalise(advantage)
        log_ratio = out.policy.log_prob(batch["action"]) - batch["log_prob"]
        ratio = log_ratio.exp()
        policy_loss = lifetime_mean(self.policy_loss(ratio, log_ratio, advantage, hyper))
        value_loss = lifetime_mean(self.value_loss(out, batch, hyper))
        entropy = lifetime_mean(out.policy.entropy())
        pg_coef, vf_coef, ent_coef = (per_lifetime(getattr(hyper, k)) for k in ("pg_coef", "vf_coef", "ent_coef"))
        loss = pg_coef * policy_loss + vf_coef * value_loss - ent_coef * entropy
        with torch.no_grad():
            metrics = {
                "policy_gradient_loss": policy_loss,
                "value_loss": value_loss,
                "entropy": entropy,
                "approx_kl": lifetime_mean(ratio - 1 - log_ratio),
                "clip_fraction": lifetime_mean(((ratio - 1).abs() > hyper.clip_range).to(ratio.dtype)),
            }
            metrics |= {k: lifetime_mean(v) for k, v in out.beyond_bins(batch["returns"]).items()}
        return loss, {k: v.detach() for k, v in metrics.items()}  # stop: only to look at

    def policy_loss(self, ratio: Tensor, log_ratio: Tensor, advantage: Tensor, hyper: Hyper) -> Tensor:
        """Unreduced loss of the policy, of the shape of `ratio`."""
        return -torch.minimum(ratio * advantage, (1 + self.clip(ratio - 1, hyper.clip_range)) * advantage)

    def clip(self, x: Tensor, bound: float | Tensor) -> Tensor:
        """x within bound of 0."""
        return _clamp(x, -bound, bound)

    def value_loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> Tensor:
        """Unreduced error of the value, of its shape."""
        error = out.value_error(batch["returns"])
        if hyper.clip_range_vf is None:
            return error
        assert out.value is not None
        near = batch["value"] + self.clip(out.value - batch["value"], hyper.clip_range_vf)
        return torch.maximum(error, (near - batch["returns"]).square())


def normalise(x: Tensor, constant: bool = False) -> Tensor:
    """Mean 0 and standard deviation 1 within each lifetime of a minibatch [P, n] or of a rollout [T, P, B].

    Args:
        constant: whether what is taken off and divided by is a constant of every gradient.
    """
    axes = (-1,) if x.dim() == 2 else (0, 2)
    if all(x.shape[i] == 1 for i in axes):
        return x  # one number a lifetime has no spread
    std, mean = torch.std_mean(x.detach() if constant else x, axes, keepdim=True)  # stop: as asked
    return (x - mean) / (std + 1e-8)


def _clamp(x: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.minimum(torch.maximum(x, torch.as_tensor(low)), torch.as_tensor(high))
    return x.clamp(low, high)


class EnvironmentReward(Reward):
    """What the environment pays."""

    name, Config = "environment", NoConfig

    def forward(self, trajectory: Trajectory, context: Context) -> tuple[Tensor, Tree]:
        return trajectory.reward, {}


@dataclass(frozen=True)
class ConstantsConfig:
    linear_decay: bool = False
    """let the learning rate fall linearly to zero over the lifetime"""


class Constants(Hyperparameters):
    """The configured numbers, with an optional linear learning-rate schedule."""

    name, Config = "constants", ConstantsConfig

    def forward(self, base: Hyper, trajectory: Trajectory, context: Context) -> tuple[Hyper, Tree]:
        if not self.config.linear_decay:
            return base, {}
        left = (1 - context.progress).unsqueeze(-1).to(trajectory.reward.dtype)
        return base.replace(learning_rate=base.learning_rate * left), {}


class NoAuxiliary(Auxiliary):
    """Nothing else is predicted."""

    name, Config = "none", NoConfig
    reads = ()

    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_heads: dict[str, Tensor], hyper: Hyper, context: Context
    ) -> Batch:
        return {}

    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> Tensor:
        return next(iter(batch.values())).new_zeros(())
