"""The score-function term: against a slow loop, against enumeration, and on the bandit that shows what it is for."""

import dataclasses
import itertools

import pytest
import torch
from torch.testing import assert_close

from experiments.oracles.arms import Arms, finite_differences, lifetime_weights
from learned_rl.distributions import log_softmax
from learned_rl.types import UserError
from meta_optimizers.corrections import CorrectionConfig, score_weights
from meta_optimizers.group import Group
from meta_optimizers.rematerialised import Rematerialised, RematerialisedConfig
from meta_optimizers.truncated import TruncatedConfig, TruncatedMetaGradient

#: gradient of the mean reward per step by eta at (2, 2), and its standard error: `finite_differences` with 800 000
#: lifetimes and a step of 0.5
REFERENCE, REFERENCE_ERROR = torch.tensor([0.0098, 0.0180]).double(), torch.tensor([0.0003, 0.0002]).double()

OFF, ON = CorrectionConfig(), CorrectionConfig(coef=1.0)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- the weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("judged", [5, 6])
def test_weights_are_those_of_an_accumulator(discount, judged):
    """With and without data of the last state."""
    steps, lifetimes = 5, 3
    lp = normal(steps, lifetimes).requires_grad_()
    costs, weights = list(normal(judged, lifetimes, seed=1)), normal(steps + 1, seed=2).tolist()
    surrogate, c = torch.zeros((), dtype=torch.float64), torch.zeros(lifetimes, dtype=torch.float64)
    for k in range(judged):
        surrogate = surrogate + (weights[k] * costs[k] * c).sum()
        if k < steps:
            c = discount * (c + lp[k])
    expected = torch.autograd.grad(0.3 * surrogate, lp, materialize_grads=True, allow_unused=True)[0]
    config = CorrectionConfig(coef=0.3, discount=discount, baseline="none")
    assert_close(score_weights(config, costs, weights, steps, Group()), expected, rtol=1e-12, atol=1e-14)
    assert bool(expected.any()) == (discount > 0)


def baseline(costs, group=None):
    """What the first of two updates is weighted by when the second costs this."""
    costs = torch.tensor(costs, dtype=torch.float64)
    return score_weights(ON, [torch.zeros_like(costs), costs], [0.0, 1.0, 0.0], 2, group or Group())[0].tolist()


def test_the_baseline_is_the_mean_over_the_others():
    assert baseline([1.0, 2.0, 6.0]) == [1 - 4, 2 - 3.5, 6 - 1.5]
    assert baseline([7.0]) == [7.0]  # a lifetime alone has nothing to be compared with


def test_a_broken_lifetime_has_no_credit_and_no_say():
    assert baseline([1.0, float("nan"), 6.0, float("inf")]) == [1 - 6, 0, 6 - 1, 0]


def test_the_baseline_spans_processes():
    class Shared(Group):
        """Another process holds costs 4 and 5, and nothing at the first update."""

        def sum(self, x):
            return x + (2 if x.dtype == torch.long else torch.tensor([[0.0], [9.0]]))

    assert baseline([1.0, 2.0], Shared()) == pytest.approx([1 - 11 / 3, 2 - 10 / 3], rel=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"discount": 1.5}, "correction.discount is 1.5: expected at most 1"),
        ({"coef": -1.0}, "correction.coef is -1.0"),
        ({"baseline": "leave-one-out"}, "'leave_one_out'"),
    ],
)
def test_mistakes_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        CorrectionConfig(**settings)


# --- the bandit ---------------------------------------------------------------------------------------------------


def whole(lifetime=30, correction=OFF, kind=TruncatedMetaGradient, config=TruncatedConfig):
    """The estimator that sees a lifetime as one window."""
    settings = {"outer_terms": "weighted", "outer_data": "shifted", "weights": lifetime_weights(lifetime)}
    return kind(config(window=lifetime, correction=correction, **settings))


def gradients(problem, estimator, eta=None):
    """[P, 2] of the reward, lifetime by lifetime."""
    eta = (eta or Arms.eta()).leaf(problem.lifetimes)
    return -estimator.differentiate(problem, eta, estimator.config.window, False).grads["rates"]


def small(lifetimes=6, lifetime=6, **changes):
    return Arms(lifetimes, arms=4, pulls=3, lifetime=lifetime, noise=0.5, **changes)


@pytest.mark.parametrize("surrogate", ["score", "dice"])
def test_the_closed_form_is_the_derivative_of_the_surrogate(surrogate):
    """The update's value, and its derivative by theta."""
    problem = small(surrogate=surrogate)
    theta = normal(6, 4).requires_grad_()
    state = problem.present() | {"theta": theta}
    data = problem.collect(state)
    found = problem.step(state, data, Arms.eta()).state["theta"] - theta
    log_prob = log_softmax(theta).gather(1, data["action"])
    written = log_prob if surrogate == "score" else (log_prob - log_prob.detach()).exp()
    inner = (data["reward"] * written).mean(1).sum()
    expected = (
        torch.nn.functional.softplus(torch.tensor(2.0).double())
        * torch.autograd.grad(inner, theta, create_graph=True)[0]
    )
    assert_close(found, expected, rtol=1e-12, atol=1e-13)
    again = [torch.autograd.grad((x * normal(6, 4, seed=1)).sum(), theta)[0] for x in (found, expected)]
    assert_close(*again, rtol=1e-12, atol=1e-13)


def test_rewards_and_pulls_are_those_of_the_bandit():
    problem = Arms(2000, arms=3, pulls=50, noise=2.0)
    assert problem.means.max() < 2.72
    assert (problem.means > 0.1).double().mean().item() == pytest.approx(3.3 / 101, abs=0.01)
    logits = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)
    data = problem.collect(problem.present() | {"theta": logits.expand(2000, 3)})
    frequency = torch.bincount(data["action"].flatten()) / 1e5
    assert_close(frequency.double(), logits.softmax(0), rtol=0, atol=0.006)  # four standard errors
    error = data["reward"] - problem.means.gather(1, data["action"])
    assert abs(error.mean()) < 0.026 and abs(error.std() - 2) < 0.018
    assert_close(data["log_prob"], logits.log_softmax(0)[data["action"]])


def test_the_second_rate_takes_over_after_a_quarter():
    problem = Arms(1, arms=3, lifetime=30)
    state = problem.present() | {"theta": normal(1, 3)}
    data, eta = problem.collect(state), Arms.eta(first=0.0, second=3.0)
    step = [problem.step(state | {"age": torch.tensor([k])}, data, eta).state["theta"] - state["theta"] for k in (6, 7)]
    ratio = torch.nn.functional.softplus(torch.tensor(3.0)) / torch.nn.functional.softplus(torch.tensor(0.0))
    assert_close(step[1], ratio * step[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("correction", [OFF, ON])
def test_gradients_of_single_lifetimes_add_up(correction):
    single = gradients(small(), whole(6, correction))
    mean = whole(6, correction)(small(), Arms.eta()).grads
    assert_close(single.mean(0), -mean["rates"], rtol=1e-11, atol=1e-14)
    assert len({tuple(g) for g in single.tolist()}) == 6


def test_lifetimes_begin_anew_and_streams_share_luck():
    problem = small(streams=torch.tensor([0, 1, 2, 0, 1, 2]))
    means, estimator = problem.means, whole(6)
    estimator(problem, Arms.eta())
    theta = problem.present()["theta"]
    assert_close(theta[:3], theta[3:], rtol=0, atol=0)
    assert not bool(problem.renew(torch.zeros(6, dtype=torch.bool)).logical_not().any())
    assert not problem.present()["theta"].any() and not problem.present()["age"].any()
    assert_close(problem.means[:3], problem.means[3:], rtol=0, atol=0)
    assert not bool((problem.means == means).any())
    assert not bool(problem.renew(torch.zeros(6, dtype=torch.bool)).any())
    broken = problem.renew(torch.arange(6) == 2)
    assert broken.tolist() == [False, False, True, False, False, False]


def test_a_saved_bandit_goes_on():
    problem, estimator = small(), whole(6)
    estimator(problem, Arms.eta())
    other = small(seed=9)
    other.load_state_dict({k: v.clone() for k, v in problem.state_dict().items()})
    runs = []
    for p in (problem, other):
        p.renew(torch.arange(6) > 3)
        runs.append((estimator(p, Arms.eta()).grads["rates"], p.present()["theta"]))
    assert_close(runs[0], runs[1], rtol=0, atol=0)


def test_an_unknown_surrogate_is_named():
    with pytest.raises(UserError, match=r"unknown surrogate 'dize': the nearest of dice, score is 'dice'"):
        Arms(1, surrogate="dize")


# --- the estimators -----------------------------------------------------------------------------------------------


def courses(surrogate="score", copies=1):
    """Every course that lifetimes of four pulls of two arms can take, `copies` lifetimes at a time.

    Yields the problem, eta, the data of the updates, and the course's probability, differentiable in eta.
    """
    for course in itertools.product(itertools.product((0, 1), repeat=4), repeat=copies):
        problem, eta = Arms(copies, surrogate, arms=2, pulls=1, lifetime=4), Arms.eta(0.3, 1.2).leaf()
        problem.means = torch.tensor([[0.4, 1.5]], dtype=torch.float64).expand(copies, 2)
        state, data, log_prob = problem.present(), [], 0.0
        for action in torch.tensor(course).T.unsqueeze(-1):
            acted = log_softmax(state["theta"]).gather(1, action).detach()
            data.append({"action": action, "reward": problem.means.gather(1, action), "log_prob": acted})
            moved = problem.step(state, data[-1], eta)
            state, log_prob = moved.state, log_prob + moved.log_prob.sum()
        yield problem, eta, data, log_prob.exp()


def exact():
    """The gradient of the expected reward per step."""
    total, gradient = 0.0, torch.zeros(2, dtype=torch.float64)
    for _, eta, data, probability in courses():
        reward = torch.stack([d["reward"] for d in data]).mean()
        gradient += torch.autograd.grad(probability * reward, eta.tensors)[0]
        total += probability.item()
    assert total == pytest.approx(1, abs=1e-12)
    return gradient


def expectation(correction, surrogate="score", copies=1, data="shifted"):
    """What an estimator finds on average, over all courses."""
    mean = torch.zeros(2, dtype=torch.float64)
    estimator = whole(4, correction)
    if data == "fresh":  # the same estimate from a window that needs no fourth update
        settings = {"outer_terms": "weighted", "outer_data": "fresh", "weights": (0.25, 0.25, 0.25)}
        estimator = TruncatedMetaGradient(TruncatedConfig(window=3, correction=correction, **settings))
    for problem, eta, recorded, probability in courses(surrogate, copies):
        window = estimator.run(problem, eta, problem.present(), estimator.config.window, recorded)
        mean -= probability.item() * torch.autograd.grad(window.loss.mean(), eta.tensors)[0]
    return mean


@pytest.mark.parametrize("data", ["shifted", "fresh"])
def test_corrected_it_is_exact_on_average(data):
    alone = expectation(dataclasses.replace(ON, baseline="none"), data=data)
    assert_close(alone, exact(), rtol=1e-10, atol=1e-13)


def test_the_baseline_does_not_change_the_average():
    assert_close(expectation(ON, copies=2), exact(), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("surrogate", "changes"),
    [
        ("score", {"coef": 0.0}),
        ("dice", {"coef": 0.0}),
        ("dice", {}),
        ("score", {"coef": 0.8}),
        ("score", {"discount": 0.8}),
    ],
)
def test_anything_else_is_not(surrogate, changes):
    found = expectation(dataclasses.replace(ON, baseline="none", **changes), surrogate)
    assert (found / exact() - 1).abs().max() > 0.02


@pytest.mark.parametrize("surrogate", ["score", "dice"])
def test_without_discount_or_weight_it_is_naive(surrogate):
    naive = gradients(small(surrogate=surrogate), whole(6))
    for changes in ({"discount": 0.0}, {"coef": 0.0}):
        correction = dataclasses.replace(ON, **changes)
        assert torch.equal(gradients(small(surrogate=surrogate), whole(6, correction)), naive)
    assert not torch.equal(gradients(small(surrogate=surrogate), whole(6, ON)), naive)


@pytest.mark.parametrize("surrogate", ["score", "dice"])
@pytest.mark.parametrize("outer_data", ["shifted", "fresh"])
def test_rematerialised_says_the_same(surrogate, outer_data):
    found = []
    for kind, config in ((TruncatedMetaGradient, TruncatedConfig), (Rematerialised, RematerialisedConfig)):
        settings = config(window=6, outer_data=outer_data, correction=CorrectionConfig(coef=0.7, discount=0.9))
        found.append(gradients(small(20, 8, surrogate=surrogate), kind(settings)))
    assert_close(*found, rtol=1e-10, atol=1e-13)


def sampled(lifetimes, surrogate="score", correction=OFF, chunk=5000):
    """[2] mean and [2] variance of the gradients of single lifetimes, at eta = (2, 2)."""
    estimator = whole(correction=correction)
    found = [gradients(Arms(chunk, surrogate, seed=s), estimator) for s in range(lifetimes // chunk)]
    return torch.cat(found).mean(0), torch.cat(found).var(0)


def test_naive_finds_half_of_the_gradient_with_little_variance():
    mean, variance = sampled(10_000)
    error = (variance / 10_000).sqrt()
    assert bool((mean + 3 * error < 0.7 * REFERENCE).all()) and bool((mean > 0.4 * REFERENCE).all())
    assert variance.sum() < 0.006
    _, corrected = sampled(10_000, correction=ON)
    assert bool((corrected > 100 * variance).all())


@pytest.mark.slow
def test_estimators_in_the_order_of_the_paper():
    """Naive, DiCE, corrected, both: from the first to the third less bias, from each to the next more variance."""
    count = 40_000
    naive, dice = sampled(count), sampled(count, "dice")
    corrected, both = sampled(count, correction=ON), sampled(count, "dice", ON)
    assert bool((naive[0] < 0.7 * REFERENCE).all())
    error = (corrected[1] / count + REFERENCE_ERROR**2).sqrt()
    assert bool(((corrected[0] - REFERENCE).abs() < 4 * error).all())
    assert bool((naive[0] < dice[0]).all()) and dice[0].norm() < REFERENCE.norm()
    assert bool((dice[1] > 3 * naive[1]).all()) and bool((corrected[1] > 20 * dice[1]).all())
    assert bool((both[1] > corrected[1]).all())


@pytest.mark.slow
def test_a_discount_lies_between():
    count = 10_000
    variance = [
        sampled(count, correction=CorrectionConfig(coef=1.0, discount=d))[1].sum() for d in (0, 0.5, 0.8, 0.95, 1)
    ]
    assert all(later > 2 * earlier for earlier, later in itertools.pairwise(variance[:-1]))
    assert variance[-1] > variance[-2]


@pytest.mark.slow
def test_the_reference_is_found_again():
    reward, gradient, error = finite_differences(Arms.eta(), lifetimes=40_000, step=0.5, seed=1)
    assert reward == pytest.approx(0.239, abs=0.008)  # its standard error is 0.002
    assert bool(((gradient - REFERENCE).abs() < 4 * (error**2 + REFERENCE_ERROR**2).sqrt()).all())
    assert bool((error < 0.2 * REFERENCE).all())
