"""The estimators by name."""

from __future__ import annotations

from learned_rl.tasks.base import unknown
from meta_optimizers.black_box import BlackBox
from meta_optimizers.bootstrapped import Bootstrapped
from meta_optimizers.estimator import Estimator, EstimatorConfig
from meta_optimizers.evolution import Evolution
from meta_optimizers.first_order import FirstOrder
from meta_optimizers.forward_mode import ForwardMode
from meta_optimizers.persistent import NoiseReuse, Persistent
from meta_optimizers.rematerialised import Rematerialised
from meta_optimizers.truncated import TruncatedMetaGradient

ESTIMATORS: dict[str, type[Estimator]] = {
    e.name: e
    for e in (
        TruncatedMetaGradient,
        Rematerialised,
        FirstOrder,
        ForwardMode,
        Bootstrapped,
        Evolution,
        Persistent,
        NoiseReuse,
        BlackBox,
    )
}


def estimator_config(name: str) -> EstimatorConfig:
    """The settings of an estimator, at their defaults.

    Raises:
        UserError: there is none of that name.
    """
    if name not in ESTIMATORS:
        raise unknown("estimator", name, ESTIMATORS)
    return ESTIMATORS[name].Config()


def make_estimator(config: EstimatorConfig, seed: int = 0) -> Estimator:
    """The estimator that the settings belong to."""
    (kind,) = [e for e in ESTIMATORS.values() if e.Config is type(config)]
    return kind(config, seed)
