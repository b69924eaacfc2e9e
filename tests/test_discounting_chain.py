"""The discounting chain: exact expectations, published outcomes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from experiments.oracles.discounting_chain import DELAY, PAYMENT, STEPS, DiscountingChain
from experiments.single_task.discounting_chain import OUTER, learn
from experiments.single_task.discounting_chain import estimator as estimator_of
from learned_rl.types import UserError
from meta_optimizers.bootstrapped import Bootstrapped, BootstrappedConfig
from meta_optimizers.problem import Eta

MARKS = (50, 1000, 2000, 5000)
# Return / discount after so many meta-steps, from another program with tiny initial weights of its own.
TABLE = {
    "A2C": ((1.0194, 0.950), (1.0103, 0.950), (1.0060, 0.950), (1.0027, 0.950)),
    "MG": ((1.0198, 0.992), (1.0200, 0.992), (1.0125, 0.919), (1.0025, 0.900)),
    "MG+outer": ((1.0193, 0.931), (1.0088, 0.901), (1.0082, 1.000), (1.0179, 1.000)),
    "BMG": ((1.0196, 0.983), (1.0175, 0.979), (1.0079, 0.901), (1.0022, 0.900)),
    "BMG+outer": ((1.0194, 0.946), (1.0094, 0.982), (1.0119, 0.999), (1.0207, 1.000)),
}


ALIKE = [("A2C",), ("MG", "MG+outer"), ("BMG", "BMG+outer")]  # which agents may live side by side
JUDGED_BY = pytest.mark.parametrize("variants", ALIKE, ids=[v[0] for v in ALIKE])


def trained(variants: Sequence[str], steps: int, **settings) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    """Return and discount of each variant after every meta-step, from before the first."""
    seen = [torch.stack(both, 1) for both in learn(variants, steps, **settings)]
    start = seen[0].new_full((len(variants), 2), math.nan)
    yield from zip(variants, torch.stack([start, *seen], 1).tolist(), strict=True)


def log_policy(theta: torch.Tensor, chain: float, t: int) -> torch.Tensor:
    return (chain * theta[:5] + t / STEPS * theta[5:10] + theta[10:]).log_softmax(0)


def expected_loss(theta: torch.Tensor, gamma: float, critic: float) -> torch.Tensor:
    """The loss state by state and action by action; the policy that acts is a constant."""

    def value(chain: int, t: int) -> float:
        return sum(PAYMENT[chain] * critic ** (k - t) for k in range(t, STEPS) if k + 1 == DELAY[chain])

    start = log_policy(theta, -1, 0)
    acting = start.exp().tolist()
    policy, entropy = torch.zeros(()).double(), -(start.exp() * start).sum()
    baseline = sum(p * PAYMENT[c] * critic ** DELAY[c] for c, p in enumerate(acting))
    for chain, p in enumerate(acting):
        paid = PAYMENT[chain] if DELAY[chain] == 1 else 0.0
        policy = policy - p * start[chain] * (paid + gamma * value(chain, 1) - baseline)
        for t in range(1, STEPS):
            log = log_policy(theta, chain, t)
            paid, after = (PAYMENT[chain] if t + 1 == DELAY[chain] else 0.0), value(chain, t + 1)
            advantage = paid + gamma * after - value(chain, t)
            policy = policy - p * (log.exp().detach() * log).sum() * advantage
            entropy = entropy - p * (log.exp() * log).sum()
    return (policy - 0.005 * entropy) / STEPS


def somewhere(lifetimes: int = 2) -> torch.Tensor:
    return torch.randn(lifetimes, 15, generator=torch.Generator().manual_seed(3)).double()


def test_a_step_and_its_judgement_are_exact_expectations():
    theta, eta = somewhere().requires_grad_(), DiscountingChain.eta()
    for outer_critic in (False, True):
        problem = DiscountingChain(2, outer_critic)
        data = problem.collect({"theta": theta})
        moved = problem.step({"theta": theta}, data, eta)
        for i, row in enumerate(theta.detach().unbind()):
            leaf = row.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(expected_loss(leaf, 0.95, 0.95), leaf)
            torch.testing.assert_close(moved.state["theta"][i], row - 0.5 * gradient, rtol=1e-12, atol=1e-14)
            judged = expected_loss(row, 1.0, 1.0 if outer_critic else 0.95)
            torch.testing.assert_close(moved.loss[i], judged, rtol=1e-12, atol=0)


@pytest.mark.parametrize("variant", ["MG", "MG+outer", "BMG", "BMG+outer"])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"normalize": True}, {"episodes": 4, "normalize": True}])
def test_the_gradient_agrees_with_finite_differences_where_values_stand_still(variant, window, settings):
    class Held(DiscountingChain):
        """Values do not move with the discount: differences see what the gradient takes as constant."""

        def _advantage(self, data, gamma, critic):
            outer = bool(self.outer_critic) and bool(critic.eq(1).all())
            return super()._advantage(data, gamma, critic if outer else torch.tensor(0.95, dtype=torch.float64))

    def run(problem):
        problem.commit({"theta": somewhere()})
        return estimator.differentiate(problem, problem.eta().leaf(), window, thorough=False)

    estimator = estimator_of(variant, window)
    held, problem = run(Held(2, OUTER[variant], **settings)), Held(2, OUTER[variant], **settings)

    def loss(gamma: float) -> torch.Tensor:
        eta = Eta({"gamma": torch.tensor(gamma, dtype=torch.float64)})
        return estimator.run(problem, eta, held.states[0], window, held.data).loss.sum()

    slope = (loss(1e-4) - loss(-1e-4)) / 2e-4
    torch.testing.assert_close(held.grads["gamma"], slope, rtol=1e-6, atol=2e-12)
    real = run(DiscountingChain(2, OUTER[variant], **settings))
    torch.testing.assert_close(held.grads["gamma"], real.grads["gamma"], rtol=1e-10, atol=0)


@JUDGED_BY
def test_fifty_meta_steps_give_the_table(variants):
    for variant, seen in trained(variants, 50):
        earned, gamma = TABLE[variant][0]
        assert seen[50] == [pytest.approx(earned, abs=1e-4), pytest.approx(gamma, abs=1.5e-3)], variant


@pytest.mark.slow
@JUDGED_BY
def test_five_thousand_meta_steps_give_the_table(variants):
    """To what tiny initial weights change: 1e-4 of the return and, where it moves fast, 2e-3 of the discount."""
    for variant, seen in trained(variants, MARKS[-1]):
        for mark, (earned, gamma) in zip(MARKS, TABLE[variant], strict=True):
            assert seen[mark] == [pytest.approx(earned, abs=1.5e-4), pytest.approx(gamma, abs=2.5e-3)], variant


@pytest.mark.parametrize("variants", ALIKE[1:], ids=["MG", "BMG"])
def test_the_outer_critic_decides_where_the_discount_goes(variants):
    """With normalised advantages a few hundred meta-steps tell."""
    for variant, seen in trained(variants, 300, normalize=True):
        assert seen[300][1] == pytest.approx(1.0 if OUTER[variant] else 0.9, abs=2e-3), variant


@pytest.mark.slow
@JUDGED_BY
def test_drawn_episodes_give_the_published_outcome(variants):
    """128 episodes an update, normalised advantages: the optimal return is 1.1, the short-sighted one 1.0."""
    for variant, seen in trained(variants, 1000, episodes=128, normalize=True):
        earned, gamma = seen[1000]
        if OUTER[variant]:
            assert earned > 1.09 and gamma > 0.995, variant
        else:
            assert earned < 1.001 and gamma < 0.96, variant


def test_drawn_frequencies_are_the_expected_ones_on_average():
    episodes = 2000
    exact, drawn = DiscountingChain(2), DiscountingChain(2, episodes=episodes)
    state = {"theta": somewhere()}
    p, n = (problem.collect(state)["taken"] * episodes * STEPS for problem in (exact, drawn))
    torch.testing.assert_close(n, n.round(), rtol=0, atol=1e-9)
    torch.testing.assert_close(n[:, 0].sum(1), torch.full((2,), float(episodes)).double())
    on = n[:, 1:].sum(2).unflatten(1, (5, STEPS - 1))  # each chain is walked to its end by all who entered it
    torch.testing.assert_close(on, n[:, 0].unsqueeze(2).expand_as(on))
    assert ((n - p).abs() < 5 * p.sqrt() + 5).all()


def test_log_probabilities_count_every_draw():
    problem = DiscountingChain(2, episodes=3)
    state = {"theta": somewhere()}
    data = problem.collect(state)
    said = problem.step(state, data, problem.eta()).log_prob
    by_hand = [
        sum(
            float(n) * log_policy(theta, float(seen[0]), round(float(seen[1]) * STEPS)).tolist()[action]
            for seen, row in zip(problem.seen, taken, strict=True)
            for action, n in enumerate((row * 3 * STEPS).tolist())
        )
        for theta, taken in zip(state["theta"], data["taken"], strict=True)
    ]
    torch.testing.assert_close(said, torch.tensor(by_hand).double())
    assert not DiscountingChain(2).step(state, data, problem.eta()).log_prob.any()


def test_ratios_judge_another_policy_on_old_data():
    """Importance weighted, the gradient at the policy that acted is the plain one."""
    problem, eta = DiscountingChain(2, normalize=True), DiscountingChain.eta()
    theta = somewhere().requires_grad_()
    data = problem.collect({"theta": theta})
    plain, weighted = (
        torch.autograd.grad(problem.judge({"theta": theta}, data, eta, importance=i).sum(), theta)[0]
        for i in (False, True)
    )
    torch.testing.assert_close(weighted, plain)
    costs = problem.cost(data)
    problem.commit({"theta": theta})
    torch.testing.assert_close(-costs, problem.expected_return())


def test_lifetimes_may_have_their_own_discounts():
    problem, state = DiscountingChain(2), {"theta": somewhere()}
    data = problem.collect(state)
    eta = Eta({"gamma": torch.tensor([0.3, -1.0]).double()}, stacked=True)
    together = problem.step(state, data, eta).state["theta"]
    for i, gamma in enumerate(eta.values["gamma"]):
        alone = problem.step(state, data, Eta({"gamma": gamma})).state["theta"]
        torch.testing.assert_close(together[i], alone[i])


def test_there_is_no_value_to_match_by():
    estimator = Bootstrapped(BootstrappedConfig(value=1.0))
    with pytest.raises(UserError, match="cannot match by 'value'"):
        estimator(DiscountingChain(), DiscountingChain.eta())
