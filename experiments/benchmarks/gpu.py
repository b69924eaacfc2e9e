"""The groups `lpg`, `grid` and `disco` on the first CUDA device."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from experiments.benchmarks import disco, grid, lpg
from experiments.benchmarks.measure import Result


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark; the device is set here."""

    lpg: lpg.Settings = lpg.DEFAULT
    grid: grid.Settings = grid.DEFAULT
    disco: disco.Settings = disco.DEFAULT


DEFAULT = Settings()


def measure(s: Settings = DEFAULT) -> list[Result]:
    """The rows of all three groups, without their targets, which are for one CPU core."""
    if not torch.cuda.is_available():
        return [Result("gpu", "no CUDA device is present", None, "")]
    device = "cuda"
    rows = lpg.measure(dataclasses.replace(s.lpg, device=device))
    rows += grid.measure(dataclasses.replace(s.grid, device=device))
    rows += disco.measure(dataclasses.replace(s.disco, device=device))
    name = torch.cuda.get_device_name()
    return [dataclasses.replace(r, group="gpu", target="", note=f"{name}; {r.note}") for r in rows]
