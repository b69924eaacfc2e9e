"""Processes over lifetimes: LPG's meta-training by two processes over that by one, with the same lifetimes in all.

Every process has one thread. One round runs each contender in fresh processes for as many meta-steps; what is counted
are agent updates, those of all lifetimes, and the time of the process that took longest.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from experiments.benchmarks.lpg import Settings as LPGSettings
from experiments.benchmarks.lpg import make_trainer
from experiments.benchmarks.measure import Result, Rounds, processes, seconds
from meta_optimizers.group import joined
from meta_optimizers.trainer import MetaTrainer

TARGET = ">= 1.8"


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    lpg: LPGSettings = field(default_factory=lambda: LPGSettings(lifetimes=16, warm_up=1))
    """of a meta-step; its lifetimes are those of all processes"""
    width: int = 256
    """units of the recurrent core"""
    meta_steps: int = 5
    """meta-steps of a contender in one round"""
    rounds: int = 3

    @property
    def updates(self) -> int:
        """Agent updates of all lifetimes in one round."""
        return self.meta_steps * self.lpg.window * self.lpg.lifetimes


DEFAULT = Settings()


def free_port() -> int:
    """A port of this machine at which processes can meet."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def work(s: Settings, rank: int, size: int, port: int) -> float:
    """Be one of the processes; returns how many seconds its meta-steps took, from the moment when all are ready."""
    here = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in here.items()})
    alone, objective = make_trainer(s.lpg, s.width)
    with joined() as group:
        trainer = MetaTrainer(alone.lifetimes.family, objective, alone.config, device=s.lpg.device, group=group)
        for _ in range(s.lpg.warm_up):
            trainer.step()
        group.agreed(True)
        return seconds(lambda: [trainer.step() for _ in range(s.meta_steps)], s.lpg.device)


def spent(s: Settings, size: int) -> float:
    """Seconds of one round with that many processes."""
    port = free_port()
    with processes(size) as pool:
        return max(job.result() for job in [pool.submit(work, s, rank, size, port) for rank in range(size)])


def measure(s: Settings = DEFAULT) -> list[Result]:
    """One row for each number of processes."""
    rounds = Rounds({"one": lambda: spent(s, 1), "two": lambda: spent(s, 2)}, s.rounds)
    one, two = (s.updates / rounds.median(name) for name in ("one", "two"))
    what, unit = f"LPG, width {s.width}, {s.lpg.lifetimes} lifetimes", "agent updates x lifetimes/s"
    return [
        Result("scaling", f"{what}, one process", one, unit, note=rounds.spread("one")),
        Result(
            "scaling",
            f"{what}, two processes",
            two,
            unit,
            "one process",
            rounds.ratio("one", "two"),
            TARGET,
            rounds.spread("two"),
        ),
    ]
