"""What every registered component owes to the algorithm. Registering a component is what puts it under these tests.

Each runs on its default settings, on small ones, and on each alternative of a flag or choice. Random data in float64;
the axes along which lifetimes and copies lie are written down once, in `AXES`.
"""

from __future__ import annotations

import copy
import dataclasses
import typing
from dataclasses import dataclass

import example_components as examples
import experience
import pytest
import torch
from gymnasium.spaces import Discrete
from probes import ProbeFamily
from torch import Tensor
from torch.testing import assert_close

from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.agents import AgentConfig, Population, make_agent
from learned_rl.component import Component, Context, Hyper
from learned_rl.layout import StepContext
from learned_rl.ppo import Algorithm, Slots
from learned_rl.registry import components, make_family
from learned_rl.trajectory import Trajectory, flatten_time
from learned_rl.types import UserError
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from meta_optimizers.truncated import TruncatedConfig
from objectives.bijectors import NUMBERS as LEARNABLE
from objectives.contextual import Contextual, ContextualConfig
from objectives.disco import Disco
from objectives.schedule import Schedule, ScheduleConfig
from objectives.self_tuned import SelfTuned, SelfTunedConfig
from objectives.stacx import STACX

T, P, B = 6, 3, 4
ACTIONS = Discrete(experience.ACTIONS)
AGENT = AgentConfig(kind="mlp", hidden=(6,))
NUMBERS = {"learning_rate": 0.01, "gamma": 0.9, "gae_lambda": 0.8, "clip_range": 0.2, "ent_coef": 0.1} | {
    "pg_coef": 0.8,
    "vf_coef": 0.5,
    "prediction_coef": 0.7,
    "vtrace_alpha": 0.6,
}


# --- which components, with which settings ------------------------------------------------------------------------

#: Settings of components that do nothing as they come, and of what one flag alone does not turn on.
MORE = {
    Schedule: {"three pieces": ScheduleConfig((0.1, 0.18), {"gamma": (0.9, 0.8, 0.7), "ent_coef": (0.1, 0.0, 1.0)})},
    SelfTuned: {
        "every number": SelfTunedConfig(tuple(k for k in LEARNABLE if k != "clip_range_vf"), {"gamma": (0.5, 1.0)}),
        "every layer": SelfTunedConfig(("learning_rate",), per_layer=True),
    },
    Contextual: {"two numbers": ContextualConfig(("ent_coef", "gamma"), {"gamma": (0.5, 1.0)}, hidden=(5, 4))},
}

#: What flags ask for other settings; `MORE` has both.
ASK_FOR_MORE = ("per_layer",)

#: What does not plug into some environments, and what it says there.
REFUSED = {
    (STACX, "continuous"): "'stacx' needs Discrete actions",
    (Disco, "continuous"): "'disco103' needs discrete actions",
}


#: Weights without a meta-gradient: a constant that is added to all logits changes no policy. The published file has it.
IDLE = {(Disco, "policy_head.bias")}


def refusal(component: Component, env: str) -> str | None:
    """What it says to an environment into which it does not plug."""
    told = getattr(component, "conditions", ())
    return "A tabular agent cannot be told" if told and env == "tabular" else REFUSED.get((type(component), env))


def variants(kind: type[Component]) -> dict[str, typing.Any]:
    """Settings by name: as they come, small, and small with each flag turned and each other choice taken."""
    default = kind.Config()
    hints = typing.get_type_hints(kind.Config)
    values = {f.name: getattr(default, f.name) for f in dataclasses.fields(default)}
    sizes = {k: min(v, 5) for k, v in values.items() if isinstance(v, int) and not isinstance(v, bool)}
    small = dataclasses.replace(default, **sizes)
    found = {"default": default, "small": small}
    for name, value in values.items():
        if name in ASK_FOR_MORE:
            continue
        choices = (not value,) if isinstance(value, bool) else typing.get_args(hints[name])
        if isinstance(value, bool) or typing.get_origin(hints[name]) is typing.Literal:
            found |= {f"{name}={x}": dataclasses.replace(small, **{name: x}) for x in choices if x != value}
    return found | MORE.get(kind, {})


def build(kind: type[Component], config: typing.Any, seed: int = 0) -> Component:
    """Fresh, in float64, of the size that the agents ask for."""
    torch.manual_seed(seed)
    component = kind(config)
    agent = make_agent(AGENT, experience.SPACES["mlp"], ACTIONS, component.heads(ACTIONS))
    component.fit(experience.SPACES["mlp"], ACTIONS, agent.layers)
    if component.slot == "optimizer":
        component.fit_layout(agent.layout)
    return awake(component).double()


def awake(component: Component) -> Component:
    """With other weights if all are zero at first, as evolution wants it: what does nothing has no gradient either."""
    if getattr(component.config, "start", None) == "zero":
        for weight in component.parameters():
            weight.data.copy_(0.1 * torch.randn(weight.shape))
    return component


GPU = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

KINDS = components() | examples.EXAMPLES
ALL = [
    pytest.param(kind, config, id=f"{name}-{variant}")
    for name, kind in KINDS.items()
    for variant, config in variants(kind).items()
]
every = pytest.mark.parametrize(("kind", "config"), ALL)
learned = pytest.mark.parametrize(("kind", "config"), [p for p in ALL if list(build(*p.values).parameters())])


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """The examples too have files."""
    monkeypatch.setattr(artifacts, "components", lambda: KINDS)


# --- what they are asked ------------------------------------------------------------------------------------------

#: name, or the part before its slash -> (axis of lifetimes, axis of copies); outputs and inputs alike.
AXES = {
    name: (1, 2)
    for name in ("obs", "action", "log_prob", "reward", "terminated", "truncated", "final_obs", "logits", "follows")
}
AXES |= {name: (1, 2) for name in ("next_value", "batch")}
AXES |= {name: (0, None) for name in ("theta", "grad", "age", "horizon", "hyper", "memory", "state", "loss", "step")}
AXES |= {"activity": (0, None), "noise": (0, None)}
AXES |= {"metrics": (0, None), "regulariser": (0, None)}


def select(tensors: dict[str, Tensor], index: list[int], copies: bool = False) -> dict[str, Tensor]:
    """Every tensor with its lifetimes (or its copies) in the order of `index`."""
    at = torch.tensor(index)
    axis = {k: AXES[k.partition("/")[0]][copies] for k in tensors}
    return {k: v if axis[k] is None else v.index_select(axis[k], at) for k, v in tensors.items()}


@dataclass
class Case:
    """Experience, parameters and numbers of P agents, as a flat tree of tensors."""

    component: Component
    data: dict[str, Tensor]

    def replaced(self, **data: Tensor) -> Case:
        return Case(self.component, self.data | data)

    @property
    def agents(self) -> Population:
        objective = self.component.slot == "objective"
        value = self.component.needs_value if objective else True
        space = experience.SPACES["mlp"]
        agent = make_agent(AGENT, space, ACTIONS, self.component.heads(ACTIONS), value)
        theta = self.data.get("theta")
        lifetimes, dtype = (P, torch.float64) if theta is None else (len(theta), theta.dtype)
        population = Population(agent, lifetimes, dtype)
        if theta is not None:
            population.to(theta.device).theta.data.copy_(theta)
        return population

    def branch(self, name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}/"): v for k, v in self.data.items() if k.startswith(f"{name}/")}

    def outputs(self, theta: Tensor | None = None, acted: Tensor | None = None) -> dict[str, Tensor]:
        """All that the component says; `theta` may carry a graph. Targets are those of the parameters that `acted`, the
        same ones unless given."""
        d, c = self.data, self.component
        hyper = Hyper(**self.branch("hyper"))
        if c.slot == "optimizer":
            known = StepContext(self.agents.layout, d["age"] / d["horizon"], 0.5, d["activity"], d["noise"])
            step, state = c.update(d["grad"], self.branch("state"), d["theta"], hyper.learning_rate, known)
            return {"step": step} | prefixed("state", state)
        rollout = Trajectory(**{f.name: d[f.name] for f in dataclasses.fields(Trajectory)})
        context = Context(d["age"], d["horizon"], self.branch("memory"))
        if c.slot == "reward":
            reward, memory = c(rollout, context)
            return {"reward": reward} | prefixed("memory", memory)
        if c.slot == "hyperparameters":
            numbers, memory = c(hyper, rollout, context)
            return prefixed("hyper", {k: v for k, v in vars(numbers).items() if isinstance(v, Tensor)}) | prefixed(
                "memory", memory
            )
        population = self.agents
        out = population.bind(population.theta if theta is None else theta)(rollout.obs)
        seen = out.detach() if acted is None else population.bind(acted)(rollout.obs).detach()
        if getattr(c, "target_rate", None) is not None:  # another agent will do
            seen = dataclasses.replace(seen, target=population.bind(population.theta.detach().flip(1))(rollout.obs))
        if c.slot == "auxiliary":
            final = lambda k: lambda obs: population(obs).heads[k].detach()  # noqa: E731
            next_heads = {k: rollout.next_value(v.detach(), final(k)) for k, v in out.heads.items()}
            batch = c.prepare(rollout, seen, next_heads, hyper, context)
            rows = {"action": rollout.action, "log_prob": rollout.log_prob} | batch
            return prefixed("batch", batch) | {"loss": c.loss(out.map(lambda x: x[:-1]), rows, hyper)}
        batch, memory = c.prepare(rollout, seen, d["next_value"], hyper, context)
        rows = {"action": rollout.action, "log_prob": rollout.log_prob} | batch
        now = out.map(lambda x: x[:-1])
        loss, metrics = c.loss(now, rows, hyper)
        found = prefixed("batch", batch) | prefixed("memory", memory) | {"loss": loss} | prefixed("metrics", metrics)
        terms = c.agent_regularisers(now, rows["action"]) | c.target_regularisers(rows)
        assert set(terms) == set(c.regularisers)
        return found | prefixed("regulariser", terms)


def prefixed(name: str, tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}/{k}": v for k, v in tree.items()}


def case(component: Component, seed: int = 0) -> Case:
    """Random data for it."""
    g = torch.Generator().manual_seed(seed)
    rollout = experience.trajectory(experience.SPACES["mlp"], seed, T, P, B)
    data = {f.name: getattr(rollout, f.name) for f in dataclasses.fields(rollout)}

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    data["next_value"] = normal(T, P, B)
    data |= {"age": torch.tensor([0.0, 3.0, 7.0]), "horizon": torch.tensor([10.0, 20.0, 40.0])}
    spread = torch.linspace(0.9, 1.1, P, dtype=torch.float64)[:, None]
    data |= prefixed("hyper", {k: v * spread for k, v in NUMBERS.items()})
    data |= prefixed("memory", {k: to(v, torch.float64) for k, v in component.initial_memory(P).items()})
    data["theta"] = 0.5 * normal(*Case(component, {}).agents.theta.shape)
    if component.slot == "optimizer":
        data |= {name: normal(*data["theta"].shape) for name in ("grad", "noise")}
        data["activity"] = data["theta"].abs()
        _, state = component.update(data["grad"] + 1, component.initial_state(data["theta"]), data["theta"], 0.01)
        data |= prefixed("state", detached(state))  # in the middle of a lifetime
    return Case(component, data)


def to(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def detached(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in tree.items()}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-9, atol: float = 1e-12) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


# --- the suite ----------------------------------------------------------------------------------------------------


@every
def test_shapes_and_types(kind, config):
    given = case(build(kind, config))
    found = given.outputs()
    assert {"loss", "step", "reward"} & set(found) or kind.slot == "hyperparameters"
    for name, value in found.items():
        branch = name.partition("/")[0]
        leading = {"batch": (T, P, B), "reward": (T, P, B), "loss": (P,), "metrics": (P,), "regulariser": (P,)}
        expected = leading.get(branch, (P,))
        assert value.shape[: len(expected)] == expected, name
        assert branch in ("batch", "memory", "state", "step", "hyper") or value.shape == expected, name
        assert not value.is_floating_point() or value.dtype == torch.float64, name
        assert bool(value.isfinite().all()), name
        assert not (branch == "metrics" and value.requires_grad), name
    assert ("metrics/approx_kl" in found) == getattr(kind, "reports_kl", False)
    if kind.slot == "optimizer":
        assert found["step"].shape == given.data["theta"].shape
        assert bool((found["step"] != 0).any())
    if kind.slot == "hyperparameters":
        assert {k for k in found if k.startswith("hyper/")} >= {k for k in given.data if k.startswith("hyper/")}


@every
def test_memory_keeps_its_structure(kind, config):
    component = build(kind, config)
    before = case(component)
    rounds = [before.data, before.outputs()]
    rounds.append(before.replaced(**detached(kept(rounds[1]))).outputs())
    shapes = [{k: (v.shape, v.dtype) for k, v in kept(tree).items()} for tree in rounds]
    assert shapes[0] == shapes[1] == shapes[2]
    for name, value in component.initial_memory(2).items():
        assert len(value) == 2 and torch.equal(value[0], value[1]), name  # a fresh lifetime is like any other


def there(tree: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    return {k: v.to(device) for k, v in tree.items()}


def kept(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in tree.items() if k.startswith(("memory/", "state/"))}


@every
def test_the_same_question_has_the_same_answer(kind, config):
    """No hidden state, no hidden randomness, nothing changed in place."""
    given = case(build(kind, config))
    copies = {k: v.clone() for k, v in given.data.items()}
    weights = {k: v.clone() for k, v in given.component.state_dict().items()}
    first = given.outputs()
    close(given.outputs(), first, 0, 0)
    close(given.data, copies, 0, 0)
    close(given.component.state_dict(), weights, 0, 0)


def meta_gradient(given: Case) -> tuple[Tensor, ...]:
    """d/d eta of a random function of what the component makes of the agents: their gradient, step, reward, numbers.

    Two updates of which nothing is judged come before, since some weights act through what a component remembers alone.
    """
    device = given.data["theta"].device
    for seed in (1, 2):
        drawn = case(copy.deepcopy(given.component).cpu(), seed).data
        earlier = Case(given.component, there(drawn, device)).replaced(**kept(given.data))
        given = given.replaced(**kept(earlier.outputs()))
    theta = given.data["theta"].clone().requires_grad_(True)
    found = given.outputs(theta)
    if "loss" in found:
        (judged,) = torch.autograd.grad(found["loss"].sum(), theta, create_graph=True)
        parts = [judged]
    else:
        parts = [v for k, v in found.items() if k.startswith(("step", "reward", "hyper/")) and v.requires_grad]
    g = torch.Generator().manual_seed(5)
    noise = [torch.randn(x.shape, generator=g, dtype=torch.float64).to(x) for x in parts]
    value = sum((x * n).sum() for x, n in zip(parts, noise, strict=True))
    return torch.autograd.grad(value, list(given.component.parameters()), allow_unused=True)


@learned
def test_every_weight_has_a_meta_gradient(kind, config):
    """At the latest after a first step: until then some wait behind a layer that starts at zero."""
    component = build(kind, config)
    given = case(component)
    weights = dict(component.named_parameters())
    waiting = set(weights)
    for _ in range(2):
        for (name, weight), grad in zip(weights.items(), meta_gradient(given), strict=True):
            if (kind, name) in IDLE:
                waiting.discard(name)
                continue
            assert grad is not None, f"nothing depends on {name}"
            assert bool(grad.isfinite().all()), f"the gradient of {name} is not finite"
            if grad.abs().max() > 1e-10:  # or what rounding leaves of zero
                waiting.discard(name)
            weight.data += 0.1 * grad.sign()
    assert not waiting, f"the gradient of {sorted(waiting)} is zero"


@every
def test_the_loss_has_a_gradient_for_the_agents(kind, config):
    given = case(build(kind, config))
    theta = given.data["theta"].clone().requires_grad_(True)
    found = given.outputs(theta)
    if "loss" not in found:
        assert kind.slot in ("optimizer", "reward", "hyperparameters")
        return
    for p in range(P):
        (grad,) = torch.autograd.grad(found["loss"][p], theta, retain_graph=True)
        assert bool(grad.isfinite().all()) and bool((grad[p] != 0).any())
        assert not bool(grad[[q for q in range(P) if q != p]].any()), "a lifetime's loss depends on another's weights"


@every
def test_lifetimes_are_treated_alike(kind, config):
    given, order = case(build(kind, config)), [2, 0, 1]
    moved = Case(given.component, select(given.data, order))
    close(moved.outputs(), select(given.outputs(), order))


@every
def test_lifetimes_are_treated_apart(kind, config):
    given = case(build(kind, config))
    mixed = {}
    for name, value in case(given.component, seed=1).data.items():
        first = torch.arange(P) == 0
        axis = AXES[name.partition("/")[0]][0]
        shape = [-1 if i == axis else 1 for i in range(value.dim())]
        mixed[name] = torch.where(first.view(shape), value, given.data[name])
    before, after = given.outputs(), Case(given.component, mixed).outputs()
    close(select(after, [1, 2]), select(before, [1, 2]))
    main = next(k for k in ("loss", "step", "reward", *before) if k in before)
    if kind.slot != "hyperparameters":
        assert not torch.equal(select(after, [0])[main], select(before, [0])[main])


@every
def test_one_lifetime_equals_many(kind, config):
    given = case(build(kind, config))
    many = given.outputs()
    for p in range(P):
        close(Case(given.component, select(given.data, [p])).outputs(), select(many, [p]))


@every
def test_the_order_of_copies_does_not_matter(kind, config):
    given, order = case(build(kind, config)), [3, 1, 0, 2]
    moved = Case(given.component, select(given.data, order, copies=True))
    close(moved.outputs(), select(given.outputs(), order, copies=True))


@every
def test_a_loss_reads_rollouts_and_minibatches_alike(kind, config):
    """[T, P, B] and the same rows as [P, T * B]."""
    component = build(kind, config)
    if kind.slot not in ("objective", "auxiliary"):
        assert not hasattr(component, "loss")
        return
    if getattr(kind, "whole_rollouts", False):  # refused when an algorithm is made: see tests/test_dice.py
        assert PPOConfig(**component.settings(tabular=True)).n_minibatches == 1
        return
    given = case(component)
    found, agents, d = given.outputs(), given.agents, given.data
    rows = {k: flatten_time(v) for k, v in d.items() if k in ("action", "log_prob")}
    rows |= {k.removeprefix("batch/"): flatten_time(v) for k, v in found.items() if k.startswith("batch/")}
    loss = component.loss(agents(flatten_time(d["obs"][:-1])), rows, Hyper(**given.branch("hyper")))
    assert_close(loss[0] if isinstance(loss, tuple) else loss, found["loss"], rtol=1e-9, atol=1e-12)


@every
def test_numbers_may_be_plain_floats(kind, config):
    given = case(build(kind, config))
    rows = {k: torch.full_like(v, NUMBERS[k.removeprefix("hyper/")]) for k, v in given.data.items() if "hyper/" in k}
    floats = Case(given.component, {k: v for k, v in given.data.items() if k not in rows})
    floats.data |= {f"hyper/{k}": v for k, v in NUMBERS.items()}
    found, expected = floats.outputs(), given.replaced(**rows).outputs()
    if kind.slot != "hyperparameters":
        close(found, expected)


@every
def test_it_reads_the_numbers_that_it_says(kind, config):
    """The agents' gradient depends on these and no others."""
    if kind.slot not in ("objective", "auxiliary"):
        assert not hasattr(kind, "reads")
        return
    given = case(build(kind, config))
    theta = given.data["theta"].requires_grad_(True)

    def gradient(**numbers):
        hyper = {f"hyper/{k}": torch.full((P, 1), v, dtype=torch.float64) for k, v in (NUMBERS | numbers).items()}
        loss = given.replaced(**hyper).outputs(theta, acted=0.9 * theta.detach())["loss"]
        return torch.autograd.grad(loss.sum(), theta)[0]

    usual = gradient()
    changed = {k: 0.9 * v for k, v in NUMBERS.items()} | {"clip_range_vf": 0.1, "max_grad_norm": 0.1, "aux_coef": 0.1}
    read = {k for k, v in changed.items() if not torch.equal(gradient(**{k: v}), usual)}
    assert read == set(given.component.reads)


@every
def test_single_and_double_precision_agree(kind, config):
    given = case(build(kind, config))
    double = given.outputs()
    single = Case(given.component.float(), {k: to(v, torch.float32) for k, v in given.data.items()}).outputs()
    for value in single.values():
        assert not value.is_floating_point() or value.dtype == torch.float32
    close({k: to(v, torch.float64) for k, v in single.items()}, double, rtol=1e-3, atol=1e-5)


@every
def test_saved_and_loaded_it_says_the_same(kind, config, tmp_path):
    given = case(build(kind, config))
    with torch.no_grad():
        for p in given.component.parameters():  # not what a fresh one starts from
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    artifacts.save(given.component, tmp_path / "x.safetensors")
    loaded = artifacts.load(tmp_path / "x.safetensors")
    assert loaded.config == given.component.config
    close(Case(loaded.to(torch.float64), given.data).outputs(), given.outputs(), 0, 0)


@every
def test_agents_have_the_heads_it_asks_for(kind, config):
    component = build(kind, config)
    config = PPOConfig(n_minibatches=1)
    algorithm = Algorithm(config, Slots.fill(config, **{kind.slot: component}))
    asked = component.heads(ACTIONS)
    for env, observations in experience.SPACES.items():
        if refusal(component, env):
            continue
        agent = algorithm.make_agent(observations, ACTIONS)
        obs = experience.observations(observations, P, B, generator=torch.Generator(), dtype=torch.float32)
        out = Population(agent, P)(obs)
        shapes = {k: shape if isinstance(shape, tuple) else (shape,) for k, shape in asked.items()}
        assert {k: v.shape for k, v in out.heads.items()} == {k: (P, B, *shape) for k, shape in shapes.items()}
        assert (out.value is not None) == getattr(component, "needs_value", True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("env", ["discrete", "tabular", "continuous"])
@every
def test_it_plugs_into_ppo(kind, config, env, device):
    """Two seeds, two updates: everything stays finite, and every seed moves."""
    families = {
        "discrete": lambda: ProbeFamily("both", as_numbers=True),
        "tabular": lambda: ProbeFamily("both"),
        "continuous": lambda: make_family("control/pendulum"),
    }
    parts = 1 if getattr(kind, "whole_rollouts", False) else 2
    small, hyper = AgentConfig(hidden=(8,)), Hyper(ent_coef=0.01)  # no weight is zero, which could not be learned
    settings = PPOConfig(n_envs=2, n_steps=8, n_epochs=2, n_minibatches=parts, hyper=hyper, agent=small)
    torch.manual_seed(0)
    component = awake(kind(config))
    if refused := refusal(component, env):
        with pytest.raises(UserError, match=refused):
            PPO(families[env](), settings, seeds=2, device=device, **{kind.slot: component})
        return
    agent = PPO(families[env](), settings, seeds=2, device=device, **{kind.slot: component})
    lifetimes = agent.lifetimes
    theta, memory = lifetimes.population.theta.clone(), {k: v.shape for k, v in lifetimes.memory.items()}
    agent.learn(2 * 16, lambda steps, metrics: None)
    assert bool(lifetimes.population.theta.isfinite().all())
    assert bool((lifetimes.population.theta != theta).any(1).all())
    assert {k: v.shape for k, v in lifetimes.memory.items()} == memory


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@learned
def test_it_is_meta_trained_on_a_gpu(kind, config, device="cuda"):
    parts, hyper = 1 if getattr(kind, "whole_rollouts", False) else 2, Hyper(ent_coef=0.01)
    agent = PPOConfig(n_envs=2, n_steps=8, n_minibatches=parts, hyper=hyper, agent=AgentConfig(hidden=(8,)))
    torch.manual_seed(0)
    trained = MetaTrainConfig(lifetimes=2, horizon=8, agent=agent, estimator=TruncatedConfig(window=4))
    trainer = MetaTrainer(make_family("catch/5x5"), awake(kind(config)), trained, device=device)
    before = {k: v.detach().clone() for k, v in trainer.problem.parameters.items()}
    trainer.step()
    after = trainer.problem.parameters
    assert all(v.device.type == device and bool(v.isfinite().all()) for v in after.values())
    assert any(bool((after[k] != before[k]).any()) for k in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@every
def test_gpu_and_cpu_agree(kind, config):
    given = case(build(kind, config))
    cpu = given.outputs()
    grads = meta_gradient(given) if list(given.component.parameters()) else ()
    moved = Case(given.component.cuda(), there(given.data, "cuda"))
    close(there(moved.outputs(), "cpu"), cpu, rtol=1e-6, atol=1e-9)
    if grads:
        for found, expected in zip(meta_gradient(moved), grads, strict=True):
            assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-9)


# --- the suite itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("test", "spoilt"),
    [
        (test_shapes_and_types, examples.IsNeverFinite),
        (test_shapes_and_types, examples.DropsANumber),
        (test_memory_keeps_its_structure, examples.ForgetsItsMemory),
        (test_the_same_question_has_the_same_answer, examples.IsRandom),
        (test_the_same_question_has_the_same_answer, examples.WritesInPlace),
        (test_every_weight_has_a_meta_gradient, examples.HasAnIdleWeight),
        (test_the_loss_has_a_gradient_for_the_agents, examples.ReadsOtherAgents),
        (test_lifetimes_are_treated_alike, examples.PrefersTheFirstLifetime),
        (test_lifetimes_are_treated_apart, examples.MixesLifetimes),
        (test_one_lifetime_equals_many, examples.MixesLifetimes),
        (test_the_order_of_copies_does_not_matter, examples.PrefersTheFirstCopy),
        (test_a_loss_reads_rollouts_and_minibatches_alike, examples.SumsInsteadOfAveraging),
        (test_single_and_double_precision_agree, examples.Single),
    ],
)
def test_the_suite_notices(test, spoilt):
    with pytest.raises(AssertionError):
        test(spoilt, spoilt.Config())


def test_the_suite_notices_what_is_not_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "components", lambda: {examples.HidesAWeight.name: examples.HidesAWeight})
    with pytest.raises(AssertionError):
        test_saved_and_loaded_it_says_the_same(examples.HidesAWeight, examples.HidesAWeight.Config(), tmp_path)


def test_the_suite_notices_a_missing_head():
    with pytest.raises(KeyError, match="reward"):
        test_it_plugs_into_ppo(examples.ForgetsAHead, examples.ForgetsAHead.Config(), "tabular", "cpu")
