"""Values as categorical distributions over bins, in a space where large returns are squeezed, and running normalisers.

A value is said as logits over bins at -S, ..., S (`CategoricalValue`), learned by cross-entropy towards the two bins
next to its target (Bellemare et al., 2017, arXiv:1707.06887; the two-hot form of Schrittwieser et al., 2020,
arXiv:1911.08265, appendix F). Bins lie in the space of the signed hyperbolic transform h (Pohlen et al., 2018,
arXiv:1805.11593, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional

from learned_rl.distributions import log_softmax, rowwise
from learned_rl.types import Tree

EPS = 1e-3  # slope of the transform far from zero


def signed_hyperbolic(x: Tensor) -> Tensor:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + 1e-3 x; written so that nothing cancels near zero."""
    return x / ((x.abs() + 1).sqrt() + 1) + EPS * x


def signed_parabolic(x: Tensor) -> Tensor:
    """The inverse of h: sign(x) (z^2 - 1) with z = (sqrt(1 + 4e (|x| + 1 + e)) - 1) / 2e and e = 1e-3.

    Written with z - 1, so that float32 loses nothing: as it stands, numbers of 500 cancel, and small values are off by
    up to 1e-4.
    """
    size = x.abs()
    beyond = 2 / ((1 + 4 * EPS * (size + 1 + EPS)).sqrt() + 1 + 2 * EPS)  # z - 1 = beyond |x|
    return beyond * x * (beyond * size + 2)


@dataclass(frozen=True)
class CategoricalValue:
    """Values as logits over bins that are one apart, from -support to support."""

    support: int = 300

    @classmethod
    def of(cls, logits: Tensor) -> Self:
        """The one whose bins these logits [..., bins] are of."""
        return cls(logits.shape[-1] // 2)

    @property
    def bins(self) -> int:
        return 2 * self.support + 1

    def mean(self, logits: Tensor) -> Tensor:
        """[...] the value of logits [..., bins]: h^-1 of the mean over bins."""
        bins = torch.arange(-self.support, self.support + 1, device=logits.device, dtype=logits.dtype)
        return signed_parabolic(rowwise(lambda rows: functional.softmax(rows, -1) @ bins, logits))

    def two_hot(self, x: Tensor) -> Tensor:
        """[..., bins] the two bins next to h(x), weighted by their nearness; of values [...]."""
        index, weights = self._neighbours(x)
        return torch.zeros(*x.shape, self.bins, dtype=x.dtype, device=x.device).scatter_add(-1, index, weights)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """[...] cross-entropy of logits [..., bins] with values [...], in nats."""
        index, weights = self._neighbours(target)
        return -(log_softmax(logits).gather(-1, index) * weights).sum(-1)

    def holds(self, x: Tensor) -> Tensor:
        """[...] bool, whether values [...] lie between the outermost bins; others are taken for those bins' values."""
        return signed_hyperbolic(x).abs() <= self.support

    def _neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[..., 2] the bins below and above h(x), and their weights."""
        where = signed_hyperbolic(x).clamp(-self.support, self.support)
        low, high = where.detach().floor(), where.detach().ceil()  # stop: steps have no slope
        share = (high - where) / (high - low + 1e-5)  # of the lower one; 0 where both are the same
        index = torch.stack([low, high], -1).nan_to_num(0).long()  # what is not a number has some bins of weight NaN
        return index + self.support, torch.stack([share, 1 - share], -1)


class RunningMoments:
    """Mean and scale of what is seen through a lifetime: exponential averages with their bias taken out.

    State of P lifetimes: `first`, `second` and `decay` [P, 1], the power of the decay by which the averages are short.
    """

    def __init__(self, decay: float = 0.99, eps: float = 1e-6) -> None:
        self.decay, self.eps = decay, eps

    def initial(self, lifetimes: int) -> Tree:
        zeros = torch.zeros(lifetimes, 1)
        return {"first": zeros, "second": zeros.clone(), "decay": torch.ones(lifetimes, 1)}

    def update(self, state: Tree, x: Tensor) -> Tree:
        """The state after x [T, P, B]."""
        seen = {"first": x.mean((0, 2)), "second": x.square().mean((0, 2))}
        averaged = {k: self.decay * state[k] + (1 - self.decay) * v.unsqueeze(-1) for k, v in seen.items()}
        return averaged | {"decay": self.decay * state["decay"]}

    def mean_scale(self, state: Tree) -> tuple[Tensor, Tensor]:
        """[P, 1] mean, and standard deviation with eps added."""
        mean, second = (state[k] / (1 - state["decay"]) for k in ("first", "second"))
        variance = (second - mean.square()).clamp(min=0)
        return mean, (variance + 1e-12).sqrt() + self.eps
