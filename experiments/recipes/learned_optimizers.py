"""Learned optimizers: the published settings of Optim4RL on Catch, and four that begin at Adam on cart-poles.

* `optim4rl-catch`. Lan et al., "Learning to Optimize for Reinforcement Learning", RLC 2024, arXiv:2302.01470: A2C with
  one copy of the environment for each of 64 agents, rollouts of 20 steps, windows of 4 updates, and an outer loss that
  is A2C's own on the next rollout, the value's error and the entropy included. Agents begin at staggered ages and live
  for 32 windows. Ours have one hidden layer of 32 units, where Adam at the paper's step size of 1e-3 is slow (the
  paper: 256).
* `NAME-cartpole`. Small agents with short lives on cart-poles of many kinds: 4096 environment steps in 64 updates of
  A2C, in which the speed of learning is all. The nominal rule is Adam at a learning rate that suits it there, and what
  agents earn over their whole lives is compared by an evolution strategy. Myopic meta-gradients made Adam worse.
"""

import math
from typing import Any

from experiments.recipes import Recipe
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from meta_optimizers.black_box import BlackBoxConfig
from meta_optimizers.estimator import EstimatorConfig
from meta_optimizers.evolution import EvolutionConfig
from meta_optimizers.learning import OuterLossConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.trainer import MetaTrainConfig
from meta_optimizers.truncated import TruncatedConfig


def _a2c(n_envs: int, n_steps: int, learning_rate: float, gamma: float, agent: AgentConfig) -> PPOConfig:
    hyper = Hyper(
        learning_rate=learning_rate,
        gamma=gamma,
        gae_lambda=0.95,
        clip_range=math.inf,
        ent_coef=0.01,
        max_grad_norm=math.inf,
    )
    return PPOConfig(
        n_envs=n_envs,
        n_steps=n_steps,
        n_epochs=1,
        n_minibatches=1,
        normalize_advantage=False,
        hyper=hyper,
        agent=agent,
    )


_SAME_LOSS = OuterCriticConfig(source="agent", gamma=0.995, gae_lambda=0.95, normalize=False)
_UPDATES = 64  # in the life of an agent on cart-poles


def _cartpole(
    component: str, settings: dict[str, Any], estimator: EstimatorConfig, meta_steps: int, validate_every: int = 20
) -> Recipe:
    return Recipe(
        name=f"{component.replace('_', '-')}-cartpole",
        about=f"{component} from Adam, on short lives with cart-poles of many kinds, by evolution",
        family="control/cartpole",
        component=component,
        settings=settings,
        meta_steps=meta_steps,
        minutes=20.0,
        validate_every=validate_every,
        validation_tasks=128,
        train=MetaTrainConfig(
            lifetimes=64,
            horizon=_UPDATES,
            learning_rate=0.06,
            half_life=60.0,
            max_grad_norm=math.inf,
            agent=_a2c(4, 16, 0.04, 0.9, AgentConfig(kind="mlp", hidden=(16,))),
            estimator=estimator,
        ),
    )


def _ranked(sigma: float) -> EvolutionConfig:
    return EvolutionConfig(window=_UPDATES, sigma=sigma, shaping="rank")


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
            agent=_a2c(1, 20, 1e-3, 0.995, AgentConfig(kind="mlp", hidden=(32,), activation="relu", shared=True)),
            estimator=TruncatedConfig(window=4, outer_terms="last", outer_data="fresh_reuse"),
            loss=OuterLossConfig(policy_entropy=0.01, value=0.5),
            critic=_SAME_LOSS,
        ),
    ),
    _cartpole("open", {"nominal": "adam"}, _ranked(0.2), 240),
    _cartpole("optim4rl", {"nominal": "adam", "conditioned": True}, _ranked(0.3), 200),
    _cartpole("l2l", {"nominal": "adam"}, _ranked(0.1), 120),
    _cartpole(
        "meta_sgd",
        {"base": "adam", "per": "tensor"},
        BlackBoxConfig(window=_UPDATES, sigma=0.5, tasks=4),
        meta_steps=60,
        validate_every=10,
    ),
)
