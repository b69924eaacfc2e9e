"""A random decision process whose return is known with all its derivatives.

Five states, four actions, episodes of 50 steps discounted by 0.95, as in the demonstration of Farquhar et al., 2019,
arXiv:1909.10549. Transition probabilities and rewards are drawn once; the policy is a softmax over a table of logits.
The expected return of an episode is a polynomial in the policy's probabilities, so that automatic differentiation gives
its derivatives exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from learned_rl.distributions import log_softmax


class RandomMDP:
    """Tables of one decision process, and what follows from them for a policy.

    Args:
        states, actions: S, A.
        gamma:           discount per environment step.
        horizon:         T, environment steps in an episode.

    Attributes:
        transition: [S, A, S] probabilities.
        reward:     [S, A] standard normal, without noise.
    """

    def __init__(
        self, states: int = 5, actions: int = 4, gamma: float = 0.95, horizon: int = 50, seed: int = 0
    ) -> None:
        self.states, self.actions, self.gamma, self.horizon = states, actions, gamma, horizon
        g = torch.Generator().manual_seed(seed)
        self.transition = torch.randn(states, actions, states, generator=g, dtype=torch.float64).softmax(-1)
        self.reward = torch.randn(states, actions, generator=g, dtype=torch.float64)

    def values(self, logits: Tensor) -> Tensor:
        """[T+1, S] expected discounted return of what is left of the episode; differentiable in logits [S, A]."""
        policy = logits.softmax(-1)
        rows = [logits.new_zeros(self.states)]
        for _ in range(self.horizon):
            rows.append((policy * (self.reward + self.gamma * self.transition @ rows[-1])).sum(-1))
        return torch.stack(rows[::-1])

    def expected(self, logits: Tensor) -> Tensor:
        """Expected discounted return of an episode that begins in any state alike; differentiable in logits [S, A]."""
        return self.values(logits)[0].mean()

    def derivatives(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """[S*A] and [S*A, S*A]: first and second derivatives of `expected`."""
        f = lambda flat: self.expected(flat.view(logits.shape))  # noqa: E731
        return torch.func.grad(f)(logits.flatten()), torch.func.hessian(f)(logits.flatten())

    @torch.no_grad()
    def sample(self, logits: Tensor, copies: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Episodes of the policy with logits [S, A]: states [T+1, *copies] and actions [T, *copies]."""
        policy, count = logits.softmax(-1), torch.Size(copies).numel()
        state, action = [torch.randint(self.states, (count,), generator=generator)], []
        for _ in range(self.horizon):
            action.append(torch.multinomial(policy[state[-1]], 1, generator=generator)[:, 0])
            following = self.transition[state[-1], action[-1]]
            state.append(torch.multinomial(following, 1, generator=generator)[:, 0])
        return torch.stack(state).view(-1, *copies), torch.stack(action).view(-1, *copies)

    def log_prob(self, logits: Tensor, state: Tensor, action: Tensor) -> Tensor:
        """[T, P, B] of the actions [T, P, B] in the states [T, P, B], under logits [P, S, A], in nats."""
        lifetimes = torch.arange(len(logits))[:, None]
        return log_softmax(logits)[lifetimes, state, action]
