"""Estimators that look back through a window, on quadratics whose meta-gradient is known in closed form."""

import copy
import math

import pytest
import torch
from graphs import held_by_graphs
from torch.testing import assert_close

from experiments.oracles.quadratic import Quadratic
from learned_rl.component import shield
from learned_rl.types import UserError
from meta_optimizers.corrections import CorrectionConfig
from meta_optimizers.first_order import FirstOrder, FirstOrderConfig
from meta_optimizers.group import Group
from meta_optimizers.problem import Eta, Moved
from meta_optimizers.rematerialised import Rematerialised, RematerialisedConfig
from meta_optimizers.truncated import TruncatedConfig, TruncatedMetaGradient

K = 4
EXACT = (TruncatedMetaGradient, Rematerialised)
EVERY = (*EXACT, FirstOrder)
WEIGHTS = (0.1, 0.0, 0.7, 0.3)
ETA = Quadratic.eta()
JUDGED = {  # w_1..w_K by hand
    ("last", "fresh"): (0, 0, 0, 1),
    ("last", "fresh_reuse"): (0, 0, 0, 1),
    ("last", "shifted"): (0, 0, 1, 0),
    ("last", "same_is"): (0, 0, 0, 1),
    ("every", "fresh"): (1 / 4, 1 / 4, 1 / 4, 1 / 4),
    ("every", "fresh_reuse"): (1 / 4, 1 / 4, 1 / 4, 1 / 4),
    ("every", "shifted"): (1 / 3, 1 / 3, 1 / 3, 0),
    ("every", "same_is"): (1 / 4, 1 / 4, 1 / 4, 1 / 4),
    ("weighted", "fresh"): WEIGHTS,
    ("weighted", "fresh_reuse"): WEIGHTS,
    ("weighted", "shifted"): (*WEIGHTS[:3], 0),
    ("weighted", "same_is"): WEIGHTS,
}


class Scored(Quadratic):
    """With a penalty, and with log-probabilities, each of which depends on the state and on eta."""

    def step(self, state, data, eta):
        m = super().step(state, data, eta)
        shift = eta.values["shift"] if eta.stacked else eta.values["shift"].unsqueeze(0)
        log_prob = -0.5 * (state["theta"] - data["noise"]).square().sum(1)
        return Moved(m.state, m.loss, (shift * state["theta"]).sum(1).sin(), log_prob, m.alive, m.metrics)


class Apart(Quadratic):
    """Every lifetime has its own view of eta, behind a shield: what is not finite stays where it is."""

    def step(self, state, data, eta):
        own = eta if eta.stacked else Eta({k: v.expand(self.lifetimes, *v.shape) for k, v in eta.values.items()}, True)
        return super().step(state, data, Eta({k: shield(v, 0) for k, v in own.values.items()}, True))


class Deaf(Quadratic):
    """Whose inner loss does not depend on eta."""

    def step(self, state, data, eta):
        return super().step(state, data, ETA)


class Watched(Quadratic):
    """Remembers what it collected and what it learned from."""

    def __init__(self, **settings):
        super().__init__(noise=0.5, **settings)
        self.collected, self.learned = [], []

    def collect(self, state):
        self.collected.append(super().collect(state))
        return self.collected[-1]

    def step(self, state, data, eta):
        self.learned.append(data)
        return super().step(state, data, eta)


def made(kind, seed=0, **settings):
    if settings.get("outer_terms") == "weighted":
        settings["weights"] = JUDGED[settings["outer_terms"], settings.get("outer_data", "fresh")]
    return kind(kind.Config(**{"window": K} | settings), seed)


def closed_form(problem, start, steps):
    """[P, 2] derivatives of 1/2 |theta_K|^2 by log_rate and shift, without momentum and noise."""
    rate, shift = ETA.values["log_rate"].exp(), ETA.values["shift"]
    shrink, x = 1 - rate * problem.curvature, start - problem.centre - shift
    end = problem.centre + shift + shrink**steps * x
    by_rate = end * steps * shrink ** (steps - 1) * -rate * problem.curvature * x
    return torch.stack([by_rate.sum(1), (end * (1 - shrink**steps)).sum(1)], 1)


def flat(grads):
    return torch.cat([grads[k].reshape(-1) for k in ETA.values])


def differences(estimator, problem, window, eps=1e-5):
    """[2] central differences of the window's loss on its own data, summed over lifetimes."""
    slopes = []
    for name in ETA.values:
        ends = []
        for sign in (1, -1):
            moved = Eta(ETA.values | {name: ETA.values[name] + sign * eps})
            with torch.no_grad():
                again = estimator.run(problem, moved, window.states[0], len(window.states) - 1, window.data)
            ends.append(again.loss.sum())
        slopes.append((ends[0] - ends[1]) / (2 * eps))
    return torch.stack(slopes)


@pytest.mark.parametrize("terms, data", JUDGED)
@pytest.mark.parametrize("kind", EXACT)
def test_without_momentum_and_noise_the_gradient_is_the_closed_form(kind, terms, data):
    problem = Quadratic()
    estimator = made(kind, outer_terms=terms, outer_data=data)
    for _ in range(2):  # the second window begins where the first ended
        start = problem.present()["theta"]
        expected = sum(w * closed_form(problem, start, k + 1) for k, w in enumerate(JUDGED[terms, data]))
        assert_close(flat(estimator(problem, ETA).grads), expected.mean(0), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("terms, data", JUDGED)
@pytest.mark.parametrize("momentum, noise", [(0.0, 0.5), (0.9, 0.0), (0.9, 0.5)])
@pytest.mark.parametrize("kind", EXACT)
def test_with_momentum_and_noise_the_gradient_is_that_of_differences(kind, momentum, noise, terms, data):
    problem = Scored(momentum=momentum, noise=noise)
    estimator = made(kind, outer_terms=terms, outer_data=data)
    estimator(problem, ETA)  # velocities, and data that wait, differ from zero
    window = estimator.differentiate(problem, ETA.leaf(), K, False)
    assert_close(flat(window.grads), differences(estimator, problem, window), rtol=1e-6, atol=0)


@pytest.mark.parametrize("baseline", ["none", "leave_one_out"])
@pytest.mark.parametrize("discount", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", EXACT)
def test_the_score_function_term_is_differentiated_too(kind, discount, baseline):
    problem = Scored(noise=0.5)
    correction = CorrectionConfig(1.0, discount, baseline)
    estimator = made(kind, correction=correction)
    window = estimator.differentiate(problem, ETA.leaf(), K, False)
    assert_close(flat(window.grads), differences(estimator, problem, window), rtol=1e-6, atol=0)
    plain = made(kind).differentiate(Scored(noise=0.5), ETA.leaf(), K, False)
    assert torch.equal(flat(window.grads), flat(plain.grads)) == (discount == 0)


@pytest.mark.parametrize("per_lifetime", [False, True])
@pytest.mark.parametrize("terms, data", JUDGED)
def test_rematerialising_changes_nothing_but_rounding(terms, data, per_lifetime):
    settings = {
        "outer_terms": terms,
        "outer_data": data,
        "per_lifetime": per_lifetime,
        "correction": CorrectionConfig(0.0 if data == "same_is" else 0.5),
        "diagnose_every": 2,
    }
    problems = [Scored(momentum=0.9, noise=0.5) for _ in EXACT]
    estimators = [made(kind, **settings) for kind in EXACT]
    for step in range(3):
        for problem in problems:
            problem.meta_step = step
        plain, again = (e(p, ETA) for e, p in zip(estimators, problems, strict=True))
        assert_close(flat(again.grads), flat(plain.grads), rtol=1e-12, atol=1e-13)
        assert {k: v for k, v in again.metrics.items() if k != "probe_error"} == pytest.approx(
            {k: v for k, v in plain.metrics.items() if k != "probe_error"}, rel=1e-9
        )
        assert torch.equal(problems[0].present()["theta"], problems[1].present()["theta"])


def peak(estimator):
    """The most tensors that graphs held at once."""
    with held_by_graphs() as held:
        estimator(Quadratic(momentum=0.9), ETA)
    return held.most


def test_rematerialising_holds_the_graph_of_one_update():
    assert peak(made(Rematerialised, window=3)) == peak(made(Rematerialised, window=24))
    assert peak(made(TruncatedMetaGradient, window=24)) > 4 * peak(made(TruncatedMetaGradient, window=3))


# --- first order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["fresh", "fresh_reuse", "same_is"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_first_order_is_exact_for_a_window_of_one(data, momentum):
    found = [
        made(kind, window=1, outer_data=data)(Quadratic(momentum=momentum, noise=0.5), ETA).grads
        for kind in (FirstOrder, TruncatedMetaGradient)
    ]
    assert_close(flat(found[0]), flat(found[1]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("terms, data", JUDGED)
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_first_order_adds_up_the_direct_effects(decay, terms, data):
    problem, rate = Quadratic(), ETA.values["log_rate"].exp()
    theta, trace, expected = problem.start, torch.zeros(2, *problem.start.shape, dtype=torch.float64), 0
    for weight in JUDGED[terms, data]:
        error = theta - problem.centre - ETA.values["shift"]
        direct = rate * problem.curvature * torch.stack([-error, torch.ones_like(error)])
        theta, trace = theta - rate * problem.curvature * error, decay * trace + direct
        expected = expected + weight * (trace * theta).sum(2).mean(1)
    found = made(FirstOrder, decay=decay, outer_terms=terms, outer_data=data)(problem, ETA)
    assert_close(flat(found.grads), expected, rtol=1e-12, atol=1e-13)


def test_with_decay_0_only_the_latest_update_counts():
    problem = Quadratic()
    found = made(FirstOrder, decay=0.0, outer_terms="last")(problem, ETA)
    twin = Quadratic()
    made(TruncatedMetaGradient, window=K - 1)(twin, ETA)
    expected = closed_form(twin, twin.present()["theta"], 1).mean(0)
    assert_close(flat(found.grads), expected, rtol=1e-12, atol=1e-13)


# --- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_random_windows_are_reproducible_and_within_bounds(kind):
    settings = {"window": 2, "longest_window": 9, "schedule": "random"}
    lengths = {seed: [made(kind, seed, **settings).config.length(s, seed) for s in range(300)] for seed in (0, 1)}
    assert set(lengths[0]) == set(range(2, 10))
    assert lengths[0] != lengths[1]
    below = sum(k < math.sqrt(2 * 9) for k in lengths[0])  # log-uniform: as many below the geometric mean as above
    assert 110 < below < 190
    problem, estimator = Quadratic(), made(kind, 1, **settings)
    for problem.meta_step in range(4):
        age = problem.age.clone()
        estimate = estimator(problem, ETA)
        assert estimate.metrics["window"] == lengths[1][problem.meta_step]
        assert (problem.age - age == lengths[1][problem.meta_step] + 1).all()  # and what it is judged on


def test_growing_windows_grow_from_the_shortest_to_the_longest():
    config = TruncatedConfig(window=2, longest_window=6, schedule="growing", growth=40)
    lengths = [config.length(s, 0) for s in range(60)]
    assert lengths == sorted(lengths) and set(lengths) == {2, 3, 4, 5, 6}
    assert lengths[0] == lengths[9] == 2 and lengths[10] == 3 and lengths[39] == 5 and lengths[40] == 6


# --- what is carried from window to window -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY)
def test_data_that_judged_are_learned_from(kind):
    problem, estimator = Watched(), made(kind, outer_data="fresh_reuse")
    estimator(problem, ETA)
    judged, problem.learned = problem.collected[-1], []
    estimator.begin(torch.zeros(4, dtype=torch.bool))
    estimator(problem, ETA)
    assert problem.learned[0] is judged
    assert len(problem.collected) == (K + 1) + K


@pytest.mark.parametrize("kind", EVERY)
def test_data_of_agents_that_are_no_more_are_dropped(kind):
    problem, estimator = Watched(), made(kind, outer_data="fresh_reuse")
    estimator(problem, ETA)
    judged, problem.learned = problem.collected[-1], []
    estimator.begin(torch.tensor([False, True, False, False]))
    assert estimator.state_dict() == {}
    estimator(problem, ETA)
    assert all(d is not judged for d in problem.learned)
    assert problem.learned[0] is problem.collected[K + 1]


@pytest.mark.parametrize("kind", EVERY)
def test_data_are_thrown_away_where_they_only_judge(kind):
    problem, estimator = Watched(), made(kind, outer_data="fresh")
    for _ in range(2):
        estimator(problem, ETA)
    assert len(problem.collected) == 2 * (K + 1)
    assert estimator.state_dict() == {}


@pytest.mark.parametrize("kind", EVERY)
def test_a_saved_estimator_goes_on_to_the_same_bits(kind):
    settings = {"outer_data": "fresh_reuse", "schedule": "random", "longest_window": 7}
    problem, estimator = Quadratic(noise=0.5, momentum=0.9), made(kind, 3, **settings)
    for problem.meta_step in range(2):
        estimator(problem, ETA)
    other = Quadratic(noise=0.5, momentum=0.9)
    other.commit(problem.present())
    other.generator.set_state(problem.generator.get_state())
    restored = made(kind, 3, **settings)
    restored.load_state_dict(copy.deepcopy(estimator.state_dict()))
    for problem.meta_step in range(2, 5):
        other.meta_step = problem.meta_step
        ours, theirs = estimator(problem, ETA), restored(other, ETA)
        assert torch.equal(flat(ours.grads), flat(theirs.grads))
        assert ours.metrics == theirs.metrics
    assert torch.equal(problem.present()["theta"], other.present()["theta"])


@pytest.mark.parametrize("kind", EVERY)
def test_nothing_that_is_left_behind_has_a_graph(kind):
    problem, estimator = Quadratic(momentum=0.9), made(kind, outer_data="fresh_reuse")
    estimate = estimator(problem, ETA)
    left = [*problem.present().values(), *estimator.state_dict().values(), *estimate.grads.values()]
    assert not any(v.requires_grad for v in left)
    assert not any(v.requires_grad for v in ETA.values.values())


# --- from a window to an estimate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXACT)
def test_lifetimes_count_alike_where_each_gradient_is_scaled(kind):
    problem = Quadratic()
    grads = closed_form(problem, problem.start, K)
    expected = (grads / grads.norm(dim=1, keepdim=True)).mean(0)
    found = made(kind, outer_terms="last", per_lifetime=True)(problem, ETA)
    assert_close(flat(found.grads), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", EXACT)
def test_diagnostics_say_what_was_computed_by_hand(kind):
    problem = Quadratic()
    grads = closed_form(problem, problem.start, K)
    shrink = (1 - ETA.values["log_rate"].exp() * problem.curvature) ** K
    found = made(kind, outer_terms="last", diagnose_every=3)(problem, ETA)
    end = problem.present()["theta"]
    assert found.metrics["growth"] == pytest.approx(((shrink * end).norm() / end.norm()).item(), rel=1e-12)
    noise = ((grads - grads.mean(0)).square().sum() / (4 - 1) / 4).sqrt()  # standard error of the mean over P = 4
    assert found.metrics["snr"] == pytest.approx((grads.mean(0).norm() / noise).item(), rel=1e-12)
    assert found.metrics["loss"] == pytest.approx(0.5 * end.square().sum(1).mean().item(), rel=1e-12)
    assert found.metrics["probe_error"] < 1e-7
    assert_close(flat(found.grads), grads.mean(0), rtol=1e-12, atol=1e-13)
    problem.meta_step = 1
    assert not {"growth", "snr", "probe_error"} & set(made(kind, diagnose_every=3)(problem, ETA).metrics)


@pytest.mark.parametrize("data", ["fresh", "fresh_reuse", "shifted", "same_is"])
@pytest.mark.parametrize("kind", EXACT)
def test_the_probe_finds_no_error_in_an_exact_gradient_and_leaves_no_trace(kind, data):
    problems = [Scored(noise=0.5, momentum=0.9) for _ in range(2)]
    looked, plain = (made(kind, outer_data=data, diagnose_every=d) for d in (1, 0))
    for _ in range(2):
        found, expected = looked(problems[0], ETA), plain(problems[1], ETA)
        assert found.metrics["probe_error"] < 1e-6
        assert_close(flat(found.grads), flat(expected.grads), rtol=1e-12, atol=1e-13)
    assert torch.equal(problems[0].present()["theta"], problems[1].present()["theta"])


def test_the_probe_finds_what_first_order_leaves_out():
    assert made(FirstOrder, diagnose_every=1)(Quadratic(), ETA).metrics["probe_error"] > 1e-2


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("terms, data", [t for t in JUDGED if t[0] != "weighted"])
@pytest.mark.parametrize("kind", EVERY)
def test_broken_lifetimes_are_left_out(kind, terms, data, scaled):
    problem, whole = Apart(), Apart()
    problem._state["theta"][1] = float("nan")
    settings = {"outer_terms": terms, "outer_data": data, "per_lifetime": scaled}
    found = made(kind, **settings)(problem, ETA)
    assert found.broken.tolist() == [False, True, False, False]
    window = made(kind, **settings).differentiate(whole, ETA.leaf(4), K, False)
    grads = torch.cat([window.grads[k].reshape(4, 1) for k in ETA.values], 1)[[0, 2, 3]]
    grads = grads / grads.norm(dim=1, keepdim=True) if scaled else grads
    assert_close(flat(found.grads), grads.mean(0), rtol=1e-12, atol=1e-13)
    assert found.metrics["loss"] == pytest.approx(window.loss[[0, 2, 3]].mean().item(), rel=1e-12)
    assert math.isfinite(found.metrics["inner"])


@pytest.mark.parametrize("kind", EVERY)
def test_where_every_lifetime_broke_there_is_no_gradient(kind):
    problem = Apart()
    problem._state["theta"][:] = float("inf")
    found = made(kind)(problem, ETA)
    assert found.grads is None and bool(found.broken.all()) and math.isnan(found.metrics["loss"])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", EVERY)
def test_an_inner_loss_that_is_deaf_to_eta_has_no_meta_gradient(kind, scaled):
    found = made(kind, per_lifetime=scaled)(Deaf(momentum=0.9, noise=0.5), ETA)
    assert flat(found.grads).tolist() == [0.0, 0.0]


class Halves(Group):
    """The second of two processes, told what the first summed."""

    def __init__(self, theirs=None):
        self.theirs, self.said = theirs, []

    def sum(self, x):
        self.said.append(x)
        return x if self.theirs is None else x + self.theirs[len(self.said) - 1]


@pytest.mark.parametrize("kind", EVERY)
def test_the_average_is_over_the_lifetimes_of_all_processes(kind):
    whole, settings = Quadratic(5), {"per_lifetime": True}
    groups = [Halves()]
    for rows in (slice(0, 2), slice(2, 5)):
        share = Quadratic(rows.stop - rows.start)
        for name in ("curvature", "centre", "start"):
            setattr(share, name, getattr(whole, name)[rows])
        share.commit({k: v[rows] for k, v in whole.present().items()})
        share.group = groups[-1]
        found = made(kind, **settings)(share, ETA)
        groups.append(Halves(groups[-1].said))
    assert_close(flat(found.grads), flat(made(kind, **settings)(whole, ETA).grads), rtol=1e-12, atol=1e-13)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"window": 0}, ("window is 0", "at least 1")),
        ({"growth": 0}, ("growth is 0", "at least 1")),
        ({"diagnose_every": -1}, ("diagnose_every is -1", "at least 0")),
        ({"schedule": "random"}, ("'random'", "longest_window")),
        ({"schedule": "growing"}, ("'growing'", "longest_window")),
        ({"schedule": "random", "longest_window": 3}, ("longest_window is 3", "at least 4")),
        ({"outer_terms": "weighted", "weights": ()}, ("'weighted' with 0 weights", "expected both")),
        ({"weights": WEIGHTS}, ("'every' with 4 weights", "expected both")),
        ({"outer_terms": "weighted", "weights": (1.0, 2.0)}, ("2 weights", "one for each")),
        (
            {"outer_terms": "weighted", "weights": (1.0, 0.0, 0.0, 2.0), "outer_data": "shifted"},
            ("the last weight is 2:", "'shifted'", "expected 0"),
        ),
        (
            {"outer_terms": "weighted", "weights": WEIGHTS, "schedule": "random", "longest_window": 9},
            ("4 weights", "fixed window"),
        ),
        ({"outer_data": "shifted", "window": 1}, ("'shifted'", "window of 1", "at least 2")),
    ],
)
@pytest.mark.parametrize("config", [TruncatedConfig, RematerialisedConfig, FirstOrderConfig])
def test_settings_that_mean_nothing_are_refused(config, settings, said):
    with pytest.raises(UserError) as error:
        config(**{"window": K} | settings)
    assert all(s in str(error.value) for s in said)
    assert str(error.value).count(".") == 1 and str(error.value).endswith(".")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: FirstOrderConfig(decay=1.5), ("decay is 1.5", "at most 1")),
        (lambda: FirstOrderConfig(decay=-0.5), ("decay is -0.5", "at least 0")),
        (
            lambda: TruncatedConfig(outer_data="same_is", correction=CorrectionConfig(1.0)),
            ("outer_data is 'same_is'", "correction"),
        ),
        (lambda: CorrectionConfig(coef=-1.0), ("correction.coef is -1.0", "at least 0")),
        (lambda: CorrectionConfig(discount=2.0), ("correction.discount is 2.0", "at most 1")),
        (lambda: CorrectionConfig(discount=-0.1), ("correction.discount is -0.1", "at least 0")),
    ],
)
def test_numbers_out_of_range_are_refused(make, said):
    with pytest.raises(UserError) as error:
        make()
    assert all(s in str(error.value) for s in said)
