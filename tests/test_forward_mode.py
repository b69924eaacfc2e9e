"""Forward mode: equal to reverse mode over everything so far, at the memory of one update; the noisy quadratic."""

import copy

import pytest
import torch
from graphs import held_by_graphs
from learners import learning_problem
from torch.autograd import forward_ad
from torch.testing import assert_close

from experiments.oracles import noisy_quadratic
from experiments.oracles.noisy_quadratic import NoisyQuadratic
from experiments.oracles.quadratic import Quadratic
from learned_rl.activations import _FastTanh
from learned_rl.component import Hyperparameters, NoConfig, lifetime_mean, shield
from learned_rl.ppo import PPOConfig
from learned_rl.tasks.chains import ChainFamily
from learned_rl.types import UserError
from meta_optimizers.forward_mode import ForwardConfig, ForwardMode
from meta_optimizers.group import Group
from meta_optimizers.problem import Eta, Moved
from meta_optimizers.rematerialised import Rematerialised
from meta_optimizers.truncated import TruncatedConfig, TruncatedMetaGradient

ETA = Quadratic.eta()
EVERY = 3


class Penalised(Quadratic):
    """With a term that depends on the state and on eta."""

    def step(self, state, data, eta):
        m = super().step(state, data, eta)
        return Moved(m.state, m.loss, (eta.values["shift"] * state["theta"]).sum(1).sin(), m.log_prob, m.alive, {})


class Graphless(Quadratic):
    """Whose inner gradient keeps no graph of its own; the loss is a quartic, so that curvature depends on theta."""

    create_graph = False

    def step(self, state, data, eta):
        theta = state["theta"] if state["theta"].requires_grad else state["theta"].clone().requires_grad_()
        error = theta - self.centre - eta.values["shift"]
        loss = (0.25 * error**4 * eta.values["shift"].exp()).sum()
        (gradient,) = torch.autograd.grad(loss, theta, create_graph=self.create_graph)
        moved = theta - 0.1 * eta.values["log_rate"].exp() * gradient
        zero = theta.new_zeros(self.lifetimes)
        return Moved(state | {"theta": moved}, self.judge(state, data, eta), zero, zero, torch.ones(4) > 0)


class Graphed(Graphless):
    create_graph = True


def flat(grads, eta=ETA):
    return torch.cat([grads[k].reshape(-1) for k in eta.values])


def forward(**settings):
    return ForwardMode(ForwardConfig(**{"every": EVERY} | settings))


def reverse(kind, problem, eta, updates, latest):
    """Reverse mode over everything so far, judging the states before the `latest` updates."""
    weights = tuple(1 / latest if updates - latest <= k < updates else 0.0 for k in range(1, updates + 1))
    config = kind.Config(window=updates, outer_terms="weighted", weights=weights, outer_data="shifted")
    return kind(config)(problem, eta)


@pytest.mark.parametrize("momentum, noise", [(0.0, 0.0), (0.9, 0.0), (0.0, 0.5), (0.9, 0.5)])
@pytest.mark.parametrize("kind", [TruncatedMetaGradient, Rematerialised])
def test_forward_mode_is_reverse_mode_over_everything_so_far(kind, momentum, noise):
    problem, estimator = Quadratic(momentum=momentum, noise=noise), forward()
    for call in range(1, 5):
        found = estimator(problem, ETA)
        twin = Quadratic(momentum=momentum, noise=noise)
        expected = reverse(kind, twin, ETA, call * EVERY, EVERY)
        assert_close(flat(found.grads), flat(expected.grads), rtol=1e-10, atol=1e-14)
        assert torch.equal(problem.present()["theta"], twin.present()["theta"])
        assert torch.equal(problem.age, twin.age)  # not one collection more
    short = reverse(kind, Quadratic(momentum=momentum, noise=noise), ETA, EVERY, EVERY)
    assert not torch.allclose(flat(found.grads), flat(short.grads), rtol=1e-2)


def test_penalties_of_all_updates_are_averaged():
    config = TruncatedConfig(window=EVERY, outer_terms="weighted", weights=(1 / 3, 1 / 3, 0.0), outer_data="shifted")
    expected = TruncatedMetaGradient(config)(Penalised(noise=0.5), ETA)
    found = forward()(Penalised(noise=0.5), ETA)
    assert_close(flat(found.grads), flat(expected.grads), rtol=1e-10, atol=1e-14)
    first = 0.5 * Penalised().start.square().sum(1).mean().item() / EVERY  # a window does not judge its first state
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"] + first, rel=1e-12)


class LearnedNumbers(Hyperparameters):
    """Four numbers of the update, each a function of age and of the lifetime's mean reward."""

    name, Config = "learned_numbers", NoConfig

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([1.5, -1.0, -2.0, -3.0], dtype=torch.float64))

    def forward(self, base, trajectory, context):
        seen = (lifetime_mean(trajectory.reward) + context.progress)[:, None]
        gamma, clip, ent, rate = torch.sigmoid(self.bias + 0.3 * seen).split(1, 1)
        return base.replace(gamma=gamma, clip_range=clip, ent_coef=ent, learning_rate=0.1 * rate), {}


def learning(agent):
    return learning_problem(ChainFamily("short"), LearnedNumbers(), agent, 3, 12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("minibatches", [1, 2])
def test_agents_that_learn_have_exact_traces_too(optimizer, minibatches):
    agent = PPOConfig(n_envs=4, n_steps=8, n_epochs=minibatches, n_minibatches=minibatches, optimizer=optimizer)
    (problem, eta), estimator = learning(agent), forward()
    for call in (1, 2):
        found = flat(estimator(problem, eta).grads, eta)
        expected = flat(reverse(TruncatedMetaGradient, learning(agent)[0], eta, call * EVERY, EVERY).grads, eta)
        assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert (found[[0, 2, 3]] != 0).all()


def test_the_inner_gradient_needs_no_graph_of_its_own():
    found, again = (forward(every=6)(kind(), ETA) for kind in (Graphless, Graphed))
    expected = reverse(TruncatedMetaGradient, Graphed(), ETA, 6, 6)
    assert_close(flat(found.grads), flat(expected.grads), rtol=1e-10, atol=1e-14)
    assert_close(flat(again.grads), flat(expected.grads), rtol=1e-10, atol=1e-14)


def test_callers_without_grad_mode_get_the_same():
    with torch.no_grad():
        found = forward()(Quadratic(momentum=0.9), ETA)
    assert torch.equal(flat(found.grads), flat(forward()(Quadratic(momentum=0.9), ETA).grads))


def test_the_trace_is_the_derivative_of_the_state():
    problem, estimator = Quadratic(momentum=0.9), forward(every=5)
    estimator(problem, ETA)
    assert {k: tuple(v.shape) for k, v in estimator.trace.items()} == {"theta": (2, 4, 3), "velocity": (2, 4, 3)}
    for i, name in enumerate(ETA.values):
        ends = []
        for sign in (1, -1):
            other = Quadratic(momentum=0.9)
            forward(every=5)(other, Eta(ETA.values | {name: ETA.values[name] + sign * 1e-5}))
            ends.append(other.present())
        for entry, trace in estimator.trace.items():
            assert_close(trace[i], (ends[0][entry] - ends[1][entry]) / 2e-5, rtol=1e-7, atol=1e-9)


def peak(estimator, calls):
    """The most tensors that graphs held at once, in the last of some calls."""
    problem = Quadratic(momentum=0.9)
    for _ in range(calls):
        with held_by_graphs() as held:
            left = estimator(problem, ETA)
        assert not held.boxes
    tensors = [*left.grads.values(), *estimator.state_dict().values(), *problem.present().values()]
    assert not any(v.requires_grad for v in tensors)
    return held.most


def test_memory_is_that_of_one_update():
    assert 0 < peak(forward(every=1), 1) == peak(forward(every=20), 1) == peak(forward(every=5), 10)


def test_the_trace_begins_anew_with_a_lifetime():
    problem, estimator = Quadratic(horizon=2 * EVERY, momentum=0.9), forward()
    first = [estimator(problem, ETA) for _ in range(2)]
    before = copy.deepcopy(estimator.trace)
    estimator.begin(torch.tensor([True, False, True, False]))
    for name, trace in estimator.trace.items():
        assert not trace[:, [0, 2]].any() and before[name][:, [0, 2]].any()
        assert torch.equal(trace[:, [1, 3]], before[name][:, [1, 3]])
    ended = problem.renew(first[-1].broken)
    assert bool(ended.all())
    estimator.begin(ended)
    again = [estimator(problem, ETA) for _ in range(2)]
    assert all(torch.equal(flat(a.grads), flat(b.grads)) for a, b in zip(first, again, strict=True))


def test_a_saved_trace_goes_on_to_the_same_bits():
    problem, estimator = Quadratic(noise=0.5, momentum=0.9), forward()
    assert estimator.state_dict() == {}
    for _ in range(2):
        estimator(problem, ETA)
    other, restored = Quadratic(noise=0.5, momentum=0.9), forward()
    other.commit(problem.present())
    other.generator.set_state(problem.generator.get_state())
    saved = estimator.state_dict()
    restored.load_state_dict(saved)
    for _ in range(2):
        ours, theirs = estimator(problem, ETA), restored(other, ETA)
        assert torch.equal(flat(ours.grads), flat(theirs.grads)) and ours.metrics == theirs.metrics
    assert not torch.equal(saved["trace/theta"], estimator.trace["theta"])  # a copy, not a view


@pytest.mark.parametrize("where", ["state", "trace"])
def test_broken_lifetimes_are_left_out(where):
    problem, estimator = Quadratic(), forward()
    estimator(problem, ETA)
    twin, other = copy.copy(problem), copy.deepcopy(estimator)
    left = [0, 2, 3]
    if where == "state":
        problem._state["theta"][1, 2] = float("nan")
    else:
        estimator.trace["theta"][1, 1, 2] = float("inf")
    found = estimator(problem, ETA)
    assert found.broken.tolist() == [False, True, False, False]
    for name in ("curvature", "centre", "start"):
        setattr(twin, name, getattr(twin, name)[left])
    twin.lifetimes, twin.streams, twin._state = 3, torch.arange(3), {k: v[left] for k, v in twin._state.items()}
    twin.age, twin.noise = twin.age[left], 0.0
    other.trace = {k: v[:, left] for k, v in other.trace.items()}
    expected = other(twin, ETA)
    assert_close(flat(found.grads), flat(expected.grads), rtol=1e-13, atol=0)
    assert found.metrics == pytest.approx(expected.metrics, rel=1e-12)
    estimator.begin(found.broken)
    problem.commit({k: v.nan_to_num() for k, v in problem.present().items()})
    assert not estimator(problem, ETA).broken.any()


def test_where_every_lifetime_broke_there_is_no_gradient():
    problem = Quadratic()
    problem._state["theta"][:] = float("inf")
    found = forward()(problem, ETA)
    assert found.grads is None and bool(found.broken.all())


class Second(Group):
    """The second of two processes, told what the first summed."""

    def __init__(self, theirs=None):
        self.theirs, self.said = theirs, []

    def sum(self, x):
        self.said.append(x)
        return x if self.theirs is None else x + self.theirs[len(self.said) - 1]


def test_the_average_is_over_the_lifetimes_of_all_processes():
    whole, groups = Quadratic(5), [Second()]
    for rows in (slice(0, 2), slice(2, 5)):
        share = Quadratic(rows.stop - rows.start)
        for name in ("curvature", "centre", "start"):
            setattr(share, name, getattr(whole, name)[rows])
        share.commit({k: v[rows] for k, v in whole.present().items()})
        share.group = groups[-1]
        found = forward()(share, ETA)
        groups.append(Second(groups[-1].said))
    expected = forward()(whole, ETA)
    assert_close(flat(found.grads), flat(expected.grads), rtol=1e-13, atol=0)
    assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-13)


def test_too_many_numbers_are_refused():
    eta = Eta(ETA.values | {"more": torch.zeros(9, 7, dtype=torch.float64)})
    with pytest.raises(UserError) as error:
        forward()(Quadratic(), eta)
    said = str(error.value)
    assert "65 numbers" in said and "at most 64" in said and "reverse mode" in said and said.count(".") == 1
    assert forward(most=65)(Quadratic(), eta).grads["more"].shape == (9, 7)


@pytest.mark.parametrize("settings, said", [({"every": 0}, "every is 0"), ({"most": 0}, "most is 0")])
def test_settings_that_mean_nothing_are_refused(settings, said):
    with pytest.raises(UserError, match=f"{said}: expected at least 1"):
        ForwardConfig(**settings)


# --- functions of our own, under forward mode ----------------------------------------------------------------------


def slope_of(f, x):
    """Gradient of a nonlinear sum of f, itself differentiable."""
    x = x if x.requires_grad else x.clone().requires_grad_()
    return torch.autograd.grad(f(x).square().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("f", [_FastTanh.apply, lambda x: shield(x**3, 1)], ids=["tanh", "shield"])
def test_our_own_functions_push_tangents(f, order):
    generator = torch.Generator().manual_seed(0)
    x, along = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=generator)
    g = f if order == 1 else lambda x: slope_of(f, x)
    leaf = lambda v: v.clone().requires_grad_()  # noqa: E731 - a shield stands only where there is a gradient
    expected = (g(leaf(x + 1e-6 * along)) - g(leaf(x - 1e-6 * along))) / 2e-6
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(leaf(x), along)
        found = forward_ad.unpack_dual(g(dual)).tangent
        assert "Backward" in f(dual).grad_fn.name()  # its own node, not an identity without one
    assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_what_is_not_finite_stays_in_its_lifetime():
    x, along = torch.ones(2, 3), torch.tensor([[1.0, float("inf"), 2.0], [1.0, 1.0, 1.0]])
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(shield(forward_ad.make_dual(x.requires_grad_(), along), 0)).tangent
    assert torch.equal(found, along)


# --- short horizons ------------------------------------------------------------------------------------------------


def test_greedy_step_sizes_fall_far_too_fast():
    rates = noisy_quadratic.greedy()
    assert [f"{rates[i - 1].item():.2g}" for i in (1, 10, 100, 1000)] == ["1.2", "0.26", "0.043", "0.0081"]
    assert rates[0].item() == pytest.approx(1.23, abs=0.005)
    assert noisy_quadratic.final_excess(rates) == pytest.approx(0.108, abs=0.0005)
    assert noisy_quadratic.final_excess(noisy_quadratic.hold_then_decay()) == pytest.approx(0.0196, abs=0.00005)


def test_each_greedy_step_size_is_the_best_for_the_next_loss():
    rates = noisy_quadratic.greedy()
    moments = noisy_quadratic.path(rates)
    for t in (0, 9, 500, 999):
        after = [
            noisy_quadratic.excess(noisy_quadratic.moved(moments[t], rates[t] * f)).item() for f in (0.99, 1, 1.01)
        ]
        assert after[1] < min(after[0], after[2])


def test_the_moments_are_those_of_sampled_descent():
    generator, rates = torch.Generator().manual_seed(0), noisy_quadratic.hold_then_decay()[:20]
    h, theta = noisy_quadratic.CURVATURE, torch.ones(5_000, 100, dtype=torch.float64)
    for rate in rates:
        target = noisy_quadratic.NOISE.sqrt() * torch.randn(theta.shape, generator=generator, dtype=theta.dtype)
        theta = theta - rate * h * (theta - target)
    expected = noisy_quadratic.path(rates)[-1]
    assert_close(theta.square().mean(0), expected, rtol=0.1, atol=0)  # five standard errors


@pytest.mark.parametrize("kind", [TruncatedMetaGradient, Rematerialised])
def test_the_schedule_s_gradient_is_that_of_differences(kind):
    eta = NoisyQuadratic.eta(knots=5)
    window = kind(kind.Config(window=7, outer_terms="last")).differentiate(NoisyQuadratic(4, eta), eta.leaf(), 7, False)
    problem, slopes = NoisyQuadratic(4, eta), []
    for i in range(5):
        ends = []
        for sign in (1, -1):
            moved, state = eta.map(torch.clone), problem.present()
            moved.values["log_rate"][i] += sign * 1e-5
            for _ in range(7):
                state = problem.step(state, problem.collect(state), moved).state
            ends.append(noisy_quadratic.excess(state["theta"]).sum())
        slopes.append((ends[0] - ends[1]) / 2e-5)
    assert_close(window.grads["log_rate"], torch.stack(slopes), rtol=1e-6, atol=1e-10)


def test_lifetimes_begin_where_the_schedule_brings_them_and_end_after_all_steps():
    eta = NoisyQuadratic.eta()
    problem, path = NoisyQuadratic(4, eta), noisy_quadratic.path(noisy_quadratic.schedule(eta))
    assert torch.equal(problem.present()["theta"], path[[0, 250, 500, 750]])
    state = problem.present()
    for _ in range(250):
        state = problem.step(state, problem.collect(state), eta).state
    assert_close(state["theta"], path[[250, 500, 750, 1000]], rtol=1e-12, atol=0)
    problem.commit(state)
    assert problem.renew(torch.tensor([False, True, False, False])).tolist() == [False, True, False, True]
    assert_close(problem.present()["theta"], path[[250, 0, 750, 0]], rtol=1e-12, atol=0)
    assert problem.present()["age"].tolist() == [250, 0, 750, 0]


def test_lifetimes_that_cannot_be_spread_are_refused():
    with pytest.raises(UserError, match="lifetimes is 3: expected a divisor of 1000, such as 2"):
        NoisyQuadratic(3, NoisyQuadratic.eta())


def final(kind, meta_steps, window, **settings):
    estimator = kind(kind.Config(window=window, outer_terms="last"))
    return noisy_quadratic.final_excess(
        noisy_quadratic.schedule(noisy_quadratic.learned(estimator, meta_steps, **settings))
    )


@pytest.mark.slow
def test_longer_windows_learn_schedules_that_end_lower():
    found = [
        final(TruncatedMetaGradient, 1500, 1),
        final(TruncatedMetaGradient, 300, 10),
        final(Rematerialised, 100, 100),
        final(TruncatedMetaGradient, 40, 1000, learning_rate=0.2),
    ]
    assert found[0] == pytest.approx(noisy_quadratic.final_excess(noisy_quadratic.greedy()), rel=0.01)
    assert found == sorted(found, reverse=True) and found[2] < 0.03
    assert found[3] < noisy_quadratic.final_excess(noisy_quadratic.hold_then_decay()) < found[2]
