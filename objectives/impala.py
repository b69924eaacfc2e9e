"""IMPALA's actor-critic: off-policy corrections by V-trace, or by its leaky form.

Espeholt et al., "IMPALA: Scalable Distributed Deep-RL with Importance Weighted Actor-Learner Architectures", ICML 2018,
arXiv:1802.01561. Leaky V-trace: Zahavy et al., "A Self-Tuning Actor-Critic Algorithm", NeurIPS 2020, arXiv:2002.12928.
With mu the policy that acted, w_t = pi(a_t|s_t) / mu(a_t|s_t), and value targets v_t and advantages A_t (each with its
importance weight) of `learned_rl.returns.vtrace`, each lifetime descends

    L = -pg_coef mean(A log pi(a|s)) + vf_coef mean((V - v)^2) - ent_coef mean(H)

Targets, advantages and weights are constants of the inner gradient. For an outer one they depend on gamma, `gae_lambda`
and `vtrace_alpha` (and on a learned reward), through which they pass derivatives; values and weights w stay constants.
They are computed anew in every epoch, at its own values and policy, so several epochs are corrected for how far the
policy has moved. While pi is mu they are those of the advantage actor-critic, whatever alpha is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from learned_rl.architecture import AgentOutput
from learned_rl.component import Batch, Context, Hyper, Metrics, Objective, lifetime_mean
from learned_rl.defaults import ACTOR_CRITIC, normalise
from learned_rl.returns import vtrace
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, at_least


@dataclass(frozen=True)
class ImpalaConfig:
    """Raises `UserError` for a negative threshold."""

    rho_clip: float = 1.0
    """threshold of the importance weights of temporal differences and of the policy gradient"""
    c_clip: float = 1.0
    """threshold of the importance weights of traces"""
    normalize_advantage: bool = False
    """give the weighted advantages of each rollout and lifetime mean 0 and standard deviation 1; both are constants"""

    def __post_init__(self) -> None:
        at_least(0, rho_clip=self.rho_clip, c_clip=self.c_clip)


def actor_critic(out: AgentOutput, action: Tensor, target: Tensor, advantage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Policy loss, value loss and entropy of every step, before their weights; all of the shape of the value."""
    return -advantage * out.policy.log_prob(action), out.value_error(target), out.policy.entropy()


class Impala(Objective):
    """The actor-critic with leaky V-trace."""

    name, Config, whole_rollouts, reports_kl = "impala", ImpalaConfig, True, True
    reads = (*ACTOR_CRITIC, "vtrace_alpha")
    config: ImpalaConfig

    def settings(self, tabular: bool) -> dict[str, Any]:
        """The paper's: one gradient step on 20 steps, RMSProp, an entropy bonus of 0.01."""
        hyper = Hyper(learning_rate=0.05 if tabular else 6e-4, gae_lambda=1.0, ent_coef=0.01)
        return {"n_steps": 20, "n_epochs": 1, "n_minibatches": 1, "optimizer": "rmsprop", "hyper": hyper}

    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_value: Tensor | None, hyper: Hyper, context: Context
    ) -> tuple[Batch, Tree]:
        assert next_value is not None
        names = ("reward", "terminated", "truncated")
        # stop: values are constants of the targets
        return {"next_value": next_value.detach()} | {k: getattr(trajectory, k) for k in names}, {}

    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
        assert out.value is not None
        log_ratio = out.policy.log_prob(batch["action"]) - batch["log_prob"]
        target, advantage = self.targets(out.value, log_ratio, batch, hyper)
        policy, value, entropy = actor_critic(out, batch["action"], target, advantage)
        loss = lifetime_mean(hyper.pg_coef * policy + hyper.vf_coef * value - hyper.ent_coef * entropy)
        with torch.no_grad():
            ratio = log_ratio.exp()
            metrics = {
                "policy_gradient_loss": policy,
                "value_loss": value,
                "entropy": entropy,
                "approx_kl": ratio - 1 - log_ratio,
                "clip_fraction": ((ratio - 1).abs() > hyper.clip_range).to(ratio.dtype),
            } | out.beyond_bins(target)
            return loss, {k: lifetime_mean(v) for k, v in metrics.items()}

    def targets(self, value: Tensor, log_ratio: Tensor, batch: Batch, hyper: Hyper) -> tuple[Tensor, Tensor]:
        """Value targets and weights of the policy gradient, both [T, P, B].

        Args:
            value:     [T, P, B] at the present parameters.
            log_ratio: [T, P, B] log(pi / mu) at the present parameters.
            batch:     what `prepare` kept. Its `next_value`, of the parameters that acted, stands for the states of
                       which `value` says nothing: the last one, and those in which an episode was truncated.
        """
        value, kept, c = value.detach(), batch["next_value"], self.config  # stop: values are constants of the targets
        terminated, truncated = batch["terminated"], batch["truncated"]
        next_value = torch.where(terminated | truncated, kept, torch.cat([value[1:], kept[-1:]]))
        numbers = (hyper.gamma, hyper.gae_lambda, c.rho_clip, c.c_clip, hyper.vtrace_alpha)
        target, advantage = vtrace(batch["reward"], value, next_value, terminated, truncated, log_ratio, *numbers)
        return target, normalise(advantage, constant=True) if c.normalize_advantage else advantage
