"""Hand-made update rules against torch.optim, in all three uses; rows apart; clipping; derivatives at zero."""

import copy

import experience
import pytest
import torch
from torch.testing import assert_close

from learned_rl.component import Hyper, lifetime_mean
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.ppo import PPOConfig, Slots
from learned_rl.rule_optimizer import RuleOptimizer
from learned_rl.types import UserError
from learned_rl.update_rules import (
    RULES,
    SGD,
    Adam,
    AdamConfig,
    ClippedAdam,
    ClippedAdamConfig,
    Momentum,
    MomentumConfig,
    RMSProp,
    RMSPropConfig,
    clip_norm,
    select_rows,
)

RATE, STEPS = 0.03, 20
EXACT = {"rtol": 1e-11, "atol": 1e-13}

# rule -> the optimizer of torch that it equals
TWINS = {
    "sgd": (SGD(), lambda p: torch.optim.SGD(p, lr=RATE)),
    "momentum": (Momentum(MomentumConfig(0.8)), lambda p: torch.optim.SGD(p, lr=RATE, momentum=0.8)),
    "rmsprop": (
        RMSProp(RMSPropConfig(decay=0.9, eps=1e-3)),
        lambda p: torch.optim.RMSprop(p, lr=RATE, alpha=0.9, eps=1e-3),
    ),
    "adam": (
        Adam(AdamConfig(beta1=0.8, beta2=0.95, eps=1e-3)),
        lambda p: torch.optim.Adam(p, lr=RATE, betas=(0.8, 0.95), eps=1e-3),
    ),
    "adamw": (
        Adam(AdamConfig(eps=1e-8, weight_decay=0.1)),
        lambda p: torch.optim.AdamW(p, lr=RATE, weight_decay=0.1),
    ),
}
EACH = pytest.mark.parametrize("name", TWINS)


def losses(agents, k):
    """A loss of each lifetime on the k-th batch of experience; not quadratic, so gradients change."""
    tr = experience.trajectory(experience.SPACES["mlp"], k)
    out = agents(tr.obs[:-1])
    return lifetime_mean(-out.policy.log_prob(tr.action) * tr.reward + (out.value - tr.reward).square())


def torch_rows(name, begin):
    """Each row optimised alone by torch's own optimizer: [P, D]."""
    rows = []
    for p in range(len(begin)):
        agents = experience.population("mlp", value=True)
        row = torch.nn.Parameter(begin[p].clone())
        optimizer = TWINS[name][1]([row])
        for k in range(STEPS):
            theta = torch.stack([row if q == p else begin[q] for q in range(len(begin))])
            optimizer.zero_grad()
            losses(agents.bind(theta), k)[p].backward()
            optimizer.step()
        rows.append(row.detach())
    return torch.stack(rows)


@pytest.mark.parametrize("inner_type", [PlainInner, GraphInner])
@EACH
def test_rows_together_equal_torch_on_each_row(name, inner_type):
    agents, rule = experience.population("mlp", value=True), TWINS[name][0]
    begin = agents.theta.detach().clone()
    inner = inner_type(agents, rule, rule.initial_state(begin))
    for k in range(STEPS):
        inner.step(losses(inner.agent, k), Hyper(learning_rate=RATE, max_grad_norm=float("inf")))
    assert_close(inner.theta.detach(), torch_rows(name, begin), **EXACT)
    assert (inner.theta - begin).abs().max() > 0.01


@EACH
def test_as_a_torch_optimizer_of_an_ordinary_module(name):
    """Parameters of several shapes, two groups with rates of their own, and a parameter without gradient."""
    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
    theirs = copy.deepcopy(ours)
    unused = torch.nn.Parameter(torch.ones(2))
    rule, twin = TWINS[name]
    mine = RuleOptimizer(
        [{"params": ours[0].parameters(), "lr": 2 * RATE}, {"params": [*ours[2].parameters(), unused]}], rule, lr=RATE
    )
    other = twin([{"params": theirs[0].parameters(), "lr": 2 * RATE}, {"params": theirs[2].parameters()}])
    for k in range(STEPS):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)

        def loss(module, optimizer, x=x):
            optimizer.zero_grad()
            value = (module(x) - x.sum(1, keepdim=True)).square().mean()
            value.backward()
            return value

        reported = mine.step(lambda: loss(ours, mine))
        assert_close(reported, other.step(lambda: loss(theirs, other)), **EXACT)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_close(a, b, **EXACT)
    assert torch.equal(unused, torch.ones(2))


@EACH
def test_a_torch_optimizer_continues_after_a_state_dict_round_trip(name):
    def drive(p, optimizer, steps):
        for k in steps:
            p.grad = torch.sin(3 * p.detach() + k)
            optimizer.step()

    rule = TWINS[name][0]
    one = torch.nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3))
    first = RuleOptimizer([one], rule, lr=RATE)
    drive(one, first, range(5))
    two = torch.nn.Parameter(one.detach().clone())
    second = RuleOptimizer([two], rule, lr=9.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    drive(one, first, range(5, 10))
    drive(two, second, range(5, 10))
    assert torch.equal(one, two)


def test_rows_of_a_torch_optimizer_are_lifetimes():
    """With rows=True the state has a count for each row of the parameter."""
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = RuleOptimizer([p], Adam(), rows=True)
    p.grad = torch.ones(3, 2)
    optimizer.step()
    assert optimizer.state[p]["count"].shape == (3, 1)


@pytest.mark.parametrize("inner_type", [PlainInner, GraphInner])
@EACH
def test_inactive_rows_and_their_state_stay_as_they_are(name, inner_type):
    agents, rule = experience.population("mlp", value=True, P=3), TWINS[name][0]

    def loss(agent, k):
        tr = experience.trajectory(experience.SPACES["mlp"], k, P=3)
        return lifetime_mean((agent(tr.obs[:-1]).value - tr.reward).square())

    inner = inner_type(agents, rule, rule.initial_state(agents.theta.detach()))
    hyper = Hyper(learning_rate=RATE)
    inner.step(loss(inner.agent, 0), hyper)
    theta = inner.theta.detach().clone()
    state = {k: v.detach().clone() for k, v in inner.state.items()}
    active = torch.tensor([True, False, True])
    inner.step(loss(inner.agent, 1), hyper, active)
    assert torch.equal(inner.theta[1], theta[1])
    assert (inner.theta[active] != theta[active]).any(1).all()
    for k, v in inner.state.items():
        assert torch.equal(v[1], state[k][1])
        assert (v[active] != state[k][active]).any()


@pytest.mark.parametrize("rate", [0.1, torch.tensor([[0.1], [0.0], [0.3]], dtype=torch.float64)])
@EACH
def test_rows_do_not_mix(name, rate):
    """The step of a row depends on nothing of the other rows, whatever they contain."""
    rule = TWINS[name][0]
    g = torch.Generator().manual_seed(0)
    grad, theta = (torch.randn(3, 4, generator=g, dtype=torch.float64) for _ in range(2))
    state = {k: v + 1 for k, v in rule.initial_state(theta).items()}
    step, new = rule.update(grad, state, theta, rate)
    grad[2], theta[2] = float("nan"), float("inf")
    other, other_new = rule.update(grad, {k: v.clone() for k, v in state.items()}, theta, rate)
    assert torch.equal(step[:2], other[:2])
    assert all(torch.equal(new[k][:2], other_new[k][:2]) for k in new)
    if isinstance(rate, torch.Tensor):
        assert not step[1].any() and step[0].all()


# --- clipping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [0.5, 3.0])
def test_clipping_equals_torch_on_each_row(bound):
    grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clipped = clip_norm(grad, bound)
    for p in range(5):
        parameter = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
        parameter.grad = grad[p].clone()
        torch.nn.utils.clip_grad_norm_([parameter], bound)
        assert_close(clipped[p], parameter.grad, rtol=1e-12, atol=0)
    norms = grad.norm(dim=1)
    assert (norms > bound).any()
    assert (clipped.norm(dim=1) <= bound).all()


def test_clipping_with_a_bound_for_each_row_and_without_one():
    grad = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 0.0]])
    clipped = clip_norm(grad, torch.tensor([[1.0], [100.0], [1.0]]))
    assert_close(clipped, torch.tensor([[0.6, 0.8], [3.0, 4.0], [0.0, 0.0]]), rtol=1e-6, atol=0)
    assert clip_norm(grad, float("inf")) is grad


def test_clipping_has_the_right_derivative_and_a_finite_one_at_zero():
    grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    bound = torch.tensor([[0.3], [0.5], [50.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(clip_norm, (grad, bound))
    zero = torch.zeros(2, 4, requires_grad=True)
    (slope,) = torch.autograd.grad(clip_norm(zero, 0.5).sum(), zero)
    assert slope.isfinite().all()


def test_select_rows():
    new, old = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    assert select_rows(torch.tensor([True, False]), new, old).sum((1, 2)).tolist() == [12, 0]


# --- derivatives --------------------------------------------------------------------------------------------------


@EACH
def test_updates_are_differentiable_in_everything(name):
    rule = TWINS[name][0]
    g = torch.Generator().manual_seed(2)
    theta = torch.randn(2, 3, generator=g, dtype=torch.float64)
    names = list(rule.initial_state(theta))
    learn = [k for k in names if k != "count"]

    def two_steps(grad, rate, *state):
        tree = dict(zip(learn, state, strict=True)) | ({"count": torch.full((2, 1), 3.0)} if "count" in names else {})
        step, tree = rule.update(grad, tree, theta, rate)
        return rule.update(grad.sin(), tree, theta + step, rate)[0]

    inputs = [torch.randn(2, 3, generator=g, dtype=torch.float64), torch.full((2, 1), 0.1, dtype=torch.float64)]
    inputs += [torch.rand(2, 3, generator=g, dtype=torch.float64) + 0.5 for _ in learn]
    assert torch.autograd.gradcheck(two_steps, [x.requires_grad_() for x in inputs])


@pytest.mark.parametrize("name", RULES)
def test_a_gradient_of_exactly_zero_has_finite_derivatives(name):
    """States of a table that were never visited: gradient and second moment are zero."""
    rule = RULES[name]()
    grad = torch.tensor([[0.0, 1.0]], requires_grad=True)
    theta = torch.zeros(1, 2)
    step, state = rule.update(grad, rule.initial_state(theta), theta, 0.1)
    step, _ = rule.update(grad, state, theta + step, 0.1)
    (slope,) = torch.autograd.grad(step.sum(), grad)
    assert slope.isfinite().all() and step[0, 0] == 0


@pytest.mark.parametrize("rule", [RMSProp, Adam])
def test_a_stopped_denominator_changes_derivatives_only(rule):
    grad = torch.tensor([[0.5, -2.0]], dtype=torch.float64, requires_grad=True)
    theta = torch.zeros(1, 2, dtype=torch.float64)
    steps = [r.update(grad, r.initial_state(theta), theta, 0.1)[0] for r in (rule(), rule(rule.Config(stop_denominator=True)))]  # fmt: skip  # noqa: E501
    assert torch.equal(*steps)
    full, stopped = (torch.autograd.grad(s.sum(), grad)[0] for s in steps)
    # Adam's first step is -rate * sign(g) whatever g is, unless the denominator is a constant.
    assert_close(stopped, (steps[1] / grad).detach(), rtol=1e-9, atol=0)
    assert (full.abs() < 1e-3 * stopped.abs()).all()


def test_the_denominator_is_stopped_from_the_settings():
    assert PPOConfig().stop_denominator is False
    config = PPOConfig(optimizer="rmsprop", stop_denominator=True)
    assert Slots.fill(config).optimizer.config.stop_denominator
    assert not Slots.fill(PPOConfig()).optimizer.config.stop_denominator
    with pytest.raises(UserError, match="stop_denominator is on, but 'sgd' has none: expected rmsprop or adam"):
        PPOConfig(optimizer="sgd", stop_denominator=True)


# --- steps of at most one learning rate ---------------------------------------------------------------------------


def gradients():
    """Of two rows: nearly silent at first, and then all of one sign, for which Adam's steps exceed its rate."""
    noise = torch.randn(60, 2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.cat([1e-3 * noise[:50], noise[50:].abs()])


def steps(rule, grads, rate=RATE):
    theta = torch.zeros(2, 5, dtype=torch.float64)
    state, found = rule.initial_state(theta), []
    for grad in grads:
        step, state = rule.update(grad, state, theta, rate)
        found.append(step)
    return torch.stack(found)


@pytest.mark.parametrize("clip", [1.0, 0.5])
def test_steps_of_clipped_adam_are_those_of_adam_up_to_a_bound(clip):
    ours = steps(ClippedAdam(ClippedAdamConfig(clip=clip)), gradients())
    plain = steps(Adam(AdamConfig(eps=1e-8)), gradients())
    assert (plain.abs() > 1.2 * clip * RATE).any() and (plain.abs() < 0.8 * clip * RATE).any()
    assert_close(ours, plain.clamp(-clip * RATE, clip * RATE), **EXACT)


def test_rows_have_bounds_of_their_own_learning_rates():
    rate = torch.tensor([[0.1], [0.0]], dtype=torch.float64)
    found = steps(ClippedAdam(), gradients(), rate)
    assert found[:, 0].abs().max() == pytest.approx(0.1, rel=1e-12) and not found[:, 1].any()


def test_clipped_adam_without_a_bound_is_adam():
    config = ClippedAdamConfig(clip=1e9, stop_denominator=False)
    grads, plain = gradients(), steps(Adam(AdamConfig(eps=1e-8)), gradients())
    assert_close(steps(ClippedAdam(config), grads), plain, **EXACT)
    assert torch.equal(steps(Adam(AdamConfig(eps=1e-8, clip=float("inf"))), grads), plain)


def test_steps_of_clipped_adam_have_derivatives_within_the_bound_alone_and_a_constant_denominator():
    """That by the last gradient is -rate (1 - beta1) / (1 - beta1^n) / root where nothing is clipped, else 0."""
    *before, last = gradients()
    theta, rule = torch.zeros(2, 5, dtype=torch.float64), ClippedAdam()
    state = rule.initial_state(theta)
    for grad in before:
        _, state = rule.update(grad, state, theta, RATE)
    last = last.requires_grad_()
    step, state = rule.update(last, state, theta, RATE)
    (slope,) = torch.autograd.grad(step.sum(), last)
    root = (state["second"].detach() / (1 - 0.999**60)).sqrt() + 1e-8
    clipped = step.abs() >= RATE * (1 - 1e-12)
    assert_close(slope, torch.where(clipped, 0.0, -RATE * 0.1 / (1 - 0.9**60) / root), rtol=1e-9, atol=0)
    assert clipped.any() and not clipped.all()


def test_clipped_adam_by_its_name_and_its_settings():
    rule = Slots.fill(PPOConfig(optimizer="clipped_adam")).optimizer
    assert type(rule) is ClippedAdam
    assert (rule.config.clip, rule.config.eps, rule.config.stop_denominator) == (1.0, 1e-8, True)
    assert (rule.config.beta1, rule.config.beta2) == (0.9, 0.999)


@pytest.mark.parametrize("kind", [AdamConfig, ClippedAdamConfig])
def test_impossible_settings_of_adam_are_refused(kind):
    for name, value, bound in (("clip", -1.0, "least 0"), ("eps", -1e-9, "least 0"), ("beta2", 1.5, "most 1")):
        with pytest.raises(UserError, match=f"{name} is {value}: expected at {bound}"):
            kind(**{name: value})
