"""Returns and advantages: by hand, against their definitions as sums, and their derivatives."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from learned_rl.returns import backward_recursion, gae, lambda_returns, retrace, td_error, vtrace

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def column(*numbers, dtype=torch.float64):
    """[T, 1, 1]"""
    return torch.tensor(numbers, dtype=dtype).view(-1, 1, 1)


def case(seed, T=6, P=2, B=3, ends=0.25):
    """reward, value, next_value, terminated, truncated; next values agree with values inside an episode."""
    g = torch.Generator().manual_seed(seed)
    reward, value, other = (torch.randn(T, P, B, generator=g, dtype=torch.float64) for _ in range(3))
    terminated = torch.rand(T, P, B, generator=g) < ends
    truncated = (torch.rand(T, P, B, generator=g) < ends) & ~terminated
    following = torch.cat([value[1:], other[-1:]])
    return reward, value, torch.where(terminated | truncated, other, following), terminated, truncated


def paths(*tensors):
    """The single time series [T] of each lifetime and copy."""
    P, B = tensors[0].shape[1:]
    for p in range(P):
        for b in range(B):
            yield p, b, [x[:, p, b].tolist() for x in tensors]


def naive_lambda_return(reward, value, next_value, terminated, truncated, gamma, lam, t):
    """(1 - lambda) sum_n lambda^(n-1) G^(n) + lambda^(last) G^(last), from n-step returns within the episode."""
    n_step, total, weight = 0.0, 0.0, 1.0
    for k in range(t, len(reward)):
        n_step += gamma ** (k - t) * reward[k]
        bootstrap = 0.0 if terminated[k] else gamma ** (k - t + 1) * next_value[k]
        if terminated[k] or truncated[k] or k == len(reward) - 1:
            return total + weight * (n_step + bootstrap)
        total += weight * (1 - lam) * (n_step + bootstrap)
        weight *= lam
    raise AssertionError


def naive_vtrace(reward, value, next_value, terminated, truncated, rho, c, pg, gamma, lam):
    """Targets and advantages of one time series [T], every number a list: equation 1 of Espeholt et al. as a sum,
    V + sum_k (prod gamma lambda c) rho_k delta_k within the episode, then the mixture of what follows."""
    T, target, advantage = len(reward), [], []
    discount = [0.0 if end else g for end, g in zip(terminated, gamma, strict=True)]
    for t in range(T):
        total, weight = value[t], 1.0
        for k in range(t, T):
            total += weight * rho[k] * (reward[k] + discount[k] * next_value[k] - value[k])
            if terminated[k] or truncated[k]:
                break
            weight *= gamma[k] * lam[k] * c[k]
        target.append(total)
    for t in range(T):
        last = terminated[t] or truncated[t] or t == T - 1
        following = next_value[t] if last else lam[t] * target[t + 1] + (1 - lam[t]) * next_value[t]
        advantage.append(pg[t] * (reward[t] + discount[t] * following - value[t]))
    return target, advantage


def log_ratios(seed, T=6, P=2, B=3):
    return 0.7 * torch.randn(T, P, B, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_vtrace(case, log_ratio, gamma, lam, alpha, clips=(1.0, 1.0, 1.0)):
    """Against the sums, with weights that are mixed by hand; numbers are floats, [P, 1] or [T, P, B]."""
    rho_clip, c_clip, pg_clip = clips
    target, advantage = vtrace(*case, log_ratio, gamma, lam, rho_clip, c_clip, alpha, pg_clip)
    gamma, lam, alpha = (torch.as_tensor(x, dtype=torch.float64).expand_as(log_ratio) for x in (gamma, lam, alpha))
    for p, b, (*series, log_w, g, la, a) in paths(*case, log_ratio, gamma, lam, alpha):
        w = [math.exp(x) for x in log_w]
        mixed = [[(1 - m) * x + m * min(x, clip) for x, m in zip(w, a, strict=True)] for clip in clips]
        expected = naive_vtrace(*series, *mixed, g, la)
        assert target[:, p, b].tolist() == pytest.approx(expected[0], rel=1e-9, abs=1e-9)
        assert advantage[:, p, b].tolist() == pytest.approx(expected[1], rel=1e-9, abs=1e-9)


def test_recursion_by_hand():
    y = backward_recursion(column(1.0, 2.0, 3.0), column(0.5, 0.0, 7.0))
    assert y.flatten().tolist() == [2.0, 2.0, 3.0]


def test_td_error_bootstraps_from_truncated_but_not_from_terminated_steps():
    delta = td_error(column(1, 1, 1), column(10, 20, 30), column(2, 4, 6), column(0, 1, 0, dtype=torch.bool), 0.5)
    assert delta.flatten().tolist() == [-8.0, -19.0, -26.0]


def test_gae_by_hand_with_a_termination_and_a_truncation():
    """gamma = 1/2, lambda = 1/2; step 1 terminates, step 3 is truncated with final value 8."""
    reward, value = column(1, 2, 3, 4, 5), column(1, 1, 1, 1, 1)
    next_value = column(1, 99, 1, 8, 6)
    terminated = column(0, 1, 0, 0, 0, dtype=torch.bool)
    truncated = column(0, 0, 0, 1, 0, dtype=torch.bool)
    # delta = [1 + .5 - 1, 2 - 1, 3 + .5 - 1, 4 + 4 - 1, 5 + 3 - 1] = [.5, 1, 2.5, 7, 7]
    advantage = gae(reward, value, next_value, terminated, truncated, 0.5, 0.5)
    assert advantage.flatten().tolist() == [0.5 + 0.25 * 1, 1, 2.5 + 0.25 * 7, 7, 7]
    returns = lambda_returns(reward, value, next_value, terminated, truncated, 0.5, 0.5)
    assert_close(returns, advantage + 1)


def test_lambda_one_is_monte_carlo_and_lambda_zero_is_td():
    reward, value, next_value, terminated, truncated = c = case(0)
    done = terminated | truncated
    expected = torch.zeros_like(reward)
    following = next_value[-1]
    for t in reversed(range(len(reward))):
        following = torch.where(done[t], next_value[t] * ~terminated[t], following)
        following = reward[t] + 0.9 * following
        expected[t] = following
    assert_close(lambda_returns(*c, 0.9, 1.0), expected, **EXACT)
    assert_close(gae(*c, 0.9, 0.0), td_error(reward, value, next_value, terminated, 0.9), **EXACT)


def test_gamma_zero_leaves_the_reward():
    reward, value, next_value, terminated, truncated = case(1)
    assert_close(lambda_returns(reward, value, next_value, terminated, truncated, 0.0, 0.9), reward, **EXACT)


unit = st.floats(0, 1)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 9), gamma=unit, lam=unit, ends=st.sampled_from([0.0, 0.2, 1.0]))
def test_lambda_returns_equal_their_definition(seed, T, gamma, lam, ends):
    c = case(seed, T, ends=ends)
    returns, advantage = lambda_returns(*c, gamma, lam), gae(*c, gamma, lam)
    assert_close(returns, advantage + c[1], **EXACT)
    for p, b, series in paths(*c):
        expected = [naive_lambda_return(*series, gamma, lam, t) for t in range(T)]
        assert returns[:, p, b].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    T=st.integers(1, 9),
    gamma=unit,
    lam=unit,
    alpha=unit,
    clips=st.tuples(*[st.floats(0.5, 3)] * 3),
)
def test_leaky_vtrace_equals_its_definition(seed, T, gamma, lam, alpha, clips):
    check_vtrace(case(seed, T), log_ratios(seed, T), gamma, lam, alpha, clips)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_alpha_goes_from_plain_to_clipped_importance_weights(lam):
    """Neither end mixes anything: 0 knows no thresholds, 1 nothing above them."""
    c, log_ratio = case(8), log_ratios(8)
    found = {alpha: vtrace(*c, log_ratio, 0.9, lam, 1.2, 0.8, alpha, 1.5) for alpha in (0.0, 1.0)}
    for p, b, (*series, log_w) in paths(*c, log_ratio):
        w = [math.exp(x) for x in log_w]
        weights = {0.0: [w, w, w], 1.0: [[min(x, clip) for x in w] for clip in (1.2, 0.8, 1.5)]}
        for alpha, tensors in found.items():
            expected = naive_vtrace(*series, *weights[alpha], [0.9] * 6, [lam] * 6)
            for x, y in zip(tensors, expected, strict=True):
                assert x[:, p, b].tolist() == pytest.approx(y, rel=1e-12, abs=1e-12)
    assert not torch.allclose(found[0.0][0], found[1.0][0])
    assert_close(vtrace(*c, log_ratio, 0.9, lam, 1.2, 0.8), vtrace(*c, log_ratio, 0.9, lam, 1.2, 0.8, 1.0, 1.2))


@pytest.mark.parametrize("shape", [(2, 1), (6, 2, 3)], ids=["per-lifetime", "per-step"])
def test_lifetimes_and_steps_may_have_numbers_of_their_own_in_vtrace(shape):
    g = torch.Generator().manual_seed(9)
    gamma, lam, alpha = (torch.rand(shape, generator=g, dtype=torch.float64) for _ in range(3))
    check_vtrace(case(9), log_ratios(9), gamma, lam, alpha, (1.2, 0.8, 1.5))


def test_vtrace_of_huge_importance_weights_stays_finite():
    """Clipped ones as ever; of plain ones e^20 is the largest."""
    c = [x.float() if x.is_floating_point() else x for x in case(4)]
    huge, large = torch.full((6, 2, 3), 200.0), torch.full((6, 2, 3), 20.0)
    assert_close(vtrace(*c, huge, 0.9), vtrace(*c, torch.zeros(6, 2, 3), 0.9), rtol=0, atol=0)
    found = vtrace(*c, huge, 0.9, 0.0, alpha=0.5)
    assert all(bool(x.isfinite().all()) for x in found)
    assert_close(found, vtrace(*c, large, 0.9, 0.0, alpha=0.5), rtol=0, atol=0)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_vtrace_on_policy_is_the_lambda_return(lam):
    c = case(3)
    target, _ = vtrace(*c, torch.zeros(6, 2, 3, dtype=torch.float64), 0.9, lam)
    assert_close(target, lambda_returns(*c, 0.9, lam), **EXACT)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_vtrace_on_policy_weighs_the_policy_gradient_with_gae(lam, alpha):
    c = case(3)
    _, advantage = vtrace(*c, torch.zeros(6, 2, 3, dtype=torch.float64), 0.9, lam, alpha=alpha)
    assert_close(advantage, gae(*c, 0.9, lam), **EXACT)


def test_vtrace_ignores_steps_that_the_target_policy_would_never_take():
    c = case(4, ends=0.0)
    target, advantage = vtrace(*c, torch.full((6, 2, 3), -60.0, dtype=torch.float64), 0.9)
    assert_close(target, c[1], **EXACT)
    assert advantage.abs().max() < 1e-12


@pytest.mark.parametrize("shape", [(), (2, 1)], ids=["one", "per-lifetime"])
@pytest.mark.parametrize("function", [gae, lambda_returns])
def test_derivatives_in_values_gamma_and_lambda(function, shape):
    reward, value, next_value, terminated, truncated = case(5)
    gamma, lam = (torch.full(shape, x, dtype=torch.float64).requires_grad_() for x in (0.9, 0.7))
    inputs = [x.requires_grad_() for x in (reward, value, next_value)]
    f = lambda r, v, n, g, la: function(r, v, n, terminated, truncated, g, la)  # noqa: E731
    assert torch.autograd.gradcheck(f, (*inputs, gamma, lam))
    assert torch.autograd.gradgradcheck(f, (*inputs, gamma, lam))


def test_derivatives_of_vtrace():
    reward, value, next_value, terminated, truncated = case(6)
    log_ratio = log_ratios(1)
    numbers = [torch.full((2, 1), x, dtype=torch.float64).requires_grad_() for x in (0.9, 0.7, 0.6)]

    def f(v, n, g, la, a):
        return vtrace(reward, v, n, terminated, truncated, log_ratio, g, la, alpha=a)

    inputs = (value.requires_grad_(), next_value.requires_grad_(), *numbers)
    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)
    log_ratio.requires_grad_()
    for said in f(*inputs):
        assert torch.autograd.grad(said.sum(), log_ratio, allow_unused=True)[0] is None  # ratios are data


@pytest.mark.parametrize("shape", [(), (2, 1), (6, 2, 3)], ids=["one", "per-lifetime", "per-step"])
@pytest.mark.parametrize("which", ["target", "advantage", "sum"])
@pytest.mark.parametrize("i", range(3), ids=["gamma", "lambda", "alpha"])
def test_derivatives_of_vtrace_against_differences(i, which, shape):
    c, log_ratio = case(10), log_ratios(10)
    g = torch.Generator().manual_seed(11)
    noise = torch.randn(2, *log_ratio.shape, generator=g, dtype=torch.float64)
    noise *= torch.tensor([which != "advantage", which != "target"]).view(2, 1, 1, 1)
    numbers = [0.3 + 0.5 * torch.rand(shape, generator=g, dtype=torch.float64) for _ in range(3)]

    def judged(x):
        gamma, lam, alpha = (x if j == i else y for j, y in enumerate(numbers))
        return (noise * torch.stack(vtrace(*c, log_ratio, gamma, lam, 1.0, 1.0, alpha))).sum()

    x, step = numbers[i].clone().requires_grad_(), 1e-5
    (gradient,) = torch.autograd.grad(judged(x), x)
    moves = step * torch.eye(x.numel(), dtype=torch.float64).view(-1, *shape)
    differences = torch.stack([(judged(x + m) - judged(x - m)) / (2 * step) for m in moves]).detach().view(shape)
    scale = gradient.abs().max()
    assert scale > 0.01
    assert (gradient - differences).abs().max() < 1e-7 * scale


def test_lifetimes_may_have_numbers_of_their_own():
    c = case(7)
    gamma, lam = torch.tensor([[0.9], [0.5]]).double(), torch.tensor([[0.3], [1.0]]).double()
    together = gae(*c, gamma, lam)
    for p in range(2):
        alone = gae(*[x[:, p : p + 1] for x in c], float(gamma[p]), float(lam[p]))
        assert_close(together[:, p : p + 1], alone, **EXACT)


# --- Retrace ------------------------------------------------------------------------------------------------------


def naive_retrace(reward, q, next_value, terminated, truncated, log_ratio, gamma, lam):
    """Equation 3 of Munos et al. for one time series: Q + sum_k gamma^k (prod c) delta_k within the episode."""
    T, found = len(reward), []
    for t in range(T):
        total, weight = q[t], 1.0
        for k in range(t, T):
            bootstrap = 0.0 if terminated[k] else gamma * next_value[k]
            total += weight * (reward[k] + bootstrap - q[k])
            if terminated[k] or truncated[k] or k == T - 1:
                break
            weight *= gamma * lam * min(1.0, math.exp(log_ratio[k + 1]))
        found.append(total)
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), T=st.integers(1, 9), gamma=unit, lam=unit, ends=st.sampled_from([0.0, 0.2, 1.0]))
def test_retrace_equals_its_definition(seed, T, gamma, lam, ends):
    c, log_ratio = case(seed, T, ends=ends), log_ratios(seed, T)
    found = retrace(*c, log_ratio, gamma, lam)
    for p, b, series in paths(*c, log_ratio):
        assert found[:, p, b].tolist() == pytest.approx(naive_retrace(*series, gamma, lam), rel=1e-9, abs=1e-9)


def test_retrace_by_hand_with_a_termination_and_a_truncation():
    """gamma = 1/2, lambda = 1, on-policy but for step 4, half as likely as it was; step 1 terminates, step 2 is
    truncated with final value 8, and the last row bootstraps from 6."""
    reward, q, next_value = column(1, 2, 3, 4, 5), column(1, 3, 1, 7, 2), column(4, 99, 8, 5, 6)
    terminated, truncated = (column(*row, dtype=torch.bool) for row in ((0, 1, 0, 0, 0), (0, 0, 1, 0, 0)))
    log_ratio = column(9.0, 0.0, 9.0, 9.0, math.log(0.5))  # that of a step counts only for the one before
    found = retrace(reward, q, next_value, terminated, truncated, log_ratio, 0.5, 1.0).flatten().tolist()
    last = 5 + 0.5 * 6
    assert found == pytest.approx([1 + 0.5 * (4 + 2 - 3), 2, 3 + 0.5 * 8, 4 + 0.5 * (5 + 0.5 * (last - 2)), last])


def test_on_policy_retrace_of_equal_action_values_is_the_lambda_return():
    """Q(s, a) = V(s): then lambda = 1 is Monte Carlo with bootstraps where episodes are cut."""
    c, ones = case(11), torch.zeros(6, 2, 3, dtype=torch.float64)
    for lam in (0.0, 0.6, 1.0):
        assert_close(retrace(*c, ones, 0.9, lam), lambda_returns(*c, 0.9, lam), **EXACT)


def test_retrace_cuts_the_trace_where_the_target_policy_would_never_act_so_and_stays_finite():
    c, q = case(12, ends=0.0), case(12, ends=0.0)[1]
    one_step = q + td_error(c[0], q, c[2], c[3], 0.9)
    assert_close(retrace(*c, torch.full_like(q, -60.0), 0.9, 1.0), one_step, **EXACT)
    assert_close(retrace(*c, torch.full_like(q, 200.0), 0.9, 1.0), retrace(*c, torch.zeros_like(q), 0.9, 1.0), **EXACT)


def test_derivatives_of_retrace():
    reward, q, next_value, terminated, truncated = case(13)
    log_ratio = log_ratios(13).requires_grad_()
    numbers = [torch.full((2, 1), x, dtype=torch.float64).requires_grad_() for x in (0.9, 0.7)]
    inputs = [x.requires_grad_() for x in (reward, q, next_value)] + numbers

    def f(r, v, n, g, la):
        return retrace(r, v, n, terminated, truncated, log_ratio, g, la)

    assert torch.autograd.gradcheck(f, inputs) and torch.autograd.gradgradcheck(f, inputs)
    assert all(slope.abs().max() > 0.1 for slope in torch.autograd.grad(f(*inputs).sum(), inputs))
    assert torch.autograd.grad(f(*inputs).sum(), log_ratio, allow_unused=True)[0] is None  # ratios are data
