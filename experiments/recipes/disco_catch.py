"""Disco from random weights on Catch, as the authors' public notebook meta-trains it.

Oh et al., "Discovering state-of-the-art reinforcement learning algorithms", Nature 2025; github.com/google-deepmind/
disco_rl, `meta_train.ipynb`: two agents that never begin anew, windows of two updates on 15 steps of 32 copies each, an
outer loss of the policy's gradient with entropies of policy and predictions and penalties on what the rule says, and
plain Adam of 5e-4. The weights of these terms are theirs.

Here every update learns from its own policy's experience (there: both of a window from the first one's, corrected by
importance weights), agents are judged on the next rollout, and their outer critic is our own. The two agents live
through all of meta-training; to validate the rule fresh ones live for 200 updates.
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

_AGENT = PPOConfig(
    n_envs=32,
    n_steps=15,
    n_epochs=1,
    n_minibatches=1,
    optimizer="clipped_adam",
    hyper=Hyper(
        learning_rate=5e-4, gamma=0.997, gae_lambda=0.95, vf_coef=0.2, prediction_coef=1.0, max_grad_norm=math.inf
    ),
    agent=AgentConfig("action_conditional", hidden=(512, 512), activation="relu", model=256, head_hidden=(256,)),
)
_MEANS = dict.fromkeys(("pi_hat_mean", "y_hat_mean", "z_hat_mean"), 1e-3)

RECIPES = (
    Recipe(
        name="disco-catch",
        about="Disco from random weights on Catch, as published",
        family="catch/5x5",
        component="disco103",
        meta_steps=800,
        minutes=30.0,
        validate_every=400,
        validation_tasks=2,
        validation_updates=200,
        train=MetaTrainConfig(
            lifetimes=2,
            horizon=1600,
            stagger=False,
            learning_rate=5e-4,
            max_grad_norm=math.inf,
            agent=_AGENT,
            estimator=TruncatedConfig(window=2, outer_terms="last"),
            loss=OuterLossConfig(
                policy_entropy=0.01, regularisers={"y_entropy": -1e-3, "z_entropy": -1e-3, "target_kl": 1e-2} | _MEANS
            ),
            critic=OuterCriticConfig(
                gamma=0.99,
                gae_lambda=0.96,
                learning_rate=1e-3,
                agent=AgentConfig("mlp", hidden=(256, 256), activation="relu"),
            ),
        ),
    ),
)
