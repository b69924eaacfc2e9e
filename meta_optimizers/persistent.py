"""Persistent evolution strategies and noise reuse: windows shorter than a lifetime, without truncation bias.

Vicol, Metz, Sohl-Dickstein, "Unbiased Gradient Estimation in Unrolled Computation Graphs with Persistent Evolution
Strategies", ICML 2021, arXiv:2112.13835: every lifetime keeps its state, and a pair's difference of costs in a window
is multiplied by all perturbations that it met since it began,

    xi_i <- xi_i + z_i / sigma,      g = 1/(2 n) sum_i (F_i+ - F_i-) xi_i

since all of them shaped the state. Averaged over the windows of a lifetime this is the gradient of the mean cost of its
states (where eta stands still meanwhile). Every further perturbation adds variance. Noise reuse (Li, Harrison,
Sohl-Dickstein, Smith, Metz, NeurIPS 2023, arXiv:2304.12180; found as ES-Single by Vicol, ICML 2023, arXiv:2304.11153)
draws one perturbation for a lifetime; between the two lies a fresh one every `redraw` windows (their GPES). Costs are
means over the states of a window, not sums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from learned_rl.spaces import Integers, searched
from learned_rl.types import Tree, UserError, at_least
from meta_optimizers.estimator import EstimatorConfig
from meta_optimizers.evolution import AntitheticConfig, Evolution
from meta_optimizers.problem import Problem


@dataclass(frozen=True)
class NoiseReuseConfig(AntitheticConfig):
    window: int = field(default=10, metadata=searched(Integers(1, 100, log=True)))
    """K: inner updates of one estimate"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sharing != "pair":
            raise UserError(
                f"sharing is {self.sharing!r}: lifetimes at all ages cannot share one stream; expected 'pair'."
            )


@dataclass(frozen=True)
class PersistentConfig(NoiseReuseConfig):
    redraw: int = 1
    """windows of a lifetime under the same perturbation"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, redraw=self.redraw)


class Persistent(Evolution):
    """Evolution with perturbations that accumulate. Each pair has one task and begins anew as a whole; every process
    carries the accumulators of all pairs."""

    name, staggered = "pes", True
    Config: ClassVar[type[EstimatorConfig]] = PersistentConfig
    config: NoiseReuseConfig
    _carried: Tree | None = None  # of all pairs: noise [n, d], score [n, d], and windows [n] since they began
    _began: Tensor | None = None  # [P] bool, of this process: what begins with the next window

    @property
    def redraw(self) -> int | None:
        """Windows under the same perturbation; None: all of a lifetime."""
        return getattr(self.config, "redraw", None)

    def perturb(self, problem: Problem, pairs: int, like: Tensor) -> tuple[Tensor, Tensor]:
        noise, score = super().perturb(problem, pairs, like)
        zero = torch.zeros_like(noise)
        c = self._carried or {"noise": zero, "score": zero, "windows": noise.new_zeros(pairs, dtype=torch.int64)}
        c = {k: v.to(like.device) for k, v in c.items()}
        began = torch.zeros(problem.lifetimes, dtype=torch.bool) if self._began is None else self._began
        anew = problem.group.gather(began.to(like.device)).view(pairs, 2).any(1)
        windows = torch.where(anew, 0, c["windows"])
        fresh = ((windows == 0) if self.redraw is None else (windows % self.redraw == 0)).unsqueeze(1)
        total = torch.where(anew.unsqueeze(1), 0.0, c["score"]) + torch.where(fresh, score, 0.0)
        self._carried = {"noise": torch.where(fresh, noise, c["noise"]), "score": total, "windows": windows + 1}
        self._began = None
        return self._carried["noise"], total

    def begin(self, which: Tensor, elsewhere: bool = False) -> None:
        super().begin(which, elsewhere)
        self._began = which.clone() if self._began is None else self._began | which

    def state_dict(self) -> Tree:
        carried = {f"carried/{k}": v.clone() for k, v in (self._carried or {}).items()}
        return super().state_dict() | carried | ({} if self._began is None else {"began": self._began.clone()})

    def load_state_dict(self, state: Tree) -> None:
        super().load_state_dict(state)
        self._carried = {k.removeprefix("carried/"): v for k, v in state.items() if k.startswith("carried/")} or None
        self._began = state.get("began")

    def axis(self, name: str, problem: Problem) -> int | None:
        return 0 if name == "began" else super().axis(name, problem)


class NoiseReuse(Persistent):
    """Persistent evolution with one perturbation for a lifetime."""

    name, Config = "nres", NoiseReuseConfig
