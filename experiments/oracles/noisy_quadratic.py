"""The noisy quadratic: short windows learn schedules that decay far too fast, and the price is known exactly.

Wu, Ren, Liao, Grosse, "Understanding Short-Horizon Bias in Stochastic Meta-Optimization", 2018, arXiv:1803.02021. SGD
with step size a on 1/2 sum_i h_i (theta_i - c_i)^2, with the target c_i ~ N(0, s_i^2) drawn afresh at every step, moves
the second moments A_i = E theta_i^2 by

    A_i <- (1 - a h_i)^2 A_i + (a h_i)^2 s_i^2,     excess loss = 1/2 sum_i h_i A_i

so that the state is A and nothing is random. Far-sighted schedules keep the step size high while low curvatures make
progress that does not show yet. The best step size for the very next loss is a = sum h^2 A / sum h^3 (A + s^2).

The constants are this project's: 100 curvatures drawn log-uniformly from 1e-2 to 1, s_i^2 = 0.1 / h_i, A_i = 1 at
first, 1000 steps. Greedy step sizes fall from 1.23 over 0.26 (10th) and 0.043 (100th) to 0.0081 (1000th) and end at an
excess loss of 0.108; a constant 0.21 that decays linearly after 30 % of the steps ends at 0.0196. Schedules that are
judged K steps ahead, found by `learned`, end at

    K                    1        10       100      1000
    final excess loss    0.108    0.088    0.026    0.011
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from learned_rl.types import Tree, UserError
from meta_optimizers.estimator import Estimator
from meta_optimizers.group import Group
from meta_optimizers.problem import Eta, Moved, Problem

STEPS = 1000
CURVATURE = torch.from_numpy(10 ** np.random.default_rng(0).uniform(-2.0, 0.0, 100))  # [D] h
NOISE = 0.1 / CURVATURE  # [D] s^2


def moved(moments: Tensor, rate: Tensor | float) -> Tensor:
    """A [..., D] after one step with step size `rate [...]`."""
    step = CURVATURE * (rate.unsqueeze(-1) if isinstance(rate, Tensor) else rate)
    return (1 - step).square() * moments + step.square() * NOISE


def excess(moments: Tensor) -> Tensor:
    """[...] expected loss above the least possible, from A [..., D]."""
    return 0.5 * (CURVATURE * moments).sum(-1)


def greedy() -> Tensor:
    """[STEPS] step sizes, each the best for the loss right after it."""
    moments, rates = torch.ones_like(CURVATURE), []
    for _ in range(STEPS):
        slope, bend = CURVATURE.square() * moments, CURVATURE**3 * (moments + NOISE)
        rates.append(slope.sum() / bend.sum())
        moments = moved(moments, rates[-1])
    return torch.stack(rates)


def hold_then_decay(rate: float = 0.21, hold: float = 0.3) -> Tensor:
    """[STEPS] a constant step size for a share `hold` of the steps, then one that falls linearly to zero."""
    left = 1 - torch.arange(STEPS, dtype=torch.float64) / STEPS
    return rate * (left / (1 - hold)).clamp(max=1.0)


def path(rates: Tensor) -> Tensor:
    """[STEPS + 1, D] second moments under step sizes [STEPS]."""
    moments = [torch.ones_like(CURVATURE)]
    for rate in rates:
        moments.append(moved(moments[-1], rate))
    return torch.stack(moments)


def final_excess(rates: Tensor) -> float:
    """Excess loss after all steps of a schedule."""
    return excess(path(rates)[-1]).item()


class NoisyQuadratic(Problem):
    """P lifetimes of SGD under a learned schedule, which begin at ages spread over the schedule.

    The schedule is linear between knots in log(step size) over log(1 + age), so that it can be steep early on. The
    state's "theta" [P, D] holds the moments A; "age" [P] counts the steps.

    Args:
        lifetimes: P; a divisor of STEPS.
        eta:       the schedule on which the lifetimes came to where they begin.

    Raises:
        UserError: lifetimes that no spacing spreads evenly.
    """

    def __init__(self, lifetimes: int, eta: Eta) -> None:
        if STEPS % lifetimes:
            raise UserError(f"lifetimes is {lifetimes}: expected a divisor of {STEPS}, such as {_divisor(lifetimes)}.")
        self.lifetimes, self.group = lifetimes, Group()
        age = torch.arange(0, STEPS, STEPS // lifetimes)
        with torch.no_grad():
            self._state = {"theta": path(schedule(eta))[age], "age": age}

    @staticmethod
    def eta(rate: float = 0.1, knots: int = 12) -> Eta:
        """A constant schedule to begin with."""
        return Eta({"log_rate": torch.full((knots,), math.log(rate), dtype=torch.float64)})

    def present(self) -> Tree:
        return {k: v.clone() for k, v in self._state.items()}

    def collect(self, state: Tree) -> Tree:
        return {"cost": excess(state["theta"].detach())}  # stop: data

    def step(self, state: Tree, data: Tree, eta: Eta) -> Moved:
        theta, zero = state["theta"], torch.zeros_like(data["cost"])
        after = {"theta": moved(theta, rate_at(state["age"], eta)), "age": state["age"] + 1}
        return Moved(after, excess(theta), zero, zero, theta.detach().isfinite().all(1))  # stop: a look

    def judge(self, state: Tree, data: Tree, eta: Eta, importance: bool = False, bare: bool = False) -> Tensor:
        return excess(state["theta"])

    def cost(self, data: Tree) -> Tensor:
        return data["cost"]

    def commit(self, state: Tree) -> None:
        self._state = {k: v.detach().clone() for k, v in state.items()}  # stop: the present

    def renew(self, broken: Tensor) -> Tensor:
        ended = broken | (self._state["age"] >= STEPS)
        self._state = {
            "theta": torch.where(ended[:, None], 1.0, self._state["theta"]),
            "age": torch.where(ended, 0, self._state["age"]),
        }
        return ended

    def state_dict(self) -> Tree:
        return self.present()

    def load_state_dict(self, state: Tree) -> None:
        self._state = {k: v.clone() for k, v in state.items()}


def rate_at(age: Tensor, eta: Eta) -> Tensor:
    """[P] step size of steps `age [P]`."""
    knots = eta.values["log_rate"].expand(len(age), -1)
    place = age.to(knots.dtype).log1p() * ((knots.shape[1] - 1) / math.log(STEPS))
    left = place.long().clamp(max=knots.shape[1] - 2)
    low, high = (knots.gather(1, i[:, None])[:, 0] for i in (left, left + 1))
    return (low + (place - left) * (high - low)).exp()


def schedule(eta: Eta) -> Tensor:
    """[STEPS] step sizes of a learned schedule."""
    return rate_at(torch.arange(STEPS), eta)


def learned(estimator: Estimator, meta_steps: int, learning_rate: float = 0.1) -> Eta:
    """The schedule that Adam finds from an estimator's gradients, which fades to zero linearly.

    As many lifetimes run as there are windows in one, so that every meta-step sees all ages.
    """
    start = NoisyQuadratic.eta()
    problem = NoisyQuadratic(STEPS // estimator.updates, start)
    values = {k: v.clone().requires_grad_() for k, v in start.values.items()}
    optimizer = torch.optim.Adam(values.values(), lr=learning_rate)
    fade = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, meta_steps)
    for problem.meta_step in range(meta_steps):
        estimate = estimator(problem, Eta({k: v.detach() for k, v in values.items()}))  # stop: estimators begin anew
        estimator.begin(problem.renew(estimate.broken))
        for name, grad in (estimate.grads or {}).items():
            values[name].grad = grad
        optimizer.step()
        fade.step()
    return Eta({k: v.detach() for k, v in values.items()})  # stop: the result


def _divisor(lifetimes: int) -> int:
    return min((d for d in range(1, STEPS + 1) if STEPS % d == 0), key=lambda d: abs(d - lifetimes))
