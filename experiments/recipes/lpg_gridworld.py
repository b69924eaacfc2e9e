"""LPG on the generalised grid worlds: the first thing to meta-learn, and what `make demo` runs.

`learned-rl meta-train lpg-gridworld`; results: `docs/objectives/lpg.md`. Learning rates, norm bound, window, width and
weights are what a study of 40 short trials found (`experiments/results/tune-lpg-gridworld`), rounded.
"""

from experiments.recipes import Recipe
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from meta_optimizers.learning import OuterLossConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.trainer import MetaTrainConfig
from meta_optimizers.truncated import TruncatedConfig

RECIPES = (
    Recipe(
        name="lpg-gridworld",
        about="LPG with a small GRU on random grid worlds, tabular agents",
        family="grid/medium",
        component="lpg",
        settings={"predictions": 8, "width": 16, "core": "gru", "scale_free": True},
        meta_steps=2000,
        minutes=30.0,
        validate_every=200,
        train=MetaTrainConfig(
            lifetimes=64,
            horizon=100,
            learning_rate=9e-3,
            max_grad_norm=0.43,
            agent=PPOConfig(
                n_envs=16,
                n_steps=20,
                n_epochs=1,
                n_minibatches=1,
                optimizer="sgd",
                hyper=Hyper(learning_rate=520.0, prediction_coef=0.05, max_grad_norm=0.02),
            ),
            estimator=TruncatedConfig(window=1),
            loss=OuterLossConfig(
                policy_entropy=0.032,
                entropy_half_life=4500.0,
                regularisers={"prediction_entropy": -0.00016, "pi_hat_square": 0.0015, "y_hat_square": 0.0001},
            ),
            critic=OuterCriticConfig(learning_rate=0.05, epochs=4),
        ),
    ),
)
