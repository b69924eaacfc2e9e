"""The score-function term: what eta does to the data inside the window.

A meta-gradient that treats sampled actions as data misses that earlier parameters chose later experience. E-MAML
(Stadie et al., 2018, arXiv:1803.01118) adds the missing credit: with lp_j the log-probability of everything sampled at
update j, and R_k what the data of the state after k updates cost,

    L = sum_k w_k [ l_k + coef (R_k - b_k) C_k ],      C_{k+1} = discount (C_k + lp_k),   C_0 = 0

discount 0 is the naive estimate, 1 the unbiased one (within the window, for an outer loss whose gradient is that of the
expected R_k and which has no penalties); between them bias is traded for variance (Vuorio et al., 2022,
arXiv:2209.11303). b_k is the mean over the other lifetimes: a baseline that saw theta_k would be biased, since theta_k
depends on the earlier actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from learned_rl.tasks.base import unknown
from learned_rl.types import UserError, at_least
from meta_optimizers.group import Group

Baseline = Literal["none", "leave_one_out"]


@dataclass(frozen=True)
class CorrectionConfig:
    coef: float = 0.0
    """weight of the score-function term; 0: none, 1: unbiased, with discount 1 and costs in the outer loss's units"""
    discount: float = 1.0
    """meta-discount: how fast credit fades per update, from 0 to 1"""
    baseline: Baseline = "leave_one_out"
    """what costs are compared with: nothing, or the mean over the other lifetimes (a lifetime alone: nothing)"""

    def __post_init__(self) -> None:
        at_least(0, **{"correction.coef": self.coef, "correction.discount": self.discount})
        if self.discount > 1:
            raise UserError(f"correction.discount is {self.discount}: expected at most 1.")
        if self.baseline not in get_args(Baseline):
            raise unknown("correction.baseline", self.baseline, get_args(Baseline))


def score_weights(c: CorrectionConfig, costs: list[Tensor], weights: list[float], steps: int, group: Group) -> Tensor:
    """[K, P] what each update's log-probability is multiplied by in the meta-loss; constants.

    The derivative by lp_j of the module's formula, sum over k > j of w_k discount^(k - j) (R_k - b_k), from the last
    state backwards.

    Args:
        costs:   [P] of the data of each state, from the window's first; the last state's may be missing.
        weights: w_0..w_K of the states' outer losses.
        steps:   K.
    """
    judged = costs[0].new_tensor(weights[: len(costs)])[:, None] * _compared(c, torch.stack(costs), group)
    credit = [torch.zeros_like(costs[0])] * (steps + 1)  # nothing is judged after the last state
    for j in reversed(range(len(judged) - 1)):
        credit[j] = c.discount * (credit[j + 1] + judged[j + 1])
    return c.coef * torch.stack(credit[:steps])


def _compared(c: CorrectionConfig, costs: Tensor, group: Group) -> Tensor:
    """[K, P] costs above the baseline. One that is not finite gives no credit, and has no say in the baselines."""
    finite = costs.isfinite()
    costs = torch.where(finite, costs, 0.0).detach()  # stop: numbers that weigh log-probabilities
    if c.baseline == "none":
        return costs
    total, count = group.sum(costs.sum(1, keepdim=True)), group.sum(finite.sum(1, keepdim=True))
    return torch.where(finite, costs - (total - costs) / (count - 1).clamp(min=1), 0.0)
