"""Action distributions over batches `[..., A]`: small, differentiable twice, and cheap to build at every step.

The trajectory stores what the distribution sampled; `to_env` turns that into what the environment takes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from learned_rl.streams import Streams, noise

WIDE = 32  # numbers of a row from which on torch's kernel for the last axis is the faster one
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def log_softmax(x: Tensor) -> Tensor:
    """log softmax over the last axis; ten times faster than torch's own where that axis is short (a few actions).

    torch's kernel for the last axis takes one row at a time; over the first axis it takes a vector of rows.
    """
    return _over_last(functional.log_softmax, x)


def softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis; see `log_softmax`."""
    return _over_last(functional.softmax, x)


def _over_last(f: Callable[[Tensor, int], Tensor], x: Tensor) -> Tensor:
    if x.shape[-1] < WIDE:
        return f(x.movedim(-1, 0).contiguous(), 0).movedim(0, -1)
    return rowwise(lambda rows: f(rows, -1), x)


def rowwise(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """f of the rows of x [..., n], taken in the order in which they lie in memory: so nothing is copied.

    What P agents say of T steps lies with P first, and is seen with T first. Wide rows are worth the trouble.

    Args:
        f: makes [..., *any] of rows [..., n], each row by itself.
    """
    lead, strides = x.dim() - 1, x.stride()
    order = sorted(range(lead), key=lambda i: -strides[i])
    said = f(x.permute([*order, lead]))
    return said.permute([*(order.index(i) for i in range(lead)), *range(lead, said.dim())])


class Distribution(ABC):
    """A policy's distribution at every state of a batch `[...]`."""

    @property
    @abstractmethod
    def params(self) -> tuple[Tensor, ...]:
        """The tensors that parametrise it, each with the batch's axes first."""

    @abstractmethod
    def like(self, *params: Tensor) -> Self:
        """The same kind of distribution with other parameter tensors."""

    def map(self, f: Callable[[Tensor], Tensor]) -> Self:
        """The same distribution with `f` applied to each parameter tensor (to slice, to detach)."""
        return self.like(*map(f, self.params))

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None, streams: Streams | None = None) -> Tensor:
        """One action per state; no gradient.

        Args:
            streams: which stream each row of a batch `[P, ...]` draws from; None: its own.
        """

    @abstractmethod
    def log_prob(self, action: Tensor) -> Tensor:
        """[...] in nats."""

    @abstractmethod
    def entropy(self) -> Tensor:
        """[...] in nats."""

    @abstractmethod
    def kl(self, other: Distribution) -> Tensor:
        """[...] KL(self || other) in nats; the other distribution is of the same kind."""

    @abstractmethod
    def mode(self) -> Tensor:
        """The most likely action, for greedy evaluation."""

    def to_env(self, action: Tensor) -> Tensor:
        """What the environment takes for this action."""
        return action


def stack(policies: Sequence[Distribution]) -> Distribution:
    """The policies of T steps as one, with a leading time axis."""
    return policies[0].like(*map(torch.stack, zip(*(p.params for p in policies), strict=True)))


class Categorical(Distribution):
    """Discrete actions; `logits [..., A]`."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    @property
    def params(self) -> tuple[Tensor, ...]:
        return (self.logits,)

    def like(self, *params: Tensor) -> Self:
        return type(self)(*params)

    @cached_property
    def log_probs(self) -> Tensor:
        return log_softmax(self.logits)

    def sample(self, generator: torch.Generator | None = None, streams: Streams | None = None) -> Tensor:
        # An exponential race: argmin of E_a / p_a is distributed as p. It needs no normalisation, and a logit that is
        # not a number yields some action instead of an error, so that one broken lifetime does not stop the others.
        race = noise(torch.Tensor.exponential_, self.logits, generator, streams)
        return (self.logits.detach() - race.log_()).argmax(-1)  # stop: actions are data

    def log_prob(self, action: Tensor) -> Tensor:
        return self.log_probs.gather(-1, action.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        return -(self.log_probs.exp() * self.log_probs).sum(-1)

    def kl(self, other: Distribution) -> Tensor:
        assert isinstance(other, Categorical)
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(-1)

    def mode(self) -> Tensor:
        return self.logits.argmax(-1)


class ClippedGaussian(Distribution):
    """Continuous actions from a diagonal Gaussian, clipped to the bounds only on the way to the environment.

    Args:
        mean, log_std: [..., A].
        low, high:     [A] bounds of the action space.
    """

    def __init__(self, mean: Tensor, log_std: Tensor, low: Tensor, high: Tensor) -> None:
        self.mean, self.log_std, self.low, self.high = mean, log_std, low, high

    @property
    def params(self) -> tuple[Tensor, ...]:
        return self.mean, self.log_std

    def like(self, *params: Tensor) -> Self:
        mean, log_std = params
        return type(self)(mean, log_std, self.low, self.high)

    def sample(self, generator: torch.Generator | None = None, streams: Streams | None = None) -> Tensor:
        mean = self.mean.detach()  # stop: actions are data
        z = noise(torch.Tensor.normal_, mean, generator, streams)
        return mean + self.log_std.detach().exp() * z  # stop: actions are data

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) * (-self.log_std).exp()
        return (-0.5 * z * z - self.log_std - _HALF_LOG_2PI).sum(-1)

    def entropy(self) -> Tensor:
        return (self.log_std + 0.5 + _HALF_LOG_2PI).sum(-1)

    def kl(self, other: Distribution) -> Tensor:
        assert isinstance(other, ClippedGaussian)
        ratio = (2 * (self.log_std - other.log_std)).exp()
        shift = (self.mean - other.mean) * (-other.log_std).exp()
        return (0.5 * (ratio + shift * shift - 1) - self.log_std + other.log_std).sum(-1)

    def mode(self) -> Tensor:
        return self.mean

    def to_env(self, action: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(action, self.high), self.low)


class SquashedGaussian(ClippedGaussian):
    """A diagonal Gaussian squashed into the bounds by tanh (Haarnoja et al., 2018, arXiv:1801.01290, appendix C).

    The stored action is the Gaussian sample u; the environment takes `low + (tanh(u) + 1) / 2 * (high - low)`. The
    squashing is the same bijection for every policy, so KL and ratios are those of the Gaussian.
    """

    def _log_jacobian(self, u: Tensor) -> Tensor:
        # log(1 - tanh(u)^2) written so that it does not cancel for large |u|.
        return 2 * (math.log(2.0) - u - functional.softplus(-2 * u)) + ((self.high - self.low) / 2).log()

    def log_prob(self, action: Tensor) -> Tensor:
        return super().log_prob(action) - self._log_jacobian(action).sum(-1)

    def entropy(self) -> Tensor:
        # The Jacobian's mean has no closed form; Gauss-Hermite quadrature has no noise, and an
        # error of 1e-7 nats at a standard deviation of 0.6, 1e-5 at 1, and 1e-2 at 2.7.
        nodes, weights = (self.mean.new_tensor(a) for a in np.polynomial.hermite_e.hermegauss(16))
        u = self.mean.unsqueeze(-1) + self.log_std.exp().unsqueeze(-1) * nodes
        jacobian = 2 * (math.log(2.0) - u - functional.softplus(-2 * u)) @ (weights / weights.sum())
        return super().entropy() + (jacobian + ((self.high - self.low) / 2).log()).sum(-1)

    def to_env(self, action: Tensor) -> Tensor:
        return self.low + (action.tanh() + 1) / 2 * (self.high - self.low)
