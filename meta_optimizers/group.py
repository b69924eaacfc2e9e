"""The processes over which lifetimes are spread: one, unless `torchrun` started more.

Every process holds a share of the lifetimes and a copy of the meta-parameters. What must agree is exchanged here and
nowhere else: gradients are summed, numbers of single lifetimes gathered, decisions are those of the first process. All
of it goes through main memory (gloo): a step exchanges no more than one gradient, and processes may share a GPU.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from learned_rl.types import Tree, UserError

R = TypeVar("R")
PATIENCE = timedelta(minutes=30)  # for a process that validates or writes while the others wait
FAREWELL = timedelta(seconds=10)  # for a process that ends later than the others


class Group:
    """One process; `Processes` is more."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes, prints and decides."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x over all processes, on each of them."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[P, ...] of this process -> [all lifetimes, ...], in order, on each process."""
        return x

    def own(self, x: Tensor) -> Tensor:
        """The rows of this process from [all lifetimes, ...].

        Raises:
            UserError: they cannot be spread evenly.
        """
        if len(x) % self.size:
            nearest = max(round(len(x) / self.size), 1) * self.size
            raise UserError(
                f"{len(x)} lifetimes on {self.size} processes: expected a multiple of {self.size}, such as {nearest}."
            )
        return x.chunk(self.size)[self.rank]

    def agreed(self, decision: bool) -> bool:
        """What the first process decides."""
        return decision

    def collected(self, state: Tree) -> list[Tree]:
        """The states of all processes, in order, on the first one; empty elsewhere."""
        return [state]

    def told(self, make: Callable[[], R]) -> R:
        """What `make` returns in the first process, where alone it runs; its `UserError` ends all of them."""
        return make()

    def together(self, make: Callable[[], R]) -> R:
        """What `make` returns in each process; where one raises a `UserError`, all end, and the first one says why."""
        return make()

    def launcher(self) -> list[str]:
        """The words before a command that start as many processes again."""
        return []

    def device(self, name: str) -> str:
        """The device of that name for this process: each takes a GPU in turn, if none is named by its number."""
        return name


class Processes(Group):
    """What `torchrun` started. Ctrl-C and SIGTERM are noted, not obeyed: `torchrun` passes them on to every process, at
    moments of its own, and a process that ends alone breaks the others.

    Raises:
        UserError: the processes do not find each other; in every exchange: one of them is lost.
    """

    def __init__(self) -> None:
        import torch.distributed.nn  # noqa: F401  before there is a group: see `leave`

        self._asked = self._lost = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)
        try:
            self._store, self.rank, self.size = next(dist.rendezvous("env://", timeout=PATIENCE))
            dist.init_process_group("gloo", timeout=PATIENCE, store=self._store, rank=self.rank, world_size=self.size)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"The processes did not find each other ({_reason(error)}).") from error

    def leave(self) -> None:
        """End the group; the first process, which may keep the store for the others, goes last.

        It waits for nobody once one of them is lost, and for no longer than `FAREWELL` otherwise.

        The threads of gloo end with the last reference to the group. One that still frees a tensor when the interpreter
        ends aborts the process, so nothing may keep the group: the functions of `torch.distributed.nn` would, whose
        defaults are the group that there is when they are first imported (by `torch.compile`'s parts, among others).
        """
        dist.destroy_process_group()
        with suppress(RuntimeError):  # the store, or a process, is gone already
            self._store.set(f"left/{self.rank}", "")
            if self.first and not self._lost:
                self._store.wait([f"left/{rank}" for rank in range(self.size)], FAREWELL)
        del self._store

    def _note(self, *_: object) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether a signal asked this process to end."""
        return self._asked

    def sum(self, x: Tensor) -> Tensor:
        total = x.detach().to("cpu", copy=True)  # stop: what is exchanged are values
        self._exchange(lambda: dist.all_reduce(total))
        return total.to(x.device)

    def gather(self, x: Tensor) -> Tensor:
        own = x.detach().cpu().contiguous()  # stop: same
        rows = [torch.empty_like(own) for _ in range(self.size)]
        self._exchange(lambda: dist.all_gather(rows, own))
        return torch.cat(rows).to(x.device)

    def agreed(self, decision: bool) -> bool:
        said = torch.tensor(decision)
        self._exchange(lambda: dist.broadcast(said, 0))
        return bool(said)

    def collected(self, state: Tree) -> list[Tree]:
        states: list[Any] | None = [None] * self.size if self.first else None
        own = {k: v.cpu() for k, v in state.items()}
        self._exchange(lambda: dist.gather_object(own, states))
        return states or []

    def told(self, make: Callable[[], R]) -> R:
        answer: list[Any] = [None, None]
        if self.first:
            answer[:] = _attempt(make)
        self._exchange(lambda: dist.broadcast_object_list(answer))
        self._end(answer[1:])
        return answer[0]

    def together(self, make: Callable[[], R]) -> R:
        made, mistake = _attempt(make)
        mistakes: list[Any] = [None] * self.size
        self._exchange(lambda: dist.all_gather_object(mistakes, mistake))
        self._end(mistakes)
        return made  # type: ignore[return-value]

    def launcher(self) -> list[str]:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.size))
        machines = [f"--nnodes={self.size // local}"] if local < self.size else []
        return ["torchrun", *machines, f"--nproc-per-node={local}", "--no-python"]

    def device(self, name: str) -> str:
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}" if name == "cuda" else name

    def _end(self, mistakes: list[str | None]) -> None:
        for mistake in mistakes:
            if mistake is not None:
                raise UserError(mistake) if self.first else SystemExit(2)

    def _exchange(self, talk: Callable[[], object]) -> None:
        try:
            talk()
        except RuntimeError as error:
            self._lost = True
            raise UserError(
                f"Process {self.rank} of {self.size} lost another one ({_reason(error)}): the same command with "
                "--resume goes on from the last checkpoint."
            ) from error


def _attempt(make: Callable[[], R]) -> tuple[R | None, str | None]:
    """What it returns, or its mistake in words."""
    try:
        return make(), None
    except UserError as error:
        return None, str(error)


def _reason(error: Exception) -> str:
    """The first line, without where in the library's source it comes from, and without a stop at its end."""
    return re.sub(r"^\[\S+:\d+\] ", "", (str(error).strip() or type(error).__name__).splitlines()[0]).rstrip(". ")


def started() -> int:
    """How many processes `torchrun` started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def joined() -> Iterator[Group]:
    """The group that `torchrun` made this process part of; a group of one otherwise.

    Raises:
        UserError: the processes do not find each other.
    """
    if started() < 2:
        yield Group()
        return
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        group = Processes()
        try:
            yield group
        finally:
            group.leave()
    finally:
        for number, handler in before:
            signal.signal(number, handler)
