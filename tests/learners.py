"""Agents that learn beside a component, as a problem for estimators: put together as meta-training does, but bare."""

from __future__ import annotations

import torch

from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, Slots
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
