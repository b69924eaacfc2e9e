"""Rematerialised: the gradient of the plain unroll, to rounding, with the graph of one update at a time.

Run the window without a graph and keep each update's state and data; then go backwards, rebuild one update's graph, and
pull the adjoint through it:

    lambda_k, G <- d/d(theta_k, eta) [ c_k(theta_k, eta) + <lambda_{k+1}, U(theta_k, eta)> ],     G summed over k

with c_k what update k contributes to the meta-loss. This is checkpointing at every step (Griewank & Walther, 2000),
which Kemaev et al., "Scalable Meta-Learning via Mixed-Mode Differentiation", 2025, arXiv:2505.00793, use per inner
update as well. Their forward-over-reverse products need losses whose second derivatives are symmetric; rebuilding does
not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learned_rl.types import Tree
from meta_optimizers.corrections import score_weights
from meta_optimizers.problem import Eta, Problem
from meta_optimizers.truncated import TruncatedConfig, TruncatedMetaGradient, Window, adjoint_growth


@dataclass(frozen=True)
class RematerialisedConfig(TruncatedConfig):
    """The same settings as the plain unroll's."""


class Rematerialised(TruncatedMetaGradient):
    """The truncated meta-gradient in the memory of one update."""

    name, Config = "rematerialised", RematerialisedConfig
    config: RematerialisedConfig

    def differentiate(self, problem: Problem, eta: Eta, length: int, thorough: bool) -> Window:
        with torch.no_grad():
            window = self.run(problem, eta, problem.present(), length)
        weights, keep = self.config.judged(length), window.alive
        credit = self._credit(problem, window, weights, length)
        grads = {k: torch.zeros_like(v) for k, v in eta.values.items()}
        adjoint: Tree = {}
        if self.config.judges_end:
            last = _leaf(window.states[-1])
            loss = weights[length] * problem.judge(last, window.data[length], eta)
            adjoint = _pull(torch.where(keep, loss, 0.0).sum(), last, eta, grads)
        end = adjoint.get("theta")  # of the last state on whose own data the window stands
        for k in reversed(range(length)):
            state, data = _leaf(window.states[k]), window.data[k]
            moved = self.advance(problem, state, data, eta, weights[k] != 0)
            loss = self.contribution(problem, moved, data, eta, weights, k) + credit[k] * moved.log_prob
            scalar = torch.where(keep, loss, 0.0).sum()
            for name, cotangent in adjoint.items():
                if (value := moved.state[name]).requires_grad:
                    scalar = scalar + (value * cotangent).nan_to_num().sum()
            adjoint = _pull(scalar, state, eta, grads)
            if end is None and thorough:
                end = adjoint["theta"] + self._judged_before(problem, window, eta, weights, k)
        window.grads = grads
        window.growth = adjoint_growth(adjoint["theta"], end) if thorough and end is not None else None
        return window

    def _credit(self, problem: Problem, window: Window, weights: list[float], length: int) -> Tensor:
        """[K, P] weights of the score-function term."""
        costs = [problem.cost(d) for d in window.data]
        return score_weights(self.config.correction, costs, weights, length, problem.group)

    def _judged_before(self, problem: Problem, window: Window, eta: Eta, weights: list[float], k: int) -> Tensor:
        """Derivative by state k of its outer loss on the data that made it, which is update k - 1's to contribute."""
        last = _leaf(window.states[k])
        if self.config.outer_data != "same_is" or not weights[k]:
            return torch.zeros_like(last["theta"])
        loss = weights[k] * problem.judge(last, window.data[k - 1], eta, importance=True)
        return torch.autograd.grad(torch.where(window.alive, loss, 0.0).sum(), last["theta"])[0]


def _leaf(state: Tree) -> Tree:
    """The state, to differentiate by."""
    return {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in state.items()}  # stop: a graph begins here


def _pull(scalar: Tensor, state: Tree, eta: Eta, grads: Tree) -> Tree:
    """Derivatives by the state; those by eta are added to `grads`."""
    if not scalar.requires_grad:
        return {k: torch.zeros_like(v) for k, v in state.items() if v.requires_grad}
    names = [k for k, v in state.items() if v.requires_grad]
    inputs = [state[k] for k in names] + eta.tensors
    found = torch.autograd.grad(scalar, inputs, allow_unused=True, materialize_grads=True)
    for name, g in zip(eta.values, found[len(names) :], strict=True):
        grads[name] += g
    return dict(zip(names, found, strict=False))
