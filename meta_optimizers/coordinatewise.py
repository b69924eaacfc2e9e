"""What coordinate-wise learned optimizers share: one small network that every parameter of the agents has for itself.

Weights are shared over parameters, recurrent states are not. Features come first and parameters last, `[P, F, D]`: the
matrix products then run over long contiguous rows, and so does everything elementwise.

A rule whose output is zero moves nothing. With a `nominal` rule it adds to a hand-made step instead, as STAR does
(Harrison, Metz, Sohl-Dickstein, 2022, arXiv:2209.11208): then neutral weights are that optimizer, and learning begins
from what works.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from learned_rl.component import Scalar, UpdateRule
from learned_rl.layout import Layout, StepContext
from learned_rl.tasks.base import check_choices
from learned_rl.types import Tree, at_least
from learned_rl.update_rules import SGD, Adam, RMSProp

#: Decays of the momenta that Metz et al., 2019, arXiv:1810.10180, and OPEN look at.
DECAYS = (0.1, 0.5, 0.9, 0.99, 0.999, 0.9999)
BLOCK = 4096  # parameters
NOMINAL: dict[str, type[UpdateRule]] = {"sgd": SGD, "rmsprop": RMSProp, "adam": Adam}


@dataclass(frozen=True)
class CoordinatewiseConfig:
    """Raises `UserError` for words that there are not, and sizes below 1."""

    nominal: Literal["none", "sgd", "rmsprop", "adam"] = "none"
    """hand-made step to which the learned one is added; its learning rate is the same"""
    stop_gradient: bool = True
    """take the agents' gradients and parameters as constants of the meta-gradient, as the papers do"""

    def __post_init__(self) -> None:
        check_choices(self)
        at_least(1, **{k: v for k, v in vars(self).items() if isinstance(v, int) and not isinstance(v, bool)})


class Coordinatewise(UpdateRule):
    """A rule in which a network says of each parameter how it moves; subclasses say what it reads and how it answers.

    State: what `fresh` names, and the nominal rule's, "nominal/name".
    """

    config: CoordinatewiseConfig

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        self.stops_gradient = self.config.stop_gradient
        kind = NOMINAL.get(self.config.nominal)
        # In a tuple, since a rule without parameters is no part of this module's weights.
        self._nominal = () if kind is None else (kind(),)

    @abstractmethod
    def fresh(self, theta: Tensor) -> Tree:
        """State of fresh rows, [P, ..., D] or [P, 1], beside the nominal rule's."""

    @abstractmethod
    def learned(self, grad: Tensor, state: Tree, theta: Tensor, context: StepContext) -> tuple[Tensor, Tree]:
        """What to subtract from theta for a learning rate of 1, [P, D], and the new state."""

    def initial_state(self, theta: Tensor) -> Tree:
        nominal = {f"nominal/{k}": v for rule in self._nominal for k, v in rule.initial_state(theta).items()}
        return self.fresh(theta) | nominal

    def update(
        self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar, context: StepContext | None = None
    ) -> tuple[Tensor, Tree]:
        if self.stops_gradient:
            grad, theta = grad.detach(), theta.detach()  # stop: as the papers do
        said, after = self.learned(grad, state, theta, context or StepContext())
        step, nominal = -learning_rate * said, self.by_hand(grad, state, theta, learning_rate)
        return (step, after) if nominal is None else (step + nominal[0], after | nominal[1])

    def by_hand(self, grad: Tensor, state: Tree, theta: Tensor, learning_rate: Scalar) -> tuple[Tensor, Tree] | None:
        """The nominal rule's step and its new state; None where there is none."""
        if not self._nominal:
            return None
        own = {k.removeprefix("nominal/"): v for k, v in state.items() if k.startswith("nominal/")}
        step, moved = self._nominal[0].update(grad, own, theta, learning_rate)
        return step, {f"nominal/{k}": v for k, v in moved.items()}


def tanh(x: Tensor) -> Tensor:
    """Hyperbolic tangent; where nobody differentiates as 2 sig(2x) - 1, which torch computes faster on a CPU."""
    return torch.tanh(x) if torch.is_grad_enabled() else torch.sigmoid(2 * x).mul_(2).sub_(1)


# --- cells and layers, features first --------------------------------------------------------------------------------


def _uniform(*shape: int, bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def _times(weight: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
    """W x + b, [P, O, D] from weights [O, I] and features [P, I, D]: a product for each lifetime, without the copies of
    x that come with folding them into one."""
    stacked = weight.expand(len(x), -1, -1)
    return torch.bmm(stacked, x) if bias is None else torch.baddbmm(bias.unsqueeze(-1), stacked, x)


class Dense(nn.Module):
    """W x + b on features [P, I, D]: [P, O, D]; zero at first if asked for."""

    def __init__(self, inputs: int, outputs: int, zero: bool = False) -> None:
        super().__init__()
        bound = 0.0 if zero else 1 / math.sqrt(inputs)
        self.weight, self.bias = _uniform(outputs, inputs, bound=bound), nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return _times(self.weight, x, self.bias)


class FeatureNorm(nn.Module):
    """Layer normalisation over the features of each parameter (Ba et al., 2016, arXiv:1607.06450)."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        x = x - x.mean(-2, keepdim=True)
        x = x * torch.rsqrt(x.square().mean(-2, keepdim=True) + 1e-6)
        return x * self.scale[:, None] + self.shift[:, None]


class GRU(nn.Module):
    """A gated recurrent unit (Cho et al., 2014) as Flax has it: of the recurrent parts only the candidate's has a bias.

    r, z = sig(W x + U h + b),    n = tanh(W x + b + r (U h + b_n)),    h' = (1 - z) n + z h
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = Dense(inputs, 3 * hidden)
        self.recurrent = _uniform(3 * hidden, hidden, bound=1 / math.sqrt(hidden))
        self.candidate = nn.Parameter(torch.zeros(hidden))

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        """[P, H, D] new states from features [P, I, D] and states [P, H, D]."""
        H = self.hidden
        # One product over (x, h, 1) for the gates and for both parts of the candidate, which r takes apart: most of
        # the time goes into passes over long rows.
        gates, given, kept = _times(self._joined(), torch.cat([x, h, torch.ones_like(h[..., :1, :])], -2)).split(
            [2 * H, H, H], -2
        )
        r, z = torch.sigmoid(gates).split(H, -2)
        n = tanh(torch.addcmul(given, r, kept))
        return torch.addcmul(n, z, h - n)

    def _joined(self) -> Tensor:
        """[4 H, I + H + 1] the weights as one matrix: of the gates, the candidate's given part, its kept part."""
        H, W, U, b = self.hidden, self.input.weight, self.recurrent, self.input.bias
        none, zeros = torch.zeros_like(U[:H]), torch.zeros_like(W[:H])
        gates = torch.cat([W[: 2 * H], U[: 2 * H], b[: 2 * H, None]], 1)
        given = torch.cat([W[2 * H :], none, b[2 * H :, None]], 1)
        return torch.cat([gates, given, torch.cat([zeros, U[2 * H :], self.candidate[:, None]], 1)])


class LSTM(nn.Module):
    """A long short-term memory cell (Hochreiter and Schmidhuber, 1997) with a bias of 1 for what is kept."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = Dense(inputs, 4 * hidden)
        self.recurrent = _uniform(4 * hidden, hidden, bound=1 / math.sqrt(hidden))
        with torch.no_grad():
            self.input.bias[hidden : 2 * hidden] = 1.0

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """New outputs and cells [P, H, D]."""
        H = self.hidden
        gates = self.input(x) + _times(self.recurrent, h)
        i, f, o = torch.sigmoid(gates[..., : 3 * H, :]).split(H, -2)
        c = f * c + i * tanh(gates[..., 3 * H :, :])
        return o * tanh(c), c


def blockwise(network: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
    """What a network says of each parameter by itself, from tensors [P, F, D]; where nobody differentiates, in blocks
    of parameters whose numbers stay in a cache."""
    if torch.is_grad_enabled() or rows[0].shape[-1] <= BLOCK:
        return network(*rows)
    said = [network(*block) for block in zip(*(x.split(BLOCK, -1) for x in rows), strict=True)]
    return tuple(torch.cat(pieces, -1) for pieces in zip(*said, strict=True))


# --- features --------------------------------------------------------------------------------------------------------


def momenta(grad: Tensor, before: Tensor, decays: tuple[float, ...] = DECAYS) -> Tensor:
    """[P, M, D] running means of the gradient [P, D] with those decays."""
    decay, gap = (grad.new_tensor(xs)[:, None] for xs in (decays, [1 - d for d in decays]))  # 1 - 0.9999 in full digits
    return decay * before + gap * grad.unsqueeze(-2)


def normalised(x: Tensor, layout: Layout | None) -> Tensor:
    """Features [P, F, D] over their root mean square in the tensor that each parameter belongs to."""
    if layout is None:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)
    pieces = x.split(layout.sizes, -1)
    return torch.cat([y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5) for y in pieces], -1)


def log_and_sign(grad: Tensor, p: float = 10.0) -> Tensor:
    """[..., 2, D] the logarithm of a gradient [..., D] and its sign, or small numbers as they are:

        (log|g| / p, sign g) where |g| >= e^-p,    (-1, e^p g) elsewhere

    (Andrychowicz et al., 2016, appendix A)."""
    large = grad.abs() >= math.exp(-p)
    log = torch.where(large, torch.where(large, grad, 1.0).abs().log() / p, -1.0)
    return torch.stack([log, torch.where(large, grad.sign(), math.exp(p) * grad)], -2)
