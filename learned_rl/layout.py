"""What a row of parameters is made of, and what an update rule may know of the step that it makes.

Most update rules treat every number of theta alike. A learned one may normalise within each tensor, ask how deep a
layer lies, whether a unit is dormant, how much of the lifetime is over, or draw noise. All of that reaches it here, as
constants, so that a rule stays a pure function wherever it runs: on rows of a population or on a torch module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One tensor of a row.

    Attributes:
        name:   of the tensor.
        shape:  of it.
        depth:  of its layer in its network, from 0 (the first) to 1 (the last).
        critic: whether only the value depends on it.
        layer:  under which name the activity of the units that it feeds is known; None: it feeds none.
        axis:   which of its axes counts those units.
    """

    name: str
    shape: tuple[int, ...]
    depth: float = 0.0
    critic: bool = False
    layer: str | None = None
    axis: int = -1


class Layout:
    """The tensors of which a row of `D` parameters is made, in order.

    Tensors are on the CPU until `to` moves a copy.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device | str = "cpu") -> None:
        self.parts, self.device = tuple(parts), torch.device(device)
        self.sizes = [math.prod(part.shape) for part in self.parts]

    @classmethod
    def of(cls, shapes: Mapping[str, Sequence[int]]) -> Layout:
        """Tensors of which nothing but the shape is known."""
        return cls([Part(name, tuple(shape)) for name, shape in shapes.items()])

    def __len__(self) -> int:
        return sum(self.sizes)

    def to(self, device: torch.device | str) -> Layout:
        """The same on another device; itself if it is there."""
        return self if torch.device(device) == self.device else Layout(self.parts, device)

    @cached_property
    def depth(self) -> Tensor:
        """[D] float32: from 0 in the first layer of a network to 1 in its last."""
        return self._repeated(torch.tensor([part.depth for part in self.parts]))

    @cached_property
    def critic(self) -> Tensor:
        """[D] bool: only the value depends on it."""
        return self._repeated(torch.tensor([part.critic for part in self.parts]))

    def _repeated(self, values: Tensor) -> Tensor:
        return values.repeat_interleave(torch.tensor(self.sizes)).to(self.device)

    def spread(self, activity: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """What is known of units, layer -> [P, H], for each parameter that feeds them: [P, D]; 1 where nothing is.

        Args:
            like: [P, D], whose precision and device the answer has.
        """
        pieces = []
        for part, size in zip(self.parts, self.sizes, strict=True):
            known = None if part.layer is None else activity.get(part.layer)
            if known is None:
                pieces.append(like.new_ones(len(like), size))
                continue
            axis = part.axis % len(part.shape)
            seen = known.to(like).reshape(len(like), *(n if i == axis else 1 for i, n in enumerate(part.shape)))
            pieces.append(seen.expand(len(like), *part.shape).reshape(len(like), size))
        return torch.cat(pieces, 1)


def dormancy(units: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How active each unit is beside the others of its layer, layer -> [P, H], from what they said, [P, n, H]:

        mean over the batch of |a| / mean over units of the same,    1 for a unit like any other, 0 for a dead one

    (Sokar et al., 2023, arXiv:2302.12902, eq. 1)."""
    found = {}
    for layer, said in units.items():
        strength = said.detach().abs().mean(1)  # stop: a look
        found[layer] = strength / (strength.mean(1, keepdim=True) + 1e-9)
    return found


@dataclass(frozen=True)
class StepContext:
    """What an update rule may know of a gradient step beside gradient, state and parameters; constants, all of it.

    Attributes:
        layout:   of the row; None: nothing is known of it.
        progress: [P], or one for all: the share of the lifetime that is over, from 0 in its first update to 1 in its
                  last.
        epoch:    the share of the passes over this update's data that is over, from 0 in the first to 1 in the last.
        activity: [P, D] how active the unit is that a parameter feeds (see `dormancy`); for rules that read it.
        noise:    [P, D] standard normal, fresh in every step; for rules that draw.
    """

    layout: Layout | None = None
    progress: Tensor | float = 0.0
    epoch: float = 0.0
    activity: Tensor | None = None
    noise: Tensor | None = None
