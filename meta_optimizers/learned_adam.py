"""Adam with learned numbers: a factor of its step size, two decays and epsilon.

Kingma and Ba, 2015, arXiv:1412.6980, whose numbers are meta-parameters, as in the learnable hand-made optimizers of
Metz et al., "Practical tradeoffs between memory, compute, and performance in learned optimizers", CoLLAs 2022,
arXiv:2203.11860. With eta = 0

    learning rate * exp(eta_0),    beta = 1 - (1 - beta_0) exp(eta),    eps = eps_0 exp(eta_3)

is Adam at beta_0 = (0.9, 0.999) and eps_0 = 1e-5. A decay is bounded below by 0.

Contract 1: eta are the logarithms of four factors: of the learning rate, of 1 - beta1, of 1 - beta2, of eps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from learned_rl.component import Scalar, UpdateRule
from learned_rl.layout import StepContext
from learned_rl.types import Tree
from learned_rl.update_rules import Adam, AdamConfig


@dataclass(frozen=True)
class LearnedAdamConfig:
    beta1: float = 0.9
    """decay of the first moment per update, before meta-training"""
    beta2: float = 0.999
    """decay of the second moment per update, before meta-training"""
    eps: float = 1e-5
    """added to the root of the second moment, before meta-training"""

    def __post_init__(self) -> None:
        AdamConfig(**vars(self))  # refuses what Adam refuses


class LearnedAdam(UpdateRule):
    """Adam whose four numbers are learned. State: Adam's."""

    name: ClassVar[str] = "learned_adam"
    Config: ClassVar[Any] = LearnedAdamConfig
    config: LearnedAdamConfig

    def __init__(self, config: LearnedAdamConfig | None = None) -> None:
        super().__init__(config)
        self.log_rate, self.log_gap1, self.log_gap2, self.log_eps = (nn.Parameter(torch.zeros(())) for _ in range(4))

    def initial_state(self, theta: Tensor) -> Tree:
        return Adam().initial_state(theta)

    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        c = self.config
        # In double precision, as the numbers of a hand-made rule are: scalars do not change what they multiply.
        rate, gap1, gap2, eps = (x.double().exp() for x in (self.log_rate, self.log_gap1, self.log_gap2, self.log_eps))
        beta1, beta2 = 1 - ((1 - c.beta1) * gap1).clamp(max=1.0), 1 - ((1 - c.beta2) * gap2).clamp(max=1.0)
        rule = Adam(AdamConfig(beta1, beta2, c.eps * eps))  # type: ignore[arg-type]
        return rule.update(grad, state, theta, learning_rate * rate, context)
