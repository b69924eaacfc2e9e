"""Learned losses, rewards, hyperparameters and auxiliary tasks: one file per method, its paper in the docstring."""

from objectives.dpo import DPO
from objectives.lpg import LPG, LPGConfig

__all__ = ["DPO", "LPG", "LPGConfig"]
