"""Action distributions against quadrature, samples and torch.distributions."""

import math

import pytest
import torch
from scipy.stats import chisquare, kstest
from torch.distributions import AffineTransform, Independent, Normal, TanhTransform, TransformedDistribution
from torch.testing import assert_close

from learned_rl.distributions import (
    Categorical,
    ClippedGaussian,
    SquashedGaussian,
    log_softmax,
    rowwise,
    softmax,
    stack,
)

LOW, HIGH = torch.tensor([-1.0, 0.5]).double(), torch.tensor([2.0, 1.5]).double()


def categorical(seed=0, shape=(3, 4), scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return Categorical(scale * torch.randn(shape, generator=g, dtype=torch.float64))


def gaussian(kind, seed=0, lead=(3,), spread=0.4):
    g = torch.Generator().manual_seed(seed)
    mean, log_std = (spread * torch.randn(*lead, 2, generator=g, dtype=torch.float64) for _ in range(2))
    return kind(mean, log_std - 0.5, LOW, HIGH)


GAUSSIANS = pytest.mark.parametrize("kind", [ClippedGaussian, SquashedGaussian])


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- categorical --------------------------------------------------------------------------------------------------


def test_softmax_is_softmax():
    x = torch.randn(2, 3, 4, generator=generator(), dtype=torch.float64)
    assert_close(softmax(x), torch.softmax(x, -1), rtol=1e-14, atol=1e-14)
    assert_close(log_softmax(x), torch.log_softmax(x, -1), rtol=1e-14, atol=1e-14)


def test_categorical_equals_torch():
    d, other = categorical(0), categorical(1)
    twin, other_twin = (torch.distributions.Categorical(logits=x.logits) for x in (d, other))
    for action in range(4):
        a = torch.full((3,), action)
        assert_close(d.log_prob(a), twin.log_prob(a))
    total = torch.stack([d.log_prob(torch.full((3,), a)).exp() for a in range(4)]).sum(0)
    assert_close(total, torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert_close(d.entropy(), twin.entropy())
    assert_close(d.kl(other), torch.distributions.kl_divergence(twin, other_twin))
    assert_close(d.kl(d), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-15)
    assert torch.equal(d.mode(), d.logits.argmax(-1))


@pytest.mark.parametrize("seed", range(3))
def test_categorical_samples_follow_the_probabilities(seed):
    logits = categorical(seed, (5,)).logits
    n = 50_000
    actions = Categorical(logits.expand(n, 5)).sample(generator(seed))
    assert actions.shape == (n,) and actions.dtype == torch.int64
    assert chisquare(actions.bincount(minlength=5).numpy(), (n * logits.softmax(-1)).numpy()).pvalue > 0.01


def test_categorical_samples_of_rows_are_independent():
    """The same generator: two states side by side are not drawn alike."""
    actions = Categorical(torch.zeros(20_000, 2, 2)).sample(generator())
    table = torch.stack([(actions == torch.tensor([a, b])).all(1).sum() for a in (0, 1) for b in (0, 1)])
    assert chisquare(table.numpy()).pvalue > 0.01


def test_a_broken_row_still_yields_actions_and_leaves_others_alone():
    logits = torch.zeros(100, 2, 3)
    whole = Categorical(logits).sample(generator())
    broken = logits.clone()
    broken[:, 1] = float("nan")
    actions = Categorical(broken).sample(generator())
    assert torch.equal(actions[:, 0], whole[:, 0])
    assert ((actions >= 0) & (actions < 3)).all()


def test_certain_actions_are_always_taken():
    logits = torch.tensor([0.0, -1e9, -1e9]).expand(1000, 3)
    assert not Categorical(logits).sample(generator()).any()


# --- Gaussians ----------------------------------------------------------------------------------------------------


def torch_twin(d):
    base = Normal(d.mean, d.log_std.exp())
    if type(d) is ClippedGaussian:
        return Independent(base, 1)
    return Independent(
        TransformedDistribution(base, [TanhTransform(), AffineTransform((LOW + HIGH) / 2, (HIGH - LOW) / 2)]), 1
    )


@GAUSSIANS
def test_log_prob_equals_torch(kind):
    d = gaussian(kind)
    u = d.sample(generator())
    action = u if kind is ClippedGaussian else d.to_env(u)
    assert_close(d.log_prob(u), torch_twin(d).log_prob(action), rtol=1e-9, atol=1e-9)


@GAUSSIANS
def test_density_integrates_to_one(kind):
    """Over the actions that the environment sees (squashed) or that are stored (clipped)."""
    mean, log_std = torch.tensor([[0.3]]).double(), torch.tensor([[-0.4]]).double()
    d = kind(mean, log_std, LOW[:1], HIGH[:1])
    u = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    x = d.to_env(u) if kind is SquashedGaussian else u
    total = torch.trapezoid(d.log_prob(u).exp(), x[:, 0])
    assert total.item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("log_std", [-2.0, -0.5, 0.0])
@pytest.mark.parametrize("mean", [0.0, 1.5])
@GAUSSIANS
def test_entropy_is_minus_the_mean_log_probability(kind, mean, log_std):
    d = kind(torch.tensor([[mean]]).double(), torch.tensor([[log_std]]).double(), LOW[:1], HIGH[:1])
    u = torch.linspace(mean - 12 * math.exp(log_std), mean + 12 * math.exp(log_std), 40_001, dtype=torch.float64)
    density = Normal(mean, math.exp(log_std)).log_prob(u).exp()
    expected = -torch.trapezoid(density * d.log_prob(u[:, None]), u)
    assert d.entropy().item() == pytest.approx(expected.item(), abs=3e-5 if log_std == 0 else 1e-6)


@GAUSSIANS
def test_entropy_of_several_dimensions_adds_up(kind):
    d = gaussian(kind)
    parts = [kind(d.mean[:, i : i + 1], d.log_std[:, i : i + 1], LOW[i : i + 1], HIGH[i : i + 1]) for i in (0, 1)]
    assert_close(d.entropy(), parts[0].entropy() + parts[1].entropy())


@GAUSSIANS
def test_kl_equals_torch_and_the_sampled_definition(kind):
    d, other = gaussian(kind, 0), gaussian(kind, 1)
    twins = (Independent(Normal(x.mean, x.log_std.exp()), 1) for x in (d, other))
    assert_close(d.kl(other), torch.distributions.kl_divergence(*twins))
    n = 100_000
    many = d.map(lambda x: x.expand(n, 3, 2))
    u = many.sample(generator())
    difference = d.log_prob(u) - other.log_prob(u)
    error = difference.std(0) / math.sqrt(n)
    assert ((difference.mean(0) - d.kl(other)).abs() < 4 * error).all()


@GAUSSIANS
def test_samples_follow_the_density(kind):
    n = 20_000
    d = gaussian(kind).map(lambda x: x.expand(n, 3, 2))
    u = d.sample(generator())
    z = ((u - d.mean) / d.log_std.exp()).flatten(1)
    assert all(kstest(z[:, i].numpy(), "norm").pvalue > 0.01 for i in range(6))
    assert torch.corrcoef(z.T).triu(1).abs().max() < 0.03
    assert torch.equal(d.mode(), d.mean) and not u.requires_grad


def test_actions_for_the_environment_stay_in_bounds():
    u = torch.linspace(-60, 60, 1001, dtype=torch.float64)[:, None].expand(-1, 2)
    zeros = torch.zeros(1001, 2, dtype=torch.float64)
    squashed = SquashedGaussian(zeros, zeros, LOW, HIGH)
    clipped = ClippedGaussian(zeros, zeros, LOW, HIGH)
    for d in (squashed, clipped):
        x = d.to_env(u)
        assert (x >= LOW).all() and (x <= HIGH).all() and (x.diff(dim=0) >= 0).all()
    assert_close(squashed.to_env(u[500:501])[0], (LOW + HIGH) / 2)
    assert_close(clipped.to_env(torch.tensor([[0.1, 0.9]]).double()), torch.tensor([[0.1, 0.9]]).double())
    assert squashed.log_prob(u).isfinite().all()  # no cancellation far out


# --- derivatives and handling -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Categorical, ClippedGaussian, SquashedGaussian])
def test_derivatives_of_first_and_second_order(kind):
    one, two = (categorical(s) if kind is Categorical else gaussian(kind, s) for s in (0, 1))
    action = one.sample(generator())
    inputs = [p.clone().requires_grad_() for p in one.params]
    for f in (
        lambda *p: one.like(*p).log_prob(action),
        lambda *p: one.like(*p).entropy(),
        lambda *p: one.like(*p).kl(two),
        lambda *p: two.kl(one.like(*p)),
    ):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("kind", [Categorical, ClippedGaussian, SquashedGaussian])
def test_slicing_and_stacking(kind):
    d = categorical() if kind is Categorical else gaussian(kind)
    action = d.sample(generator())
    assert_close(d.map(lambda x: x[1:]).log_prob(action[1:]), d.log_prob(action)[1:])
    both = stack([d, d.map(lambda x: x + 0.1)])
    assert type(both) is kind
    assert_close(both.log_prob(torch.stack([action, action]))[0], d.log_prob(action))


# --- the kernels behind them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [3, 40])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize(("ours", "theirs"), [(softmax, torch.softmax), (log_softmax, torch.log_softmax)])
def test_softmaxes_are_torchs_in_whatever_order_rows_lie(ours, theirs, order, width):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 2, 3, width, generator=g, dtype=torch.float64).permute(*order, 3).requires_grad_()
    weights = torch.randn(x.shape, generator=g, dtype=torch.float64)
    found, expected = ours(x), theirs(x, -1)
    assert_close(found, expected)
    slopes = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
    assert_close(*slopes)


def test_rows_are_not_copied_and_stay_where_they_were():
    x = torch.randn(4, 2, 3, 40).permute(2, 0, 1, 3)
    seen = []

    def largest_and_mean(rows):
        seen.append(rows)
        return torch.stack([rows.amax(-1), rows.mean(-1)], -1)

    assert_close(rowwise(largest_and_mean, x), torch.stack([x.amax(-1), x.mean(-1)], -1))
    assert seen[0].is_contiguous() and seen[0].data_ptr() == x.data_ptr()
    assert_close(rowwise(lambda rows: rows.sum(-1), x), x.sum(-1))
