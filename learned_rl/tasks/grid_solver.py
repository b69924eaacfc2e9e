"""The grid world as a finite Markov decision process: its tables, and exact expected returns from them.

Axes besides those of `learned_rl.types`: `n` tasks, `C` padded cells (row-major, `cell = row * width + column`),
`m` object slots, `M = 2^m` presence masks (bit `k` is set while object `k` is on the grid).

The solver is backward induction over (cell, mask) with the task's own time limit as horizon. Objects come back
independently of each other, so the expectation over the next mask is a product: one 2x2 mixing per object instead of
an `M x M` matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learned_rl.types import Tasks

#: (row, column) displacement of each move: up, down, left, right, stay, then the four diagonals.
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))

#: Tasks solved together; bounds the working memory and keeps it in the processor's cache.
CHUNK = 16


@dataclass(frozen=True)
class Layout:
    """What all tasks of a family share.

    Attributes:
        height, width:   padded size in cells.
        slots:           object slots, `m`.
        moves:           how many of `MOVES` are actions: 5 or 9.
        collect_actions: as many "collect at that neighbour" actions follow the moves, and moves collect nothing.
    """

    height: int
    width: int
    slots: int
    moves: int
    collect_actions: bool = False

    @property
    def cells(self) -> int:
        return self.height * self.width

    @property
    def masks(self) -> int:
        return 2**self.slots

    @property
    def states(self) -> int:
        return self.cells * self.masks

    @property
    def actions(self) -> int:
        return self.moves * (1 + self.collect_actions)


@dataclass
class GridTables:
    """What happens in each of `n` tasks, as lookups.

    Attributes:
        next_cell:   `[n, C, A]` cell after the action.
        reach:       `[n, C, A]` cell whose objects the action collects; `C` where it collects nothing.
        objects_at:  `[n, C + 1]` bit set of the objects that live on a cell (all 0 where objects move).
        reward:      `[n, M]` sum of the rewards of a set of collected objects.
        p_terminate: `[n, M]` chance that collecting the set ends the episode: the sum of its members', at most 1.
    """

    next_cell: Tensor
    reach: Tensor
    objects_at: Tensor
    reward: Tensor
    p_terminate: Tensor


def set_bits(member: Tensor) -> Tensor:
    """Bit set of boolean columns: `[..., m]` to int64 `[...]`."""
    return (member << torch.arange(member.shape[-1], device=member.device)).sum(-1)


def has_bits(mask: Tensor, slots: int) -> Tensor:
    """Boolean columns of a bit set: int64 `[...]` to bool `[..., m]`."""
    return (mask[..., None] >> torch.arange(slots, device=mask.device) & 1).bool()


def grid_tables(tasks: Tasks, layout: Layout) -> GridTables:
    """The tables of the tasks, on their device."""
    walls = tasks["walls"]
    n, cells, device = len(walls), layout.cells, walls.device
    cell = torch.arange(cells, device=device)
    step = torch.tensor(MOVES[: layout.moves], device=device)
    row = (cell // layout.width)[:, None] + step[:, 0]
    column = (cell % layout.width)[:, None] + step[:, 1]
    inside = (row >= 0) & (row < layout.height) & (column >= 0) & (column < layout.width)
    target = torch.where(inside, row * layout.width + column, 0)
    open_ = inside & ~walls[:, target]
    next_cell = torch.where(open_, target, cell[:, None])
    reach = next_cell
    if layout.collect_actions:
        next_cell = torch.cat((next_cell, cell[:, None].expand_as(next_cell)), -1)
        reach = torch.cat((torch.full_like(reach, cells), torch.where(open_, target, cells)), -1)
    objects_at = torch.zeros(n, cells + 1, dtype=torch.int64, device=device)
    if "object_cell" in tasks:
        bit = tasks["used"] << torch.arange(layout.slots, device=device)
        objects_at.scatter_add_(1, tasks["object_cell"], bit)
    members = has_bits(torch.arange(layout.masks, device=device), layout.slots).float().T
    p_terminate = (tasks["p_terminate"] @ members).clamp(max=1)
    return GridTables(next_cell, reach, objects_at, tasks["reward"] @ members, p_terminate)


def expected_return(tasks: Tasks, layout: Layout, *, best: bool) -> Tensor:
    """Expected undiscounted return of one episode from the start with all objects present, float32 `[n]`.

    Exact (double precision inside) for the policy that knows the task and the time (`best`), or for uniformly random
    actions. Needs tasks whose objects stay in place.
    """
    order = tasks["max_steps"].argsort(descending=True)
    chunks = [_solve({k: v[rows] for k, v in tasks.items()}, layout, best) for rows in order.split(CHUNK)]
    return torch.cat(chunks).float()[order.argsort()]


def _solve(tasks: Tasks, layout: Layout, best: bool) -> Tensor:
    """Backward induction, float64 `[n]`; `tasks` come with the longest time limit first.

    An action leads to a *landing*: a pair (cell the agent is in, cell whose objects it collects). `value` is
    `[n, M, C]`, with `h` steps to go; tasks leave the batch once `h` reaches their own limit.
    """
    tables = grid_tables(tasks, layout)
    stand, reach, action_to = _landings(tables, layout)
    n, slots, device = len(reach), layout.slots, reach.device
    at = [(tasks["object_cell"][:, k, None] == reach)[:, None, None, :] for k in range(slots)]
    p_respawn = tasks["p_respawn"].double()[:, :, None, None, None]
    present = torch.arange(layout.masks, device=device)[None, :, None]
    collected = (present & tables.objects_at.gather(1, reach)[:, None, :]).flatten(1)
    reward = tables.reward.double().gather(1, collected).view(n, layout.masks, -1)
    go_on = (1 - tables.p_terminate.double()).gather(1, collected).view_as(reward)
    first = (set_bits(tasks["used"]) * layout.cells + tasks["start"])[:, None]
    limit = tasks["max_steps"].tolist()
    value = torch.zeros(n, layout.masks, layout.cells, dtype=torch.float64, device=device)
    result = torch.zeros(n, dtype=torch.float64, device=device)
    active = n
    for h in range(1, limit[0] + 1):
        while limit[active - 1] < h:
            active -= 1
        ahead = value[:active] if stand is None else value[:active, :, stand]
        for k in range(slots):
            gone, there = ahead.view(active, layout.masks >> (k + 1), 2, 1 << k, -1).unbind(2)
            back = gone.lerp(there, p_respawn[:active, k])
            ahead = torch.stack((back, torch.where(at[k][:active], gone, there)), 2)
        outcome = reward[:active] + go_on[:active] * ahead.view(active, layout.masks, -1)
        index = action_to[:active, None, :].expand(-1, layout.masks, -1)
        q = outcome.gather(2, index).view(active, layout.masks, layout.actions, layout.cells)
        value = q.amax(2) if best else q.mean(2)
        result[:active] = value.flatten(1).gather(1, first[:active])[:, 0]
    return result


def _landings(tables: GridTables, layout: Layout) -> tuple[Tensor | None, Tensor, Tensor]:
    """The distinct landings `L` of the tasks, and the one of each action.

    Returns:
        stand:     `[L]` the agent's cell, or None where landings are the cells themselves.
        reach:     `[n, L]` the cell it collects from; `C` for none.
        action_to: `[n, A * C]` landing of each action in each cell, action-major.
    """
    n, cells, moves = len(tables.next_cell), layout.cells, layout.moves
    cell = torch.arange(cells, device=tables.next_cell.device)
    if not layout.collect_actions:
        return None, cell.expand(n, -1), tables.next_cell.transpose(1, 2).flatten(1)
    collect = tables.reach[:, :, moves:].transpose(1, 2).flatten(1)
    stand = cell.repeat(1 + moves)
    reach = torch.cat((torch.full_like(cell, cells).expand(n, -1), collect), 1)
    own = torch.arange(cells, cells * (1 + moves), device=cell.device).expand(n, -1)
    action_to = torch.cat((tables.next_cell[:, :, :moves].transpose(1, 2).flatten(1), own), 1)
    return stand, reach, action_to
