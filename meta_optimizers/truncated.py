"""The truncated meta-gradient: differentiate through a window of K inner updates, judge what comes out.

Xu, van Hasselt, Silver, "Meta-Gradient Reinforcement Learning", 2018, arXiv:1805.09801, for the idea; Werbos,
"Backpropagation through time", 1990, and Sutskever, 2013, for truncation with carried state. With theta_k the inner
parameters after k updates of the window,

    L(eta) = sum_k w_k l(theta_k) + mean_k penalty_k,        k = 1..K

averaged over lifetimes. The window begins at constants: what eta did in earlier windows is cut off (truncation bias,
Wu et al., 2018, arXiv:1803.02021). Sampled actions are data, unless a score-function term is added
(`meta_optimizers.corrections`). Mixing horizons by the weights w_k is what Bonnet et al., 2021, arXiv:2111.00206, found
to lower the variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from learned_rl.component import finite
from learned_rl.spaces import Integers, searched
from learned_rl.types import Tree, UserError, at_least, stream
from meta_optimizers.corrections import CorrectionConfig, score_weights
from meta_optimizers.diagnostics import probe_error, signal_to_noise
from meta_optimizers.estimator import Estimate, Estimator, EstimatorConfig
from meta_optimizers.problem import Eta, Moved, Problem


@dataclass(frozen=True)
class UnrollConfig(EstimatorConfig):
    """What estimators that look back through a window have in common."""

    window: int = field(default=5, metadata=searched(Integers(1, 20, log=True)))
    """K: inner updates that are differentiated through (where the window varies: the shortest)"""
    longest_window: int | None = None
    """the longest, where the window varies"""
    schedule: Literal["fixed", "random", "growing"] = "fixed"
    """fixed; random: each window's length is drawn log-uniformly; growing: from the shortest to the longest"""
    growth: int = 1000
    """meta-steps in which a growing window reaches its longest"""
    outer_data: Literal["fresh", "fresh_reuse", "shifted", "same_is"] = "fresh"
    """what the last state is judged on: fresh data, thrown away; fresh data that the next window learns from (unless a
    lifetime began anew, which with staggered lifetimes is often); shifted: it is not judged, only states whose data the
    window learns from; same_is: every state on the data that made it, weighted by the ratio of probabilities"""
    per_lifetime: bool = False
    """scale each lifetime's meta-gradient to norm 1 before averaging"""
    diagnose_every: int = 0
    """meta-steps between thorough looks: signal-to-noise over lifetimes, growth of the adjoint, finite differences on
    the window's data; 0: never"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, window=self.window, growth=self.growth)
        at_least(0, diagnose_every=self.diagnose_every)
        if self.schedule == "fixed" and self.longest_window is not None:
            raise UserError(
                f"longest_window is {self.longest_window}, but schedule is 'fixed': expected another schedule."
            )
        if self.schedule != "fixed":
            if self.longest_window is None:
                raise UserError(f"schedule is {self.schedule!r}: longest_window says how long windows may be.")
            at_least(self.window, longest_window=self.longest_window)

    def length(self, meta_step: int, seed: int) -> int:
        """K of the window at a meta-step."""
        longest = self.longest_window or self.window
        if self.schedule == "growing":
            return min(longest, self.window + meta_step * (longest - self.window) // self.growth)
        if self.schedule == "random":
            uniform = torch.rand((), generator=stream("window", seed, meta_step)).item()
            return round(math.exp(math.log(self.window) + uniform * math.log(longest / self.window)))
        return self.window

    @property
    def judges_end(self) -> bool:
        """Whether the state that comes out of the window is judged, on data of its own."""
        return self.outer_data.startswith("fresh")

    def judged(self, window: int) -> list[float]:
        """w_0..w_K: the weight of each state's outer loss; w_0 is 0."""
        return [0.0] * (window + 1)


@dataclass(frozen=True)
class WindowConfig(UnrollConfig):
    """States of the window are judged by the outer loss."""

    outer_terms: Literal["last", "every", "weighted"] = "every"
    """which states of the window are judged: the one that comes out of it, the ones after every update (costs no extra
    experience, since each update's data is fresh data of the update before), or all with given weights"""
    weights: tuple[float, ...] = ()
    """w_1..w_K of `weighted`"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.outer_terms == "weighted") != bool(self.weights):
            raise UserError(f"outer_terms is {self.outer_terms!r} with {len(self.weights)} weights: expected both.")
        if not all(map(math.isfinite, self.weights)):
            raise UserError(f"weights is {self.weights}: expected finite numbers.")
        if self.weights and (self.schedule != "fixed" or len(self.weights) != self.window):
            raise UserError(f"{len(self.weights)} weights: expected one for each update of a fixed window.")
        if self.outer_data == "shifted" and self.window < 2:
            raise UserError("outer_data is 'shifted': a window of 1 update has no state to judge; expected at least 2.")
        if self.outer_data == "shifted" and self.weights and self.weights[-1]:
            raise UserError(
                f"the last weight is {self.weights[-1]:g}: 'shifted' data do not judge that state; expected 0."
            )

    def judged(self, window: int) -> list[float]:
        last = window - 1 if self.outer_data == "shifted" else window
        if self.outer_terms == "weighted":
            return [0.0, *self.weights]
        if self.outer_terms == "last":
            return [float(k == last) for k in range(window + 1)]
        return [1 / last if 1 <= k <= last else 0.0 for k in range(window + 1)]


@dataclass(frozen=True)
class TruncatedConfig(WindowConfig):
    """The whole graph of the window is kept."""

    correction: CorrectionConfig = field(default_factory=CorrectionConfig)
    """the score-function term for what eta does to the data inside the window"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.correction.coef and self.outer_data == "same_is":
            raise UserError("outer_data is 'same_is': a correction needs data that the judged state collected itself.")


@dataclass
class Window:
    """What one window saw.

    Attributes:
        states:  K + 1 of them.
        data:    of each update, and of the last state if it is judged on fresh data.
        loss:    [P].
        alive:   [P] bool.
        metrics: name -> [P].
        grads:   name -> [...] summed over the alive lifetimes, or [P, ...] where eta is stacked.
        end:     where learning goes on; None: at the last state.
        pending: data that were collected at `end`; None: those of the last state.
        growth:  norm of the adjoint at the window's beginning over its norm at the end, if asked for.
    """

    states: list[Tree]
    data: list[Tree]
    loss: Tensor
    alive: Tensor
    metrics: dict[str, Tensor]
    grads: Tree = field(default_factory=dict)
    growth: float | None = None
    end: Tree | None = None
    pending: Tree | None = None


class TruncatedMetaGradient(Estimator):
    """Estimates the gradient over one window and leaves the problem at its end."""

    name: ClassVar[str] = "truncated"
    Config: ClassVar[type[UnrollConfig]] = TruncatedConfig
    config: UnrollConfig
    correction: ClassVar[CorrectionConfig] = CorrectionConfig()
    _pending: Tree | None = None  # data of the present state, to learn from

    @property
    def updates(self) -> int:
        return self.config.window

    @property
    def rollouts(self) -> int:
        return self.config.window + self.config.judges_end

    def __call__(self, problem: Problem, eta: Eta) -> Estimate:
        c, step = self.config, problem.meta_step
        thorough = bool(c.diagnose_every) and step % c.diagnose_every == 0
        leaf = eta.leaf(problem.lifetimes if c.per_lifetime or thorough else None)
        window = self.differentiate(problem, leaf, c.length(step, self.seed), thorough)
        problem.commit({k: v.detach() for k, v in (window.end or window.states[-1]).items()})  # stop: the window's end
        self._pending = (window.pending or window.data[-1]) if c.outer_data == "fresh_reuse" else None
        return self._estimate(problem, leaf, window, thorough, alone=eta.stacked)

    def differentiate(self, problem: Problem, eta: Eta, length: int, thorough: bool) -> Window:
        """Run a window with its graph and differentiate it."""
        first = problem.present()
        theta = first["theta"].requires_grad_(thorough)
        window = self.run(problem, eta, first, length)
        ends = [theta, window.states[self.last(length)]["theta"]] if thorough else []
        loss = torch.where(window.alive, window.loss, torch.zeros_like(window.loss)).sum()
        if not loss.requires_grad:  # eta moves nothing in this window
            window.grads = {k: torch.zeros_like(v) for k, v in eta.values.items()}
            return window
        found = torch.autograd.grad(loss, eta.tensors + ends, allow_unused=True, materialize_grads=True)
        window.grads = dict(zip(eta.values, found, strict=False))
        window.growth = adjoint_growth(*found[-2:]) if thorough else None
        return window

    def run(self, problem: Problem, eta: Eta, first: Tree, length: int, recorded: list[Tree] | None = None) -> Window:
        """A window from `first`, on fresh data or on what was recorded; with a graph where grad mode is on."""
        weights, states = self.config.judged(length), [first]
        data: list[Tree] = []
        losses: list[Tensor] = []
        moves: list[Moved] = []
        for k in range(length):
            data.append(recorded[k] if recorded else self.data(problem, states[-1], k))
            moves.append(self.advance(problem, states[-1], data[-1], eta, weights[k] != 0))
            states.append(moves[-1].state)
            losses.append(self.contribution(problem, moves[-1], data[-1], eta, weights, k))
        if self.config.judges_end:
            data.append(recorded[length] if recorded else problem.collect(states[-1]))
            losses.append(weights[length] * problem.judge(states[-1], data[-1], eta))
        total = torch.stack(losses).sum(0) + self.score_term(problem, data, [m.log_prob for m in moves], weights)
        alive = torch.stack([m.alive for m in moves]).all(0) & finite(states[-1]["theta"]) & total.isfinite()
        return Window(states, data, total, alive, mean([m.metrics for m in moves]))

    def last(self, length: int) -> int:
        """The last state on whose own data the window stands."""
        return length if self.config.judges_end else length - 1

    # --- what a window is made of ------------------------------------------------------------------------------

    def data(self, problem: Problem, state: Tree, k: int) -> Tree:
        """What update k learns from."""
        pending, self._pending = self._pending, None
        return pending if k == 0 and pending is not None else problem.collect(state)

    def advance(self, problem: Problem, state: Tree, data: Tree, eta: Eta, judged: bool) -> Moved:
        """One inner update with its graph; its loss is read only where `judged`."""
        return problem.step(state, data, eta)

    def contribution(
        self, problem: Problem, moved: Moved, data: Tree, eta: Eta, weights: list[float], k: int
    ) -> Tensor:
        """[P] what update k contributes to the meta-loss."""
        loss = moved.penalty / (len(weights) - 1)
        if self.config.outer_data == "same_is":
            return loss + weights[k + 1] * problem.judge(moved.state, data, eta, importance=True)
        return loss + weights[k] * moved.loss if weights[k] else loss

    def score_term(self, problem: Problem, data: list[Tree], scores: list[Tensor], weights: list[float]) -> Tensor:
        """[P] log-probabilities of earlier data, weighted by the cost of later data."""
        c = getattr(self.config, "correction", self.correction)
        if not c.coef:
            return torch.zeros_like(scores[0])
        costs = [problem.cost(d) for d in data]
        return (score_weights(c, costs, weights, len(scores), problem.group) * torch.stack(scores)).sum(0)

    # --- from a window to an estimate --------------------------------------------------------------------------

    def _estimate(self, problem: Problem, eta: Eta, window: Window, thorough: bool, alone: bool) -> Estimate:
        """From the gradients of the window: their average, or those of each lifetime if it learns alone."""
        alive, group = window.alive, problem.group
        count = group.sum(alive.sum())
        if not bool(count):
            return Estimate(None, ~alive, {"loss": float("nan")}, window.metrics)
        loss = window.loss.detach()  # stop: to look at
        total = group.sum(torch.where(alive, loss, torch.zeros_like(loss)).sum())
        metrics = {"loss": (total / count).item(), "window": float(self.config.length(problem.meta_step, self.seed))}
        metrics |= {k: v[alive].mean().item() for k, v in window.metrics.items()} if bool(alive.any()) else {}
        if thorough:
            metrics |= {"growth": window.growth or 0.0, "snr": signal_to_noise(eta.flatten(window.grads), alive)}
            metrics["probe_error"] = probe_error(self, problem, eta, window)
        grads = window.grads
        if eta.stacked:
            flat = eta.flatten(grads)
            scale = 1 / flat.norm(dim=1).clamp(min=1e-12) if self.config.per_lifetime else torch.ones_like(flat[:, 0])
            scaled = torch.where(alive.unsqueeze(1), flat * scale.unsqueeze(1), torch.zeros_like(flat))
            grads = eta.unflatten(scaled if alone else scaled.sum(0))
        if not alone:
            grads = {k: group.sum(v) / count for k, v in grads.items()}
        return Estimate(grads, ~alive, metrics, window.metrics)

    def begin(self, which: Tensor, elsewhere: bool = False) -> None:
        if elsewhere or bool(which.any()):
            self._pending = None  # some of it belongs to agents that are no more; all processes collect together

    def state_dict(self) -> Tree:
        return {f"pending/{k}": v.clone() for k, v in (self._pending or {}).items()}

    def load_state_dict(self, state: Tree) -> None:
        self._pending = {k.removeprefix("pending/"): v for k, v in state.items() if k.startswith("pending/")} or None


def mean(metrics: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """name -> [P], averaged over updates."""
    return {k: torch.stack([m[k] for m in metrics]).mean(0) for k in metrics[0]}


def adjoint_growth(begin: Tensor, end: Tensor) -> float:
    """|d loss / d theta_0| over |d loss / d theta_K|: beyond 1 earlier states matter more than later ones (Metz et al.,
    2021, arXiv:2111.05803, on what products of Jacobians do to gradients)."""
    return float(begin.norm() / end.norm().clamp(min=1e-30))
