"""Forward mode: the meta-gradient of a handful of numbers by a trace that is never cut.

Williams and Zipser, "A Learning Algorithm for Continually Running Fully Recurrent Neural Networks", 1989 (real-time
recurrent learning); for meta-gradients the exact trace of Xu, van Hasselt, Silver, 2018, arXiv:1805.09801, and for
learning rates Wu et al., 2018, arXiv:1803.02021. With s_k the state of a lifetime after k updates (parameters,
optimizer state, memory) and l the outer loss on the data that update k learns from,

    z_{k+1} = dU/ds z_k + dU/d(eta),   z_0 = 0            g = mean_k [ dl/ds z_k + dl/d(eta) ]

over the updates k of one estimate, with the penalty's derivative added. Nothing is unrolled: memory is one update and
one trace for every number in eta, whatever came before counts in full, and each number costs one more run of every
update. Where eta moves between estimates, the trace is that of the path which was taken, as with every online method.
Problems take their inner gradients by reverse mode, so this is forward over reverse. What a problem holds constant it
must detach: unlike graphs, traces go through `torch.no_grad`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd import forward_ad

from learned_rl.component import finite
from learned_rl.spaces import Integers, searched
from learned_rl.types import Tree, UserError, at_least
from meta_optimizers.estimator import Estimate, Estimator, EstimatorConfig
from meta_optimizers.problem import Eta, Moved, Problem
from meta_optimizers.truncated import mean


@dataclass(frozen=True)
class ForwardConfig(EstimatorConfig):
    every: int = field(default=5, metadata=searched(Integers(1, 20, log=True)))
    """inner updates between outer updates; each one's data first judge the state that collected them"""
    most: int = 64
    """numbers in eta beyond which forward mode is refused, since each one costs an update and a trace"""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, every=self.every, most=self.most)


class ForwardMode(Estimator):
    """Carries d state / d eta through whole lifetimes.

    Attributes:
        trace: name -> [m, P, ...] for each floating-point entry of the state and each of the m numbers in eta; empty
               before the first call.
    """

    name, Config = "forward", ForwardConfig
    config: ForwardConfig

    def __init__(self, config: ForwardConfig | None = None, seed: int = 0) -> None:
        super().__init__(config, seed)
        self.trace: Tree = {}

    @property
    def updates(self) -> int:
        return self.config.every

    def check(self, eta: Eta, lifetimes: int) -> None:
        """Whether this can be, before anything is run.

        Raises:
            UserError: eta has more numbers than `most`.
        """
        if (m := eta.flatten().shape[-1]) > self.config.most:
            raise UserError(
                f"eta has {m} numbers: expected at most {self.config.most} for estimator {self.name!r}, which runs "
                "every update once for each; reverse mode ('truncated', 'rematerialised') serves any number."
            )

    def __call__(self, problem: Problem, eta: Eta) -> Estimate:
        """Run the problem for `every` updates."""
        self.check(eta, problem.lifetimes)
        flat, state = eta.flatten().detach(), problem.present()  # stop: directions are constants
        m = flat.shape[-1]
        if not self.trace:
            self.trace = {k: v.new_zeros(m, *v.shape) for k, v in state.items() if v.is_floating_point()}
        basis = eta.unflatten(torch.eye(m, dtype=flat.dtype, device=flat.device))  # name -> [m, ...]
        moves, slopes = [], []
        for _ in range(self.config.every):
            data = problem.collect(state)
            pushed = [_push(problem, state, _row(self.trace, i), data, eta, _row(basis, i)) for i in range(m)]
            self.trace = {k: torch.stack([tangent[k] for _, tangent, _ in pushed]) for k in self.trace}
            slopes.append(torch.stack([slope for _, _, slope in pushed], 1))
            moves.append(pushed[0][0])  # the same in every direction
            state = moves[-1].state
        problem.commit(state)
        return self._estimate(problem, eta, moves, torch.stack(slopes).mean(0))

    def _estimate(self, problem: Problem, eta: Eta, moves: list[Moved], slopes: Tensor) -> Estimate:
        """The average over lifetimes, from d (loss + penalty) / d eta [P, m]."""
        group, loss = problem.group, torch.stack([m.loss + m.penalty for m in moves]).mean(0)
        traced = torch.stack([v.transpose(0, 1).flatten(1).isfinite().all(1) for v in self.trace.values()])
        alive = torch.stack([m.alive for m in moves]).all(0) & finite(moves[-1].state["theta"]) & loss.isfinite()
        alive = alive & slopes.isfinite().all(1) & traced.all(0)
        count = group.sum(alive.sum())
        if not bool(count):
            return Estimate(None, ~alive, {"loss": float("nan")})
        looked = mean([m.metrics for m in moves])
        looked["trace"] = self.trace["theta"].transpose(0, 1).flatten(1).norm(dim=1)
        metrics = {"loss": (group.sum(torch.where(alive, loss, 0.0).sum()) / count).item()}
        if bool(alive.any()):
            metrics |= {k: v[alive].mean().item() for k, v in looked.items()}
        known = torch.where(alive[:, None], slopes, 0.0)
        slope = known if eta.stacked else group.sum(known.sum(0)) / count
        return Estimate(eta.unflatten(slope), ~alive, metrics, looked)

    def begin(self, which: Tensor, elsewhere: bool = False) -> None:
        self.trace = {k: v.masked_fill(which.view(1, -1, *[1] * (v.dim() - 2)), 0.0) for k, v in self.trace.items()}

    def state_dict(self) -> Tree:
        return {f"trace/{k}": v.clone() for k, v in self.trace.items()}

    def load_state_dict(self, state: Tree) -> None:
        self.trace = {k.removeprefix("trace/"): v.clone() for k, v in state.items() if k.startswith("trace/")}

    def axis(self, name: str, problem: Problem) -> int | None:
        return 1


def _row(tree: Tree, i: int) -> Tree:
    return {k: v[i] for k, v in tree.items()}


def _push(
    problem: Problem, state: Tree, trace: Tree, data: Tree, eta: Eta, direction: Tree
) -> tuple[Moved, Tree, Tensor]:
    """One inner update with its derivative in one direction of eta.

    Args:
        trace:     name -> [P, ...], derivative of the state in that direction.
        direction: name -> [...], like one set of eta.

    Returns:
        The update as constants, the derivative of the state after it, and that of loss + penalty [P].
    """
    with torch.enable_grad(), forward_ad.dual_level():
        # stop: neither what made the state nor eta is looked back at; the inner gradient needs a leaf
        dual = {k: v.detach().requires_grad_(k == "theta") for k, v in state.items()}
        dual |= {k: forward_ad.make_dual(dual[k], v) for k, v in trace.items()}
        fixed = eta.map(torch.Tensor.detach)  # stop: same
        along = {k: direction[k].to(v).expand_as(v) for k, v in fixed.values.items()}
        numbers = {k: forward_ad.make_dual(v, along[k]) for k, v in fixed.values.items()}
        moved = problem.step(dual, data, Eta(numbers, eta.stacked))
        slope = _tangent(moved.loss + moved.penalty)
        tangents = {k: _tangent(moved.state[k]) for k in trace}
    # stop: the graph of one update is all there ever is
    constant = {k: v.detach() for k, v in moved.state.items()}
    seen = {k: v.detach() for k, v in moved.metrics.items()}  # stop: same
    loss, penalty, log_prob = moved.loss.detach(), moved.penalty.detach(), moved.log_prob.detach()  # stop: same
    return Moved(constant, loss, penalty, log_prob, moved.alive, seen), tangents, slope


def _tangent(x: Tensor) -> Tensor:
    """The derivative that x carries, as a constant; zero where it carries none."""
    tangent = forward_ad.unpack_dual(x).tangent
    return torch.zeros_like(x) if tangent is None else tangent.detach()  # stop: derivatives of one order
