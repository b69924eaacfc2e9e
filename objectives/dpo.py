"""DPO: Discovered Policy Optimisation, in closed form.

Lu, Kuba, Letcher, Metz, Schroeder de Witt, Foerster, "Discovered Policy Optimisation", NeurIPS 2022, arXiv:2210.05639.
A drift function was meta-learned by evolution within mirror learning (LPO), then written down: with r the probability
ratio and A the normalised advantage the agent maximises mean(r A - D(r, A)), where

    A >= 0:  D = relu((r - 1) A - alpha tanh((r - 1) A / alpha)),    alpha = 2
    A <  0:  D = relu(log(r) A - beta tanh(log(r) A / beta)),        beta = 0.6

D and all its derivatives vanish at r = 1; only moves along the advantage are penalised. It replaces PPO's clipping:
everything else, value loss and entropy bonus too, is PPO's. `clip_range` is not used.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learned_rl.component import Hyper
from learned_rl.defaults import ACTOR_CRITIC, PPOClip


@dataclass(frozen=True)
class DPOConfig:
    alpha: float = 2.0
    """softness of the drift where the advantage is positive"""
    beta: float = 0.6
    """softness of the drift where the advantage is negative"""
    normalize_advantage: bool = True
    """normalise the advantages of each minibatch and lifetime; part of the method's definition"""


def drift(ratio: Tensor, log_ratio: Tensor, advantage: Tensor, alpha: float = 2.0, beta: float = 0.6) -> Tensor:
    """D(r, A) of the module's docstring, elementwise; all of one shape."""
    positive = advantage >= 0
    move = torch.where(positive, ratio - 1, log_ratio) * advantage
    softness = torch.where(positive, alpha, beta)
    return (move - softness * torch.tanh(move / softness)).relu()


class DPO(PPOClip):
    """PPO's objective with the discovered drift in place of clipping."""

    name, Config = "dpo", DPOConfig
    reads = (*ACTOR_CRITIC, "clip_range_vf")

    def policy_loss(self, ratio: Tensor, log_ratio: Tensor, advantage: Tensor, hyper: Hyper) -> Tensor:
        return drift(ratio, log_ratio, advantage, self.config.alpha, self.config.beta) - ratio * advantage
