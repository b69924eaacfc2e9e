"""The discounting chain: a discount is learned, and which critic judges decides between the short and the long view.

Osband et al., "Behaviour Suite for Reinforcement Learning", 2020, arXiv:1908.03568, for the environment; Bonnet,
Midgley, Laterre, "Debiasing Meta-Gradient Reinforcement Learning by Learning the Outer Value Function", 2022,
arXiv:2211.10550, for the experiment. The first of 100 actions chooses one of five chains, which pay once, after 1, 3,
10, 30 or 100 steps: 1.1 on the fourth, 1.0 on the others; later actions change nothing. Seen are the chain (first
-1) and t / 100. The policy is one linear layer, the critic V is true, and agents descend

    l(theta; gamma) = -mean log pi(a_t|s_t) A_t - 0.005 mean H(pi),    A_t = r_{t+1} + gamma V(s_{t+1}) - V(s_t)

by plain steps of 0.5, with gamma = 0.90 + 0.10 sigmoid(eta). They are judged by the same loss at discount 1, with the
values of the inner critic, which belong to gamma (a bias: gamma goes to 0.90), or of an outer critic, which belong to
discount 1 (gamma goes to 1).

A policy gradient is linear in how often each action was taken in each state, so data are these frequencies: expected
ones, exact, or those of episodes that were drawn. With exact ones the expectation over a later action cancels against
the log-probability's gradient, whatever the advantage, and only entropy is left of later states. As in Bonnet et al.,
the value at t = 0 has one power of gamma too many; it shifts a baseline, nothing else. They draw tiny initial weights;
here they are zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learned_rl.types import Tree, stream
from meta_optimizers.group import Group
from meta_optimizers.problem import Eta, Match, Moved, Problem

DELAY = (1, 3, 10, 30, 100)  # environment steps from the beginning to the payment
PAYMENT = (1.0, 1.0, 1.0, 1.1, 1.0)
STEPS = 100  # of an episode
CHAINS = len(DELAY)
RATE, ENTROPY = 0.5, 0.005


class DiscountingChain(Problem):
    """P agents on the chain, in double precision.

    States are numbered S = 1 + 5 * 99: the first one, then t = 1..99 on each chain. Data: `taken` [P, S, A], how often
    each action was taken in each state per environment step, and `log_policy` [P, S, A] of the agent that took them.

    Args:
        lifetimes:    P.
        outer_critic: judge with V_1 instead of V_gamma; one for all agents, or P of them.
        normalize:    advantages have mean 0 and variance 1 over the data.
        episodes:     drawn for each update; None: exact expectations.
    """

    def __init__(
        self,
        lifetimes: int = 1,
        outer_critic: bool | Sequence[bool] = False,
        normalize: bool = False,
        episodes: int | None = None,
        seed: int = 0,
    ) -> None:
        self.lifetimes, self.group = lifetimes, Group()
        self.outer_critic = torch.tensor(outer_critic)
        self.normalize, self.episodes = normalize, episodes
        self.generator = stream("discounting chain", seed)
        chain, t = torch.arange(CHAINS).repeat_interleave(STEPS - 1), torch.arange(1, STEPS).repeat(CHAINS)
        first = torch.tensor([[-1.0, 0.0]], dtype=torch.float64)
        self.seen = torch.cat([first, torch.stack([chain, t.double() / STEPS], 1)])  # [S, 2]
        self.payment = torch.tensor(PAYMENT, dtype=torch.float64)
        self.delay = torch.tensor(DELAY)
        self.chain, self.left = chain, self.delay[chain] - t  # [S - 1] steps to the payment; not above 0: it was paid
        self._theta = torch.zeros(lifetimes, 3 * CHAINS, dtype=torch.float64)

    @staticmethod
    def eta() -> Eta:
        """A discount of 0.95."""
        return Eta({"gamma": torch.zeros((), dtype=torch.float64)})

    @staticmethod
    def gamma(eta: Eta) -> Tensor:
        """[] or, stacked, [P] discount per environment step."""
        return 0.90 + 0.10 * eta.values["gamma"].sigmoid()

    def expected_return(self) -> Tensor:
        """[P] undiscounted return of an episode."""
        return self._log_policy(self._theta)[:, 0].exp() @ self.payment

    # --- what estimators ask -----------------------------------------------------------------------------------

    def present(self) -> Tree:
        return {"theta": self._theta.clone()}

    @torch.no_grad()
    def collect(self, state: Tree) -> Tree:
        log_policy = self._log_policy(state["theta"])
        policy = log_policy.exp()
        if self.episodes is None:
            begun = policy[:, 0]
            visits = torch.cat([torch.ones_like(begun[:, :1]), begun[:, self.chain]], 1) / STEPS  # [P, S]
            return {"taken": visits.unsqueeze(-1) * policy, "log_policy": log_policy}
        return {"taken": self._drawn(policy, self.episodes) / (self.episodes * STEPS), "log_policy": log_policy}

    def step(self, state: Tree, data: Tree, eta: Eta) -> Moved:
        theta, gamma = state["theta"], self.gamma(eta)
        graph = torch.is_grad_enabled()
        with torch.enable_grad():
            followed = theta.requires_grad and graph
            inner = theta if followed else theta.detach().requires_grad_()  # stop: nobody looks back
            loss = self._loss(inner, data, gamma, gamma)
            (gradient,) = torch.autograd.grad(loss.sum(), inner, create_graph=graph)
        zero = torch.zeros_like(loss)
        drawn = 0 if self.episodes is None else self.episodes * STEPS
        log_prob = drawn * (data["taken"] * self._log_policy(theta)).sum((1, 2)) if drawn else zero
        alive = theta.detach().isfinite().all(1)  # stop: a look
        metrics = {"inner": gradient.detach().norm(dim=1)}  # stop: to look at
        moved = {"theta": theta - RATE * gradient}
        return Moved(moved, self.judge(state, data, eta), zero, log_prob, alive, metrics)

    def judge(self, state: Tree, data: Tree, eta: Eta, importance: bool = False, bare: bool = False) -> Tensor:
        one = torch.ones((), dtype=torch.float64)
        critic = torch.where(self.outer_critic, one, self.gamma(eta))
        return self._loss(state["theta"], data, one, critic, 0.0 if bare else ENTROPY, importance)

    def cost(self, data: Tree) -> Tensor:
        return -STEPS * data["taken"][:, 0] @ self.payment

    def descend(self, state: Tree, loss: Tensor, eta: Eta) -> Tree:
        (gradient,) = torch.autograd.grad(loss.sum(), state["theta"])
        return {"theta": state["theta"].detach() - RATE * gradient}  # stop: the target is a constant

    def match(self, state: Tree, target: Tree, data: Tree, by: Match) -> Tensor:
        """The divergence is that at the first state; there is no learned value."""
        if by != "kl":
            return super().match(state, target, data, by)
        ours, theirs = (self._log_policy(s["theta"], 1)[:, 0] for s in (state, target))
        theirs = theirs.detach()  # stop: the target is a constant
        return (theirs.exp() * (theirs - ours)).sum(1)

    def commit(self, state: Tree) -> None:
        self._theta = state["theta"].detach().clone()  # stop: the present

    # --- the episodes ------------------------------------------------------------------------------------------

    def _drawn(self, policy: Tensor, episodes: int) -> Tensor:
        """[P, S, A] how many times each action was taken, where actions are drawn from `policy` [P, S, A]."""
        chosen = torch.multinomial(policy[:, 0], episodes, replacement=True, generator=self.generator)  # [P, E]
        on = torch.cat([torch.zeros_like(chosen).unsqueeze(2), self._later(chosen)], 2)  # [P, E, T] states
        rows = on.flatten(1) + len(self.seen) * torch.arange(self.lifetimes).unsqueeze(1)  # of policy.flatten(0, 1)
        action = torch.multinomial(policy.flatten(0, 1)[rows.flatten()], 1, generator=self.generator).view_as(on)
        action[:, :, 0] = chosen
        index = CHAINS * rows.flatten() + action.flatten()
        return index.bincount(minlength=policy.numel()).view_as(policy).double()

    def _later(self, chain: Tensor) -> Tensor:
        """[..., T - 1] the states from t = 1 on."""
        return 1 + (STEPS - 1) * chain.unsqueeze(-1) + torch.arange(STEPS - 1)

    # --- the agent ---------------------------------------------------------------------------------------------

    def _log_policy(self, theta: Tensor, states: int | None = None) -> Tensor:
        """[P, S, A], or of the first few states."""
        weight, bias = theta[:, : 2 * CHAINS].unflatten(1, (2, CHAINS)), theta[:, None, 2 * CHAINS :]
        return (self.seen[:states] @ weight + bias).log_softmax(-1)

    def _loss(
        self,
        theta: Tensor,
        data: Tree,
        gamma: Tensor,
        critic: Tensor,
        entropy: float = ENTROPY,
        importance: bool = False,
    ) -> Tensor:
        """[P] policy gradient and entropy, with advantages at `gamma` from the values at `critic`."""
        log_policy, taken = self._log_policy(theta), data["taken"]
        score = (log_policy - data["log_policy"]).exp() if importance else log_policy
        policy = -(taken * score * self._advantage(data, gamma, critic)).sum((1, 2))
        return policy + entropy * (taken.sum(2) * (log_policy.exp() * log_policy).sum(2)).sum(1)

    def _advantage(self, data: Tree, gamma: Tensor, critic: Tensor) -> Tensor:
        """[P, S, A]; after the first step actions do not matter."""
        gamma, critic = gamma.reshape(-1, 1), critic.detach().reshape(-1, 1)  # stop: values are constants of the data
        left, paid = self.left, self.payment[self.chain]
        value = torch.where(left > 0, paid * critic ** (left - 1).clamp(min=0), 0.0)  # [1 or P, S - 1]
        after = torch.where(left > 1, paid * critic ** (left - 2).clamp(min=0), 0.0)
        later = torch.where(left == 1, paid, 0.0) + gamma * after - value
        entered = gamma * value.unflatten(1, (CHAINS, STEPS - 1))[:, :, 0] + torch.where(
            self.delay == 1, self.payment, 0
        )
        begun = data["log_policy"][:, 0].exp()
        first = entered - (begun * self.payment * critic**self.delay).sum(1, keepdim=True)  # [P, A]
        later = later.expand(len(first), -1).unsqueeze(-1).expand(-1, -1, CHAINS)
        advantage = torch.cat([first.unsqueeze(1), later], 1)
        if not self.normalize:
            return advantage
        mean = (data["taken"] * advantage).sum((1, 2), keepdim=True)
        variance = (data["taken"] * (advantage - mean).square()).sum((1, 2), keepdim=True)
        return (advantage - mean) / (variance.sqrt() + 1e-8)
