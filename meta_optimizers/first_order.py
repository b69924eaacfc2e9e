"""First order: the inner gradient does not see that its parameters depend on the meta-parameters.

    theta_{k+1} = theta_k + u(sg(theta_k), eta):     d theta_{k+1} / d eta = decay d theta_k / d eta + d u / d eta

so that no Hessian of the inner loss enters; every update contributes its direct effect, and effects add up over the
window. This is the trace of Xu, van Hasselt, Silver, 2018, arXiv:1805.09801, with A ~ decay I (0 in their experiments:
only the latest update counts). For an initialisation it is first-order MAML (Finn et al., 2017, arXiv:1703.03400). The
cheap reference: it is biased as soon as a window has two updates.
"""

from __future__ import annotations

from dataclasses import dataclass

from learned_rl.types import Tree, UserError, at_least
from meta_optimizers.problem import Eta, Moved, Problem
from meta_optimizers.truncated import TruncatedMetaGradient, WindowConfig


@dataclass(frozen=True)
class FirstOrderConfig(WindowConfig):
    decay: float = 1.0
    """how much of an update's effect lives through the next update, from 0 to 1"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, decay=self.decay)
        if self.decay > 1:
            raise UserError(f"decay is {self.decay}: expected at most 1.")


class FirstOrder(TruncatedMetaGradient):
    """The truncated meta-gradient without second derivatives of the inner loss."""

    name, Config = "first_order", FirstOrderConfig
    config: FirstOrderConfig

    def advance(self, problem: Problem, state: Tree, data: Tree, eta: Eta, judged: bool) -> Moved:
        theta = state["theta"]
        held = theta.detach()  # stop: the inner gradient does not see where its parameters come from
        moved = problem.step(state | {"theta": held}, data, eta)
        linked = moved.state["theta"] + self.config.decay * (theta - held)
        read = judged and self.config.outer_data != "same_is"
        loss = problem.judge(state, data, eta) if read else moved.loss
        return Moved(moved.state | {"theta": linked}, loss, moved.penalty, moved.log_prob, moved.alive, moved.metrics)
