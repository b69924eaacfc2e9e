"""Thorough looks at a meta-gradient: how much of it is signal, and whether it is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from learned_rl.types import stream
from meta_optimizers.problem import Eta, Problem

if TYPE_CHECKING:
    from meta_optimizers.truncated import TruncatedMetaGradient, Window


def signal_to_noise(grads: Tensor, alive: Tensor) -> float:
    """Norm of the mean gradient over the standard error of that mean, from the gradients [P, d] of single lifetimes."""
    g = grads[alive]
    if len(g) < 2:
        return float("nan")
    noise = (g.var(0).sum() / len(g)).sqrt()
    return float(g.mean(0).norm() / noise.clamp(min=1e-30))


@torch.no_grad()
def probe_error(estimator: TruncatedMetaGradient, problem: Problem, eta: Eta, window: Window) -> float:
    """Relative error of the gradient along a random direction against central differences on the window's own data.

    Where a method treats something that depends on eta as a constant, differences see more than the gradient does.
    """
    generator = stream("probe", estimator.seed, problem.meta_step)
    shapes = {k: v.shape[1:] if eta.stacked else v.shape for k, v in eta.values.items()}
    direction = {k: torch.randn(s, generator=generator).to(eta.values[k]) for k, s in shapes.items()}
    flat = eta.flatten()
    size = flat.abs().max() if flat.numel() else flat.new_ones(())
    eps = float(torch.finfo(flat.dtype).eps ** (1 / 3) * size.clamp(min=1.0))

    def loss(sign: float) -> Tensor:
        moved = Eta({k: v + sign * eps * direction[k] for k, v in eta.values.items()}, eta.stacked)
        again = estimator.run(problem, moved, window.states[0], len(window.states) - 1, window.data)
        return torch.where(window.alive, again.loss, torch.zeros_like(again.loss)).sum()

    slope = (loss(1.0) - loss(-1.0)) / (2 * eps)
    claimed = sum((g * direction[k]).sum() for k, g in window.grads.items())
    return float((slope - claimed).abs() / slope.abs().clamp(min=1e-30))
