"""How every benchmark measures: a monotonic clock, warm-up, rounds in which the contenders take turns, medians.

Taking turns (A B C, A B C, ...) lets a drift of the machine's speed fall on all contenders alike, and a ratio is the
median of the ratios within a round.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
import torch

A = ParamSpec("A")
R = TypeVar("R")


@dataclass(frozen=True)
class Result:
    """One row of a benchmark.

    Attributes:
        group:  of benchmarks.
        name:   what was measured.
        value:  median over the rounds; None where nothing could be measured, and `note` says why.
        unit:   of the value.
        peer:   what it is compared with.
        ratio:  the value over the peer's, the median over the rounds of the ratio within a round.
        target: what the project wants of the value or the ratio.
        note:   how it was measured, or how far the rounds are apart.
    """

    group: str
    name: str
    value: float | None
    unit: str
    peer: str = ""
    ratio: float | None = None
    target: str = ""
    note: str = ""


def seconds(work: Callable[[], object], device: torch.device | str = "cpu") -> float:
    """Wall time of one call, until the device has finished too."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


class Rounds:
    """Seconds of several contenders that took turns.

    Args:
        contenders: name -> one timed run, returning its seconds.
        repeats:    rounds, at least 3 for a median that one disturbance cannot move.
    """

    def __init__(self, contenders: Mapping[str, Callable[[], float]], repeats: int) -> None:
        if repeats < 3:
            raise ValueError(f"repeats is {repeats}: expected at least 3")
        table = [[run() for run in contenders.values()] for _ in range(repeats)]
        self.seconds = dict(zip(contenders, np.array(table).T, strict=True))

    def median(self, name: str) -> float:
        """Median seconds of one contender."""
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, peer: str) -> float:
        """Median over the rounds of the time of `name` over the time of `peer`."""
        return float(np.median(self.seconds[name] / self.seconds[peer]))

    def spread(self, name: str) -> str:
        """How many rounds, and how far apart the slowest and the fastest were."""
        s = self.seconds[name]
        return f"{len(s)} rounds, max/min {s.max() / s.min():.2f}"


def set_threads(threads: int) -> None:
    """Intra-op threads of this process (a name that a fresh process can look up)."""
    torch.set_num_threads(threads)


def processes(number: int, threads: int = 1) -> ProcessPoolExecutor:
    """A pool of fresh interpreters with that many intra-op threads each; nothing is inherited from this process."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(number, mp_context=context, initializer=set_threads, initargs=(threads,))


def fresh(threads: int, function: Callable[A, R], *args: A.args, **kwargs: A.kwargs) -> R:
    """The result of a function of a module, called in a fresh process with that many intra-op threads."""
    with processes(1, threads) as pool:
        return pool.submit(function, *args, **kwargs).result()


@contextmanager
def busy_process() -> Iterator[None]:
    """One other process that keeps one core busy meanwhile."""
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        loop.kill()
        loop.wait()
