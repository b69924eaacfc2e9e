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
from learned_rl.types import Tree, UserError


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

    def push(self, trajectory: Trajectory, which: Tensor | None = None) -> None:
        """Keep the B trajectories of each lifetime, or where `which [P]` is true, of a rollout [T, P, B].

        Raises:
            UserError: the replay holds trajectories of another length.
        """
        found = {k: v for k, v in vars(trajectory).items() if v is not None}
        found.setdefault("final_obs", trajectory.obs[1:])  # as it is where nothing was truncated
        rows = {k: v.movedim(0, 2) for k, v in found.items()}
        P, B = rows["reward"].shape[:2]
        if not self.kept:
            self.kept = {k: v.new_zeros(P, self.capacity, *v.shape[2:]) for k, v in rows.items()}
        if (T := rows["reward"].shape[2]) != (held := self.kept["reward"].shape[2]):
            raise UserError(f"The replay holds trajectories of {held} steps: expected an n_steps of {held}, not {T}.")
        new = torch.arange(B, device=self.count.device)
        last = slice(max(B - self.capacity, 0), None)  # of a rollout wider than all that is kept
        at = ((self.count[:, None] + new) % self.capacity)[:, last]
        lifetime = torch.arange(P, device=self.count.device)[:, None]
        which = torch.ones_like(self.count, dtype=torch.bool) if which is None else which
        for name, value in rows.items():
            self.kept[name][lifetime[which], at[which]] = value[which, last]
        self.count = self.count + B * which

    def sample(self, generator: torch.Generator, streams: Streams) -> Trajectory:
        """A rollout [T, P, batch] of trajectories drawn evenly, with replacement."""
        P, there = len(self.count), self.count.clamp(max=self.capacity)
        uniform = streams.uniform((P, self.batch), generator)
        at = (uniform * there[:, None]).long().clamp(max=self.capacity - 1)
        lifetime = torch.arange(P, device=at.device)[:, None]
        drawn = {k: v[lifetime, at].movedim(2, 0) for k, v in self.kept.items() if k != "final_obs"}
        if bool(drawn["truncated"].any()):
            drawn["final_obs"] = self.kept["final_obs"][lifetime, at].movedim(2, 0)
        return Trajectory(**drawn)

    def reset(self, which: Tensor) -> None:
        """Forget what the lifetimes kept where `which [P]` is true."""
        self.count = torch.where(which, torch.zeros_like(self.count), self.count)

    def copy(self, rows: Tensor) -> None:
        """Let lifetime p go on with what lifetime `rows[p]` kept."""
        self.kept, self.count = {k: v[rows] for k, v in self.kept.items()}, self.count[rows]

    def state_dict(self) -> Tree:
        return self.kept | {"count": self.count}

    def load_state_dict(self, state: Tree) -> None:
        """Go on from what was saved.

        Raises:
            UserError: it was saved without replay, or with another capacity.
        """
        known = {f.name for f in dataclasses.fields(Trajectory)}
        kept = {k: v.clone() for k, v in state.items() if k in known}  # copies, since `push` writes in place
        empty = self.capacity if "count" in state else 0  # where nothing was kept yet, nothing says for how many
        if (found := kept["reward"].shape[1] if kept else empty) != self.capacity:
            raise UserError(f"The state has a replay_capacity of {found}: expected {self.capacity}, as configured.")
        self.count, self.kept = state["count"], kept
