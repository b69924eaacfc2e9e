"""The outer loop: an estimate a step, and one optimizer of the meta-parameters that follows it.

Meta-parameters move by the same update rules as agents do (`learned_rl.update_rules`), as rows: one row that all
lifetimes share, or a row for each lifetime that learns alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from learned_rl.component import Metrics, UpdateRule
from learned_rl.lifetimes import under
from learned_rl.spaces import LogUniform, searched
from learned_rl.tasks.base import check_choices
from learned_rl.types import Tree, UserError, at_least
from learned_rl.update_rules import SGD, Adam, AdamConfig, clip_norm, select_rows
from meta_optimizers.estimator import Estimate, Estimator
from meta_optimizers.problem import Eta, Problem


@dataclass(frozen=True)
class OuterConfig:
    """How the meta-parameters follow the estimates."""

    learning_rate: float = field(default=1e-3, metadata=searched(LogUniform(1e-4, 1e-2)))
    """of the outer optimizer"""
    max_grad_norm: float = field(default=0.5, metadata=searched(LogUniform(0.003, 3.0)))
    """bound on the norm of the meta-gradient"""
    optimizer: Literal["adam", "sgd"] = "adam"
    """outer optimizer"""
    beta1: float = 0.9
    """decay of the outer Adam's first moment per meta-step"""
    eps: float = 1e-8
    """added to the root of the outer Adam's second moment; larger than noise (1e-4) it keeps noise from moving eta"""
    half_life: float = math.inf
    """meta-steps in which the outer learning rate halves"""

    def __post_init__(self) -> None:
        check_choices(self)
        at_least(0, learning_rate=self.learning_rate, max_grad_norm=self.max_grad_norm, beta1=self.beta1, eps=self.eps)
        at_least(1e-6, half_life=self.half_life)
        if self.beta1 >= 1:
            raise UserError(f"beta1 is {self.beta1}: expected less than 1.")


class OuterLoop:
    """Moves meta-parameters by what an estimator says of a problem.

    Args:
        problem:   the inner processes.
        eta:       name -> parameter, [P, ...] if `stacked`; moved in place.
        estimator: of the direction.
        config:    how to follow it.
        stacked:   whether every lifetime has meta-parameters of its own, which move alone.

    Raises:
        UserError: an estimator that learns from many lifetimes together, for meta-parameters of single ones.
    """

    def __init__(
        self,
        problem: Problem,
        eta: Mapping[str, nn.Parameter],
        estimator: Estimator,
        config: OuterConfig | None = None,
        stacked: bool = False,
    ) -> None:
        self.problem, self.estimator, self.outer = problem, estimator, config or OuterConfig()
        self.eta, self.stacked = dict(eta), stacked
        if stacked and estimator.stacked:
            raise UserError(
                f"estimator is {estimator.name!r}, which compares lifetimes: expected one that serves a single "
                "lifetime, such as 'truncated' or 'bmg'."
            )
        c = self.outer
        self.rule: UpdateRule = Adam(AdamConfig(beta1=c.beta1, eps=c.eps)) if c.optimizer == "adam" else SGD()
        self._state = self.rule.initial_state(self._rows())
        self.steps = 0
        self.moved = False  # whether eta ever did
        self.seen: Metrics = {}  # name -> [P], of the last step
        self._before: Tensor | None = None  # the last gradients, to compare with

    def step(self) -> dict[str, float]:
        """One update of the meta-parameters; returns what to log."""
        self.problem.meta_step = self.steps
        estimate = self.estimator(self.problem, self.present)
        self.seen = estimate.seen
        followed = self._follow(estimate)
        self.moved = self.moved or followed["skipped"] < 1
        metrics = estimate.metrics | followed
        anew = self.problem.renew(estimate.broken)
        anywhere, broken = self.problem.group.sum(torch.stack([anew.sum(), estimate.broken.sum()])).tolist()
        self.estimator.begin(anew, elsewhere=anywhere > 0)
        self.steps += 1
        return metrics | {"broken": float(broken)} | self.problem.report()

    def _follow(self, estimate: Estimate) -> dict[str, float]:
        """Move eta; what is not finite is skipped, as is a broken lifetime's own eta, and shows in the metrics."""
        said = estimate.move if estimate.move is not None else estimate.grads
        if said is None:
            return {"grad_norm": float("nan"), "skipped": 1.0}
        rows = self._rows(said)
        whole = rows.isfinite().all(1)
        if self.stacked:
            whole = whole & ~estimate.broken  # or momentum would move them on
        metrics = {"skipped": 1.0 - whole.double().mean().item()}
        if not bool(whole.any()):
            return metrics | {"grad_norm": float("nan")}
        if estimate.move is None:
            rows, seen = self._descent(rows, whole)
            metrics |= seen
        else:
            rows = torch.where(whole.unsqueeze(1), rows, torch.zeros_like(rows))
        moves = self.present.unflatten(rows if self.stacked else rows[0])
        with torch.no_grad():
            for name, p in self.eta.items():
                p.add_(moves[name])
        return metrics | {"update_norm": rows.norm(dim=1).mean().item()}

    def _descent(self, grads: Tensor, whole: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The step [R, d] along gradients [R, d], in those rows `whole [R]` that are finite; and what was seen."""
        metrics = {"grad_norm": grads[whole].norm(dim=1).mean().item()}
        if self._before is not None:
            metrics["cosine"] = torch.cosine_similarity(grads[whole], self._before[whole], dim=1).mean().item()
        self._before = grads.clone()
        rate = self.outer.learning_rate * 0.5 ** (self.steps / self.outer.half_life)
        clipped = clip_norm(grads, self.outer.max_grad_norm)
        step, state = self.rule.update(clipped, self._state, self._rows(), rate)
        self._state = {k: select_rows(whole, v, self._state[k]) for k, v in state.items()}
        return select_rows(whole, step, torch.zeros_like(step)), metrics

    def check_moved(self) -> None:
        """Raises `UserError` if every meta-step so far was skipped; to ask when a run has ended."""
        if self.steps and not self.moved:
            raise UserError(
                f"The meta-gradient was finite in none of {self.steps} meta-steps, and what was to be learned is as "
                "it was: expected agents that do not break, as with a smaller learning_rate or max_grad_norm of theirs."
            )

    @property
    def present(self) -> Eta:
        """The meta-parameters as they are now, as constants."""
        return Eta({k: p.detach() for k, p in self.eta.items()}, self.stacked)  # stop: values

    def _rows(self, values: Tree | None = None) -> Tensor:
        """[R, d] the meta-parameters, or values like them: a row for each lifetime, or one for all."""
        flat = self.present.flatten(values)
        return flat if self.stacked else flat.unsqueeze(0)

    # --- save and resume ---------------------------------------------------------------------------------------

    def state_dict(self) -> Tree:
        """Everything that the next step depends on, of all processes as a single one would save it; tensors only.

        All processes ask together, and only the first one is answered: elsewhere the state is empty.
        """
        group, estimator = self.problem.group, self.estimator
        carried, problems = group.collected(estimator.state_dict()), group.collected(self.problem.state_dict())
        if not group.first:
            return {}
        axes = {k: estimator.axis(k, self.problem) for k in carried[0]}
        state: Tree = {"steps": torch.tensor(self.steps), "moved": torch.tensor(self.moved)}
        state |= {f"eta/{k}": p.detach().clone() for k, p in self.eta.items()}  # stop: saved values
        state |= {} if self._before is None else {"before": self._before.clone()}
        state |= {f"optimizer/{k}": v.clone() for k, v in self._state.items()}
        for k, axis in axes.items():
            state[f"estimator/{k}"] = carried[0][k] if axis is None else torch.cat([c[k] for c in carried], axis)
        return state | {f"problem/{k}": v for k, v in self.problem.join(problems).items()}

    @torch.no_grad()
    def load_state_dict(self, state: Tree) -> None:
        """Continue from a saved state: the same numbers follow as if there had been no break (to rounding, where the
        number of processes is another one)."""
        self.steps, self.moved = int(state["steps"]), bool(state["moved"])
        self._before = state["before"].clone() if "before" in state else None
        for name, p in self.eta.items():
            p.copy_(state[f"eta/{name}"])
        self._state = {k: v.clone().to(self._state[k]) for k, v in under("optimizer", state).items()}
        group, carried = self.problem.group, under("estimator", state)
        for k, v in carried.items():
            if (axis := self.estimator.axis(k, self.problem)) is not None:
                device = next(iter(self.eta.values())).device
                carried[k] = group.own(v.movedim(axis, 0)).movedim(0, axis).clone().to(device)
        self.estimator.load_state_dict(carried)
        self.problem.load_state_dict(self.problem.part(under("problem", state)))
