"""Made-up experience for tests: small, seeded, with terminated and truncated steps in the middle."""

import torch
from gymnasium.spaces import Box, Discrete

from learned_rl.agents import AgentConfig, Population, make_agent
from learned_rl.component import Context
from learned_rl.trajectory import Trajectory

STATES, ACTIONS = 4, 3
SPACES = {"tabular": Discrete(STATES), "mlp": Box(-1.0, 1.0, (3,)), "conv": Box(0.0, 1.0, (2, 5, 4))}


def observations(space, *lead, generator, dtype=torch.float64):
    """[*lead, ...] of the space: states of a Discrete one, else standard normal numbers."""
    if isinstance(space, Discrete):
        return torch.randint(int(space.n), lead, generator=generator)
    return torch.randn(*lead, *space.shape, generator=generator, dtype=dtype)


def trajectory(space, seed, T=5, P=2, B=3, actions=ACTIONS, dtype=torch.float64, truncate=True):
    """[T, P, B] experience of nobody in particular: actions and their probabilities are drawn, not acted."""
    g = torch.Generator().manual_seed(seed)
    lead = (T, P, B)
    terminated = torch.rand(lead, generator=g) < 0.2
    truncated = (torch.rand(lead, generator=g) < 0.2) & ~terminated & truncate
    return Trajectory(
        obs=observations(space, T + 1, P, B, generator=g, dtype=dtype),
        action=torch.randint(actions, lead, generator=g),
        log_prob=torch.randn(lead, generator=g, dtype=dtype) * 0.1 - torch.tensor(float(actions)).log(),
        reward=torch.randn(lead, generator=g, dtype=dtype),
        terminated=terminated,
        truncated=truncated,
        final_obs=observations(space, *lead, generator=g, dtype=dtype) if truncate else None,
        logits=torch.randn(*lead, actions, generator=g, dtype=dtype),
        follows=torch.cat([torch.zeros(1, P, B, dtype=torch.bool), (terminated | truncated)[:-1]]),
    )


def population(kind, heads=None, value=False, P=2, seed=0, scale=0.5, actions=ACTIONS, hidden=(6,)):
    """P agents in float64 whose weights are all random, so that no gradient is zero by symmetry."""
    config = AgentConfig(kind=kind, hidden=hidden, channels=2)
    agents = Population(make_agent(config, SPACES[kind], Discrete(actions), heads or {}, value), P, torch.float64)
    g = torch.Generator().manual_seed(seed)
    agents.theta.data.copy_(scale * torch.randn(agents.theta.shape, generator=g, dtype=torch.float64))
    return agents


def context(P=2, age=0.0, horizon=10.0, memory=None):
    return Context(torch.full((P,), age), torch.full((P,), horizon), memory or {})
