"""What an agent's architecture is: it names the shapes of one agent's weights, and says what agents say.

Architectures are stateless; the weights of P agents come from `learned_rl.agents.Population`, a row for each.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import gymnasium
import torch
from gymnasium.spaces import Box, Discrete
from torch import Tensor, nn

from learned_rl.distributions import Categorical, ClippedGaussian, Distribution, SquashedGaussian
from learned_rl.layout import Layout
from learned_rl.types import UserError
from learned_rl.values import CategoricalValue

Weights = Mapping[str, Tensor]
#: How many numbers a head says, or of which shape.
HeadShape = int | tuple[int, ...]
Heads = Mapping[str, HeadShape]
CONDITION = "condition"  # the weight that holds the numbers which a network is told: the last of them


@dataclass(frozen=True)
class AgentOutput:
    """What an agent says about a batch of observations with leading axes `[...]`, usually [T, P, B] or [P, B].

    Attributes:
        policy: action distribution.
        value:  [...] V(obs), or None where the agent was asked for the policy alone or has no value head.
        bins:   [..., n] logits whose mean the value is, of agents whose value is categorical.
        heads:  name -> [..., *shape] of the extra heads.
        units:  layer -> [..., H] what its units said, of an agent that is watched.
        target: what the same agents say at the parameters of their target network, if the objective keeps one.
    """

    policy: Distribution
    value: Tensor | None = None
    heads: dict[str, Tensor] = field(default_factory=dict)
    units: dict[str, Tensor] = field(default_factory=dict)
    target: AgentOutput | None = None
    bins: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> AgentOutput:
        """The same output with `f` applied to each tensor (to slice rows, reshape or detach)."""
        value, bins = (None if x is None else f(x) for x in (self.value, self.bins))
        heads, units = ({k: f(v) for k, v in named.items()} for named in (self.heads, self.units))
        return AgentOutput(self.policy.map(f), value, heads, units, self.target and self.target.map(f), bins)

    def value_error(self, target: Tensor) -> Tensor:
        """[...] how far the value is from targets [...]: the squared error, or of a categorical value the cross-entropy
        in nats."""
        assert self.value is not None
        if self.bins is None:
            return (self.value - target).square()
        return CategoricalValue.of(self.bins).loss(self.bins, target)

    def beyond_bins(self, target: Tensor) -> dict[str, Tensor]:
        """What to log of a categorical value: [...] 1 where its bins do not hold the target [...], and it learns the
        outermost one instead; nothing of others."""
        if self.bins is None:
            return {}
        return {"beyond_bins": (~CategoricalValue.of(self.bins).holds(target)).to(target.dtype)}

    def detach(self) -> AgentOutput:
        """Values only; the caller says why."""
        return self.map(torch.Tensor.detach)  # stop: as asked


class PolicyHead:
    """How many numbers the policy needs, and the distribution that they parametrise; none at all for `space=None`."""

    def __init__(self, space: gymnasium.Space | None, gaussian: Literal["squashed", "clipped"] = "squashed") -> None:
        if space is None:
            self.size, self.continuous = 0, False
        elif isinstance(space, Discrete):
            self.size, self.continuous = int(space.n), False
        elif isinstance(space, Box) and len(space.shape) == 1:
            self.size, self.continuous = space.shape[0], True
            self.low, self.high = torch.as_tensor(space.low), torch.as_tensor(space.high)
            if gaussian == "squashed" and not bool(torch.isfinite(self.high - self.low).all()):
                raise UserError("A squashed Gaussian needs finite action bounds; this space has none: use 'clipped'.")
            self.kind = SquashedGaussian if gaussian == "squashed" else ClippedGaussian
        else:
            raise UserError(f"Action space {space} is not supported: expected Discrete or a one-dimensional Box.")

    def __call__(self, numbers: Tensor, log_std: Tensor | None) -> Distribution:
        if not self.continuous:
            return Categorical(numbers)
        assert log_std is not None
        low, high = (x.to(numbers) for x in (self.low, self.high))
        return self.kind(numbers, log_std.expand(numbers.shape), low, high)


class Agent(ABC):
    """An architecture without weights.

    Attributes:
        shapes: name -> shape of one agent's weights, in the order in which a row of theta holds them.
        policy: the policy head.
        heads:  name -> shape of the extra heads.
        value:  numbers of the value head: none, one, or the bins of a categorical value.
        conditions: names of the numbers of the update that the network is told; its weight "condition" holds them.
        obs_dim: number of axes of one observation, by which [P, B, ...] is told from [T, P, B, ...].
        watched: whether outputs tell what the units of its layers said, for update rules that ask.
        reads: fields of `AgentConfig` that say how large it is, and of what; arguments of the same names.
    """

    shapes: dict[str, tuple[int, ...]]
    reads: ClassVar[tuple[str, ...]] = ()
    conditions: tuple[str, ...] = ()
    watched: bool = False

    def __init__(self, policy: PolicyHead, heads: Heads, value: int, obs_dim: int) -> None:
        self.policy, self.value, self.obs_dim = policy, int(value), obs_dim
        self.heads = {name: (shape,) if isinstance(shape, int) else shape for name, shape in heads.items()}
        self.head_sizes = {name: math.prod(shape) for name, shape in self.heads.items()}

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers in order: a weight and its bias are one."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in self.shapes if name != CONDITION))

    @property
    def layout(self) -> Layout:
        """Of one agent's row of theta."""
        return Layout.of(self.shapes)

    @abstractmethod
    def initial(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh weights of one agent, float32."""

    @abstractmethod
    def forward(self, w: Weights, obs: Tensor, policy_only: bool) -> AgentOutput:
        """Outputs [P, n, ...] from weights [P, ...] and observations [P, n, ...]."""

    def _output(self, w: Weights, numbers: Tensor, value: Tensor | None, heads: dict[str, Tensor]) -> AgentOutput:
        """Of policy parameters [P, n, ...], the value's numbers [P, n, value], and heads: name -> [P, n, ...], in
        whichever shape."""
        log_std = w["log_std"][:, None] if self.policy.continuous else None
        shaped = {k: x.reshape(*numbers.shape[:2], *self.heads[k]) for k, x in heads.items()}
        policy = self.policy(numbers, log_std)
        if value is None or self.value == 1:
            return AgentOutput(policy, None if value is None else value.squeeze(-1), shaped)
        return AgentOutput(policy, CategoricalValue.of(value).mean(value), shaped, bins=value)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """[P, n, in] -> [P, n, out] with each agent's own weights."""
    return torch.baddbmm(w[f"{name}.bias"].unsqueeze(1), x, w[f"{name}.weight"])


def truncated_normal(weight: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill in place with a normal of that standard deviation, cut off at twice of it."""
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=generator)
