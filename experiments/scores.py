"""From returns to scores: what a return is worth on its task."""

from __future__ import annotations

import dataclasses

import numpy as np

from learned_rl.evaluation import Array, Curves
from learned_rl.tasks.base import Split, TaskFamily

WORTH = 0.05  # a task whose best return is below this has nothing to learn in it, and is not scored


class Scorer:
    """Divides returns by each task's exact best return, where the family can compute it.

    On such a family a score of 1 is the best that any policy can do. Tasks on which nothing can be won (the best
    return is below `WORTH`) are left out; `kept` says which remain. On other families scores are returns.
    """

    def __init__(self, family: TaskFamily, split: Split, tasks: int, seed: int = 0) -> None:
        best = family.optimal_return(family.sample_split(split, tasks, seed))
        self.exact = best is not None
        self.best = np.ones(tasks) if best is None else best.double().numpy()
        self.kept: Array = self.best >= WORTH if self.exact else np.ones(tasks, dtype=bool)

    def __call__(self, curves: Curves) -> Curves:
        """Curves of scores on the tasks kept, [C, kept, seeds]."""
        return dataclasses.replace(curves, returns=curves.returns[:, self.kept] / self.best[self.kept, None])

    def final(self, returns: Array, which: slice = slice(None)) -> Array:
        """[kept, n] scores of final returns [tasks, n], of all tasks or of some."""
        kept, best = self.kept[which], self.best[which]
        return returns[kept] / best[kept, None]
