"""L2L: an LSTM for every parameter says how it moves.

Andrychowicz, Denil, Gomez, Hoffman, Pfau, Schaul, Shillingford, de Freitas, "Learning to learn by gradient descent by
gradient descent", NeurIPS 2016, arXiv:1606.04474. Two layers of LSTM with weights shared over parameters,

    theta' = theta - learning_rate * w . h_2,    h = LSTM(log and sign of the gradient, h)

with a learning rate of 0.1 (the paper's factor of the output), and a bias beside w. With a `nominal` rule the last
layer starts at zero, and the rule is that one.

Contract 1: features are those of `coordinatewise.log_and_sign` with p = 10.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from learned_rl.layout import StepContext
from learned_rl.types import Tree
from meta_optimizers.coordinatewise import LSTM, Coordinatewise, CoordinatewiseConfig, Dense, blockwise, log_and_sign


@dataclass(frozen=True)
class L2LConfig(CoordinatewiseConfig):
    hidden: int = 20
    """units of each of the two layers"""


class L2L(Coordinatewise):
    """A two-layer LSTM for every parameter. State: `h`, `c` [P, 2 hidden, D], the first layer's units first."""

    name: ClassVar[str] = "l2l"
    Config: ClassVar[Any] = L2LConfig
    suited_rate = 0.1
    config: L2LConfig

    def __init__(self, config: L2LConfig | None = None) -> None:
        super().__init__(config)
        hidden = self.config.hidden
        self.first, self.second = LSTM(2, hidden), LSTM(hidden, hidden)
        self.out = Dense(hidden, 1, zero=self.config.nominal != "none")

    def fresh(self, theta: Tensor) -> Tree:
        zeros = theta.new_zeros(len(theta), 2 * self.config.hidden, theta.shape[1])
        return {"h": zeros, "c": zeros.clone()}

    def learned(self, grad: Tensor, state: Tree, theta: Tensor, context: StepContext) -> tuple[Tensor, Tree]:
        said, h, c = blockwise(self._network, log_and_sign(grad), state["h"], state["c"])
        return said.squeeze(1), {"h": h, "c": c}

    def _network(self, seen: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """Output [P, 1, D] and new states, from features [P, 2, D] and states [P, 2 hidden, D]."""
        (h1, h2), (c1, c2) = (x.split(self.config.hidden, 1) for x in (h, c))
        h1, c1 = self.first(seen, h1, c1)
        h2, c2 = self.second(h1, h2, c2)
        return self.out(h2), torch.cat([h1, h2], 1), torch.cat([c1, c2], 1)
