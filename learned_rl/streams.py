"""Which random stream each lifetime draws from: its own, one that it shares, or its place among other processes'.

Tasks, initial agents and horizons come from a seed that names the stream. Everything that is drawn while lifetimes go
on (actions, what happens in environments) comes from one generator: a draw is made for all streams, and each lifetime
takes the row of its own. So lifetimes on one stream share their luck, as the antithetic members of an evolution
strategy should (common random numbers), and a process that holds some of the lifetimes draws for them what a single
process would have drawn. The price is that every process draws for all streams.

What is drawn is the same to the last bit. What is computed from it is too where torch treats every row alike; kernels
that choose by the number of rows (convolutions above all) may round differently in a process that holds fewer of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from learned_rl.types import Tree, UserError


class Streams:
    """The streams of P lifetimes, or of N environment copies, among `total`.

    `Streams(torch.tensor([0, 0, 1, 1]), 2)` are two pairs, `Streams(torch.arange(4, 8), 8)` the second of two processes
    with four lifetimes each.

    Args:
        index: [P] int64, which stream each lifetime draws from; the same one may occur many times.
        total: how many streams there are, over all processes.

    Attributes:
        whole: the index is 0, 1, ..., total - 1, so that a draw needs no rows taken.

    Raises:
        UserError: a stream that does not exist.
    """

    def __init__(self, index: Tensor, total: int) -> None:
        outside = index[(index < 0) | (index >= total)]
        if len(outside):
            raise UserError(f"a lifetime draws from stream {int(outside[0])}: expected 0 to {total - 1}.")
        self.index, self.total = index, total
        self.whole = torch.equal(index, torch.arange(total, device=index.device))

    @classmethod
    def apart(cls, lifetimes: int) -> Self:
        """A stream for each lifetime, all of them in this process."""
        return cls(torch.arange(lifetimes), lifetimes)

    @classmethod
    def of(cls, streams: Streams | None, lifetimes: int) -> Streams:
        """The given streams, or else one for each of P lifetimes.

        Raises:
            UserError: streams of another number of lifetimes.
        """
        if streams is not None and len(streams) != lifetimes:
            raise UserError(f"{len(streams)} streams were given for {lifetimes} lifetimes: expected one for each.")
        return streams if streams is not None else cls.apart(lifetimes)

    def __len__(self) -> int:
        return len(self.index)

    def copies(self, copies: int) -> Streams:
        """The streams of N = P * B environment copies, lifetime-major: each lifetime's copies have B of their own."""
        rows = self.index[:, None] * copies + torch.arange(copies, device=self.index.device)
        return Streams(rows.flatten(), self.total * copies)

    def to(self, device: torch.device | str) -> Streams:
        return Streams(self.index.to(device), self.total)

    # --- draws -------------------------------------------------------------------------------------------------

    def uniform(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Uniform numbers in [0, 1) of a shape that begins with P (or N, for the streams of copies)."""
        return self._own(torch.rand(self._full(shape), generator=generator, device=generator.device))

    def normal(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Standard normal numbers of such a shape."""
        return self._own(torch.randn(self._full(shape), generator=generator, device=generator.device))

    def integers(self, high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Integers from 0 to high - 1, evenly, of such a shape."""
        return self._own(torch.randint(high, self._full(shape), generator=generator, device=generator.device))

    def _full(self, shape: Sequence[int]) -> tuple[int, ...]:
        return tuple(shape) if self.whole else (self.total, *shape[1:])

    def _own(self, drawn: Tensor) -> Tensor:
        return drawn if self.whole else drawn.index_select(0, self.index)


def noise(
    fill: Callable[..., Tensor], like: Tensor, generator: torch.Generator | None, streams: Streams | None
) -> Tensor:
    """Noise of the shape and precision of `like [P, ...]`, each row from its lifetime's stream.

    Args:
        fill:    draws in place, such as `torch.Tensor.normal_`.
        streams: None: a stream for each row.
    """
    if streams is None or streams.whole:
        return fill(torch.empty_like(like), generator=generator)
    full = like.new_empty(streams.total, *like.shape[1:])
    return fill(full, generator=generator).index_select(0, streams.index)


# --- states of several processes -----------------------------------------------------------------------------------


def _axis(name: str, value: Tensor) -> int | None:
    """Along which axis the lifetimes of an entry lie; None: it is shared (`Lifetimes.state_dict` states the rule)."""
    *above, last = name.split("/")
    if value.dim() == 0 or last.endswith("generator"):
        return None
    return 1 if last == "running" and not {"env", "memory"} & set(above) else 0


def join(states: Sequence[Tree]) -> Tree:
    """The state of all lifetimes from those of several processes, in the order of their rows.

    It is what `Lifetimes.state_dict` of a single process would hold, and so can be taken apart in another way (`part`).

    Raises:
        UserError: states that were not saved at the same moment of one run: their names or generators differ.
    """
    first, joined = states[0], {}
    for other in states[1:]:
        if differing := first.keys() ^ other.keys():
            raise UserError(f"the entry {min(differing)!r} is in some of the states only: expected states of one run.")
    for name, value in first.items():
        axis, values = _axis(name, value), [state[name] for state in states]
        if axis is None and not all(torch.equal(value, v) for v in values):
            raise UserError(f"the shared entry {name!r} differs: expected states saved after the same update.")
        joined[name] = value.clone() if axis is None else torch.cat(values, axis)
    return joined


def part(state: Tree, first: int, count: int, total: int) -> Tree:
    """The state of the lifetimes `first` to `first + count - 1` of the `total` that `state` holds.

    Raises:
        UserError: lifetimes that are not there, or a state of another number of them.
    """
    if not 0 <= first < first + count <= total:
        raise UserError(f"lifetimes {first} to {first + count - 1} were asked for: expected some of 0 to {total - 1}.")
    taken = {}
    for name, value in state.items():
        axis = _axis(name, value)
        if axis is not None:
            copies, rest = divmod(value.shape[axis], total)
            if rest:
                raise UserError(f"{name!r} has {value.shape[axis]} rows: expected a multiple of {total} lifetimes.")
            value = value.narrow(axis, first * copies, count * copies)
        taken[name] = value.clone()
    return taken
