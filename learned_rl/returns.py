"""Returns and advantages as pure functions, differentiable in values, `gamma`, `gae_lambda` and `alpha`.

All of them read time-major tensors `[T, ...]` and one recursion, `x_t + c_t * y_{t+1}`, run backwards. `next_value[t]`
is the value of the state that step `t` led to: of `final_obs[t]` where the episode was truncated there. `gamma`,
`gae_lambda` and `alpha` are floats or tensors that broadcast against `[T, ...]` (per lifetime: `[P, 1]`).
"""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor
LARGEST = 20.0  # bound on the log of an importance weight, which keeps it finite


def backward_recursion(x: Tensor, c: Tensor) -> Tensor:
    """y_t = x_t + c_t * y_{t+1} with y_T = 0; x, c and the result are [T, ...]."""
    y = torch.zeros_like(x[0])
    rows = []
    for x_t, c_t in zip(reversed(x.unbind(0)), reversed(c.unbind(0)), strict=True):
        y = torch.addcmul(x_t, c_t, y)
        rows.append(y)
    return torch.stack(rows[::-1])


def td_error(reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, gamma: Scalar) -> Tensor:
    """r_t + gamma V(s_{t+1}) - V(s_t), without bootstrap where `terminated`; all [T, ...]."""
    return reward + gamma * next_value * ~terminated - value


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: Scalar,
    gae_lambda: Scalar,
) -> Tensor:
    """Generalised advantage estimation (Schulman et al., 2016, arXiv:1506.02438, eq. 16).

    Args:
        reward:     [T, P, B] after action[t]; reward units per environment step.
        value:      [T, P, B] V(obs[t]).
        next_value: [T, P, B] V of the state that step t led to.
        terminated: [T, P, B] bool; no bootstrap beyond it.
        truncated:  [T, P, B] bool; bootstrap from next_value, but no trace into the next episode.
        gamma:      discount per environment step.
        gae_lambda: trace decay.

    Returns:
        advantage:  [T, P, B].
    """
    delta = td_error(reward, value, next_value, terminated, gamma)
    return backward_recursion(delta, gamma * gae_lambda * (~(terminated | truncated)).to(delta.dtype))


def lambda_returns(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: Scalar,
    gae_lambda: Scalar,
) -> Tensor:
    """The lambda-return (Sutton & Barto, 2018, eq. 12.18): `gae + value`. Shapes as in `gae`."""
    return gae(reward, value, next_value, terminated, truncated, gamma, gae_lambda) + value


def retrace(
    reward: Tensor,
    action_value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    log_ratio: Tensor,
    gamma: Scalar,
    gae_lambda: Scalar,
) -> Tensor:
    """Retrace(lambda) (Munos et al., 2016, arXiv:1606.02647, eq. 4): returns of the actions taken

        G_t = r_t + gamma (V_{t+1} + c_{t+1} (G_{t+1} - Q_{t+1}(a_{t+1}))),    c = lambda min(1, exp(log_ratio))

    without the correction across an episode's end and past the last row.

    Args:
        reward:       [T, P, B] after action[t].
        action_value: [T, P, B] Q(obs[t], action[t]).
        next_value:   [T, P, B] V of the state that step t led to, the mean of Q over the target policy.
        terminated:   [T, P, B] bool; no bootstrap beyond it.
        truncated:    [T, P, B] bool; bootstrap from next_value, but no trace into the next episode.
        log_ratio:    [T, P, B] log of target over behaviour probability of action[t], in nats; a constant.
        gamma:        discount per environment step.
        gae_lambda:   trace decay.

    Returns:
        [T, P, B] targets of Q(obs[t], action[t]); differentiable in all but log_ratio.
    """
    weight = leaky(log_ratio, 1.0, 1.0)
    onward = torch.cat([weight[1:], torch.zeros_like(weight[:1])]) * ~(terminated | truncated)
    # G_t - Q_t(a_t) = delta_t + gamma c_{t+1} (G_{t+1} - Q_{t+1}(a_{t+1}))
    delta = td_error(reward, action_value, next_value, terminated, gamma)
    return action_value + backward_recursion(delta, gamma * gae_lambda * onward)


def leaky(log_ratio: Tensor, clip: float, alpha: Scalar) -> Tensor:
    """(1 - alpha) w + alpha min(w, clip) of importance weights w = exp(log_ratio); those above e^20 count as e^20."""
    ratio = log_ratio.detach().clamp(max=LARGEST).exp()  # stop: importance weights are constants of the data
    return (1 - alpha) * ratio + alpha * ratio.clamp(max=clip)


def vtrace(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    log_ratio: Tensor,
    gamma: Scalar,
    gae_lambda: Scalar = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    alpha: Scalar = 1.0,
    pg_clip: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Leaky V-trace (Zahavy et al., 2020, arXiv:2002.12928); with alpha 1 V-trace (Espeholt et al., 2018,
    arXiv:1802.01561, eq. 1 and section 4.2).

    Every importance weight w is (1 - alpha) w + alpha min(w, clip). All that is returned is differentiable in `value`,
    `next_value`, `gamma`, `gae_lambda` and `alpha`, which may also be [T, P, B], one for each step.

    Args:
        log_ratio: [T, P, B] log of target over behaviour probability of action[t], in nats; a constant.
        rho_clip, c_clip: truncation of the importance weights of the temporal difference and of the trace.
        alpha:     from plain importance weights (0) to truncated ones (1).
        pg_clip:   truncation of the importance weight of the policy gradient; None: rho_clip.

    Returns:
        target:    [T, P, B] values v_t.
        advantage: [T, P, B] w_t (r_t + gamma (gae_lambda v_{t+1} + (1 - gae_lambda) V(s_{t+1})) - V(s_t)), the weight
                   of the policy gradient; on-policy that of `gae`.
    """
    done = terminated | truncated
    delta = leaky(log_ratio, rho_clip, alpha) * td_error(reward, value, next_value, terminated, gamma)
    trace = gae_lambda * leaky(log_ratio, c_clip, alpha)
    target = value + backward_recursion(delta, gamma * trace * ~done)
    # Across an episode's end, and past the last row, the next target is the plain bootstrap value.
    next_target = torch.where(done, next_value, torch.cat([target[1:], next_value[-1:]]))
    following = gae_lambda * next_target + (1 - gae_lambda) * next_value
    weight = leaky(log_ratio, rho_clip if pg_clip is None else pg_clip, alpha)
    return target, weight * td_error(reward, value, following, terminated, gamma)
