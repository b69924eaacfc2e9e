"""Hand-made update rules for the optimizer slot: pure functions on rows of parameters.

Every rule is written once, as `update(grad, state, theta, learning_rate, context) -> step, state`, and used three ways:
in place by plain training, through `higher` inside a differentiable window (`inner_loop`), and as a
`torch.optim.Optimizer` for any other torch code (`rule_optimizer`). The state is an explicit tree of tensors with the
lifetime axis first and the axis of parameters last, so that it is carried over windows, detached, restarted row by
row, and saved like anything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from learned_rl.component import NoConfig, Scalar, UpdateRule
from learned_rl.layout import StepContext
from learned_rl.types import Tree, UserError, at_least


def clip_norm(grad: Tensor, max_norm: Scalar) -> Tensor:
    """Scale each row of `grad [P, D]` so that its norm is at most `max_norm`; differentiable, also at zero."""
    if isinstance(max_norm, float) and max_norm == float("inf"):
        return grad
    # The square root of the clamped sum has a finite derivative where the whole gradient is zero.
    norm = grad.square().sum(1, keepdim=True).clamp(min=1e-30).sqrt()
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0)


def select_rows(keep: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows of `new` where `keep [P]`, else of `old`; both [P, ...]."""
    return torch.where(keep.view(-1, *[1] * (new.dim() - 1)), new, old)


class SGD(UpdateRule):
    """theta - learning_rate * g."""

    name, Config = "sgd", NoConfig

    def initial_state(self, theta: Tensor) -> Tree:
        return {}

    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        return -learning_rate * grad, state


@dataclass(frozen=True)
class MomentumConfig:
    momentum: float = 0.9
    """decay of the velocity per update"""


class Momentum(UpdateRule):
    """Heavy-ball momentum as `torch.optim.SGD` has it: v <- mu v + g; theta - learning_rate * v."""

    name, Config = "momentum", MomentumConfig

    def initial_state(self, theta: Tensor) -> Tree:
        return {"velocity": torch.zeros_like(theta)}

    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        velocity = self.config.momentum * state["velocity"] + grad
        return -learning_rate * velocity, {"velocity": velocity}


@dataclass(frozen=True)
class RMSPropConfig:
    decay: float = 0.99
    """decay of the mean square per update"""
    eps: float = 1e-5
    """added to the root mean square"""
    stop_denominator: bool = False
    """treat the denominator as a constant of the meta-gradient"""


class RMSProp(UpdateRule):
    """RMSProp (Tieleman & Hinton, 2012): g / (sqrt(mean square) + eps)."""

    name, Config = "rmsprop", RMSPropConfig

    def initial_state(self, theta: Tensor) -> Tree:
        return {"square": torch.zeros_like(theta)}

    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        c = self.config
        square = state["square"] * c.decay + (1 - c.decay) * grad * grad
        return -learning_rate * grad / _root(square, c.eps, c.stop_denominator), {"square": square}


@dataclass(frozen=True)
class AdamConfig:
    beta1: float = 0.9
    """decay of the first moment per update"""
    beta2: float = 0.999
    """decay of the second moment per update"""
    eps: float = 1e-5
    """added to the root of the second moment; PPO's usual one, torch's own is 1e-8"""
    stop_denominator: bool = False
    """treat the denominator as a constant of the meta-gradient (as Disco103 does)"""
    weight_decay: float = 0.0
    """decoupled decay of the parameters, per unit of learning rate (AdamW)"""
    clip: float = math.inf
    """bound on each element of the step, in learning rates"""

    def __post_init__(self) -> None:
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, float | int)}  # a learned one is a tensor
        at_least(0, **numbers)
        for name in ("beta1", "beta2"):
            if numbers.get(name, 0) > 1:
                raise UserError(f"{name} is {numbers[name]}: expected at most 1.")


class Adam(UpdateRule):
    """Adam (Kingma & Ba, 2015, arXiv:1412.6980); with weight_decay AdamW (Loshchilov & Hutter, arXiv:1711.05101).

    The number of updates is counted for each lifetime, since lifetimes restart at different moments.
    """

    name, Config = "adam", AdamConfig

    def initial_state(self, theta: Tensor) -> Tree:
        zeros = torch.zeros_like(theta)
        return {"first": zeros, "second": zeros.clone(), "count": zeros.new_zeros(len(theta), 1)}

    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        c = self.config
        count = state["count"] + 1
        first = state["first"] + (1 - c.beta1) * (grad - state["first"])
        second = c.beta2 * state["second"] + (1 - c.beta2) * grad * grad
        corrected = second / (1 - c.beta2**count)
        root = _root(corrected, c.eps, c.stop_denominator)
        if math.isinf(c.clip):
            step = -(learning_rate / (1 - c.beta1**count)) * first / root
        else:
            step = -learning_rate * (first / (1 - c.beta1**count) / root).clamp(-c.clip, c.clip)
        if c.weight_decay:
            step = step - learning_rate * c.weight_decay * theta
        return step, {"first": first, "second": second, "count": count}


@dataclass(frozen=True)
class ClippedAdamConfig(AdamConfig):
    eps: float = 1e-8
    stop_denominator: bool = True
    clip: float = 1.0


class ClippedAdam(Adam):
    """Adam whose steps are bounded, and whose denominator is a constant of the meta-gradient.

    A parameter moves by at most one learning rate. It moves the agents of Disco103 (Oh et al., Nature 2025).
    """

    name, Config = "clipped_adam", ClippedAdamConfig


def _root(square: Tensor, eps: float, stop: bool) -> Tensor:
    """sqrt(square) + eps, whose derivative is zero (not infinite) where square is zero."""
    if stop:
        square = square.detach()  # stop: the denominator is a constant of the meta-gradient
    if not torch.is_grad_enabled():  # under `vmap` a tensor does not say whether it carries a gradient
        return square.sqrt() + eps
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0) + eps


RULES: dict[str, type[UpdateRule]] = {rule.name: rule for rule in (SGD, Momentum, RMSProp, Adam, ClippedAdam)}
