"""PPO at equal settings: this project's and the peers' from one description of the settings."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.ppo import PPOConfig
from learned_rl.training import PPO

if TYPE_CHECKING:
    from stable_baselines3 import PPO as SB3PPO

SB3 = "Stable-Baselines3 PPO"
NO_SB3 = "stable-baselines3 is not installed (extra: bench)"


@dataclass(frozen=True)
class PPOSettings:
    """What all contenders share; beyond it, orthogonal initialisation, Adam with eps 1e-5, normalised advantages."""

    n_envs: int = 8
    n_steps: int = 128
    n_epochs: int = 4
    batch_size: int = 256
    learning_rate: float = 3e-4
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: float = 0.2
    ent_coef: float = 0.0
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    hidden: tuple[int, ...] = (64, 64)
    """tanh units of the policy's network, and of the value's own"""

    @property
    def per_update(self) -> int:
        """Environment steps of one update."""
        return self.n_envs * self.n_steps


def ours(env: str, s: PPOSettings, seed: int, objective: str | None = None, seeds: int = 1) -> PPO:
    """This project's PPO, with another objective in its slot if one is named."""
    names = ("learning_rate", "gamma", "gae_lambda", "clip_range", "ent_coef", "vf_coef", "max_grad_norm")
    config = PPOConfig(
        s.n_envs,
        s.n_steps,
        s.n_epochs,
        s.per_update // s.batch_size,
        hyper=Hyper(**{name: getattr(s, name) for name in names}),
        agent=AgentConfig(hidden=s.hidden),
    )
    return PPO(env, config, objective=objective, seeds=seeds, seed=seed)


def has_sb3() -> bool:
    """Whether the optional peer is there."""
    return importlib.util.find_spec("stable_baselines3") is not None


def sb3(env: str, s: PPOSettings, seed: int) -> SB3PPO:
    """Stable-Baselines3's PPO as its users have it: `make_vec_env` (a DummyVecEnv of monitored copies) on the CPU."""
    from stable_baselines3 import PPO as SB3PPO  # an optional dependency, and slow to import
    from stable_baselines3.common.env_util import make_vec_env
    from torch import nn

    hidden = list(s.hidden)
    architecture: dict[str, Any] = {"net_arch": {"pi": hidden, "vf": hidden}, "activation_fn": nn.Tanh}
    return SB3PPO(
        "MlpPolicy",
        make_vec_env(env, n_envs=s.n_envs, seed=seed),
        learning_rate=s.learning_rate,
        n_steps=s.n_steps,
        batch_size=s.batch_size,
        n_epochs=s.n_epochs,
        gamma=s.gamma,
        gae_lambda=s.gae_lambda,
        clip_range=s.clip_range,
        ent_coef=s.ent_coef,
        vf_coef=s.vf_coef,
        max_grad_norm=s.max_grad_norm,
        policy_kwargs=architecture,
        seed=seed,
        device="cpu",
    )
