"""Learned optimizers: the published settings of Optim4RL on Catch.

Lan et al., "Learning to Optimize for Reinforcement Learning", RLC 2024, arXiv:2302.01470: A2C with one copy of the
environment for each of 64 agents, rollouts of 20 steps, windows of 4 updates, and an outer loss that is A2C's own on
the next rollout, the value's error and the entropy included. Agents begin at staggered ages and live for 32 windows.
Ours have one hidden layer of 32 units, where Adam at the paper's step size of 1e-3 is slow (the paper: 256).
"""

import math

from experiments.recipes import Recipe
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from meta_optimizers.learning import OuterLossConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.trainer import MetaTrainConfig
from meta_optimizers.truncated import TruncatedConfig

_A2C = PPOConfig(
    n_envs=1,
    n_steps=20,
    n_epochs=1,
    n_minibatches=1,
    normalize_advantage=False,
    hyper=Hyper(
        learning_rate=1e-3,
        gamma=0.995,
        gae_lambda=0.95,
        clip_range=math.inf,
        ent_coef=0.01,
        max_grad_norm=math.inf,
    ),
    agent=AgentConfig(kind="mlp", hidden=(32,), activation="relu", shared=True),
)
_SAME_LOSS = OuterCriticConfig(source="agent", gamma=0.995, gae_lambda=0.95, normalize=False)

RECIPES = (
    Recipe(
        name="optim4rl-catch",
        about="Optim4RL with the paper's settings on Catch, small networks",
        family="catch/10x5",
        component="optim4rl",
        meta_steps=78,
        minutes=30.0,
        validate_every=26,
        validation_tasks=16,
        train=MetaTrainConfig(
            lifetimes=64,
            horizon=128,
            learning_rate=3e-3,
            agent=_A2C,
            estimator=TruncatedConfig(window=4, outer_terms="last", outer_data="fresh_reuse"),
            loss=OuterLossConfig(policy_entropy=0.01, value=0.5),
            critic=_SAME_LOSS,
        ),
    ),
)
