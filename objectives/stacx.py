"""STACX: auxiliary actor-critic heads on the agent's trunk, each with learned numbers of its own.

Zahavy, Xu, Veeriah, Hessel, Oh, van Hasselt, Silver, Singh, "A Self-Tuning Actor-Critic Algorithm", NeurIPS 2020,
arXiv:2002.12928, the section on auxiliary losses. Head i has a policy pi_i and a value V_i, never acts, and learns
off-policy from what the agent did: with the leaky V-trace targets v_i and weighted advantages A_i of its own gamma_i,
lambda_i and alpha_i, at w = pi_i / mu,

    L_aux = sum_i [-g_i mean(A_i log pi_i(a|s)) + h_i mean((V_i - v_i)^2) - e_i mean(H(pi_i))]

is added to the agent's loss (times `aux_coef`), whose trunk thereby learns what other horizons ask for. Meta-parameters
are the six numbers of each head: gamma, lambda and alpha as sigmoids, the weights g, h and e as sigmoids times a bound
(the weight that judges the agent, in the paper). Targets and advantages are constants of the inner gradient, and pass
derivatives to gamma, lambda and alpha; values and importance weights are constants of both.

They are made once an update, at the parameters that acted, and stay the same through its epochs and minibatches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import gymnasium
import torch
from gymnasium.spaces import Discrete
from torch import Tensor, nn

from learned_rl.architecture import AgentOutput
from learned_rl.component import Auxiliary, Batch, Context, Hyper, lifetime_mean
from learned_rl.distributions import Categorical
from learned_rl.returns import vtrace
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError, at_least
from objectives.bijectors import UNIT
from objectives.impala import actor_critic


@dataclass(frozen=True)
class STACXConfig:
    """Raises `UserError` for fewer than one head, and for numbers that no head can have or start from."""

    heads: int = 2
    """n: auxiliary policies, each with a value of its own"""
    gamma: float = 0.99
    """where the heads' discounts start"""
    gae_lambda: float = 0.95
    """where the heads' trace decays start"""
    vtrace_alpha: float = 0.95
    """where the heads' mixtures of plain (0) and clipped (1) importance weights start"""
    pg_coef: float = 1.0
    """bound of the weights of the heads' policy losses"""
    vf_coef: float = 0.5
    """bound of the weights of the heads' value losses"""
    ent_coef: float = 0.01
    """bound of the weights of the heads' entropies"""
    start: float = 0.95
    """where these weights start, as a share of their bounds"""

    def __post_init__(self) -> None:
        at_least(1, heads=self.heads)
        Hyper(gamma=self.gamma, gae_lambda=self.gae_lambda, vtrace_alpha=self.vtrace_alpha)  # refuses the others
        for name in WEIGHTS:
            if not 0 < getattr(self, name) < math.inf:
                default = getattr(type(self), name)
                raise UserError(f"{name} is {getattr(self, name)}: expected a positive bound, such as {default}.")
        if not 0 < self.start < 1:
            raise UserError(f"start is {self.start}: expected a share between 0 and 1, such as 0.95.")


RETURNS = ("gamma", "gae_lambda", "vtrace_alpha")
WEIGHTS = ("pg_coef", "vf_coef", "ent_coef")
SAID = ("stacx_target", "stacx_advantage")  # [T, P, B, n] each


class STACX(Auxiliary):
    """Auxiliary actor-critic heads that tune their own numbers."""

    name, Config, online, reads = "stacx", STACXConfig, True, ()  # its numbers are its own
    outer_rate = 0.03  # a handful of numbers
    config: STACXConfig

    def __init__(self, config: STACXConfig | None = None) -> None:
        super().__init__(config)
        self.eta = nn.ParameterDict({k: nn.Parameter(torch.zeros(self.config.heads)) for k in RETURNS + WEIGHTS})

    def numbers(self) -> dict[str, Tensor]:
        """Name -> [n], one for each head."""
        c, eta = self.config, self.eta
        weights = {k: getattr(c, k) * UNIT(c.start, eta[k]) for k in WEIGHTS}
        return {k: UNIT(getattr(c, k), eta[k]) for k in RETURNS} | weights

    def heads(self, action_space: gymnasium.Space) -> dict[str, int]:
        """Of n policies and n values.

        Raises:
            UserError: the actions are not discrete.
        """
        if not isinstance(action_space, Discrete):
            raise UserError(f"{self.name!r} needs Discrete actions: this task has {action_space}.")
        of_each = {"stacx_policy": int(action_space.n), "stacx_value": 1}
        return {f"{name}{i}": size for i in range(self.config.heads) for name, size in of_each.items()}

    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_heads: dict[str, Tensor], hyper: Hyper, context: Context
    ) -> Batch:
        tr, number = trajectory, self.numbers()
        policy, value = self._read({k: v[:-1].detach() for k, v in out.heads.items()})  # stop: constants of the targets
        _, next_value = self._read({k: v.detach() for k, v in next_heads.items()})  # stop: constants of the targets
        log_ratio = policy.log_prob(_each_head(tr.action, value)) - tr.log_prob.unsqueeze(-1)
        reward, terminated, truncated = (x.unsqueeze(-1) for x in (tr.reward, tr.terminated, tr.truncated))
        happened = (reward, value, next_value, terminated, truncated, log_ratio)
        said = vtrace(*happened, number["gamma"], number["gae_lambda"], alpha=number["vtrace_alpha"])
        return dict(zip(SAID, said, strict=True))

    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> Tensor:
        number, (policy, value) = self.numbers(), self._read(out.heads)
        action = _each_head(batch["action"], value)
        pg_loss, vf_loss, entropy = actor_critic(AgentOutput(policy, value), action, *(batch[k] for k in SAID))
        loss = number["pg_coef"] * pg_loss + number["vf_coef"] * vf_loss - number["ent_coef"] * entropy
        return lifetime_mean(loss.sum(-1))

    def _read(self, heads: dict[str, Tensor]) -> tuple[Categorical, Tensor]:
        """Policies [..., n] and values [..., n] of the heads; beside them `heads` may hold others."""
        each = range(self.config.heads)
        logits = torch.stack([heads[f"stacx_policy{i}"] for i in each], -2)
        return Categorical(logits), torch.cat([heads[f"stacx_value{i}"] for i in each], -1)


def _each_head(x: Tensor, like: Tensor) -> Tensor:
    """x [...] for each head, of the shape of `like` [..., n]."""
    return x.unsqueeze(-1).expand(like.shape)
