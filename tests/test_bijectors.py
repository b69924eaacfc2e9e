"""Bijectors: a number starts at its base, bit for bit, and moves along a sigmoid or an exponential from there."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from learned_rl.component import Hyper
from learned_rl.types import UserError
from objectives.bijectors import BIJECTORS, MARGIN, NUMBERS, UNIT, Interval, Positive, canonical

ALL = [UNIT, Interval(0.9, 1.0), Interval(-2.0, 5.0), Positive()]
each = pytest.mark.parametrize("bijector", ALL, ids=str)


def bases(bijector, dtype=torch.float64, n=1000):
    """Numbers that a learned one may start from, [n, 1]."""
    u = torch.rand(n, 1, generator=torch.Generator().manual_seed(0), dtype=dtype)
    if isinstance(bijector, Positive):
        return torch.exp(20 * u - 10)
    return (bijector.low + (bijector.high - bijector.low) * u).clamp(bijector.low + 1e-5, bijector.high - 1e-5)


def written_down(bijector, base, eta):
    """f(x_0 + eta) with f(x_0) = base."""
    if isinstance(bijector, Positive):
        return torch.exp(base.log() + eta)
    width = bijector.high - bijector.low
    return bijector.low + width * torch.sigmoid(torch.logit((base - bijector.low) / width) + eta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each
def test_at_zero_it_is_the_base_bit_for_bit(bijector, dtype):
    base = bases(bijector, dtype)
    assert torch.equal(bijector(base, torch.zeros(1, dtype=dtype)), base)
    assert torch.equal(bijector.start(base), base)
    for number in base[:50, 0].tolist():
        assert bijector.start(number) == number
        assert bijector(number, torch.zeros(1, dtype=dtype)).item() == torch.tensor(number, dtype=dtype).item()


@each
def test_it_is_the_sigmoid_or_the_exponential(bijector):
    base, eta = bases(bijector), torch.linspace(-8, 8, 33, dtype=torch.float64)
    assert_close(bijector(base, eta), written_down(bijector, base, eta), rtol=1e-11, atol=1e-12)


@each
def test_its_derivative_against_differences(bijector):
    base, eta = bases(bijector)[:20], torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda eta: bijector(base, eta), eta, eps=1e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("interval", ALL[:-1], ids=str)
def test_it_never_leaves_the_interval_and_its_derivative_stays_finite(interval, dtype):
    eta = torch.tensor([-1e4, -90.0, -20.0, 20.0, 90.0, 1e4], dtype=dtype, requires_grad=True)
    number = interval(bases(interval, dtype), eta)
    (slope,) = torch.autograd.grad(number.sum(), eta)
    assert bool((number >= interval.low).all()) and bool((number <= interval.high).all())
    assert_close(number[:, 0], torch.full_like(number[:, 0], interval.low), rtol=0, atol=1e-6)
    assert_close(number[:, -1], torch.full_like(number[:, -1], interval.high), rtol=0, atol=1e-6)
    assert bool(slope.isfinite().all()) and bool((slope >= 0).all())


@pytest.mark.parametrize(
    ("interval", "base", "start"),
    [
        (UNIT, 0.0, 0.001),
        (UNIT, -3.0, 0.001),
        (UNIT, 1.0, 0.999),
        (UNIT, 7.0, 0.999),
        (UNIT, 0.9999, 0.9999),
        (Interval(0.9, 1.1), 1.1, 1.0998),
        (Interval(0.9, 1.1), 0.0, 0.9002),
    ],
)
def test_a_base_at_an_edge_or_beyond_starts_a_margin_inside(interval, base, start):
    assert MARGIN == 0.001
    assert interval.start(base) == pytest.approx(start, abs=1e-15)
    rows, zero = torch.tensor([[base], [base]], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for given in (base, rows):
        number, exactly = interval(given, zero), torch.as_tensor(interval.start(given), dtype=torch.float64)
        assert torch.equal(number, exactly.expand_as(number))
    eta = zero.clone().requires_grad_()
    assert torch.autograd.grad(interval(rows, eta).sum(), eta)[0].item() > 0  # from where it can move


@pytest.mark.parametrize("name", NUMBERS)
def test_what_cannot_be_learned_from_is_refused_with_a_number_that_can(name):
    for base in [None, math.inf, -math.inf, math.nan] + ([0.0, -1.0] if BIJECTORS[name].positive else []):
        said = f"^{name} is {base}, but it is to be learned: expected a finite .*number to start from, such as (.*), or"
        with pytest.raises(UserError, match=said) as error:
            BIJECTORS[name].learnable(name, base)
        such = float(str(error.value).partition("such as ")[2].partition(",")[0])
        assert BIJECTORS[name].learnable(name, such) == such
        Hyper().replace(**{name: such})


def test_a_weight_of_zero_cannot_grow_by_factors():
    with pytest.raises(UserError, match=r"ent_coef is 0\.0, .*positive number to start from, such as 0\.01"):
        Positive().learnable("ent_coef", 0.0)
    assert UNIT.learnable("ent_coef", 0.0) == 0.0


def test_tensors_are_taken_as_they_are():
    base = torch.tensor([[0.0], [math.inf]])
    assert Positive().learnable("max_grad_norm", base) is base


def test_every_learnable_number_has_its_bijector():
    assert set(BIJECTORS) == set(NUMBERS)
    ours = {"gamma", "gae_lambda", "vtrace_alpha", "clip_range", "ent_coef"}
    assert {name for name, bijector in BIJECTORS.items() if bijector == Interval(0, 1)} == ours
    assert all(isinstance(BIJECTORS[name], Positive) for name in set(BIJECTORS) - ours)


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0)])
def test_an_interval_has_two_ends(bounds):
    with pytest.raises(UserError, match="expected finite low < high"):
        Interval(*bounds)


def test_names_of_others_are_known():
    found = canonical(["entropy_cost", "value_cost", "lambda", "step_size", "gamma"])
    assert found == ("ent_coef", "vf_coef", "gae_lambda", "learning_rate", "gamma")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["gama"], "unknown number 'gama'.*'gamma'"),
        (["gamma", "gamma"], "gamma is there twice among gamma, gamma"),
        (["gae_lambda", "lambda"], "gae_lambda is there twice"),
    ],
)
def test_names_that_do_not_name_one_number_are_refused(names, said):
    with pytest.raises(UserError, match=said):
        canonical(names)
