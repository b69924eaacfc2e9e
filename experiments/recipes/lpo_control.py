"""LPO by evolution on cart-poles whose parameters vary: whole lifetimes of PPO, nothing is differentiated.

`learned-rl meta-train lpo-control`; results: `docs/objectives/lpo.md`. A generation is 64 agents, 32 antithetic pairs
of drifts that share task, initial weights and luck.
"""

from experiments.recipes import Recipe
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from meta_optimizers.evolution import EvolutionConfig
from meta_optimizers.trainer import MetaTrainConfig

RECIPES = (
    Recipe(
        name="lpo-control",
        about="LPO's drift on cart-poles of many kinds, by an evolution strategy over whole lifetimes of PPO",
        family="control/cartpole",
        component="lpo",
        settings={"base": "ppo", "width": 32},
        meta_steps=150,
        minutes=30.0,
        validate_every=25,
        checkpoint_every=5,
        train=MetaTrainConfig(
            lifetimes=64,
            horizon=48,
            learning_rate=0.01,
            max_grad_norm=float("inf"),
            agent=PPOConfig(
                n_envs=8,
                n_steps=64,
                n_epochs=4,
                n_minibatches=4,
                hyper=Hyper(learning_rate=3e-3),
                agent=AgentConfig(hidden=(32, 32)),
            ),
            estimator=EvolutionConfig(window=48, sigma=0.07, shaping="pair"),
        ),
    ),
)
