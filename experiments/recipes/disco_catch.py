"""Disco from random weights on Catch: as the authors' public notebook meta-trains it, and small.

Oh et al., "Discovering state-of-the-art reinforcement learning algorithms", Nature 2025; github.com/google-deepmind/
disco_rl, `meta_train.ipynb`: two agents that never begin anew, windows of two updates on 15 steps of 32 copies each, an
outer loss of the policy's gradient with entropies of policy and predictions and penalties on what the rule says, and
plain Adam of 5e-4. The weights of these terms are theirs.

Here every update learns from its own policy's experience (there: both of a window from the first one's, corrected by
importance weights), agents are judged on the next rollout, and their outer critic is our own. The two agents live
through all of meta-training; to validate the rule fresh ones live for 200 updates.

`disco-catch-small` is for a CPU: a smaller rule, and small agents that live for 200 updates and begin anew. What a rule
reads of actions are their values, and agents know them soon only if three bins carry them: among 601 bins the ones far
off, which no return needs, drown a return of 1 for hundreds of updates. Predictions weigh little in the agents' loss:
with the weight of 1 a changing rule keeps fresh agents from learning values, which windows of two updates cannot see.
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

_MEANS = dict.fromkeys(("pi_hat_mean", "y_hat_mean", "z_hat_mean"), 1e-3)
_REGULARISERS = {"y_entropy": -1e-3, "z_entropy": -1e-3, "target_kl": 1e-2} | _MEANS


def _agents(n_envs: int, learning_rate: float, prediction_coef: float, hidden: int, model: int) -> PPOConfig:
    return PPOConfig(
        n_envs=n_envs,
        n_steps=15,
        n_epochs=1,
        n_minibatches=1,
        optimizer="clipped_adam",
        hyper=Hyper(
            learning_rate=learning_rate,
            gamma=0.997,
            gae_lambda=0.95,
            vf_coef=0.2,
            prediction_coef=prediction_coef,
            max_grad_norm=math.inf,
        ),
        agent=AgentConfig(
            "action_conditional", hidden=(hidden, hidden), activation="relu", model=model, head_hidden=(model,)
        ),
    )


def _critic(hidden: int, learning_rate: float) -> OuterCriticConfig:
    agent = AgentConfig("mlp", hidden=(hidden, hidden), activation="relu")
    return OuterCriticConfig(gamma=0.99, gae_lambda=0.96, learning_rate=learning_rate, agent=agent)


RECIPES = (
    Recipe(
        name="disco-catch",
        about="Disco from random weights on Catch, of the published sizes",
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
            agent=_agents(n_envs=32, learning_rate=5e-4, prediction_coef=1.0, hidden=512, model=256),
            estimator=TruncatedConfig(window=2, outer_terms="last"),
            loss=OuterLossConfig(policy_entropy=0.01, regularisers=_REGULARISERS),
            critic=_critic(hidden=256, learning_rate=1e-3),
        ),
    ),
    Recipe(
        name="disco-catch-small",
        about="A small Disco rule from random weights on Catch",
        family="catch/5x5",
        component="disco103",
        settings={"predictions": 32, "support": 1, "width": 64, "lifetime_width": 32},
        meta_steps=600,
        minutes=20.0,
        validate_every=100,
        validation_tasks=4,
        train=MetaTrainConfig(
            lifetimes=16,
            horizon=200,
            learning_rate=3e-3,
            max_grad_norm=math.inf,
            agent=_agents(n_envs=16, learning_rate=1e-2, prediction_coef=0.01, hidden=64, model=64),
            estimator=TruncatedConfig(window=2, outer_terms="every"),
            loss=OuterLossConfig(policy_entropy=0.003, regularisers=_REGULARISERS),
            critic=_critic(hidden=64, learning_rate=3e-3),
        ),
    ),
)
