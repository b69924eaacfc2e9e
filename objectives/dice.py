"""Loaded DiCE: a policy-gradient objective whose higher derivatives are right too.

Farquhar, Whiteson, Foerster, "Loaded DiCE: Trading off Bias and Variance in Any-Order Score Function Estimators for
Reinforcement Learning", NeurIPS 2019, arXiv:1909.10549. Differentiating `A log pi` once more does not give the second
derivative of the return, since it takes the actions as data. With box(x) = exp(x - sg x), whose value is 1 and whose
derivatives are those of a probability ratio, the agent maximises, step by step of an episode,

    A_t [box(w_t) - box(w_t - log pi_t)],    w_t = dice_lambda w_{t-1} + log pi_t

which is A_t box(dice_lambda w_{t-1}) (box(log pi_t) - 1): the first box says that earlier actions led here. The first
derivative is the advantage actor-critic's whatever dice_lambda is; of the higher ones it trades bias for variance:

| dice_lambda | gae_lambda | |
|---|---|---|
| 1 | 1 | Mao et al., ICML 2019: unbiased with any baseline |
| 1 | 1, value 0 | DiCE (Foerster et al., 2018, arXiv:1802.05098), `dice` below |
| 0 | any | LVC (Rothfuss et al., 2019, arXiv:1810.06784): no credit of earlier actions |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from learned_rl.architecture import AgentOutput
from learned_rl.component import Batch, Context, Hyper, Metrics
from learned_rl.defaults import ACTOR_CRITIC, PPOClip
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree, UserError, at_least


@dataclass(frozen=True)
class LoadedDiCEConfig:
    dice_lambda: float = 1.0
    """how much the episode's earlier actions count in second and higher derivatives, decaying per step: 1 unbiased, 0
    (LVC) least variance"""
    normalize_advantage: ClassVar[bool] = False  # it would change the scale of every derivative

    def __post_init__(self) -> None:
        at_least(0, dice_lambda=self.dice_lambda)
        if self.dice_lambda > 1:
            raise UserError(f"dice_lambda is {self.dice_lambda}: expected at most 1.")


def box(x: Tensor) -> Tensor:
    """exp(x - sg x): 1, with the derivatives of exp at 0."""
    return (x - x.detach()).exp()  # stop: what makes it 1


def earlier(log_prob: Tensor, done: Tensor, decay: float = 1.0) -> Tensor:
    """dice_lambda w_{t-1}: what was decided before each step of its episode, as far as the rollout shows it.

    Args:
        log_prob: [T, P, B] of the action of each step, in nats.
        done:     [T, P, B] bool: the episode ended at this step.
        decay:    dice_lambda.

    Returns:
        [T, P, B] sum over earlier steps of the episode of decay^distance log_prob.
    """
    rows = [torch.zeros_like(log_prob[0])]
    for now, kept in zip(log_prob[:-1], decay * (~done[:-1]).to(log_prob.dtype), strict=True):
        rows.append(kept * (rows[-1] + now))
    return torch.stack(rows)


def loaded_dice(log_prob: Tensor, advantage: Tensor, done: Tensor, dice_lambda: float = 1.0) -> Tensor:
    """The objective of the module's docstring, to be maximised, unreduced; all [T, P, B], `done` bool.

    Summed over the steps of an episode, with gamma^t times the advantage, its derivatives estimate those of the
    discounted return; its value is 0.
    """
    return advantage * box(earlier(log_prob, done, dice_lambda)) * (box(log_prob) - 1)


def dice(log_prob: Tensor, reward: Tensor, done: Tensor) -> Tensor:
    """DiCE (Foerster et al., 2018, arXiv:1802.05098): r_t box(sum of log pi up to t); all [T, P, B], `done` bool.

    Summed over the steps of an episode, with gamma^t times the reward, it is the discounted return, and its derivatives
    of every order estimate those of the expected one without bias.
    """
    return reward * box(earlier(log_prob, done) + log_prob)


class LoadedDiCE(PPOClip):
    """The advantage actor-critic's loss, differentiable rightly as often as one likes.

    As in the actor-critic, steps are not weighted by gamma^t. Value loss and entropy bonus are PPO's.
    """

    name, Config, whole_rollouts = "loaded_dice", LoadedDiCEConfig, True
    reads = (*ACTOR_CRITIC, "clip_range_vf")

    def settings(self, tabular: bool) -> dict[str, Any]:
        """The actor-critic's: one gradient step an update, since there is no ratio to the policy that acted."""
        hyper = Hyper(learning_rate=0.05 if tabular else 7e-4, gae_lambda=1.0)
        return {"n_steps": 20, "n_epochs": 1, "n_minibatches": 1, "optimizer": "rmsprop", "hyper": hyper}

    def prepare(
        self, trajectory: Trajectory, out: AgentOutput, next_value: Tensor | None, hyper: Hyper, context: Context
    ) -> tuple[Batch, Tree]:
        batch, memory = super().prepare(trajectory, out, next_value, hyper, context)
        return batch | {"done": trajectory.done}, memory

    def loss(self, out: AgentOutput, batch: Batch, hyper: Hyper) -> tuple[Tensor, Metrics]:
        reached = box(earlier(out.policy.log_prob(batch["action"]), batch["done"], self.config.dice_lambda))
        return super().loss(out, batch | {"advantage": batch["advantage"] * reached}, hyper)

    def policy_loss(self, ratio: Tensor, log_ratio: Tensor, advantage: Tensor, hyper: Hyper) -> Tensor:
        return -advantage * (box(log_ratio) - 1)
