"""Whether memory stays flat over many chained windows of meta-training."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from experiments.benchmarks.lpg import Settings as LPGSettings
from experiments.benchmarks.lpg import make_trainer
from experiments.benchmarks.measure import Result
from learned_rl.types import UserError

STATM = Path("/proc/self/statm")


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    lpg: LPGSettings = field(default_factory=lambda: LPGSettings(lifetimes=4, copies=8, steps=10))
    width: int = 16
    """units of the recurrent core"""
    every: int = 100
    """windows between two looks at the memory"""
    looks: int = 10
    """how often one looks; the first is what the others are compared with"""


DEFAULT = Settings()


def resident_bytes() -> int:
    """Resident memory of this process.

    Raises:
        UserError: the system has no /proc.
    """
    if not STATM.exists():
        raise UserError(f"The benchmark 'memory' reads {STATM}, which this system lacks: run it on Linux.")
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_tensors() -> int:
    """Tensors that Python still refers to, after a collection of garbage."""
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def measure(s: Settings = DEFAULT) -> list[Result]:
    """The largest amount seen at any look, over that at the first."""
    trainer, _ = make_trainer(s.lpg, s.width)
    tensors: list[float] = []
    resident: list[float] = []
    for _ in range(s.looks):
        for _ in range(s.every):
            trainer.step()
        tensors.append(live_tensors())
        resident.append(resident_bytes() / 2**20)
    windows, first = s.every * s.looks, f"the same after {s.every} windows"
    rows = []
    for name, unit, seen in (("live tensors", "tensors", tensors), ("resident memory", "MiB", resident)):
        note = ", ".join(f"{x:.6g}" for x in seen)
        what = f"{name}, largest over {windows} windows"
        rows.append(Result("memory", what, max(seen), unit, first, max(seen) / seen[0], "ratio <= 1.01", note))
    return rows
