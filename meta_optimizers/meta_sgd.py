"""Meta-SGD: a learned step size for every parameter, tensor or agent, and the numbers of a hand-made optimizer.

Li, Zhou, Chen, Li, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", 2017, arXiv:1707.09835:

    theta' = theta - learning_rate * exp(eta) o g

with g the gradient, or with `base` "rmsprop" or "adam" that rule's direction. eta starts at zero, which is the base
rule itself. The paper's step sizes may turn negative; logarithms keep ours positive. Its initial parameters of the
agents, learned beside the step sizes, are another slot's matter.

A rate for every parameter or tensor belongs to agents of one architecture: `fit_layout` takes their size.

Contract 1: eta is the logarithm of a factor of the learning rate, one for each parameter in the order of a row of
theta, one for each tensor in the order of the layout, or one for all.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from learned_rl.component import Scalar, UpdateRule
from learned_rl.layout import Layout, StepContext
from learned_rl.tasks.base import check_choices
from learned_rl.types import Tree, UserError, at_least
from meta_optimizers.coordinatewise import NOMINAL


@dataclass(frozen=True)
class MetaSGDConfig:
    """Raises `UserError` for words that there are not."""

    per: Literal["parameter", "tensor", "agent"] = "parameter"
    """what has a step size of its own"""
    base: Literal["sgd", "rmsprop", "adam"] = "sgd"
    """hand-made rule whose step is scaled"""
    sizes: tuple[int, ...] | None = None
    """parameters of each tensor; None until `fit_layout`"""

    def __post_init__(self) -> None:
        check_choices(self)
        at_least(1, sizes=None if self.sizes is None else len(self.sizes))


class MetaSGD(UpdateRule):
    """A hand-made rule with learned step sizes. State: the hand-made rule's."""

    name: ClassVar[str] = "meta_sgd"
    Config: ClassVar[Any] = MetaSGDConfig
    config: MetaSGDConfig

    def __init__(self, config: MetaSGDConfig | None = None) -> None:
        super().__init__(config)
        self._base = (NOMINAL[self.config.base](),)
        if self.config.per == "agent" or self.config.sizes is not None:
            self._build()

    def fit_layout(self, layout: Layout) -> None:
        sizes, own = tuple(layout.sizes), self.config.sizes
        if self.config.per == "agent":
            return
        if own is None:
            self.config = dataclasses.replace(self.config, sizes=sizes)
            self._build()
        elif own != sizes:
            raise UserError(
                f"This meta_sgd has rates for tensors of {', '.join(map(str, own))} parameters, and here are "
                f"{', '.join(map(str, sizes))}: expected the same agents, or a fresh 'meta_sgd'."
            )

    def _build(self) -> None:
        sizes = self.config.sizes or ()
        count = {"parameter": sum(sizes), "tensor": len(sizes), "agent": 1}[self.config.per]
        self.log_rate = nn.Parameter(torch.zeros(count))

    def initial_state(self, theta: Tensor) -> Tree:
        return self._base[0].initial_state(theta)

    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        if not hasattr(self, "log_rate"):
            raise UserError("This meta_sgd has no size yet: plug it into PPO, or call its `fit_layout`.")
        step, state = self._base[0].update(grad, state, theta, learning_rate)
        rate = self.log_rate.exp()
        if self.config.per == "tensor":
            sizes = torch.tensor(self.config.sizes, device=rate.device)
            rate = rate.repeat_interleave(sizes, output_size=theta.shape[1])
        return rate * step, state
