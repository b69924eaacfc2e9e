"""A bandit of thirty arms, learned with two step sizes: where meta-gradients from samples are known to go wrong.

Vuorio, Beck, Whiteson, Foerster, Farquhar, "An Investigation of the Bias-Variance Tradeoff in Meta-Gradients", 2022,
arXiv:2209.11303, the bandit experiment. Arm a pays mu_a + 2 N(0, 1) with mu_a = exp(U(-100, 1)), drawn for every
lifetime, so that most arms pay next to nothing. A lifetime begins at logits 0 and makes 30 updates of 10 pulls each,

    theta <- theta + softplus(eta_i) mean(r grad log pi(a)),     i = 0 in the first 7 updates, then 1

and is judged by its mean reward per step. Two facts are known: the gradient of that mean by eta (`finite_differences`),
and that an estimator which takes the pulls as data finds about half of it.

The whole lifetime's estimator is a window of 30 updates whose states are judged on the data that they learn from:
`outer_data="shifted"`, `outer_terms="weighted"`, `weights=lifetime_weights()`. State 0 counts in the mean but has no
derivative; state 30 has no data, so its weight is 0, and it is thrown away when the lifetime begins anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from learned_rl.distributions import log_softmax
from learned_rl.tasks.base import unknown
from learned_rl.types import Tree
from meta_optimizers.group import Group
from meta_optimizers.problem import Eta, Moved, Problem

Surrogate = Literal["score", "dice"]


def lifetime_weights(lifetime: int = 30) -> tuple[float, ...]:
    """w_1..w_K of a window that is one lifetime: the mean over its `lifetime` data, of states 0..K-1."""
    return (1 / lifetime,) * (lifetime - 1) + (0.0,)


class Arms(Problem):
    """P lifetimes of the bandit.

    The inner gradient is written in closed form: with p the probabilities, d/d theta of r log pi(a) is r (1_a - p). A
    second derivative depends on what was differentiated: `score`, r log pi(a), gives the derivative of the update as it
    was made; `dice`, r box(log pi(a)) with box(x) = exp(x - sg x), adds, to first order and in expectation, what theta
    does to the pulls of the same update.

    Args:
        lifetimes: P.
        surrogate: how the inner objective is written.
        arms:      A.
        pulls:     n, in one update.
        lifetime:  updates; the second step size takes over after a quarter of them.
        noise:     standard deviation of a reward.
        streams:   [P] which random stream each lifetime draws from; None: one each.
    """

    def __init__(
        self,
        lifetimes: int,
        surrogate: Surrogate = "score",
        arms: int = 30,
        pulls: int = 10,
        lifetime: int = 30,
        noise: float = 2.0,
        seed: int = 0,
        streams: Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        if surrogate not in ("score", "dice"):
            raise unknown("surrogate", surrogate, ("score", "dice"))
        self.lifetimes, self.group, self.surrogate = lifetimes, Group(), surrogate
        self.arms, self.pulls, self.lifetime, self.noise, self.dtype = arms, pulls, lifetime, noise, dtype
        self.streams = torch.arange(lifetimes) if streams is None else streams
        self.generator = torch.Generator().manual_seed(seed)
        self.means = self._draw_means()
        self._state = self._fresh()
        self._rewards: list[Tensor] = []

    @staticmethod
    def eta(first: float = 2.0, second: float = 2.0, dtype: torch.dtype = torch.float64) -> Eta:
        """Meta-parameters to begin with: two step sizes before the softplus."""
        return Eta({"rates": torch.tensor([first, second], dtype=dtype)})

    # --- what estimators ask -----------------------------------------------------------------------------------

    def present(self) -> Tree:
        return {k: v.clone() for k, v in self._state.items()}

    def collect(self, state: Tree) -> Tree:
        log_p = log_softmax(state["theta"].detach())  # stop: data
        edges = log_p.exp().cumsum(1)
        action = torch.searchsorted(edges, self._random(torch.rand) * edges[:, -1:]).clamp(max=self.arms - 1)
        reward = self.means.gather(1, action) + self.noise * self._random(torch.randn)
        self._rewards.append(reward.mean())
        return {"action": action, "reward": reward, "log_prob": log_p.gather(1, action)}

    def step(self, state: Tree, data: Tree, eta: Eta) -> Moved:
        theta, action, reward = state["theta"], data["action"], data["reward"]
        log_p = log_softmax(theta)
        log_prob = log_p.gather(1, action)
        if self.surrogate == "dice":
            reward = reward * (log_prob - log_prob.detach()).exp()  # stop: 1, with the derivative of log pi
        chosen = torch.zeros_like(theta).scatter_add(1, action, reward)
        gradient = (chosen - reward.sum(1, keepdim=True) * log_p.exp()) / self.pulls
        moved = theta + self._rate(state, eta) * gradient
        alive = theta.detach().isfinite().all(1) & data["reward"].isfinite().all(1)  # stop: a look
        zero = theta.new_zeros(self.lifetimes)
        after = {"theta": moved, "age": state["age"] + 1}
        return Moved(after, _outer(log_prob, data), zero, log_prob.sum(1), alive)

    def judge(self, state: Tree, data: Tree, eta: Eta, importance: bool = False, bare: bool = False) -> Tensor:
        return _outer(log_softmax(state["theta"]).gather(1, data["action"]), data)

    def cost(self, data: Tree) -> Tensor:
        return -data["reward"].mean(1)

    def commit(self, state: Tree) -> None:
        self._state = {k: v.detach().clone() for k, v in state.items()}  # stop: the present

    def renew(self, broken: Tensor) -> Tensor:
        ended = broken | (self._state["age"] >= self.lifetime)
        if bool(ended.any()):
            fresh = self._fresh()
            self._state = {k: torch.where(_rows(ended, v), fresh[k], v) for k, v in self._state.items()}
            self.means = torch.where(ended[:, None], self._draw_means(), self.means)
        return ended

    def report(self) -> dict[str, float]:
        rewards, self._rewards = self._rewards, []
        return {"reward": torch.stack(rewards).mean().item()} if rewards else {}

    def state_dict(self) -> Tree:
        return self.present() | {"means": self.means.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: Tree) -> None:
        self._state = {k: state[k].clone() for k in self._state}
        self.means = state["means"].clone()
        self.generator.set_state(state["generator"])

    # --- what is known -----------------------------------------------------------------------------------------

    def expected(self, state: Tree) -> Tensor:
        """[P] mean reward of a pull, without noise."""
        return (log_softmax(state["theta"]).exp() * self.means).sum(1)

    # --- its parts ---------------------------------------------------------------------------------------------

    def _rate(self, state: Tree, eta: Eta) -> Tensor:
        """[P, 1] the step size at each lifetime's age."""
        rates = softplus(eta.values["rates"])
        rates = rates if eta.stacked else rates.expand(self.lifetimes, 2)
        return rates.gather(1, (state["age"] >= self.lifetime // 4).long()[:, None])

    def _fresh(self) -> Tree:
        theta = torch.zeros(self.lifetimes, self.arms, dtype=self.dtype)
        return {"theta": theta, "age": torch.zeros(self.lifetimes, dtype=torch.long)}

    def _draw_means(self) -> Tensor:
        count = int(self.streams.max()) + 1
        uniform = torch.rand(count, self.arms, generator=self.generator, dtype=self.dtype)
        return (101 * uniform - 100).exp()[self.streams]

    def _random(self, draw: Callable[..., Tensor]) -> Tensor:
        """[P, n] numbers, the same ones for lifetimes of the same stream."""
        count = int(self.streams.max()) + 1
        return draw(count, self.pulls, generator=self.generator, dtype=self.dtype)[self.streams]


def _outer(log_prob: Tensor, data: Tree) -> Tensor:
    """[P] minus the mean reward, weighted by the ratio of probabilities.

    On the data of the state itself the ratio is 1: the value is the cost, the gradient that of -mean(r log pi).
    """
    return -(data["reward"] * (log_prob - data["log_prob"]).exp()).mean(1)


def _rows(which: Tensor, like: Tensor) -> Tensor:
    """`which [P]` with as many axes as `like`."""
    return which.view(-1, *[1] * (like.dim() - 1))


@torch.no_grad()
def finite_differences(eta: Eta, lifetimes: int, step: float = 0.25, seed: int = 0) -> tuple[float, Tensor, Tensor]:
    """Mean reward per step of a lifetime, and its gradient by the two rates.

    Four copies of each lifetime with the same luck, at eta plus and minus `step` along each axis, judged without noise.

    Args:
        lifetimes: how many, four copies of each.

    Returns:
        reward:   mean over the copies.
        gradient: [2] of the mean reward per step; central differences.
        error:    [2] its standard error.
    """
    rates = eta.values["rates"]
    moves = torch.cat([step * torch.eye(2), -step * torch.eye(2)]).to(rates)
    stacked = Eta({"rates": (rates + moves).repeat_interleave(lifetimes, 0)}, stacked=True)
    problem = Arms(4 * lifetimes, seed=seed, streams=torch.arange(lifetimes).repeat(4), dtype=rates.dtype)
    state, earned = problem.present(), rates.new_zeros(4 * lifetimes)
    for _ in range(problem.lifetime):
        earned += problem.expected(state) / problem.lifetime
        state = problem.step(state, problem.collect(state), stacked).state
    up, down = earned.view(2, 2, lifetimes)
    slope = (up - down) / (2 * step)
    return earned.mean().item(), slope.mean(1), slope.std(1) / lifetimes**0.5
