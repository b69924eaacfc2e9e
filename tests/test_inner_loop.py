"""The differentiable inner loop: meta-gradients against differences, windows, memory, and what we ask of `higher`."""

import dataclasses
import gc
import importlib.metadata

import experience
import higher
import pytest
import torch
from torch.testing import assert_close

from learned_rl.component import Auxiliary, Hyper, Hyperparameters, NoConfig, lifetime_mean
from learned_rl.defaults import PPOClip
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.tasks.bandits import BanditFamily
from learned_rl.update_rules import RULES, SGD, AdamConfig, ClippedAdamConfig, RMSPropConfig
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from meta_optimizers.truncated import TruncatedConfig
from objectives.lpg import LPG

K, P = 3, 2


class Held:
    """Mixed into an objective: `prepare` reads what theta said at the base point, whatever theta is now.

    So a difference quotient sees what a meta-gradient with detached inputs sees.
    """

    def hold(self):
        self.recorded, self.replaying = [], False

    def replay(self):
        self.replaying, self.position = True, 0

    def prepare(self, trajectory, out, next_value, hyper, context):
        if self.replaying:
            out, next_value = self.recorded[self.position]
            self.position += 1
        else:
            self.recorded.append((out.detach(), None if next_value is None else next_value.detach()))
        return super().prepare(trajectory, out, next_value, hyper, context)


class HeldLPG(Held, LPG):
    pass


class HeldPPO(Held, PPOClip):
    pass


class LearnedNumbers(Hyperparameters):
    """Five numbers of the update, each a function of age and of the lifetime's mean reward."""

    name, Config = "learned_numbers", NoConfig

    def __init__(self, rate):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.tensor([1.5, 1.0, -1.0, -2.0, rate], dtype=torch.float64))
        self.slope = torch.nn.Parameter(torch.linspace(-0.5, 0.5, 5, dtype=torch.float64))

    def forward(self, base, trajectory, context):
        seen = (lifetime_mean(trajectory.reward) + context.progress)[:, None]
        gamma, gae_lambda, clip, ent_coef, rate = torch.sigmoid(self.bias + self.slope * seen).split(1, 1)
        numbers = base.replace(
            gamma=gamma, gae_lambda=gae_lambda, clip_range=clip, ent_coef=ent_coef, learning_rate=rate
        )
        return numbers, {}


def unrolled(agents, config, slots, updates=K, inner_type=GraphInner):
    """The inner loop after `updates` updates on fixed experience (frozen actions)."""
    algorithm, rule = Algorithm(config, slots), slots.optimizer
    inner = inner_type(agents, rule, rule.initial_state(agents.theta.detach()))
    generator = torch.Generator().manual_seed(5)
    space = next(s for k, s in experience.SPACES.items() if k == _kind(agents))
    for k in range(updates):
        context = experience.context(len(agents.theta), age=k)
        algorithm.update(inner, experience.trajectory(space, seed=k), context, config.hyper, generator)
    return inner


def _kind(agents):
    return {0: "tabular", 1: "mlp", 3: "conv"}[agents.agent.obs_dim]


def meta_loss(agents, config, slots):
    """A made-up judgement of the agents after K updates: policy gradient, entropy and the extra outputs."""
    inner = unrolled(agents, config, slots)
    outer = experience.trajectory(experience.SPACES[_kind(agents)], seed=99)
    out = inner.agent(outer.obs[:-1])
    loss = lifetime_mean(out.policy.log_prob(outer.action) * outer.reward) - 0.1 * lifetime_mean(out.policy.entropy())
    extra = [*out.heads.values()] + ([] if out.value is None else [out.value])
    return loss.mean() + 0.1 * sum(x.square().mean() for x in extra)


def check_against_differences(component, evaluate, step=1e-6, tolerance=1e-5):
    """The gradient of `evaluate()` in the component's parameters, along random directions and coordinates."""
    eta = list(component.parameters())
    grads = torch.autograd.grad(evaluate(), eta)
    assert all(bool((g != 0).any()) for g in grads), "a meta-parameter without gradient"
    flat = torch.cat([g.flatten() for g in grads])
    base = torch.nn.utils.parameters_to_vector(eta).detach()
    g = torch.Generator().manual_seed(3)
    directions = [torch.randn(len(base), generator=g, dtype=base.dtype) for _ in range(4)]
    strongest = flat.abs().topk(3).indices
    directions += [torch.nn.functional.one_hot(i, len(base)).to(base) for i in strongest]
    with torch.no_grad():
        for d in directions:
            sides = []
            for sign in (1, -1):
                torch.nn.utils.vector_to_parameters(base + sign * step * d, eta)
                with torch.enable_grad():
                    sides.append(evaluate().item())
            torch.nn.utils.vector_to_parameters(base, eta)
            difference, exact = (sides[0] - sides[1]) / (2 * step), float(flat @ d)
            assert difference == pytest.approx(exact, rel=tolerance), (difference, exact)


def smooth(rule):
    """The rule with an eps so large that a step is no cliff where a gradient passes zero, as differences need it."""
    configs = {"adam": AdamConfig(eps=1e-3), "rmsprop": RMSPropConfig(eps=1e-3)}
    configs["clipped_adam"] = ClippedAdamConfig(eps=1e-3, stop_denominator=False)
    return RULES[rule](configs.get(rule))


def lpg_case(kind, core, rule, stop, held=True):
    torch.manual_seed(4)
    cls = HeldLPG if held else LPG
    objective = cls(predictions=4, width=5, core=core, embedding=8, stop_inputs=stop).double()
    hyper = Hyper(learning_rate={"adam": 0.05, "rmsprop": 0.01}.get(rule, 0.5), prediction_coef=0.7, max_grad_norm=0.3)
    config = PPOConfig(n_envs=3, n_steps=5, n_epochs=1, n_minibatches=1, optimizer=rule, hyper=hyper)
    slots = Slots.fill(config, objective=objective, optimizer=smooth(rule))
    agents = experience.population(kind, {"prediction": 4})
    return agents, config, slots


RULE_NAMES = ["sgd", "momentum", "rmsprop", "adam", "clipped_adam"]


@pytest.mark.parametrize("core", ["gru", "lstm"])
@pytest.mark.parametrize("kind", ["tabular", "mlp"])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_true_meta_gradient_through_lpg(rule, kind, core):
    agents, config, slots = lpg_case(kind, core, rule, stop=False, held=False)
    check_against_differences(slots.objective, lambda: meta_loss(agents, config, slots))


@pytest.mark.parametrize("core", ["gru", "lstm"])
@pytest.mark.parametrize("kind", ["tabular", "mlp"])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_meta_gradient_with_stopped_inputs(rule, kind, core):
    agents, config, slots = lpg_case(kind, core, rule, stop=True)
    slots.objective.hold()
    meta_loss(agents, config, slots)

    def evaluate():
        slots.objective.replay()
        return meta_loss(agents, config, slots)

    check_against_differences(slots.objective, evaluate)


@pytest.mark.parametrize("inner_type", [PlainInner, GraphInner])
@pytest.mark.parametrize("epochs", [1, 2])
def test_inner_updates_do_not_depend_on_whether_inputs_are_stopped(inner_type, epochs):
    """What the objective reads from the agent is a constant of the inner gradient in either case."""
    thetas = []
    for stop in (True, False):
        agents, config, slots = lpg_case("mlp", "gru", "sgd", stop=stop, held=False)
        config = dataclasses.replace(config, n_epochs=epochs)
        thetas.append(unrolled(agents, config, slots, inner_type=inner_type).theta.detach())
    assert_close(*thetas, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("rule", RULE_NAMES)
def test_meta_gradient_of_hyperparameters_through_ppo(rule, minibatches):
    numbers, objective = LearnedNumbers(rate={"adam": -3.0, "rmsprop": -4.5}.get(rule, -1.0)), HeldPPO()
    hyper = Hyper(max_grad_norm=0.4)
    config = PPOConfig(n_envs=3, n_steps=5, n_epochs=2, n_minibatches=minibatches, optimizer=rule, hyper=hyper)
    slots = Slots.fill(config, hyperparameters=numbers, objective=objective, optimizer=smooth(rule))
    agents = experience.population("mlp", value=True)
    objective.hold()
    meta_loss(agents, config, slots)

    def evaluate():
        objective.replay()
        return meta_loss(agents, config, slots)

    check_against_differences(numbers, evaluate)


@pytest.mark.parametrize("rule", RULE_NAMES)
@pytest.mark.parametrize("kind", ["tabular", "mlp", "conv"])
def test_plain_and_graph_updates_agree(kind, rule):
    thetas = []
    for inner_type in (PlainInner, GraphInner):
        config = PPOConfig(n_envs=3, n_steps=5, n_epochs=2, n_minibatches=2, optimizer=rule)
        agents = experience.population(kind, value=True)
        thetas.append(unrolled(agents, config, Slots.fill(config), inner_type=inner_type).theta.detach())
    assert_close(*thetas, rtol=1e-12, atol=1e-13)
    assert not torch.equal(thetas[0], experience.population(kind, value=True).theta)


class LeakyAuxiliary(Auxiliary):
    """Its target is the agents' own output, which it does not detach."""

    name, Config = "leaky", NoConfig

    def heads(self, action_space):
        return {"guess": 1}

    def prepare(self, trajectory, out, next_heads, hyper, context):
        return {"target": out.policy.log_prob(trajectory.action.new_zeros(out.policy.logits.shape[:-1]))[:-1]}

    def loss(self, out, batch, hyper):
        return lifetime_mean((out.heads["guess"].squeeze(-1) - batch["target"]).square())


@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize("linked", [False, True])
def test_targets_of_an_auxiliary_are_constants_of_the_inner_gradient(linked, minibatches):
    """Plain and in a window, whether or not the objective lets the outer gradient through its inputs."""
    thetas = {}
    for case in ("plain", "graph", "without"):
        torch.manual_seed(4)
        objective = LPG(predictions=4, width=5, stop_inputs=not linked).double()
        hyper = Hyper(learning_rate=0.5, aux_coef=0.0 if case == "without" else 1.0, max_grad_norm=float("inf"))
        config = PPOConfig(3, 5, n_epochs=2, n_minibatches=minibatches, optimizer="sgd", hyper=hyper)
        slots = Slots.fill(config, objective=objective, auxiliary=LeakyAuxiliary())
        agents = experience.population("tabular", {"prediction": 4, "guess": 1})
        inner = unrolled(agents, config, slots, inner_type=GraphInner if case == "graph" else PlainInner)
        thetas[case] = inner.theta.detach().unflatten(1, (experience.STATES, -1))
    assert_close(thetas["plain"], thetas["graph"], rtol=1e-12, atol=1e-13)
    guess = slice(-1, None)  # the last column of a table
    assert (thetas["plain"] - thetas["without"])[..., guess].abs().max() > 1e-3
    assert_close(thetas["plain"][..., :-1], thetas["without"][..., :-1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_two_windows_equal_one_plain_run(rule):
    family, thetas, states = BanditFamily("bernoulli-5"), [], []
    trajectories = [experience.trajectory(family.observation_space, seed=k, actions=5) for k in range(4)]
    for windows in (False, True):
        torch.manual_seed(0)
        config = PPOConfig(n_envs=3, n_steps=5, n_epochs=1, n_minibatches=1, optimizer=rule)
        slots = Slots.fill(config, objective=LPG(predictions=4, width=5).double())
        lifetimes = Lifetimes(family, Algorithm(config, slots), P, 10, seed=0, dtype=torch.float64)
        for pair in (trajectories[:2], trajectories[2:]):
            inner = lifetimes.window() if windows else lifetimes.plain()
            for tr in pair:
                lifetimes.advance(inner, tr)
            if windows:
                lifetimes.commit(inner)
        thetas.append(lifetimes.population.theta.detach())
        states.append(lifetimes.optimizer_state)
        assert not any(v.requires_grad for v in lifetimes.optimizer_state.values())
        assert lifetimes.age.tolist() == [4, 4]
    assert_close(*thetas, rtol=1e-12, atol=1e-13)
    assert_close(*states, rtol=1e-12, atol=1e-13)
    assert bool((thetas[0] != 0).any())


def test_a_window_leaves_the_population_until_it_is_committed():
    agents, config, slots = lpg_case("mlp", "gru", "adam", stop=True, held=False)
    before = agents.theta.detach().clone()
    inner = unrolled(agents, config, slots)
    assert len(inner._fast._fast_params) == 1  # older versions live only where the graph needs them
    assert torch.equal(agents.theta, before)
    theta, state = inner.carry()
    assert torch.equal(theta, inner.theta) and not torch.equal(theta, before)
    assert not theta.requires_grad and not any(v.requires_grad for v in state.values())


def live_tensors():
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def _tiny_trainer():
    torch.manual_seed(0)
    agent = PPOConfig(n_envs=2, n_steps=3, n_epochs=1, n_minibatches=1, optimizer="adam")
    config = MetaTrainConfig(lifetimes=2, horizon=1000, agent=agent, estimator=TruncatedConfig(window=2))
    return MetaTrainer(BanditFamily("bernoulli-5"), LPG(predictions=3, width=4), config)


@pytest.mark.parametrize("collect", [True, False], ids=["collected", "uncollected"])
def test_memory_is_flat_over_windows(collect):
    """Also without Python's cycle collector: a window's graph must go when the window goes."""
    trainer, counts = _tiny_trainer(), {}
    for step in range(1, 61):
        trainer.step()
        if step in (5, 60):
            if collect or step == 5:
                gc.collect()
            counts[step] = live_tensors()
        if step == 5 and not collect:
            gc.disable()
    gc.enable()
    assert counts[5] == counts[60]


# --- what we ask of `higher` -------------------------------------------------------------------------------------


def test_higher_is_the_version_whose_private_parts_we_use():
    assert importlib.metadata.version("higher") == "0.2.1"


def test_a_patched_module_keeps_its_parameters_where_we_look():
    module = torch.nn.Linear(2, 1)
    fast = higher.monkeypatch(module, copy_initial_weights=True)
    assert isinstance(fast._fast_params, list) and len(fast._fast_params) == 1
    assert fast.fast_params is fast._fast_params[-1]
    assert fast.fast_params[0] is not module.weight and torch.equal(fast.fast_params[0], module.weight)
    fast.update_params([p * 2 for p in fast.fast_params])
    assert len(fast._fast_params) == 2  # it grows by one version a step: the reason why we delete
    del fast._fast_params[:-1]
    x = torch.ones(1, 2)
    assert_close(fast(x), 2 * module(x))


def test_a_differentiable_optimizer_calls_update_as_we_expect():
    seen = {}

    class Doubling(higher.optim.DifferentiableOptimizer):
        def _update(self, grouped_grads, **kwargs):
            ((grad,),) = grouped_grads
            (group,) = self.param_groups
            seen.update(grad=grad, theta=group["params"][0])
            group["params"][0] = group["params"][0] - 2 * grad

    module = torch.nn.Linear(2, 1, bias=False)
    fast = higher.monkeypatch(module, copy_initial_weights=True)
    optimizer = Doubling(torch.optim.SGD(module.parameters(), lr=1.0), module.parameters(), fmodel=fast)
    begin = fast.fast_params[0]
    optimizer.step(fast(torch.ones(1, 2)).square().sum())
    assert seen["theta"] is begin
    assert seen["grad"].requires_grad, "the inner gradient must keep its graph"
    assert_close(fast.fast_params[0], begin - 2 * seen["grad"])
    assert torch.autograd.grad(fast.fast_params[0].sum(), begin)[0].shape == begin.shape


def test_rules_named_in_the_configuration_are_those_tested_here():
    assert set(RULE_NAMES) == set(RULES) and RULES["sgd"] is SGD
