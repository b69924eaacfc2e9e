"""What agents are judged by in the outer loop; how it is trained is in tests/test_lifetimes.py."""

import experience
import torch
from torch.testing import assert_close

from meta_optimizers.outer_critic import OuterCriticConfig, judged


def test_late_rewards_are_credited_to_the_next_action():
    """As in the authors' outer loop: V-trace of unshifted rows, which on-policy is the generalised advantage."""
    trajectory = experience.trajectory(experience.SPACES["mlp"], seed=3, truncate=False)
    value_of = lambda obs: obs.sum(-1)  # noqa: E731
    config = OuterCriticConfig(gamma=0.9, gae_lambda=0.8, normalize=False, late_rewards=True)
    found, _ = judged(trajectory, value_of, config)
    value, expected = value_of(trajectory.obs), torch.zeros_like(trajectory.reward)
    carry = torch.zeros_like(trajectory.reward[0])
    for t in reversed(range(len(trajectory.reward))):
        reward = trajectory.reward[t - 1] if t else torch.zeros_like(carry)
        over = trajectory.done[t - 1] if t else trajectory.follows[0]
        delta = reward + 0.9 * value[t + 1] * ~over - value[t]
        carry = expected[t] = delta + 0.9 * 0.8 * ~over * carry
    assert_close(found, expected)
