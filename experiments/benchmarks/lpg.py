"""Meta-steps of LPG: how fast, and how close to the time of their matrix products alone.

A meta-step is one window of K updates of P lifetimes on B environments of T steps, a rollout for the meta-loss, the
meta-gradient and the outer Adam step (`MetaTrainer.step`). Agents are tables that descend by SGD, on `grid/small`; the
objective is LPG with a GRU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from experiments.benchmarks.measure import Result, Rounds, seconds
from learned_rl.ppo import PPOConfig
from learned_rl.registry import make_family
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from meta_optimizers.truncated import TruncatedConfig
from objectives.lpg import LPG

TARGETS = {256: ">= 45,000 env steps/s", 32: ">= 200,000 env steps/s"}  # by width
PRODUCTS_TARGETS = {256: "ratio <= 2.5"}


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    lifetimes: int = 8
    """P"""
    copies: int = 64
    """B"""
    steps: int = 20
    """T"""
    window: int = 5
    """K"""
    predictions: int = 30
    """m: entries of the agent's prediction"""
    widths: tuple[int, ...] = (256, 32)
    """units of the recurrent core, one benchmark each"""
    warm_up: int = 3
    """meta-steps that are not measured"""
    repeats: int = 15
    """meta-steps that are"""
    device: str = "cpu"

    @property
    def agent_steps(self) -> int:
        """Environment steps of one meta-step that agents learned from (those of the meta-loss not counted)."""
        return self.window * self.lifetimes * self.copies * self.steps


DEFAULT = Settings()


def make_trainer(s: Settings, width: int) -> tuple[MetaTrainer, LPG]:
    """The trainer whose meta-steps are timed, and the objective that it trains."""
    torch.manual_seed(0)
    objective = LPG(core="gru", width=width, predictions=s.predictions)
    agent = PPOConfig(**objective.settings(tabular=True) | {"n_envs": s.copies, "n_steps": s.steps})
    config = MetaTrainConfig(lifetimes=s.lifetimes, agent=agent, estimator=TruncatedConfig(window=s.window))
    return MetaTrainer(make_family("grid/small"), objective, config, device=s.device), objective


def matrix_products(s: Settings, objective: LPG) -> Callable[[], None]:
    """The matrix products of one meta-step in the core and its two heads, and nothing else, into memory that is ready.

    For each of the K updates, with n = P B columns: the projection of the inputs, T recurrent products, two heads;
    then back: T transposed recurrent products, T for the recurrent weights, and for the heads and the projection those
    of weights and inputs. Shapes and layout are the objective's own.
    """
    T, n, core = s.steps, s.lifetimes * s.copies, objective.core
    layers = [(w.weight, core.width) for w in (objective.policy_head, objective.prediction_head)]
    layers.append((core.weight_x, core.weight_x.shape[1]))
    w_h = core.weight_h.detach()  # stop: only to multiply with
    before, d_a = (torch.randn(T, k, n, device=s.device) for k in (core.width, len(w_h)))
    forward = [(w_h, h) for h in before]
    backward = [pair for h, d in zip(before, d_a, strict=True) for pair in ((w_h.T, d), (d, h.T))]
    for weight, inputs in layers:
        w = weight.detach().expand(T, -1, -1)  # stop: only to multiply with
        x, d = (torch.randn(T, k, n, device=s.device) for k in (inputs, len(weight)))
        forward.append((w, x))
        backward += [(d, x.mT), (w.mT, d)]
    shapes = {(*left.shape[:-1], right.shape[-1]) for left, right in forward + backward}
    out = {shape: torch.empty(shape, device=s.device) for shape in shapes}
    pairs = forward * s.window + backward * s.window
    products = [(x, y, out[*x.shape[:-1], y.shape[-1]], torch.mm if x.dim() == 2 else torch.bmm) for x, y in pairs]

    def run() -> None:
        for left, right, product, multiply in products:
            multiply(left, right, out=product)

    return run


def measure(s: Settings = DEFAULT) -> list[Result]:
    """Rates of the meta-step at each width, and its time over that of its products."""
    return [result for width in s.widths for result in _measure_width(s, width)]


def _measure_width(s: Settings, width: int) -> list[Result]:
    trainer, objective = make_trainer(s, width)
    products = matrix_products(s, objective)
    for _ in range(s.warm_up):
        trainer.step()
        products()
    runs = {"step": lambda: seconds(trainer.step, s.device), "products": lambda: seconds(products, s.device)}
    rounds = Rounds(runs, s.repeats)
    time, note = rounds.median("step"), rounds.spread("step")
    rate, every = s.agent_steps / time, s.agent_steps * (s.window + 1) / s.window / time
    name, peer, unit = f"width {width}", "its matrix products alone", "env steps/s"
    return [
        Result(
            "lpg", f"{name}, experience the agents learned from", rate, unit, "", None, TARGETS.get(width, ""), note
        ),
        Result("lpg", f"{name}, with the meta-loss's rollout", every, unit, note=note),
        Result(
            "lpg",
            f"{name}, one meta-step",
            time,
            "s",
            peer,
            rounds.ratio("step", "products"),
            PRODUCTS_TARGETS.get(width, ""),
            f"products: {rounds.spread('products')}",
        ),
    ]
