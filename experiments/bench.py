"""Benchmarks by group: each runs in a fresh process with one intra-op thread, prints a table and goes into one file.

The file is JSON: group -> {"machine": ..., "results": [...]}; running a group again replaces its entry alone.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from experiments.benchmarks import (
    DEFAULT_OUT,
    disco,
    estimators,
    gpu,
    grid,
    learning,
    lpg,
    memory,
    optimizers,
    ppo,
    scaling,
    self_tuning,
    threads,
    tuning,
)
from experiments.benchmarks.measure import Result, fresh
from experiments.runs import git_revision, plain, read_json, versions
from learned_rl.files import replacing
from learned_rl.tasks.base import unknown
from learned_rl.types import UserError

THREADS = 1


@dataclass(frozen=True)
class Group:
    """Benchmarks that run together.

    Attributes:
        measure: returns the rows; takes the folder to write in where `files` is true.
        about:   what is measured, in a few words.
        default: whether it runs when no group is named.
        files:   whether it writes files of its own beside the report.
    """

    measure: Callable[..., list[Result]]
    about: str
    default: bool = True
    files: bool = False


GROUPS: dict[str, Group] = {
    "lpg": Group(lpg.measure, "meta-steps of LPG on grid/small, one process, one thread"),
    "threads": Group(threads.measure, "one against two intra-op threads, idle and under load"),
    "grid": Group(grid.measure, "grid-world stepping without a policy"),
    "ppo": Group(ppo.measure, "PPO on CartPole beside other implementations, many seeds at once, DPO's cost"),
    "memory": Group(memory.measure, "memory over many chained windows"),
    "tuning": Group(tuning.measure, "workers that share a study"),
    "estimators": Group(estimators.measure, "long windows: the rematerialised meta-gradient beside the plain unroll"),
    "self-tuning": Group(self_tuning.measure, "numbers learned online beside the same algorithm without"),
    "optimizers": Group(optimizers.measure, "a step of learned optimizers beside torch's Adam"),
    "disco": Group(disco.measure, "learner steps and meta-steps of Disco103"),
    "scaling": Group(scaling.measure, "meta-training by two processes over that by one"),
    "gpu": Group(gpu.measure, "lpg, grid and disco on a CUDA device"),
    "learning": Group(
        learning.measure, "learning curves beside Stable-Baselines3 (minutes)", default=False, files=True
    ),
}


def run(groups: Sequence[str] = (), out: Path = DEFAULT_OUT, console: Console | None = None) -> list[Result]:
    """Run the named groups (none: the default ones), print their tables, and record them in `out`.

    Raises:
        UserError: an unknown group, or a file that cannot be read or written.
    """
    for name in groups:
        if name not in GROUPS:
            raise unknown("benchmark group", name, GROUPS)
    console = console or Console()
    report = _previous(out)
    results: list[Result] = []
    for name in dict.fromkeys(groups) or [name for name, group in GROUPS.items() if group.default]:
        group, host = GROUPS[name], machine()
        console.print(f"{name}: {group.about} (load average {host['load_average']})", highlight=False, soft_wrap=True)
        rows = fresh(THREADS, group.measure, *([out.parent] if group.files else []))
        console.print(table(name, rows))
        results += rows
        report[name] = {"machine": host, "results": plain(rows)}
        with replacing(out) as file:
            file.write((json.dumps(report, indent=2) + "\n").encode())
    return results


def _previous(out: Path) -> dict[str, Any]:
    """What `out` holds already."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write {out}: {error.strerror or error}.") from error
    if not out.exists():
        return {}
    report = read_json(out)
    if not isinstance(report, dict):
        raise UserError(f"{out} holds no benchmark report: choose another --out.")
    return report


def machine() -> dict[str, Any]:
    """What measured numbers depend on, at this moment."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": THREADS,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(x, 2) for x in os.getloadavg()],
        "versions": versions(),
        "git": git_revision(),
    }


def table(name: str, rows: Sequence[Result]) -> Table:
    """The rows of one group, to print."""
    columns = Table(title=name)
    for heading in ("what", "value", "unit", "compared with", "ratio", "target", "note"):
        columns.add_column(heading, justify="right" if heading in ("value", "ratio") else "left", overflow="fold")
    for r in rows:
        columns.add_row(r.name, number(r.value), r.unit, r.peer, number(r.ratio), r.target, r.note)
    return columns


def number(x: float | None) -> str:
    """Three or more digits that mean something; nothing for None."""
    if x is None:
        return ""
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
