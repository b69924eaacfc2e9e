"""Axis letters, units and small shared types.

Axes, in the order in which they appear in a shape:

| letter | axis |
|---|---|
| `T` | time: environment steps of one rollout |
| `P` | lifetimes (agents) that learn side by side |
| `B` | parallel copies of the environment inside one lifetime |
| `N` | environment copies altogether, `N = P * B`, lifetime-major: copy `i` belongs to lifetime `i // B` |
| `D` | parameters of one agent |
| `S`, `A` | states and actions of a tabular task |
| `K` | agent updates in one window of the outer loop |

Symbols: `theta` are agent parameters, `eta` meta-parameters (the parameters of a component).
Units: counts of experience are *environment steps*, summed over copies; entropies and divergences are in nats.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

#: A batch of `n` tasks: every tensor has the leading axis `n`.
Tasks = dict[str, Tensor]

#: State that is carried, detached, saved: a flat tree of tensors.
Tree = dict[str, Tensor]


class UserError(Exception):
    """A mistake in what the user asked for. The command line prints its one sentence and exits with code 2."""


def at_least(minimum: float, **values: float | None) -> None:
    """Checks settings by name; None is one that was left out.

    Raises:
        UserError: a value below `minimum`, or not a number.
    """
    for name, value in values.items():
        if value is not None and not value >= minimum:
            raise UserError(f"{name} is {value}: expected at least {minimum}.")


def stream_seed(*names: object) -> int:
    """A seed of its own for whatever the names identify; other names, unrelated seeds."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, names)).encode()).digest()[:7], "little")


def stream(*names: object) -> torch.Generator:
    """A CPU generator of its own for whatever the names identify."""
    return torch.Generator().manual_seed(stream_seed(*names))
