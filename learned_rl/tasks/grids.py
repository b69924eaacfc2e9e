"""Grid worlds of objects with a reward, a chance to end the episode, and a chance to come back.

Source: Oh et al., "Discovering Reinforcement Learning Algorithms", NeurIPS 2020, arXiv 2007.08794, appendix A (the ten
fixed presets), and Jackson et al., "Discovering General Reinforcement Learning Algorithms with Adversarial Environment
Design", NeurIPS 2023, arXiv 2310.02782, with its code "groove" (the generalised presets, the walls, and the order of
events within a step).

One step, in this order:

1. *Move.* A move into a wall or off the grid leaves the agent where it is; diagonal moves pass between two walls.
2. *Collect.* Every object present on the agent's cell is collected: the rewards add up, and the episode terminates with
   the sum of their `p_terminate`, at most 1.
3. *Respawn.* Every object that was absent at the start of the step comes back with its own `p_respawn`. On the random
   grids it comes back on a cell drawn among those free of walls, agent and present objects.
4. *Remove.* What was collected in 2 is absent from now on. So an object collected in step `t` is absent in the next
   observation even at `p_respawn = 1`, and one that comes back under the agent is collected at the next step at the
   earliest.

After `max_steps` steps the episode is truncated, not terminated. A new episode begins with all objects present, in the
task's start cell; on the random grids the start and the objects are drawn anew on distinct free cells.

Axes besides those of `learned_rl.types`: `n` tasks, `C` padded cells (row-major), `m` object slots.

Tasks are dictionaries of

| key | shape | meaning |
|---|---|---|
| `size` | int64 `[n, 2]` | height and width of the task's own grid, the upper left corner of the padded one |
| `walls` | bool `[n, C]` | true on walls, and on all cells outside the task's grid |
| `used` | bool `[n, m]` | the slot holds an object |
| `reward`, `p_terminate`, `p_respawn` | float32 `[n, m]` | of each object; 0 in unused slots |
| `max_steps` | int64 `[n]` | time limit in environment steps |
| `start`, `object_cell` | int64 `[n]`, `[n, m]` | cells fixed for the task (absent on the random grids) |

Objects can be out of reach: walled in, or, where a task has fewer free cells than objects + 1, on a wall. So scores
should be normalised by `optimal_return` and `random_return`, never by the sum of the rewards.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, Literal

import gymnasium
import numpy as np
import torch
from torch import Tensor

from learned_rl.streams import Streams
from learned_rl.tasks.base import BuiltInFamily, TaskVectorEnv
from learned_rl.tasks.grid_solver import Layout, expected_return, grid_tables, has_bits, set_bits
from learned_rl.types import Tasks, UserError

Observation = Literal["tabular", "planes"]


@dataclass(frozen=True)
class FixedPreset:
    """A grid of Oh et al. 2020: given objects and walls; where start and objects lie is drawn.

    Attributes:
        size:      height and width in cells.
        objects:   (reward, p_terminate, p_respawn) of each.
        max_steps: time limit in environment steps.
        walls:     (row, column) of each wall cell.
        random:    start and objects are drawn per episode and per respawn instead of per task.
    """

    size: tuple[int, int]
    objects: tuple[tuple[float, float, float], ...]
    max_steps: int
    walls: tuple[tuple[int, int], ...] = ()
    random: bool = False

    @property
    def slots(self) -> int:
        return len(self.objects)

    def parameters(self, n: int, generator: torch.Generator) -> Tasks:
        """Everything of `n` tasks but the start and the object cells."""
        height, width = self.size
        walls = torch.zeros(n, height * width, dtype=torch.bool)
        walls[:, [row * width + column for row, column in self.walls]] = True
        reward, p_terminate, p_respawn = torch.tensor(self.objects).T[:, None].repeat(1, n, 1)
        return {
            "size": torch.tensor(self.size).repeat(n, 1),
            "walls": walls,
            "used": torch.ones(n, self.slots, dtype=torch.bool),
            "reward": reward,
            "p_terminate": p_terminate,
            "p_respawn": p_respawn,
            "max_steps": torch.full((n,), self.max_steps),
        }


@dataclass(frozen=True)
class DrawnPreset:
    """A generalised family of groove: square grids whose every property is drawn per task; all ranges inclusive.

    Attributes:
        sides:  side length in cells, uniform; padded to the largest.
        steps:  time limit in environment steps, log-uniform, rounded.
        counts: number of objects, uniform.
        walls:  wall cells drawn without replacement in the *padded* grid, so that smaller grids get fewer.
    """

    sides: tuple[int, int]
    steps: tuple[int, int]
    counts: tuple[int, int]
    walls: int
    random: ClassVar[bool] = False

    @property
    def size(self) -> tuple[int, int]:
        return self.sides[1], self.sides[1]

    @property
    def slots(self) -> int:
        return self.counts[1]

    @property
    def max_steps(self) -> int:
        return self.steps[1]

    def parameters(self, n: int, generator: torch.Generator) -> Tasks:
        """Everything of `n` tasks but the start and the object cells."""

        def integer(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (n,), generator=generator)

        def log_uniform(low: float, high: float, *shape: int) -> Tensor:
            u = torch.rand(n, *shape, generator=generator, dtype=torch.float64)
            return (math.log(low) + u * math.log(high / low)).exp()

        side, padded = integer(*self.sides), torch.arange(self.sides[1])
        used = torch.arange(self.slots) < integer(*self.counts)[:, None]
        # The first object is good, the others may be either, so that every task has something to collect.
        reward = torch.rand(n, self.slots, generator=generator)
        reward[:, 1:] = 2 * reward[:, 1:] - 1
        inside = padded < side[:, None]
        drawn = torch.rand(n, len(padded) ** 2, generator=generator).topk(self.walls).indices
        outside = ~(inside[:, :, None] & inside[:, None, :]).flatten(1)
        return {
            "size": side[:, None].repeat(1, 2),
            "walls": outside.scatter(1, drawn, True),
            "used": used,
            "reward": reward * used,
            "p_terminate": log_uniform(0.01, 1, self.slots).float() * used,
            "p_respawn": log_uniform(0.001, 0.1, self.slots).float() * used,
            "max_steps": log_uniform(*self.steps).round().long(),
        }


_GOOD_OFTEN, _GOOD_SLOW = (1.0, 0.0, 0.05), (1.0, 0.0, 0.01)
_BAD_ENDING, _BAD_BACK_AT_ONCE = (-1.0, 0.5, 0.1), (-1.0, 0.5, 1.0)
_DENSE = (_GOOD_OFTEN, _GOOD_OFTEN, _BAD_ENDING, (-1.0, 0.0, 0.5))
_LONG = (_GOOD_SLOW, _GOOD_SLOW, _BAD_BACK_AT_ONCE, _BAD_BACK_AT_ONCE)

PRESETS: dict[str, FixedPreset | DrawnPreset] = {
    "dense": FixedPreset((11, 11), _DENSE, 500),
    "sparse": FixedPreset((13, 13), ((1.0, 1.0, 0.0), (-1.0, 1.0, 0.0)), 50),
    "long": FixedPreset((11, 11), _LONG, 1000),
    # One wall down the middle; its two gaps are one cell away from the ends, as on groove's 9x9 version.
    "longer": FixedPreset(
        (7, 9), ((1.0, 0.1, 0.01),) * 2 + ((-1.0, 0.8, 1.0),) * 5, 2000, tuple((row, 4) for row in (0, 2, 3, 4, 6))
    ),
    # A vertical and a horizontal wall that cross, each with two gaps.
    "long-dense": FixedPreset(
        (11, 11),
        ((1.0, 0.0, 0.005),) * 4,
        2000,
        tuple((row, 5) for row in range(11) if row not in (0, 7))
        + tuple((4, column) for column in range(11) if column not in (2, 5, 8)),
    ),
    "rand-dense": FixedPreset((11, 11), _DENSE, 500, random=True),
    "rand-long": FixedPreset((11, 11), _LONG, 1000, random=True),
    "rand-small": FixedPreset((5, 7), (_GOOD_OFTEN,) * 2 + (_BAD_ENDING,) * 2, 500, ((1, 2), (3, 4)), random=True),
    "rand-small-sparse": FixedPreset((5, 7), ((1.0, 1.0, 1.0),) + ((-1.0, 1.0, 1.0),) * 2, 50, random=True),
    "rand-very-dense": FixedPreset((11, 11), ((1.0, 0.0, 1.0),), 2000, random=True),
    "all": DrawnPreset(sides=(4, 10), steps=(20, 750), counts=(1, 5), walls=15),
    "small": DrawnPreset(sides=(4, 6), steps=(20, 100), counts=(1, 3), walls=7),
    "medium": DrawnPreset(sides=(6, 8), steps=(100, 250), counts=(2, 4), walls=10),
    "large": DrawnPreset(sides=(8, 10), steps=(250, 750), counts=(2, 5), walls=15),
    "debug": DrawnPreset(sides=(3, 4), steps=(5, 10), counts=(1, 2), walls=4),
}
_PLANES = "-planes"


class GridFamily(BuiltInFamily):
    """Grid worlds: five fixed layouts per task (`dense` ...), five random ones (`rand-...`), five drawn families.

    Actions of the drawn families: up, down, left, right, stay. Those of the fixed presets: the same five, then the
    diagonals up-left, up-right, down-left, down-right; with `collect_actions`, nine more that collect at the cell in
    the same nine directions without moving, and then the moves collect nothing. (Oh et al. draw one of the two action
    sets per lifetime; lifetimes that run side by side share one action space here, so the set belongs to the family.)

    Observations:
        tabular: the index `cell * 2^m + mask` in `Discrete(C * 2^m)`; bit `k` of the mask is set while object `k` is
            present. The default of all presets but the random ones, where it would not be a state.
        planes: float32 `[m + 2, height, width]` of zeros and ones: the agent, each object slot while present, the walls
            (which include the cells outside the task's grid).

    Time is not observed.

    Args:
        preset: a key of `PRESETS`; `-planes` may be appended in place of `observation="planes"`.
        observation: None takes the preset's default.
        collect_actions: the 18-action variant of the fixed presets.

    Raises:
        UserError: unknown preset or observation, or a combination that does not exist.
    """

    name = "grid"
    presets: ClassVar[tuple[str, ...]] = (
        *PRESETS,
        *(name + _PLANES for name, preset in PRESETS.items() if isinstance(preset, DrawnPreset)),
    )

    def __init__(
        self, preset: str = "small", *, observation: Observation | None = None, collect_actions: bool = False
    ) -> None:
        base = preset.removesuffix(_PLANES)
        if base not in PRESETS:
            near = get_close_matches(preset, self.presets, 1, 0) or list(self.presets)
            raise UserError(
                f"unknown grid preset {preset!r}: expected one of {', '.join(PRESETS)}; nearest: {near[0]!r}"
            )
        if observation not in (None, "tabular", "planes"):
            near = get_close_matches(str(observation), ("tabular", "planes"), 1, 0)
            raise UserError(
                f"unknown observation {observation!r}: expected 'tabular' or 'planes'; nearest: {near[0]!r}"
            )
        source = PRESETS[base]
        if observation == "tabular" and (source.random or base != preset):
            raise UserError(f"grid preset {preset!r} has no 'tabular' observation; the nearest choice is 'planes'")
        if collect_actions and isinstance(source, DrawnPreset):
            raise UserError(
                f"grid preset {preset!r} has no collect_actions; the nearest preset that has them is 'dense'"
            )
        self.preset = preset
        self.source = source
        moves = 5 if isinstance(source, DrawnPreset) else 9
        self.layout = Layout(*source.size, source.slots, moves, collect_actions)
        self.observation: Observation = observation or ("planes" if source.random or base != preset else "tabular")
        self.observation_space = (
            gymnasium.spaces.Discrete(self.layout.states)
            if self.observation == "tabular"
            else gymnasium.spaces.Box(0, 1, (source.slots + 2, *source.size), np.float32)
        )
        self.action_space = gymnasium.spaces.Discrete(self.layout.actions)
        self.max_episode_steps = source.max_steps

    def sample(self, n: int, generator: torch.Generator) -> Tasks:
        tasks = self.source.parameters(n, generator)
        if self.source.random:
            return tasks
        # Free cells have the smaller keys; should they run out, the last objects land on blocked cells.
        key = torch.rand(tasks["walls"].shape, generator=generator) + tasks["walls"]
        cells = key.topk(1 + self.layout.slots, largest=False).indices
        return tasks | {"start": cells[:, 0].clone(), "object_cell": cells[:, 1:].clone()}

    @property
    def vector_env(self) -> type[GridVectorEnv]:
        return RandomGridVectorEnv if self.source.random else GridVectorEnv

    def optimal_return(self, tasks: Tasks) -> Tensor | None:
        """Exact best expected return of one episode, undiscounted, `[n]`; None on the random grids."""
        return None if self.source.random else expected_return(self.check(tasks), self.layout, best=True)

    def random_return(self, tasks: Tasks) -> Tensor | None:
        """Exact expected return of one episode under uniformly random actions, `[n]`; None on the random grids."""
        return None if self.source.random else expected_return(self.check(tasks), self.layout, best=False)

    def check(self, tasks: Tasks) -> Tasks:
        layout = self.layout
        shape = tuple(tasks[key].shape[-1] if key in tasks else 0 for key in ("walls", "used"))
        if shape != (layout.cells, layout.slots) or ("start" in tasks) == self.source.random:
            raise UserError(
                f"tasks of {shape[0]} cells and {shape[1]} objects do not fit grid preset {self.preset!r}, which has "
                f"{layout.cells} and {layout.slots}; draw them with the sample() of this family"
            )
        free = int((~tasks["walls"]).sum(1).min())
        if self.source.random and free <= layout.slots:
            raise UserError(f"a task has {free} free cells, expected at least {layout.slots + 1}: agent and objects")
        return tasks


class GridVectorEnv(TaskVectorEnv):
    """`N` grid worlds whose objects stay in place.

    State: `cell` int64 `[N]`, and `present` int64 `[N]`, the bit set of the objects on the grid. What can happen is
    looked up in tables made once per task, `[P, ...]` and flat.
    """

    state_names: ClassVar[tuple[str, ...]] = ("cell", "present")

    def __init__(
        self,
        family: GridFamily,
        tasks: Tasks,
        copies: int,
        seed: int,
        device: torch.device | str = "cpu",
        streams: Streams | None = None,
    ) -> None:
        self.layout = family.layout
        self.planes = family.observation == "planes"
        super().__init__(family, tasks, copies, seed, device, streams)

    def _allocate(self) -> None:
        layout = self.layout
        self.cell = torch.zeros(self.num_envs, dtype=torch.int64, device=self.device)
        self.present = torch.zeros_like(self.cell)
        self._all = self._changed = torch.arange(self.lifetimes, device=self.device)
        row = self._all.repeat_interleave(self.copies)
        self._move_row = row * (layout.cells * layout.actions)
        self._cell_row = row * (layout.cells + 1)
        self._mask_row = row * layout.masks
        self._tables = grid_tables(self._of_lifetimes(self._all), layout)
        self._tasks_changed()

    def _of_lifetimes(self, lifetimes: Tensor) -> Tasks:
        return {key: value[lifetimes * self.copies] for key, value in self.task.items()}

    def set_tasks(self, lifetimes: Tensor, tasks: Tasks) -> Tensor:
        self._changed = lifetimes.to(self.device)  # the tables of the others stay
        return super().set_tasks(lifetimes, tasks)

    def _tasks_changed(self) -> None:
        fresh = vars(grid_tables(self._of_lifetimes(self._changed), self.layout))
        for name, table in vars(self._tables).items():
            table[self._changed] = fresh[name]
        self._changed = self._all
        self._full = set_bits(self.task["used"])
        if self.planes:
            self._blank = torch.zeros(self.num_envs, self.layout.slots + 2, self.layout.cells, device=self.device)
            self._blank[:, -1] = self.task["walls"].float()

    @property
    def time_limit(self) -> Tensor:
        return self.task["max_steps"]

    def _begin(self, mask: Tensor) -> None:
        self.cell = torch.where(mask, self.task["start"], self.cell)
        self.present = torch.where(mask, self._full, self.present)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        layout, tables = self.layout, self._tables
        index = torch.add(self._move_row, self.cell, alpha=layout.actions) + action
        draw = self._uniform(self.num_envs, layout.slots + 1)
        self.cell = tables.next_cell.take(index)
        target = tables.reach.take(index) if layout.collect_actions else self.cell
        collected = self.present & self._objects_at(target)
        outcome = self._mask_row + collected
        terminated = draw[:, -1] < tables.p_terminate.take(outcome)
        back = set_bits(draw[:, :-1] < self.task["p_respawn"]) & ~self.present
        left = self.present ^ collected
        self._place(back, left)
        self.present = left | back
        return tables.reward.take(outcome), terminated

    def _objects_at(self, cell: Tensor) -> Tensor:
        """Bit set of the objects, present or not, that live on the cells `[N]`."""
        return self._tables.objects_at.take(self._cell_row + cell)

    def _place(self, back: Tensor, left: Tensor) -> None:
        """Choose the cells of the objects that come `back`, given those `left` on the grid: here they are fixed."""

    def _observe(self) -> Tensor:
        layout = self.layout
        if not self.planes:
            return torch.add(self.present, self.cell, alpha=layout.masks)
        object_index = self._object_cells() + torch.arange(1, layout.slots + 1, device=self.device) * layout.cells
        index = torch.cat((self.cell[:, None], object_index), 1)
        agent = torch.ones(self.num_envs, 1, dtype=torch.bool, device=self.device)
        value = torch.cat((agent, has_bits(self.present, layout.slots)), 1).float()
        planes = self._blank.flatten(1).scatter(1, index, value)
        return planes.view(-1, layout.slots + 2, layout.height, layout.width)

    def _object_cells(self) -> Tensor:
        """Cell of each object, present or not, `[N, m]`."""
        return self.task["object_cell"]


class RandomGridVectorEnv(GridVectorEnv):
    """`N` grid worlds whose start and objects are drawn each episode, and whose objects come back somewhere else."""

    state_names = ("cell", "present", "object_cell")

    def _allocate(self) -> None:
        self.object_cell = torch.zeros(self.num_envs, self.layout.slots, dtype=torch.int64, device=self.device)
        super()._allocate()

    def _tasks_changed(self) -> None:
        super()._tasks_changed()
        free = ~self._of_lifetimes(self._all)["walls"]
        self._free = (~free).int().argsort(dim=1, stable=True)  # free cells first, in order
        self._rank = free.cumsum(1) - 1  # where a free cell stands in that list
        self._room = free.sum(1).repeat_interleave(self.copies)
        self._list_row = torch.arange(self.lifetimes, device=self.device).repeat_interleave(self.copies)
        self._list_row *= self.layout.cells

    def _vacant(self, u: Tensor, cells: Tensor, occupied: Tensor) -> Tensor:
        """A uniform draw, by the uniform numbers `u [N]`, of a free cell other than the `occupied` ones of `cells`.

        `cells` int64 and `occupied` bool are `[N, k]`; occupied cells are distinct and free of walls.
        """
        rank = self._rank.take(self._list_row[:, None] + cells).where(occupied, self.layout.cells).sort(1).values
        room = self._room - occupied.sum(1)
        choice = (u * room).long().minimum(room - 1)
        for taken in rank.unbind(1):  # ascending, so that each one skips past those already passed
            choice = choice + (choice >= taken)
        return self._free.take(self._list_row + choice)

    def _begin(self, mask: Tensor) -> None:
        u = self._uniform(self.num_envs, 1 + self.layout.slots)
        drawn = torch.empty_like(u, dtype=torch.int64)
        for k, column in enumerate(u.unbind(1)):
            drawn[:, k] = self._vacant(column, drawn[:, :k], torch.ones_like(drawn[:, :k], dtype=torch.bool))
        self.cell = torch.where(mask, drawn[:, 0], self.cell)
        self.object_cell = torch.where(mask[:, None], drawn[:, 1:], self.object_cell)
        self.present = torch.where(mask, self._full, self.present)

    def _object_cells(self) -> Tensor:
        return self.object_cell

    def _objects_at(self, cell: Tensor) -> Tensor:
        return set_bits(self.object_cell == cell[:, None])

    def _place(self, back: Tensor, left: Tensor) -> None:
        u = self._uniform(self.num_envs, self.layout.slots)
        come = has_bits(back, self.layout.slots)
        cells = torch.cat((self.cell[:, None], self.object_cell), 1)
        occupied = torch.cat((torch.ones_like(come[:, :1]), has_bits(left, self.layout.slots)), 1)
        for k in range(self.layout.slots):
            new = self._vacant(u[:, k], cells, occupied)
            cells[:, k + 1] = torch.where(come[:, k], new, cells[:, k + 1])
            occupied[:, k + 1] |= come[:, k]
        self.object_cell = cells[:, 1:].clone()
