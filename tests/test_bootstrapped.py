"""Bootstrapped meta-gradients on quadratics, where targets and distances are known."""

from __future__ import annotations

import pytest
import torch

from experiments.oracles.quadratic import Quadratic
from learned_rl.types import UserError
from meta_optimizers.bootstrapped import Bootstrapped, BootstrappedConfig
from meta_optimizers.problem import Eta
from meta_optimizers.truncated import TruncatedConfig, TruncatedMetaGradient

NOISE = 0.3


def estimator(**settings) -> Bootstrapped:
    return Bootstrapped(BootstrappedConfig(**{"kl": 0.0, "parameters": 1.0, "window": 3, "bootstrap": 4} | settings))


class Watched(Quadratic):
    """Remembers what was asked of it."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.collected: list[tuple[dict, dict]] = []
        self.learned_from: list[dict] = []
        self.bare: list[bool] = []

    def collect(self, state):
        data = super().collect(state)
        self.collected.append((state, data))
        return data

    def step(self, state, data, eta):
        self.learned_from.append(data)
        return super().step(state, data, eta)

    def judge(self, state, data, eta, importance=False, bare=False):
        self.bare.append(bare)
        return super().judge(state, data, eta, importance, bare)

    def states(self) -> list[torch.Tensor]:
        """Parameters of every state that collected."""
        return [state["theta"].detach() for state, _ in self.collected]


def after(problem: Quadratic, eta: Eta, theta: torch.Tensor, noise: list[torch.Tensor]) -> torch.Tensor:
    """Parameters after plain updates, by hand."""
    for n in noise:
        rate, shift = eta.values["log_rate"].exp(), eta.values["shift"]
        theta = theta - rate * problem.curvature * (theta - problem.centre - shift - n)
    return theta


@pytest.mark.parametrize("window", [1, 4])
def test_half_a_step_under_the_squared_distance_is_the_plain_meta_gradient(window):
    """The target is theta_K - rate * grad f, so that weight 1 / (2 rate) undoes the rate."""
    eta = Quadratic.eta()
    weight = float(0.5 / eta.values["log_rate"].exp())
    ours = estimator(window=window, bootstrap=1, parameters=weight)(Quadratic(noise=NOISE), eta)
    plain = TruncatedMetaGradient(TruncatedConfig(window=window, outer_terms="last"))(Quadratic(noise=NOISE), eta)
    assert ours.grads is not None and plain.grads is not None
    for name, g in plain.grads.items():
        torch.testing.assert_close(ours.grads[name], g, rtol=1e-12, atol=0)


def test_the_gradient_is_that_of_the_distance_from_a_target_that_stands_still():
    bmg, eta, problem = estimator(), Quadratic.eta(), Quadratic(noise=NOISE)
    window = bmg.differentiate(problem, eta.leaf(), 3, thorough=False)
    assert len(window.states) == 4 and len(window.data) == 3 + 4 + 1
    target, noise = window.data[-1]["theta"], [d["noise"] for d in window.data[:3]]

    def loss(**moved: torch.Tensor) -> torch.Tensor:
        end = after(problem, Eta(eta.values | moved), problem.start, noise)
        return (end - target).square().sum()

    torch.testing.assert_close(window.loss.sum(), loss(), rtol=1e-12, atol=0)
    for name, value in eta.values.items():
        up, down = (loss(**{name: value + sign * 1e-5}) for sign in (1, -1))
        torch.testing.assert_close(window.grads[name].sum(), (up - down) / 2e-5, rtol=1e-8, atol=0)


def test_the_target_is_where_the_learner_gets_and_one_step_along_the_bare_outer_loss():
    problem, eta, length = Watched(noise=NOISE), Quadratic.eta(), 4
    window = estimator(window=3, bootstrap=length).differentiate(problem, eta.leaf(), 3, thorough=False)
    noise = [data["noise"] for _, data in problem.collected]
    assert len(noise) == 3 + length  # each of the L states ahead collects once
    end = after(problem, eta, problem.start, noise[: 3 + length - 1])
    torch.testing.assert_close(window.data[-1]["theta"], end - eta.values["log_rate"].exp() * end, rtol=1e-12, atol=0)
    assert problem.bare.count(True) == 1 and problem.bare[-1]
    assert not any(v.requires_grad for tree in window.data for v in tree.values())


def test_bonuses_stay_in_the_target_where_that_is_asked():
    problem = Watched()
    estimator(bare=False)(problem, Quadratic.eta())
    assert not any(problem.bare)


@pytest.mark.parametrize(("continue_from", "updates"), [("window", 3), ("bootstrap", 6), ("target", 7)])
def test_learning_goes_on_where_it_was_told_to(continue_from, updates):
    bmg, problem, eta = estimator(continue_from=continue_from), Watched(noise=NOISE), Quadratic.eta()
    bmg(problem, eta)
    assert bmg.updates == updates and bmg.rollouts == len(problem.collected) == 7
    states, rate = problem.states(), eta.values["log_rate"].exp()
    expected = {"window": states[3], "bootstrap": states[6], "target": states[6] * (1 - rate)}[continue_from]
    torch.testing.assert_close(problem.present()["theta"], expected, rtol=1e-12, atol=0)
    assert not any(v.requires_grad for v in problem.present().values())


@pytest.mark.parametrize(("continue_from", "which"), [("window", 3), ("bootstrap", 6)])
def test_the_data_collected_where_learning_goes_on_are_learned_from_next(continue_from, which):
    bmg = estimator(continue_from=continue_from, outer_data="fresh_reuse")
    problem, eta = Watched(noise=NOISE), Quadratic.eta()
    bmg(problem, eta)
    assert len(problem.collected) == 7
    problem.learned_from.clear()
    bmg(problem, eta)
    assert problem.learned_from[0] is problem.collected[which][1]
    assert len(problem.collected) == 7 + bmg.rollouts - 1 == 7 + 6

    again = estimator(continue_from=continue_from, outer_data="fresh_reuse")
    again.load_state_dict(bmg.state_dict())
    problem.learned_from.clear()
    again(problem, eta)
    torch.testing.assert_close(problem.learned_from[0]["noise"], problem.collected[7 + which - 1][1]["noise"])
    again.begin(torch.tensor([False, True, False, False]))
    problem.learned_from.clear()
    again(problem, eta)
    assert problem.learned_from[0] is problem.collected[-7][1]  # collected anew


def test_fresh_data_are_thrown_away():
    bmg, problem, eta = estimator(), Watched(noise=NOISE), Quadratic.eta()
    bmg(problem, eta)
    before = len(problem.collected)
    problem.learned_from.clear()
    bmg(problem, eta)
    assert problem.learned_from[0] is problem.collected[before][1]


def test_weights_of_distances_add_up():
    class Valued(Quadratic):
        def match(self, state, target, data, by):
            scale = {"kl": 2.0, "value": 3.0, "parameters": 1.0}[by]
            return scale * super().match(state, target, data, "parameters")

    eta = Quadratic.eta()
    alone = estimator()(Valued(), eta)
    mixed = estimator(kl=0.5, value=0.25, parameters=0.1)(Valued(), eta)
    assert alone.grads is not None and mixed.grads is not None
    for name, g in alone.grads.items():
        torch.testing.assert_close(mixed.grads[name], (2 * 0.5 + 3 * 0.25 + 0.1) * g)
    assert {"match_kl", "match_value", "match_parameters", "target_loss"} <= mixed.metrics.keys()
    assert "match_kl" not in alone.metrics


def test_windows_of_other_lengths_are_drawn():
    bmg, problem, eta = estimator(window=2, longest_window=5, schedule="growing", growth=3), Watched(), Quadratic.eta()
    lengths = []
    for problem.meta_step in range(5):
        before = len(problem.collected)
        assert bmg(problem, eta).metrics["window"] == len(problem.collected) - before - 4
        lengths.append(len(problem.collected) - before - 4)
    assert lengths == [2, 3, 4, 5, 5]


def test_a_lifetime_whose_target_is_not_finite_takes_no_part():
    class Torn(Quadratic):
        def descend(self, state, loss, eta):
            target = super().descend(state, loss, eta)
            return target | {"theta": target["theta"].index_fill(0, torch.tensor([1]), float("inf"))}

    class Three(Quadratic):
        def match(self, state, target, data, by):
            return super().match(state, target, data, by) * torch.tensor([1.0, 0.0, 1.0, 1.0])

    eta = Quadratic.eta()
    torn, three = estimator()(Torn(), eta), estimator()(Three(), eta)
    assert torn.broken.tolist() == [False, True, False, False]
    assert torn.grads is not None and three.grads is not None
    for name, g in three.grads.items():
        torch.testing.assert_close(torn.grads[name], g * 4 / 3, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"kl": 0.0}, "at least one positive weight"),
        ({"kl": -1.0}, "kl is -1.0"),
        ({"value": -0.5}, "value is -0.5"),
        ({"bootstrap": 0}, "bootstrap is 0"),
        ({"window": 0}, "window is 0"),
        ({"schedule": "random"}, "longest_window"),
        ({"continue_from": "target", "outer_data": "fresh_reuse"}, "expected 'fresh'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        BootstrappedConfig(**settings)


def test_what_a_problem_cannot_match_by_is_refused():
    with pytest.raises(UserError, match="cannot match by 'kl': expected 'parameters'"):
        estimator(kl=1.0)(Quadratic(), Quadratic.eta())
