"""Replay: the latest trajectories of each lifetime, from which updates draw instead of learning from each once.

What is kept is whole rollouts of one environment copy with the policy that acted, so that objectives which correct for
old policies (V-trace, Retrace) can read them. A capacity of 1024 and draws of 64 are those with which Disco103 was
evaluated (Oh et al., Nature 2025).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from learned_rl.streams import Streams
from learned_rl.trajectory import Trajectory
from learned_rl.types import Tree


class Replay:
    """The latest C trajectories of each of P lifetimes; the oldest give way.

    Args:
        capacity: C.
        batch:    trajectories drawn for each update.

    Attributes:
        kept:  field of `Trajectory` -> [P, C, T, ...] (observations T + 1); empty until the first are there.
        count: [P] int64, trajectories that each lifetime ever had.
    """

    def __init__(self, capacity: int, batch: int, lifetimes: int, device: torch.device | str) -> None:
        self.capacity, self.batch = capacity, batch
        self.kept: Tree = {}
        self.count = torch.zeros(lifetimes, dtype=torch.int64, device=device)

    @property
    def ready(self) -> Tensor:
        """[P] bool: there are as many trajectories as an update draws."""
        return self.count >= self.batch

    def push(self, trajectory: Trajectory) -> None:
        """Keep the B trajectories of each lifetime of a rollout [T, P, B]."""
        found = {k: v for k, v in vars(trajectory).items() if v is not None}
        found.setdefault("final_obs", trajectory.obs[1:])  # as it is where nothing was truncated
        rows = {k: v.movedim(0, 2) for k, v in found.items()}
        P, B = rows["reward"].shape[:2]
        if not self.kept:
            self.kept = {k: v.new_zeros(P, self.capacity, *v.shape[2:]) for k, v in rows.items()}
        new = torch.arange(B, device=self.count.device)
        last = slice(max(B - self.capacity, 0), None)  # of a rollout wider than all that is kept
        at = ((self.count[:, None] + new) % self.capacity)[:, last]
        lifetime = torch.arange(P, device=self.count.device)[:, None]
        for name, value in rows.items():
            self.kept[name][lifetime, at] = value[:, last]
        self.count = self.count + B

    def sample(self, generator: torch.Generator, streams: Streams) -> Trajectory:
        """A rollout [T, P, batch] of trajectories drawn evenly, with replacement."""
        P, there = len(self.count), self.count.clamp(max=self.capacity)
        uniform = streams.uniform((P, self.batch), generator)
        at = (uniform * there[:, None]).long().clamp(max=self.capacity - 1)
        lifetime = torch.arange(P, device=at.device)[:, None]
        return Trajectory(**{k: v[lifetime, at].movedim(2, 0) for k, v in self.kept.items()})

    def reset(self, which: Tensor) -> None:
        """Forget what the lifetimes kept where `which [P]` is true."""
        self.count = torch.where(which, torch.zeros_like(self.count), self.count)

    def copy(self, rows: Tensor) -> None:
        """Let lifetime p go on with what lifetime `rows[p]` kept."""
        self.kept, self.count = {k: v[rows] for k, v in self.kept.items()}, self.count[rows]

    def state_dict(self) -> Tree:
        return self.kept | {"count": self.count}

    def load_state_dict(self, state: Tree) -> None:
        known = {f.name for f in dataclasses.fields(Trajectory)}
        # Copies, since `push` writes in place.
        self.count, self.kept = state["count"], {k: v.clone() for k, v in state.items() if k in known}
