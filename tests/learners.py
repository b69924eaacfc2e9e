"""Agents that learn beside a component, as a problem for estimators: put together as meta-training does, but bare."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, Slots
from learned_rl.substitute import substituted
from learned_rl.types import stream
from meta_optimizers.agent_bandit import AgentBandit, AgentBanditConfig
from meta_optimizers.learning import Learning, OuterLossConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.problem import Eta

CRITIC = OuterCriticConfig()


def learning_problem(
    family,
    component,
    agent,
    lifetimes,
    horizon,
    *,
    kind=Learning,
    loss=None,
    critic=CRITIC,
    seed=0,
    streams=None,
    staggered=True,
    window=1,
    dtype=torch.float64,
    **plugged,
):
    """A problem around one learned component, and the meta-parameters with which it begins.

    Args:
        plugged: components of the other slots; the rest of them hold the hand-made ones.
    """
    algorithm = Algorithm(agent, Slots.fill(agent, **{component.slot: component.to(dtype)}, **plugged))
    lives = Lifetimes(family, algorithm, lifetimes, horizon, seed, streams=streams, dtype=dtype)
    if staggered:
        lives.stagger(window)
    bandit = AgentBandit(AgentBanditConfig(), agent.hyper, lives.streams.total, stream("bandit", seed))
    problem = kind(lives, (component.slot,), loss or OuterLossConfig(), critic, bandit, together=not staggered)
    return problem, Eta({k: v.detach().clone() for k, v in problem.parameters.items()})


def check_differences(component: nn.Module, lived: Callable[[nn.Module], Tensor]) -> None:
    """The meta-gradient of what agents [P] lived with a component, against central differences."""
    names, eta = zip(*component.named_parameters(), strict=True)

    def judged(*eta: Tensor) -> Tensor:
        return lived(substituted(component, dict(zip(names, eta, strict=True)), stacked=False)).sum()

    for name, slope in zip(names, torch.autograd.grad(judged(*eta), eta), strict=True):
        assert slope.abs().max() > 1e-6, name
    assert gradcheck(judged, eta, eps=1e-6, rtol=1e-5, atol=1e-8)


def check_each_alone(component: nn.Module, lived: Callable[[nn.Module], Tensor], stacked: Sequence[Tensor]) -> None:
    """Lifetimes with parameters of their own (the component's, [P, ...]) in one call, as each of them alone:
    what they lived [P], and its meta-gradient."""
    names = [name for name, _ in component.named_parameters()]
    stacked = [v.detach().requires_grad_() for v in stacked]
    found = lived(substituted(component, dict(zip(names, stacked, strict=True)), stacked=True))
    slopes = torch.autograd.grad(found.sum(), stacked)
    for p in range(len(found)):
        alone = [v[p].detach().requires_grad_() for v in stacked]
        judged = lived(substituted(component, dict(zip(names, alone, strict=True)), stacked=False))[p]
        assert_close(found[p], judged, rtol=1e-12, atol=1e-14)
        expected = torch.autograd.grad(judged, alone)
        assert_close([v[p] for v in slopes], list(expected), rtol=1e-9, atol=1e-13)
