"""Two colours while nothing swaps: what the best and the random policy collect per step, from the exact model.

The decision process of `learned_rl.tasks.two_colours` between two swaps, whose tables are the model: 13800 placements,
4 actions, at most 23 (or, where everything is drawn anew, 13800) outcomes, all equally likely. Every placement can be
reached from every other, so that the average reward does not depend on where a stream began; relative value iteration
encloses it, since after every sweep it lies between the least and the largest change of a value.

The best average is what an agent that finds out about swaps at once comes close to as they become rare. It costs
something first: the best policy reaches the bad object again and again until it comes back in a corner, where it is in
nobody's way, and never afterwards.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from learned_rl.tasks.two_colours import ACTIONS, FREE, PAIRS, tables


class Solution(NamedTuple):
    """What a policy is worth; placements are in the order of `Tables.start`.

    Attributes:
        average: reward per environment step.
        values:  [13800] what a stream from a placement collects beyond the average of each step, up to a constant.
        policy:  [13800, 4] probabilities of the actions.
    """

    average: float
    values: Tensor
    policy: Tensor


def solve(respawn: bool = False, *, best: bool = True, tolerance: float = 1e-7) -> Solution:
    """The best policy, or else the uniform one, while the first object is the good one.

    Args:
        respawn:   the agent and both objects are drawn anew when one is reached, as in presets ending with `-respawn`.
        tolerance: how far the average may be off.
    """
    rules = tables(torch.device("cpu"))
    start, actions = rules.start, torch.arange(ACTIONS)
    pair = start[:, None] * ACTIONS + actions  # [13800, 4]
    rank = torch.full((PAIRS // ACTIONS,), -1).index_put((start,), torch.arange(len(start)))
    outcome = rank[rules.successor.view(PAIRS, FREE)[pair]]  # [13800, 4, 23]
    reward, reaches = rules.reward[pair].double(), rules.reaches[pair]
    only, several = outcome[:, :, 0], outcome[reaches]
    values = torch.zeros(len(start), dtype=torch.float64)
    while True:
        ahead = reward + values[only]
        ahead[reaches] = reward[reaches] + (values.mean() if respawn else values[several].mean(-1))
        after = ahead.max(1).values if best else ahead.mean(1)
        low, high = torch.aminmax(after - values)
        if float(high - low) < 2 * tolerance:
            break
        values = after - after[0]
    chosen = torch.eye(ACTIONS, dtype=torch.float64)[ahead.argmax(1)]
    return Solution(float(low + high) / 2, values, chosen if best else torch.full_like(ahead, 1 / ACTIONS))
