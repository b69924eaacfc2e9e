"""The outer loop: estimators of the meta-gradient, and the trainer that follows them."""

from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from meta_optimizers.truncated import TruncatedConfig

__all__ = ["MetaTrainConfig", "MetaTrainer", "TruncatedConfig"]
