"""Components under other parameters: one set, or one for each lifetime, equals as many components of their own."""

import copy
import dataclasses

import example_components as examples
import experience
import pytest
import torch
from test_conformance import (
    ACTIONS,
    ALL,
    IDLE,
    KINDS,
    NUMBERS,
    B,
    Case,
    P,
    T,
    build,
    case,
    close,
    detached,
    kept,
    prefixed,
    select,
)
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.testing import assert_close

from learned_rl.agents import AgentConfig, Population
from learned_rl.architecture import AgentOutput
from learned_rl.component import Component, Context, Hyper, NoConfig, Reward
from learned_rl.distributions import SquashedGaussian
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.substitute import substituted
from learned_rl.trajectory import flatten_time
from learned_rl.types import UserError
from objectives.lpg import LPG, LPGConfig
from objectives.recurrence import CORES as CORE_KINDS

EXACT = {"rtol": 1e-12, "atol": 1e-12}
EVERYTHING = LPGConfig(predictions=5, width=5, embedding=5, lifetime=True, scale_free=True, standardize=True)
CORES = [pytest.param(LPG, dataclasses.replace(EVERYTHING, core=core), id=f"all-{core}") for core in ("gru", "lstm")]
LEARNED = [p for p in ALL if list(build(*p.values).parameters())] + CORES
#: One of each slot, and each core.
FEW = CORES + [pytest.param(kind, None, id=name) for name, kind in examples.EXAMPLES.items()]
each = pytest.mark.parametrize(("kind", "config"), LEARNED)
every = pytest.mark.parametrize(("kind", "config"), ALL)
few = pytest.mark.parametrize(("kind", "config"), FEW)


def own(component):
    return {k: p.detach() for k, p in component.named_parameters()}


def spread(component, seed=0):
    """[P, ...] around the component's own, another one for each lifetime."""
    g = torch.Generator().manual_seed(seed)
    return {k: v + 0.3 * torch.randn(P, *v.shape, generator=g, dtype=v.dtype) for k, v in own(component).items()}


def row(tree, p):
    return {k: v[p] for k, v in tree.items()}


def with_weights(component, values):
    """A component of its own."""
    other = copy.deepcopy(component)
    other.load_state_dict(component.state_dict() | values)
    return other


def leaves(values):
    return {k: v.clone().requires_grad_() for k, v in values.items()}


# --- what it says -------------------------------------------------------------------------------------------------


@every
def test_under_its_own_values_it_is_itself(kind, config):
    given = case(build(kind, config))
    values = own(given.component)
    close(Case(substituted(given.component, values, False), given.data).outputs(), given.outputs(), 0, 0)
    if values:
        values = {k: v.expand(P, *v.shape) for k, v in values.items()}
    close(Case(substituted(given.component, values, True), given.data).outputs(), given.outputs(), **EXACT)


@pytest.mark.parametrize("grad", [True, False])
@each
def test_values_of_each_lifetime_equal_components_of_their_own(kind, config, grad):
    given = case(build(kind, config))
    values = spread(given.component)
    with torch.set_grad_enabled(grad):
        found = Case(substituted(given.component, values, True), given.data).outputs()
        for p in range(P):
            alone = Case(with_weights(given.component, row(values, p)), select(given.data, [p]))
            close(select(found, [p]), alone.outputs(), **EXACT)
    before = given.outputs()
    assert max((found[k] - before[k]).abs().max() for k in found if found[k].is_floating_point()) > 1e-6


@each
def test_fewer_things_are_given(kind, config):
    """Numbers for all lifetimes, no episode cut off: None passes."""
    given = case(build(kind, config))
    data = {k: v for k, v in given.data.items() if not k.startswith("hyper/")} | {"final_obs": None}
    data |= prefixed("hyper", NUMBERS)
    values = spread(given.component)
    stacked = Case(substituted(given.component, values, True), data).outputs()
    for p in range(P):
        rows = {k: v for k, v in data.items() if isinstance(v, torch.Tensor)}
        alone = Case(with_weights(given.component, row(values, p)), data | select(rows, [p])).outputs()
        close(select(stacked, [p]), alone, **EXACT)


@each
def test_minibatches_too(kind, config):
    """[P, T * B] as [T, P, B]."""
    if kind.slot not in ("objective", "auxiliary"):
        assert not hasattr(kind, "loss")
        return
    given = case(build(kind, config))
    component = substituted(given.component, spread(given.component), True)
    found, d = Case(component, given.data).outputs(), given.data
    rows = {k: flatten_time(v) for k, v in d.items() if k in ("action", "log_prob")}
    rows |= {k.removeprefix("batch/"): flatten_time(v) for k, v in found.items() if k.startswith("batch/")}
    loss = component.loss(given.agents(flatten_time(d["obs"][:-1])), rows, Hyper(**given.branch("hyper")))
    assert_close(loss[0] if isinstance(loss, tuple) else loss, found["loss"], **EXACT)


def test_continuous_actions():
    net, g = build(LPG, EVERYTHING), torch.Generator().manual_seed(0)
    values = spread(net)

    def normal(*shape):
        return torch.randn(T, P, B, *shape, generator=g, dtype=torch.float64)

    low, high = torch.full((2,), -1.0, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    policy = SquashedGaussian(normal(2), 0.1 * normal(2), low, high)
    out = AgentOutput(policy, None, {"prediction": normal(net.config.predictions)})
    batch = {"action": normal(2), "log_prob": normal(), "pi_hat": normal()}
    batch["y_hat"] = normal(net.config.predictions).softmax(-1)
    loss, _ = substituted(net, values, True).loss(out, batch, Hyper())
    assert_close(loss, net.loss(out, batch, Hyper())[0], **EXACT)


@pytest.mark.parametrize("part", ["weight_x", "weight_h", "bias"])
@pytest.mark.parametrize("kind", CORE_KINDS)
def test_a_core_of_which_only_a_part_differs(kind, part):
    """One core over P sets of one of its weights, on the same sequences."""
    core = CORE_KINDS[kind](4, 5).double()
    x, reset = torch.randn(T, 4, B, dtype=torch.float64), torch.rand(T, B) < 0.3
    values = leaves({part: spread(core)[part]})
    hidden = torch.vmap(lambda v: functional_call(core, v, (x, reset)))(values)
    alone = torch.stack([functional_call(core, row(values, p), (x, reset)) for p in range(P)])
    assert_close(hidden, alone, **EXACT)
    used = [*values.values(), *(p for k, p in core.named_parameters() if k != part)]
    grads = [torch.autograd.grad(h.square().sum(), used) for h in (hidden, alone)]
    assert_close(*grads, **EXACT)


class RemembersALearnedNumber(Reward):
    """Its memory begins at a parameter."""

    name, Config = "remembers", NoConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.start = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))

    def initial_memory(self, lifetimes):
        return {"level": self.start.expand(lifetimes)}

    def forward(self, trajectory, context):
        return trajectory.reward + context.memory["level"][:, None], dict(context.memory)


def test_what_a_fresh_lifetime_carries_may_be_learned():
    component, values = RemembersALearnedNumber(), {"start": torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)}
    one = substituted(component, row(values, 1), False)
    assert one.initial_memory(4)["level"].tolist() == [2.0] * 4
    each = substituted(component, values, True)
    assert each.initial_memory(3)["level"].tolist() == [1.0, 2.0, 3.0]
    memory = each.initial_memory(3)
    rollout = experience.trajectory(experience.SPACES["mlp"], 0, T, P, B)
    reward, _ = each(rollout, Context(torch.zeros(P), torch.ones(P), memory))
    assert_close(reward, rollout.reward + values["start"])


@pytest.mark.parametrize("rate", [0.1, torch.tensor(0.1), torch.full((1, 1), 0.1), torch.full((P, 1), 0.1)], ids=str)
def test_step_sizes_of_an_update_rule(rate):
    rule, g = build(examples.LearnedStep, None), torch.Generator().manual_seed(0)
    theta, grad = torch.randn(2, P, 4, generator=g, dtype=torch.float64)
    values = spread(rule)
    each = substituted(rule, values, True)
    state = each.initial_state(theta)
    for _ in range(2):
        step, state = each.update(grad, state, theta, rate)
    decay = values["decay"].sigmoid()
    assert_close(step, -0.1 * (1 + decay) * grad, rtol=1e-6, atol=0)


# --- what it is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stacked", [False, True])
@few
def test_it_fits_the_same_slot_and_holds_no_parameters(kind, config, stacked):
    component = build(kind, config)
    component.provenance = {"trained": "somewhere"}
    values = spread(component) if stacked else own(component)
    other = substituted(component, values, stacked)
    base = next(c for c in kind.__mro__ if "slot" in vars(c))
    assert isinstance(other, base) and isinstance(other, Component) and other is not component
    for name in ("slot", "name", "contract", "config", "provenance", *vars(base)):
        if not name.startswith("_") and not callable(expected := getattr(component, name)):
            assert getattr(other, name) == expected, name
    assert other.heads(experience.Discrete(3)) == component.heads(experience.Discrete(3))
    if base.slot == "objective":
        assert other.settings(True) == component.settings(True) != {}
    assert not list(other.parameters()) and not other.state_dict()
    close(other.initial_memory(P), component.initial_memory(P), 0, 0)
    other.to(torch.float32)
    assert {p.dtype for p in component.parameters()} == {torch.float64}
    slots = Slots.fill(PPOConfig(), **{base.slot: other})
    assert getattr(slots, base.slot) is other


def test_without_parameters_there_is_nothing_to_substitute():
    idle = [kind(kind.Config()) for kind in KINDS.values()]
    idle = [component for component in idle if not list(component.parameters())]
    assert len(idle) >= 7
    for component in idle:
        assert substituted(component, {}, True) is component
        with pytest.raises(UserError, match="unknown parameter"):
            substituted(component, {"weight": torch.zeros(1)}, False)


@pytest.mark.parametrize(
    ("values", "stacked", "message"),
    [
        ({"scale": torch.ones(1)}, False, "parameter shift of component 'running_reward' is missing.*\\[1\\]"),
        ({"scale": torch.ones(1), "shift": torch.ones(2)}, False, "shift .* is \\[2\\]: expected shape \\[1\\]"),
        ({"scale": torch.ones(1), "shift": torch.ones(1)}, True, "scale .* is \\[1\\]: expected shape \\[1, 1\\]"),
        ({"scale": torch.ones(3, 1), "shift": torch.ones(2, 1)}, True, "shift .* is \\[2, 1\\]: .* \\[3, 1\\]"),
        ({"scale": torch.ones(()), "shift": torch.ones(2, 1)}, True, "scale .* is \\[\\]: expected shape \\['P', 1\\]"),
        ({"scale": torch.ones(1), "shfit": torch.ones(1)}, False, "'shfit'.* is 'shift'"),
    ],
)
def test_values_that_do_not_fit_are_refused(values, stacked, message):
    with pytest.raises(UserError, match=message):
        substituted(examples.RunningReward(), values, stacked)


def test_another_number_of_lifetimes_is_refused():
    each = substituted(component := build(examples.RunningReward, None), spread(component), True)
    rollout = experience.trajectory(experience.SPACES["mlp"], 0, T, P + 1, B)
    with pytest.raises(UserError, match="4 lifetimes were given: expected 3"):
        each.initial_memory(P + 1)
    with pytest.raises(UserError, match="4 lifetimes were given: expected 3"):
        each(rollout, Context(torch.zeros(P), torch.ones(P), each.initial_memory(P)))


class ForgetsTheLifetimeAxis(examples.RunningReward):
    def forward(self, trajectory, context):
        return super().forward(trajectory, context)[0], {"mean": trajectory.reward.mean()}


def test_an_answer_without_lifetimes_is_refused():
    each = substituted(component := build(ForgetsTheLifetimeAxis, None), spread(component), True)
    with pytest.raises(UserError, match="'running_reward' says \\[\\] of one lifetime: expected size 1 on axis 0"):
        case_of(each).outputs()


def case_of(component):
    return Case(component, case(build(examples.RunningReward, None)).data)


# --- derivatives --------------------------------------------------------------------------------------------------


def judged(given, found, theta, order=range(P)):
    """[P] a random number of what it makes of each lifetime: the agents' gradient, step, reward, numbers, memory."""
    if "loss" in found:
        (grad,) = torch.autograd.grad(found["loss"].sum(), theta, create_graph=True)
        found = {"loss": found["loss"], "grad": grad} | {k: v for k, v in found.items() if k.startswith("memory")}
    total, g = 0.0, torch.Generator().manual_seed(5)
    for name in sorted(found):
        axis = 1 if name.startswith(("batch", "reward")) else 0
        x = found[name].movedim(axis, 0)
        x = x.reshape(len(x), -1)
        noise = torch.randn(P, x.shape[1], generator=g, dtype=torch.float64)
        total = total + (x * noise[list(order)]).sum(1)
    return total


def gradients(component, values, data, stacked, order=range(P)):
    theta = data["theta"].clone().requires_grad_()
    given = Case(substituted(component, values, stacked), data)
    total = judged(given, given.outputs(theta), theta, order).sum()
    return torch.autograd.grad(total, [*values.values()], allow_unused=True, materialize_grads=True)


@each
def test_one_backward_pass_has_the_meta_gradient_of_every_lifetime(kind, config):
    component = build(kind, config)
    earlier = case(component, seed=1).outputs()  # the first update of a lifetime says nothing of those before it
    given = case(component).replaced(**detached(kept(earlier)))
    values = leaves(spread(given.component))
    found = gradients(given.component, values, given.data, True)
    for p in range(P):
        alone = gradients(given.component, leaves(row(values, p)), select(given.data, [p]), False, [p])
        for name, ours, expected in zip(values, found, alone, strict=True):
            assert_close(ours[p], expected, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
            assert bool(expected.any()) or (kind, name) in IDLE, name
    shared = own(given.component)
    sums = gradients(given.component, leaves(shared), given.data, False)
    copies = leaves({k: v.expand(P, *v.shape) for k, v in shared.items()})
    assert_close([x.sum(0) for x in gradients(given.component, copies, given.data, True)], [*sums], **EXACT)


def along(values):
    """A random direction."""
    g = torch.Generator().manual_seed(7)
    return {k: torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in values.items()}


def pushed(f, values, direction):
    """The derivative of f(values) along the direction, in forward mode."""
    with forward_ad.dual_level():
        dual = {k: forward_ad.make_dual(v.detach(), direction[k]) for k, v in values.items()}
        return forward_ad.unpack_dual(f(dual)).tangent


@pytest.mark.parametrize("stacked", [False, True])
@each
def test_tangents_equal_gradients(kind, config, stacked):
    given = case(build(kind, config))
    values = leaves(spread(given.component) if stacked else own(given.component))
    direction = along(values)

    def total(values):
        found = Case(substituted(given.component, values, stacked), given.data).outputs()
        return sum(x.sin().sum() for k, x in found.items() if not k.startswith("metrics"))

    grads = torch.autograd.grad(total(values), [*values.values()], allow_unused=True)
    expected = sum((g * d).sum() for g, d in zip(grads, direction.values(), strict=True) if g is not None)
    assert_close(pushed(total, values, direction), expected, rtol=1e-11, atol=1e-12)
    assert expected.abs() > 1e-9


# --- a whole window -----------------------------------------------------------------------------------------------

SETTINGS = PPOConfig(n_envs=B, n_steps=T, n_epochs=2, optimizer="momentum", agent=AgentConfig(hidden=(6,)))
RATES = torch.tensor([[0.05], [0.02], [0.1]], dtype=torch.float64)
HORIZONS = torch.tensor([10.0, 20.0, 40.0])


def window(component, values, stacked, lifetimes=range(P), minibatches=1, inner_type=GraphInner):
    """[P, D] parameters of those lifetimes after two updates."""
    index = list(lifetimes)
    config = dataclasses.replace(SETTINGS, n_minibatches=minibatches)
    slots = Slots.fill(config, **{component.slot: substituted(component, values, stacked)})
    algorithm = Algorithm(config, slots)
    agents = Population(algorithm.make_agent(experience.SPACES["mlp"], ACTIONS), len(index), torch.float64)
    everyone = torch.randn(P, agents.theta.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    agents.theta.data.copy_(0.5 * everyone[index])
    inner = inner_type(agents, slots.optimizer, slots.optimizer.initial_state(agents.theta.detach()))
    memory = algorithm.initial_memory(agents.theta.detach())
    hyper = Hyper(RATES[index], prediction_coef=0.7, aux_coef=2.0)
    for k in range(2):
        rollout = experience.trajectory(experience.SPACES["mlp"], k, T, P, B)
        rollout = dataclasses.replace(rollout, **select(vars(rollout), index))
        context = Context(torch.full((len(index),), float(k)), HORIZONS[index], memory)
        memory = algorithm.update(inner, rollout, context, hyper, torch.Generator().manual_seed(k)).memory
    return inner.theta


def noisy(theta, lifetimes=range(P)):
    """[P] random numbers of the agents."""
    noise = torch.randn(P, theta.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (theta * noise[list(lifetimes)]).sum(1)


@pytest.mark.parametrize("minibatches", [1, 2])
@few
def test_meta_gradients_of_every_lifetime_through_a_window(kind, config, minibatches):
    component = build(kind, config)
    values = leaves(spread(component))
    theta = window(component, values, True, minibatches=minibatches)
    found = torch.autograd.grad(noisy(theta).sum(), [*values.values()])
    for p in range(P):
        alone = leaves(row(values, p))
        end = window(component, alone, False, [p], minibatches)
        assert_close(theta[p : p + 1], end, **EXACT)
        for name, ours, expected in zip(
            values, found, torch.autograd.grad(noisy(end, [p]).sum(), [*alone.values()]), strict=True
        ):
            assert_close(ours[p], expected, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
            assert bool(expected.any()) or (kind, name) in IDLE, name


@few
def test_meta_gradients_of_lifetimes_sum_to_the_shared_one(kind, config):
    component = build(kind, config)
    shared = [*component.parameters()]
    expected = torch.autograd.grad(noisy(window(component, dict(component.named_parameters()), False)).sum(), shared)
    copies = leaves({k: v.expand(P, *v.shape) for k, v in own(component).items()})
    found = torch.autograd.grad(noisy(window(component, copies, True)).sum(), [*copies.values()])
    assert_close([x.sum(0) for x in found], [*expected], **EXACT)


@few
def test_a_population_of_an_evolution_strategy_in_one_call(kind, config):
    component = build(kind, config)
    values = spread(component)
    together = window(component, values, True, inner_type=PlainInner)
    for p in range(P):
        single = with_weights(component, row(values, p))
        assert_close(together[p : p + 1], window(single, own(single), False, [p], inner_type=PlainInner), **EXACT)


@pytest.mark.parametrize("stacked", [False, True])
@few
def test_tangents_equal_gradients_through_a_window(kind, config, stacked):
    """Forward over reverse, through what is read from the agents too."""
    component = build(kind, config)
    values = leaves(spread(component) if stacked else own(component))
    direction = along(values)

    def f(values):
        return noisy(window(component, values, stacked)).sum()

    grads = torch.autograd.grad(f(values), [*values.values()])
    expected = sum((g * d).sum() for g, d in zip(grads, direction.values(), strict=True))
    assert_close(pushed(f, values, direction), expected, rtol=1e-9, atol=1e-12)
