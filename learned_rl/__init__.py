"""learned-rl: meta-learn the parts of a reinforcement-learning algorithm and plug them into an ordinary PPO."""

from learned_rl.artifacts import load, save
from learned_rl.component import Auxiliary, Component, Hyper, Hyperparameters, Objective, Reward, UpdateRule
from learned_rl.ppo import PPOConfig
from learned_rl.registry import make_component, make_family
from learned_rl.training import PPO
from learned_rl.types import UserError

__version__ = "0.1.0"

__all__ = [
    "PPO",
    "Auxiliary",
    "Component",
    "Hyper",
    "Hyperparameters",
    "Objective",
    "PPOConfig",
    "Reward",
    "UpdateRule",
    "UserError",
    "load",
    "make_component",
    "make_family",
    "save",
]
