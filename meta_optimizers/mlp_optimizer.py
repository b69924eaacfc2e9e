"""The MLP optimizer: a perceptron for every parameter reads momenta, and the age (`mlp_lopt`).

Metz, Maheswaranathan, Nixon, Freeman, Sohl-Dickstein, "Understanding and correcting pathologies in the training of
learned optimizers", ICML 2019, arXiv:1810.10180; in JAX: google/learned_optimization, `MLPLOpt`. Two layers of 32 ReLUs
with two outputs, a direction d and a magnitude m:

    theta' = theta - learning_rate * d exp(1e-3 m),    learning_rate 1e-3

It reads the gradient, the parameter and six momenta of the gradient, each over its root mean square within its tensor,
and tanh(t / tau - 1) of the number t of steps so far for eleven time scales tau.

Contract 1: features in that order; decays (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999); tau 1, 3, 10, 30, ..., 1e5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from learned_rl.layout import StepContext
from learned_rl.types import Tree
from meta_optimizers.coordinatewise import (
    DECAYS,
    Coordinatewise,
    CoordinatewiseConfig,
    Dense,
    blockwise,
    momenta,
    normalised,
)

SCALES = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 3e4, 1e5)


@dataclass(frozen=True)
class MLPOptimizerConfig(CoordinatewiseConfig):
    hidden: int = 32
    """units of each of the two layers"""


class MLPOptimizer(Coordinatewise):
    """A perceptron for every parameter. State: `momenta` [P, 6, D] and the number of steps `count` [P, 1]."""

    name: ClassVar[str] = "mlp_optimizer"
    Config: ClassVar[Any] = MLPOptimizerConfig
    suited_rate = 1e-3
    config: MLPOptimizerConfig

    def __init__(self, config: MLPOptimizerConfig | None = None) -> None:
        super().__init__(config)
        hidden = self.config.hidden
        self.first, self.second = Dense(2 + len(DECAYS) + len(SCALES), hidden), Dense(hidden, hidden)
        self.out = Dense(hidden, 2, zero=self.config.nominal != "none")

    def fresh(self, theta: Tensor) -> Tree:
        P, D = theta.shape
        return {"momenta": theta.new_zeros(P, len(DECAYS), D), "count": theta.new_zeros(P, 1)}

    def learned(self, grad: Tensor, state: Tree, theta: Tensor, context: StepContext) -> tuple[Tensor, Tree]:
        moving = momenta(grad, state["momenta"])
        seen = normalised(torch.cat([grad.unsqueeze(1), theta.unsqueeze(1), moving], 1), context.layout)
        age = torch.tanh(state["count"] / theta.new_tensor(SCALES) - 1)  # [P, scales]
        x = torch.cat([seen, age.unsqueeze(-1).expand(-1, -1, theta.shape[1])], 1)
        (said,) = blockwise(lambda x: (self.out(self.second(self.first(x).relu()).relu()),), x)
        direction, magnitude = said.unbind(1)
        return direction * (1e-3 * magnitude).exp(), {"momenta": moving, "count": state["count"] + 1}
