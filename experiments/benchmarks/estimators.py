"""Long windows: memory and time of the rematerialised meta-gradient beside the plain unroll's, at the shape of `lpg`.

Each is one meta-step in a process of its own, after a short window has warmed everything up. Memory is what the process
holds at its peak beyond what it held before, from the kernel's count of resident pages.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from experiments.benchmarks.lpg import Settings as LPGSettings
from experiments.benchmarks.lpg import make_trainer
from experiments.benchmarks.measure import Result, fresh, seconds
from experiments.benchmarks.memory import resident_bytes
from learned_rl.types import UserError
from meta_optimizers.estimators import estimator_config, make_estimator

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
THREADS = 1


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    lpg: LPGSettings = field(default_factory=LPGSettings)
    width: int = 256
    """units of the recurrent core"""
    window: int = 100
    """K of the comparison"""
    longest: int = 1000
    """K that only the rematerialised gradient is run with"""
    rounds: int = 2
    """meta-steps of each, taking turns; each in a fresh process"""


DEFAULT = Settings()


def peak_bytes() -> int:
    """The most memory that this process held since `CLEAR` was written to.

    Raises:
        UserError: the system has no /proc.
    """
    if not STATUS.exists():
        raise UserError(f"The benchmark 'estimators' reads {STATUS}, which this system lacks: run it on Linux.")
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def one_step(s: Settings, name: str, window: int) -> tuple[float, int]:
    """Seconds of one meta-step, and the bytes that it held at its peak beyond those held before."""
    trainer, _ = make_trainer(s.lpg, s.width)
    trainer.estimator = make_estimator(replace(estimator_config(name), window=2))  # type: ignore[call-arg]
    trainer.step()
    trainer.estimator = make_estimator(replace(estimator_config(name), window=window))  # type: ignore[call-arg]
    gc.collect()
    before = resident_bytes()
    CLEAR.write_text("5")  # the peak begins anew
    time = seconds(trainer.step, s.lpg.device)
    return time, peak_bytes() - before


def measure(s: Settings = DEFAULT) -> list[Result]:
    """The two gradients at one window, and the longest window."""
    contenders = ("truncated", "rematerialised")
    runs = [[fresh(THREADS, one_step, s, name, s.window) for name in contenders] for _ in range(s.rounds)]
    time, memory = (torch.tensor([[float(each[i]) for each in pair] for pair in runs]) for i in (0, 1))
    at = f"K = {s.window}, width {s.width}"
    rows = []
    for name, unit, seen, scale, target in (
        ("peak memory", "MiB", memory, 2**20, "ratio <= 0.1"),
        ("time of a meta-step", "s", time, 1, "ratio <= 1.5"),
    ):
        plain, again = (seen.median(0).values / scale).tolist()
        ratio = float((seen[:, 1] / seen[:, 0]).median())
        note = f"plain unroll {plain:.4g}; {s.rounds} rounds"
        rows.append(
            Result("estimators", f"{name}, rematerialised, {at}", again, unit, "plain unroll", ratio, target, note)
        )
    took, held = fresh(THREADS, one_step, s, "rematerialised", s.longest)
    note = f"{held / 2**20:.4g} MiB at the peak"
    rows.append(
        Result("estimators", f"one meta-step, rematerialised, K = {s.longest}, width {s.width}", took, "s", note=note)
    )
    return rows
