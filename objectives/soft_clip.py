"""PPO with a clip that has a derivative, so that clip ranges can be learned by meta-gradients.

Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347, whose clip decides which samples
have a gradient and by the bound itself has none: whatever learns the bound by gradients learns nothing. Here

    clip(r, 1 - eps, 1 + eps)   becomes   1 + eps tanh((r - 1) / eps)

and the value's clip likewise: the same slope where nothing has moved, the same bounds far away, and in between a
gradient that fades in the measure of eps. Everything else is PPO's.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from learned_rl.defaults import PPOClip


class PPOSoftClip(PPOClip):
    """PPO's clipped surrogate with a smooth clip."""

    name: ClassVar[str] = "ppo_soft_clip"
    insensitive = ()

    def clip(self, x: Tensor, bound: float | Tensor) -> Tensor:
        if isinstance(bound, float) and (math.isinf(bound) or bound == 0):
            return x if bound else torch.zeros_like(x)
        return bound * torch.tanh(x / bound)
