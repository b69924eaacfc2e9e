"""What a step of a learned optimizer costs, beside `torch.optim.Adam(foreach=True)` on the same tensors.

Two kinds of parameters: a population of perceptrons of 2 x 64 units, whose tensors have the agents as their first axis,
and one network of about a million parameters. The step alone is measured, from gradients that are there; and a whole
training step, forward, backward and optimizer, on a minibatch as PPO has it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from experiments.benchmarks.measure import Result, Rounds, seconds
from learned_rl.component import UpdateRule
from learned_rl.registry import components
from learned_rl.rule_optimizer import RuleOptimizer


@dataclass(frozen=True)
class Settings:
    """Sizes of the benchmark."""

    agents: int = 10
    """of the population"""
    observations: int = 8
    """that each reads"""
    actions: int = 4
    """that each has"""
    width: int = 64
    """of their two hidden layers"""
    large: tuple[int, ...] = (64, 700, 700, 640, 8)
    """widths of the network's layers"""
    batch: int = 256
    """rows of a training step, for each agent"""
    rules: tuple[str, ...] = ("learned_adam", "meta_sgd", "l2l", "optim4rl", "open", "mlp_optimizer")
    """learned optimizers"""
    steps: int = 20
    """in a round"""
    rounds: int = 5
    """in which all take turns"""


DEFAULT = Settings()
ADAM = "Adam(foreach)"


def _population(s: Settings) -> list[nn.Parameter]:
    """Weights and biases [P, ...] of policy and value."""
    found = []
    for out in (s.actions, 1):
        widths = (s.observations, s.width, s.width, out)
        for n, m in itertools.pairwise(widths):
            found += [nn.Parameter(torch.randn(s.agents, n, m)), nn.Parameter(torch.zeros(s.agents, m))]
    return found


def _network(s: Settings) -> nn.Sequential:
    layers = [layer for n, m in itertools.pairwise(s.large) for layer in (nn.Linear(n, m), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def _optimizer(name: str, params: list[nn.Parameter], rows: bool) -> torch.optim.Optimizer:
    if name == ADAM:
        return torch.optim.Adam(params, lr=1e-6, foreach=True)
    torch.manual_seed(0)
    kind = components()[name]
    # Without units to watch: reading them belongs to the forward pass.
    config = kind.Config(dormancy=False) if hasattr(kind.Config(), "dormancy") else None
    rule = kind(config)
    assert isinstance(rule, UpdateRule)
    return RuleOptimizer(params, rule, lr=1e-6, rows=rows, total_steps=10_000)


def _steps(s: Settings, name: str, params: list[nn.Parameter], rows: bool) -> Callable[[], float]:
    """Seconds of some steps along gradients that are there."""
    optimizer = _optimizer(name, params, rows)
    for p in params:
        p.grad = torch.randn_like(p)

    def run() -> None:
        for _ in range(s.steps):
            optimizer.step()

    run()
    return lambda: seconds(run)


def _training(
    s: Settings, name: str, params: list[nn.Parameter], loss: Callable[[], torch.Tensor], rows: bool
) -> Callable[[], float]:
    """Seconds of some training steps."""
    optimizer = _optimizer(name, params, rows)

    def run() -> None:
        for _ in range(s.steps):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    run()
    return lambda: seconds(run)


def _training_population(s: Settings, name: str) -> Callable[[], float]:
    torch.manual_seed(0)
    params, x = _population(s), torch.randn(s.agents, s.batch, s.observations)

    def loss() -> torch.Tensor:
        total = x.new_zeros(())
        for tower in (params[:6], params[6:]):
            y = x
            for i, (weight, bias) in enumerate(zip(tower[::2], tower[1::2], strict=True)):
                y = torch.baddbmm(bias.unsqueeze(1), y, weight)
                y = torch.tanh(y) if i < 2 else y
            total = total + y.square().mean((1, 2)).sum()
        return total

    return _training(s, name, params, loss, rows=True)


def _training_network(s: Settings, name: str) -> Callable[[], float]:
    torch.manual_seed(0)
    module, x = _network(s), torch.randn(s.batch, s.large[0])
    return _training(s, name, list(module.parameters()), lambda: module(x).square().mean(), rows=False)


def measure(s: Settings = DEFAULT) -> list[Result]:
    """Each learned optimizer beside Adam, on both kinds of parameters."""
    small = sum(p.numel() for p in _population(s)) // s.agents
    large = sum(p.numel() for p in _network(s).parameters())
    cases: dict[str, Callable[[str], Callable[[], float]]] = {
        f"step, {s.agents} agents of {small:,} parameters": lambda name: _steps(s, name, _population(s), True),
        f"step, {large:,} parameters": lambda name: _steps(s, name, list(_network(s).parameters()), False),
        f"training step, batch {s.batch}, {s.agents} agents": lambda name: _training_population(s, name),
        f"training step, batch {s.batch}, {large:,} parameters": lambda name: _training_network(s, name),
    }
    rows = []
    for case, run in cases.items():
        rounds = Rounds({name: run(name) for name in (ADAM, *s.rules)}, s.rounds)
        rows.append(Result("optimizers", f"{ADAM}: {case}", 1e3 * rounds.median(ADAM) / s.steps, "ms"))
        for name in s.rules:
            value, ratio = 1e3 * rounds.median(name) / s.steps, rounds.ratio(name, ADAM)
            rows.append(
                Result("optimizers", f"{name}: {case}", value, "ms", ADAM, ratio, "ratio <= 3", rounds.spread(name))
            )
    return rows
