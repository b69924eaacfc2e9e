"""STAC, the self-tuning actor-critic: every number of the loss is learned.

Zahavy, Xu, Veeriah, Hessel, Oh, van Hasselt, Silver, Singh, "A Self-Tuning Actor-Critic Algorithm", NeurIPS 2020,
arXiv:2002.12928. Of the loss of the objective `impala`,

    L = pg_coef L_policy + vf_coef L_value - ent_coef H,    returns by V-trace with gamma, lambda, alpha

six numbers are learned. gamma, lambda and alpha are sigmoids, as in `self_tuned`. A weight is

    weight = reference sigmoid(x_0 + eta)

where the reference is the configured weight, which is never exceeded. In the paper it is the weight of the term in the
outer loss as well, so that the agent weighs nothing more than its judge does; here the outer loss has settings of its
own (`OuterLossConfig`), and whoever wants that sets both. The sigmoid reaches no 1, so weights start slightly below
their reference, at `start` of it. By how much the paper's do is not known to us; 0.95 is a choice. For the same reason
a lambda or alpha configured as 1 starts at 0.999 (`bijectors.MARGIN`).

The paper's outer loss has all three terms at fixed numbers (alpha 1) and KL(new policy, old policy), which keeps the
policy from moving further than the experience can judge. One update a window; Adam as the outer optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from learned_rl.component import Scalar
from learned_rl.types import UserError
from objectives.bijectors import UNIT, Positive
from objectives.self_tuned import SelfTuned, SelfTunedConfig

WEIGHTS = ("pg_coef", "vf_coef", "ent_coef", "prediction_coef", "aux_coef")


@dataclass(frozen=True)
class STACConfig(SelfTunedConfig):
    """Raises `UserError` as well for a start that is not between 0 and 1."""

    numbers: tuple[str, ...] = ("gamma", "gae_lambda", "vtrace_alpha", "pg_coef", "vf_coef", "ent_coef")
    """names of the learned numbers"""
    start: float = 0.95
    """where the weights of the loss start, as a share of the configured ones; those with bounds start as configured"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.start < 1:
            raise UserError(f"start is {self.start}: expected a share between 0 and 1, such as 0.95.")


class STAC(SelfTuned):
    """Numbers of an actor-critic's loss, learned; its weights stay below the configured ones."""

    name, Config = "stac", STACConfig
    config: STACConfig

    def learned(self, name: str, base: Scalar | None, eta: Tensor) -> Tensor:
        if name not in WEIGHTS or name in self.config.bounds:
            return super().learned(name, base, eta)
        return Positive().learnable(name, base) * UNIT(self.config.start, eta)
