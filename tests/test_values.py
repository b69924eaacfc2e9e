"""Categorical values and running moments: transforms and their inverse, two-hot targets, averages without bias."""

import numpy as np
import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

from learned_rl.values import CategoricalValue, RunningMoments, signed_hyperbolic, signed_parabolic

P = 2
SMALL = CategoricalValue(support=4)  # nine bins


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


# --- the squeezed space -------------------------------------------------------------------------------------------


def test_the_transform_by_hand():
    found = signed_hyperbolic(double(0, 3, -3, 99))
    assert_close(found, double(0, 1 + 0.003, -1 - 0.003, 9 + 0.099), rtol=0, atol=1e-15)


def test_each_transform_inverts_the_other():
    """Small values too: neither loses a digit to cancellation."""
    x = torch.logspace(-12, 6, 200, dtype=torch.float64)
    x = torch.cat([-x, x, torch.zeros(1, dtype=torch.float64)])
    assert_close(signed_parabolic(signed_hyperbolic(x)), x, rtol=1e-12, atol=0)
    assert_close(signed_hyperbolic(signed_parabolic(x)), x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("transform", [signed_hyperbolic, signed_parabolic])
def test_single_precision_keeps_small_and_large_values(transform):
    """As it is usually written the inverse is off by up to 1e-4."""
    x = torch.cat([torch.linspace(-300, 300, 2001), torch.logspace(-12, 0, 200)])
    assert_close(transform(x).double(), transform(x.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("transform", [signed_hyperbolic, signed_parabolic])
def test_transforms_have_derivatives_also_at_zero(transform):
    x = double(-2.0, 0.0, 1e-3, 5.0).requires_grad_()
    (slope,) = torch.autograd.grad(transform(x).sum(), x)
    with torch.no_grad():
        assert_close(slope, (transform(x + 1e-6) - transform(x - 1e-6)) / 2e-6, rtol=1e-6, atol=0)


# --- categorical values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [SMALL, CategoricalValue()], ids=["small", "default"])
def test_two_hots_are_distributions_whose_mean_is_the_value(value):
    g = torch.Generator().manual_seed(0)
    x = signed_parabolic(0.99 * value.support * (2 * torch.rand(50, 3, generator=g, dtype=torch.float64) - 1))
    found = value.two_hot(x)
    assert found.shape == (50, 3, 2 * value.support + 1) and (found >= 0).all() and ((found > 0).sum(-1) == 2).all()
    assert_close(found.sum(-1), torch.ones_like(x), rtol=0, atol=1e-12)
    # 1e-5 below the share of a bin, as the authors have it, moves what is squeezed by as much.
    assert_close(signed_hyperbolic(value.mean(found.log())), signed_hyperbolic(x), rtol=0, atol=1.1e-5)


def test_two_hot_by_hand():
    """h(x) = 1.25 lies between the bins 1 and 2, whose places are 5 and 6; h(0) is a bin."""
    found = SMALL.two_hot(torch.stack([signed_parabolic(double(1.25)), double(0)]))
    expected = torch.zeros(2, 1, 9, dtype=torch.float64)
    expected[0, 0, 5], expected[0, 0, 6], expected[1, 0, 4] = 0.75, 0.25, 1.0
    assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [1e9, -1e9, 25.0])
def test_values_beyond_the_support_fall_into_the_outermost_bin(value):
    found = SMALL.two_hot(double(value))[0]
    assert found.tolist() == [float(k == (8 if value > 0 else 0)) for k in range(9)]
    loss = SMALL.loss(torch.zeros(1, 9, dtype=torch.float64), double(value))
    assert_close(loss, double(9).log())
    assert not SMALL.holds(double(value))
    assert SMALL.holds(signed_parabolic(double(-4, -3.9, 4, 4.1)) * (1 - 1e-12)).tolist() == [True, True, True, False]


def test_what_is_not_a_number_spoils_no_other_value():
    loss = SMALL.loss(torch.zeros(3, 9, dtype=torch.float64), double(1.0, float("nan"), float("inf")))
    assert loss.isfinite().tolist() == [True, False, False]
    assert SMALL.two_hot(double(1.0, float("nan"))).isfinite().all(-1).tolist() == [True, False]


def test_the_mean_of_equal_logits_is_zero_and_of_a_sure_bin_its_value():
    assert SMALL.mean(torch.zeros(9, dtype=torch.float64)).abs() < 1e-12
    sure = torch.full((9,), -1e3, dtype=torch.float64)
    sure[7] = 0
    assert_close(signed_hyperbolic(SMALL.mean(sure)), torch.tensor(3.0, dtype=torch.float64))


def test_the_loss_is_the_cross_entropy_with_the_two_hot():
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 2, 9, generator=g, dtype=torch.float64, requires_grad=True)
    target = 30 * torch.randn(6, 2, generator=g, dtype=torch.float64)
    found = SMALL.loss(logits, target)
    expected = functional.cross_entropy(logits.flatten(0, 1), SMALL.two_hot(target).flatten(0, 1), reduction="none")
    assert_close(found, expected.view(6, 2), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(found.sum(), logits)
    assert_close(slope, logits.softmax(-1) - SMALL.two_hot(target), rtol=1e-10, atol=1e-12)


def test_a_loss_has_a_derivative_to_its_target():
    """So a learned discount is reached through the value that it makes a target of."""
    target, logits = double(0.3, 2.0, -0.7).requires_grad_(), torch.linspace(-1, 2, 9, dtype=torch.float64).square()
    loss = lambda x: SMALL.loss(logits.expand(3, 9), x)  # noqa: E731
    (slope,) = torch.autograd.grad(loss(target).sum(), target)
    with torch.no_grad():
        assert_close(slope, (loss(target + 1e-6) - loss(target - 1e-6)) / 2e-6, rtol=1e-6, atol=0)
    assert (slope != 0).all()


# --- running moments ----------------------------------------------------------------------------------------------


def lived(decay, batches, eps=1e-6):
    moments = RunningMoments(decay, eps)
    state = {k: v.double() for k, v in moments.initial(P).items()}
    for x in batches:
        state = moments.update(state, x)
    return state, moments.mean_scale(state)


def batches(n=4):
    g = torch.Generator().manual_seed(2)
    scale = torch.tensor([1.0, 50.0], dtype=torch.float64)[:, None]
    return [3 + k + scale * torch.randn(5, P, 3, generator=g, dtype=torch.float64) for k in range(n)]


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_moments_are_weighted_averages_over_batches(decay):
    """Batch k of n weighs decay^(n - 1 - k), and the weights sum to 1."""
    seen = batches()
    state, (mean, scale) = lived(decay, seen)
    weights = np.array([decay ** (len(seen) - 1 - k) for k in range(len(seen))])
    for p in range(P):
        each = [x[:, p].numpy() for x in seen]
        first, second = (np.average([(x**m).mean() for x in each], weights=weights) for m in (1, 2))
        assert float(mean[p]) == pytest.approx(first, rel=1e-12)
        assert float(scale[p]) == pytest.approx(np.sqrt(second - first**2 + 1e-12) + 1e-6, rel=1e-12)
    assert float(state["decay"][0]) == pytest.approx(decay ** len(seen))
    assert mean.shape == scale.shape == (P, 1)


def test_the_first_batch_is_normalised_by_itself():
    (x,) = batches(1)
    _, (mean, scale) = lived(0.99, [x])
    for p in range(P):
        assert float(mean[p]) == pytest.approx(np.mean(x[:, p].numpy()), rel=1e-10)
        assert float(scale[p]) == pytest.approx(np.std(x[:, p].numpy()), rel=1e-5)


def test_what_never_varies_has_a_small_positive_scale():
    _, (mean, scale) = lived(0.9, [torch.full((5, P, 3), 7.0, dtype=torch.float64)] * 3)
    assert_close(mean, torch.full_like(mean, 7.0))
    assert ((scale > 1e-6) & (scale < 1e-5)).all()
