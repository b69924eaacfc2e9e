"""Architectures: P agents in one tensor equal P agents one by one, in every output and gradient."""

import dataclasses
import json

import experience
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from torch import nn
from torch.testing import assert_close

from learned_rl.agents import AgentConfig, ModuleAgent, Population, make_agent
from learned_rl.architecture import PolicyHead
from learned_rl.distributions import Categorical, ClippedGaussian, SquashedGaussian
from learned_rl.ppo import PPOConfig
from learned_rl.types import UserError

P, N = 3, 4
EXACT = {"rtol": 1e-10, "atol": 1e-12}
HEADS = {"guess": 2, "other": 5}
CONTINUOUS = Box(np.array([-1.0, 0.0], dtype=np.float32), np.array([2.0, 1.0], dtype=np.float32))
CASES = {
    "tabular": (AgentConfig("tabular"), experience.SPACES["tabular"]),
    "mlp": (AgentConfig("mlp", hidden=(6, 5)), experience.SPACES["mlp"]),
    "mlp-shared": (AgentConfig("mlp", hidden=(6, 5), shared=True, activation="relu"), experience.SPACES["mlp"]),
    "mlp-linear": (AgentConfig("mlp", hidden=()), experience.SPACES["mlp"]),
    "mlp-flattens": (AgentConfig("mlp", hidden=(4,)), Box(0.0, 1.0, (2, 3))),
    "conv": (AgentConfig("conv", hidden=(6,), channels=3, activation="relu"), experience.SPACES["conv"]),
    "tabular-bins": (AgentConfig("tabular", value_support=2), experience.SPACES["tabular"]),
    "mlp-bins": (AgentConfig("mlp", hidden=(6, 5), value_support=3), experience.SPACES["mlp"]),
    "conv-bins": (AgentConfig("conv", hidden=(6,), channels=3, value_support=2), experience.SPACES["conv"]),
}
EACH = pytest.mark.parametrize("case", CASES)


def build(case, actions=None, heads=HEADS, value=True, lifetimes=P, gaussian="squashed"):
    config, space = CASES[case]
    config = AgentConfig(**{**vars(config), "gaussian": gaussian})
    agent = make_agent(config, space, actions or Discrete(3), heads, value)
    population = Population(agent, lifetimes, torch.float64)
    g = torch.Generator().manual_seed(1)
    population.theta.data.copy_(0.5 * torch.randn(population.theta.shape, generator=g, dtype=torch.float64))
    return population, experience.observations(space, 5, lifetimes, N, generator=g)


def tensors(out):
    """All tensors of an output by name."""
    named = {f"policy{i}": x for i, x in enumerate(out.policy.params)} | out.heads
    said = {"value": out.value, "bins": out.bins}
    return named | {k: x for k, x in said.items() if x is not None}


@pytest.mark.parametrize("actions", [Discrete(3), CONTINUOUS], ids=["discrete", "continuous"])
@EACH
def test_agents_together_equal_agents_alone(case, actions):
    together, obs = build(case, actions)
    out = tensors(together(obs))
    (grad,) = torch.autograd.grad(sum(x.sin().sum() for x in out.values()), together.theta)
    assert (grad != 0).any(1).all()
    for p in range(P):
        alone, _ = build(case, actions, lifetimes=1)
        alone.theta.data.copy_(together.theta[p : p + 1])
        own = tensors(alone(obs[:, p : p + 1]))
        assert own.keys() == out.keys()
        for name in out:
            assert_close(own[name][:, 0], out[name][:, p], **EXACT)
        (own_grad,) = torch.autograd.grad(sum(x.sin().sum() for x in own.values()), alone.theta)
        assert_close(own_grad[0], grad[p], **EXACT)


@EACH
def test_shapes_with_and_without_time(case):
    population, obs = build(case)
    out = population(obs)
    assert out.policy.logits.shape == (5, P, N, 3) and out.value.shape == (5, P, N)
    assert {k: v.shape for k, v in out.heads.items()} == {"guess": (5, P, N, 2), "other": (5, P, N, 5)}
    whole = tensors(out)
    for t in range(5):
        row = tensors(population(obs[t]))
        for name in whole:
            assert_close(row[name], whole[name][t], **EXACT)


@EACH
def test_the_policy_alone_is_the_policy_of_the_whole(case):
    population, obs = build(case)
    whole, alone = population(obs), population.bind(population.theta, policy_only=True)(obs)
    assert_close(alone.policy.logits, whole.policy.logits, **EXACT)


@EACH
def test_an_agent_without_a_value_head(case):
    population, obs = build(case, value=False)
    out = population(obs)
    assert out.value is None and out.policy.logits.shape == (5, P, N, 3) and set(out.heads) == set(HEADS)
    assert population.theta.shape[1] < build(case)[0].theta.shape[1]


@EACH
def test_an_agent_that_only_values(case):
    """As the outer critic is: every parameter counts."""
    config, space = CASES[case]
    population = Population(make_agent(config, space, None, value=True), P, torch.float64)
    g = torch.Generator().manual_seed(0)
    population.theta.data.copy_(torch.randn(population.theta.shape, generator=g, dtype=torch.float64))
    out = population(experience.observations(space, 50, P, N, generator=g))
    assert out.value.shape == (50, P, N)
    (grad,) = torch.autograd.grad(out.value.square().sum(), population.theta)
    used = (grad != 0).double().mean()
    assert used == 1 if CASES[case][0].activation == "tanh" else used > 0.5


@EACH
def test_heads_are_apart(case):
    """No head shares output weights with another: the gradient of one misses the last layer of the others."""
    population, obs = build(case)
    out = tensors(population(obs))
    for name in out:
        (grad,) = torch.autograd.grad(out[name].sum(), population.theta, retain_graph=True)
        last = population.weights(grad)
        if case.startswith("tabular"):
            columns = [3, 2, 5, population.agent.value]
            sizes = dict(zip(["policy0", *HEADS, "value"], last["table"].split(columns, -1), strict=True))
        else:
            layers = {"policy0": "policy", "value": "value"} | {k: f"head_{k}" for k in HEADS}
            sizes = {k: last[f"{layer}.bias"] for k, layer in layers.items()}
        assert {k for k, g in sizes.items() if g.any()} == {"value" if name == "bins" else name}


# --- against torch's own modules ----------------------------------------------------------------------------------


def test_tabular_is_a_lookup():
    population, obs = build("tabular")
    out, table = population(obs), population.theta.view(P, experience.STATES, -1)
    for p in range(P):
        assert_close(out.policy.logits[:, p], table[p, obs[:, p], :3], **EXACT)
        assert_close(out.value[:, p], table[p, obs[:, p], -1], **EXACT)


def test_mlp_equals_linear_layers():
    population, obs = build("mlp")
    out, w = population(obs), population.weights(population.theta)
    for p in range(P):
        linear = lambda name, x, p=p: nn.functional.linear(x, w[f"{name}.weight"][p].T, w[f"{name}.bias"][p])  # noqa: E731
        x = linear("trunk1", linear("trunk0", obs[:, p]).tanh()).tanh()
        y = linear("value_trunk1", linear("value_trunk0", obs[:, p]).tanh()).tanh()
        assert_close(out.policy.logits[:, p], linear("policy", x), **EXACT)
        assert_close(out.heads["guess"][:, p], linear("head_guess", x), **EXACT)
        assert_close(out.value[:, p], linear("value", y).squeeze(-1), **EXACT)


def test_conv_equals_conv2d():
    population, obs = build("conv")
    out, w = population(obs), population.weights(population.theta)
    for p in range(P):
        planes = nn.functional.conv2d(obs[:, p].flatten(0, 1), w["conv.weight"][p], w["conv.bias"][p]).relu()
        x = (planes.flatten(1) @ w["trunk0.weight"][p] + w["trunk0.bias"][p]).relu()
        logits = x @ w["policy.weight"][p] + w["policy.bias"][p]
        value = x @ w["value.weight"][p] + w["value.bias"][p]
        assert_close(out.policy.logits[:, p].flatten(0, 1), logits, **EXACT)
        assert_close(out.value[:, p].flatten(), value.flatten(), **EXACT)


class Net(nn.Module):
    """A module as a user would bring it, with a normalisation layer and a buffer."""

    def __init__(self):
        super().__init__()
        self.body, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.policy, self.value, self.guess = nn.Linear(4, 3), nn.Linear(4, 1), nn.Linear(4, 2)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, obs):
        x = torch.tanh(self.norm(self.body(obs * self.scale)))
        return {"policy": self.policy(x), "value": self.value(x), "guess": self.guess(x)}


def test_a_module_as_an_agent_equals_the_module():
    module = Net().double()
    agent = ModuleAgent(module, PolicyHead(Discrete(3)), obs_dim=1, heads={"guess": 2})
    population = Population(agent, P, torch.float64)
    for p in range(P):
        population.theta.data[p] = population.initial(torch.Generator().manual_seed(p))
    obs = torch.randn(5, P, N, 3, dtype=torch.float64)
    out = population(obs)
    (grad,) = torch.autograd.grad(out.policy.logits.square().sum() + out.value.square().sum(), population.theta)
    for p in range(P):
        nn.utils.vector_to_parameters(population.theta[p].detach().clone(), module.parameters())
        own = module(obs[:, p])
        assert_close(own["policy"], out.policy.logits[:, p], **EXACT)
        assert_close(own["value"].squeeze(-1), out.value[:, p], **EXACT)
        assert_close(own["guess"], out.heads["guess"][:, p], **EXACT)
        loss = own["policy"].square().sum() + own["value"].square().sum()
        gradient = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True, materialize_grads=True)
        assert_close(torch.cat([g.flatten() for g in gradient]), grad[p], **EXACT)


def test_a_module_draws_its_weights_from_the_given_stream():
    agent = ModuleAgent(Net(), PolicyHead(Discrete(3)), obs_dim=1)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    draws = [agent.initial(torch.Generator().manual_seed(s))["body.weight"] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert torch.equal(torch.rand(1), expected)  # torch's global stream stays where it was


# --- weights ------------------------------------------------------------------------------------------------------


def test_initial_weights_are_orthogonal_with_small_policies():
    config, space = AgentConfig("mlp", hidden=(16, 8)), Box(-1.0, 1.0, (5,))
    agent = make_agent(config, space, Discrete(3))
    w = agent.initial(torch.Generator().manual_seed(0))
    gram = w["trunk0.weight"] @ w["trunk0.weight"].T
    assert_close(gram, 2 * torch.eye(5), rtol=0, atol=1e-5)
    gram = w["trunk1.weight"].T @ w["trunk1.weight"]
    assert_close(gram, 2 * torch.eye(8), rtol=0, atol=1e-5)
    assert_close(w["policy.weight"].T @ w["policy.weight"], 1e-4 * torch.eye(3), rtol=0, atol=1e-8)
    assert all(not v.any() for k, v in w.items() if k.endswith("bias"))


@EACH
def test_rows_and_weights_are_the_same_numbers(case):
    population, _ = build(case)
    row = population.initial(torch.Generator().manual_seed(3))
    fresh = population.agent.initial(torch.Generator().manual_seed(3))
    population.theta.data[1] = row
    w = population.weights(population.theta)
    assert list(w) == list(population.agent.shapes)
    for name, shape in population.agent.shapes.items():
        assert w[name].shape == (P, *shape)
        assert torch.equal(w[name][1], fresh[name].double())


# --- actions and mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gaussian", "kind"), [("squashed", SquashedGaussian), ("clipped", ClippedGaussian)])
def test_continuous_actions(gaussian, kind):
    population, obs = build("mlp", CONTINUOUS, gaussian=gaussian)
    policy = population(obs).policy
    assert type(policy) is kind
    assert policy.mean.shape == policy.log_std.shape == (5, P, N, 2)
    assert_close(policy.log_std, population.weights(population.theta)["log_std"][:, None].expand(5, P, N, 2))
    action = policy.sample(torch.Generator().manual_seed(0))
    assert policy.log_prob(action).shape == (5, P, N)
    env_action = policy.to_env(10 * action)
    low, high = torch.tensor([-1.0, 0.0]).double(), torch.tensor([2.0, 1.0]).double()
    assert (env_action >= low).all() and (env_action <= high).all()


def test_automatic_choice_of_the_architecture():
    kinds = [
        Discrete(4),
        Box(0.0, 1.0, (3,)),
        Box(0.0, 1.0, (2, 5, 5)),
        Box(0.0, 1.0, (3, 3)),
        Box(0.0, 1.0, (2, 2, 2)),
    ]
    names = [type(make_agent(AgentConfig(), space, Discrete(2))).__name__ for space in kinds]
    assert names == ["TabularAgent", "MLPAgent", "ConvAgent", "MLPAgent", "MLPAgent"]
    assert isinstance(PolicyHead(Discrete(2))(torch.zeros(1, 2), None), Categorical)


@pytest.mark.parametrize(
    ("config", "observations", "actions", "message"),
    [
        (AgentConfig("tabular"), Box(0.0, 1.0, (3,)), Discrete(2), "kind 'tabular' does not take"),
        (AgentConfig("mlp"), Discrete(3), Discrete(2), "kind 'mlp' does not take"),
        (AgentConfig("conv"), Box(0.0, 1.0, (3,)), Discrete(2), "kind 'conv' does not take"),
        (AgentConfig("conv"), Box(0.0, 1.0, (1, 2, 9)), Discrete(2), "does not fit planes of 2x9"),
        (AgentConfig(), Dict({"a": Discrete(2)}), Discrete(2), "does not take observations of Dict"),
        (AgentConfig(), Discrete(3), MultiBinary(3), "Action space MultiBinary.* expected Discrete"),
        (AgentConfig(), Discrete(3), Box(0.0, 1.0, (2, 2)), "one-dimensional Box"),
        (AgentConfig(), Discrete(3), Box(-np.inf, np.inf, (2,)), "finite action bounds.*'clipped'"),
    ],
)
def test_spaces_that_do_not_fit_are_refused(config, observations, actions, message):
    with pytest.raises(UserError, match=message):
        make_agent(config, observations, actions)


def test_the_fast_tanh_of_large_batches_is_tanh():
    from learned_rl.activations import LARGE, tanh

    x = torch.linspace(-9, 9, LARGE, requires_grad=True)
    (fast,) = torch.autograd.grad(tanh(x).sum(), x, create_graph=True)
    (slow,) = torch.autograd.grad(torch.tanh(x).sum(), x, create_graph=True)
    torch.testing.assert_close(tanh(x), torch.tanh(x), rtol=0, atol=3e-7)
    torch.testing.assert_close(fast, slow, rtol=0, atol=6e-7)  # 1 - y^2: twice the error of y
    twice = [torch.autograd.grad(g.sum(), x)[0] for g in (fast, slow)]
    torch.testing.assert_close(*twice, rtol=0, atol=2e-6)  # -2 y (1 - y^2)


# --- a model that looks one action ahead --------------------------------------------------------------------------

AHEAD = {"y": 4, "z": (3, 4), "q": (3, 5), "grid": (2, 3)}  # z and q speak of each of three actions


def ahead(space=None, heads=AHEAD, value=True, lifetimes=P, **settings):
    """Agents with a model of each action in float64, whose weights are all random."""
    config = AgentConfig("action_conditional", **{"hidden": (6, 5), "model": 4, "head_hidden": (7,)} | settings)
    space = space or experience.SPACES["mlp"]
    population = Population(make_agent(config, space, Discrete(3), heads, value), lifetimes, torch.float64)
    g = torch.Generator().manual_seed(1)
    population.theta.data.copy_(0.5 * torch.randn(population.theta.shape, generator=g, dtype=torch.float64))
    return population, experience.observations(space, 5, lifetimes, N, generator=g)


def of_one_state(w, x, activation):
    """What one agent says of one observation, by torch's own layers: one LSTM step for each action."""
    linear = lambda name, x: nn.functional.linear(x, w[f"{name}.weight"].T, w[f"{name}.bias"])  # noqa: E731
    state = linear("torso1", activation(linear("torso0", x)))
    said = {"policy0": linear("policy", state), "y": linear("head_y", state), "value": linear("value", state)[0]}
    said["grid"] = linear("head_grid", state).view(2, 3)
    root, rows = linear("root", state), {"z": [], "q": []}
    order = torch.cat([torch.arange(4) + 4 * "igfo".index(gate) for gate in "ifgo"])  # ours -> torch's
    cell = nn.LSTMCell(3, 4, dtype=torch.float64)
    for name, part in zip(("ih", "hh"), w["model.weight"].split([3, 4]), strict=True):
        getattr(cell, f"weight_{name}").data = part.T[order]
    cell.bias_ih.data = (w["model.bias"] + torch.tensor([0.0] * 8 + [1.0] * 4 + [0.0] * 4))[order]
    cell.bias_hh.data.zero_()
    for action in range(3):
        led, _ = cell(nn.functional.one_hot(torch.tensor(action), 3).double(), (root.tanh(), root))
        for name, row in rows.items():
            row.append(linear(f"head_{name}1", activation(linear(f"head_{name}0", led))))
    return said | {name: torch.stack(row) for name, row in rows.items()}


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("space", [Box(0.0, 1.0, (1, 3, 2)), Discrete(4)], ids=["planes", "discrete"])
def test_an_action_conditional_agent_equals_torch_state_by_state(space, activation):
    population, obs = ahead(space, activation=activation)
    out, w = tensors(population(obs)), population.weights(population.theta.detach())
    seen = nn.functional.one_hot(obs, 4).double() if isinstance(space, Discrete) else obs.flatten(3)
    assert set(out) == {"policy0", "value", *AHEAD} and out["z"].shape == (5, P, N, 3, 4)
    for p in range(P):
        own = {k: v[p] for k, v in w.items()}
        for t in range(5):
            for b in range(N):
                for name, value in of_one_state(own, seen[t, p, b], getattr(torch, activation)).items():
                    assert_close(out[name][t, p, b], value, **EXACT, msg=lambda m, name=name: f"{name}: {m}")


def test_action_conditional_agents_together_equal_agents_alone():
    together, obs = ahead()
    out = tensors(together(obs))
    (grad,) = torch.autograd.grad(sum(x.sin().sum() for x in out.values()), together.theta)
    for p in range(P):
        alone, _ = ahead(lifetimes=1)
        alone.theta.data.copy_(together.theta[p : p + 1])
        own = tensors(alone(obs[:, p : p + 1]))
        assert_close({k: v[:, 0] for k, v in own.items()}, {k: v[:, p] for k, v in out.items()}, **EXACT)
        (own_grad,) = torch.autograd.grad(sum(x.sin().sum() for x in own.values()), alone.theta)
        assert_close(own_grad[0], grad[p], **EXACT)
    row = tensors(together(obs[2]))  # without time
    assert_close(row, {k: v[2] for k, v in out.items()}, **EXACT)


def test_heads_of_the_model_are_those_that_begin_with_the_number_of_actions():
    agent = ahead()[0].agent
    assert agent.ahead == ["z", "q"] and "head_grid.weight" in agent.shapes
    assert agent.shapes["head_q1.weight"] == (7, 5) and agent.shapes["model.weight"] == (3 + 4, 4 * 4)
    plain = ahead(heads={"y": 4, "as many": 3})[0].agent  # a head of one number for each action is of the state
    assert not plain.ahead and not any(k.startswith(("root", "model")) for k in plain.shapes)


@pytest.mark.parametrize("config", [AgentConfig("mlp"), AgentConfig("tabular"), AgentConfig("conv", channels=2)])
def test_heads_of_any_shape_are_linear_ones_reshaped(config):
    space = experience.SPACES[config.kind]
    flat, shaped = (make_agent(config, space, Discrete(3), heads) for heads in ({"a": 6}, {"a": (3, 2)}))
    assert flat.shapes == shaped.shapes
    g = torch.Generator().manual_seed(0)
    row = torch.randn(1, sum(Population(flat, 1).sizes), generator=g)
    obs = experience.observations(space, 1, N, generator=g, dtype=torch.float32)
    said = [Population(agent, 1).bind(row)(obs).heads["a"] for agent in (flat, shaped)]
    assert said[1].shape == (1, N, 3, 2) and torch.equal(said[0].unflatten(-1, (3, 2)), said[1])


def test_the_policy_alone_of_an_action_conditional_agent():
    population, obs = ahead()
    whole, alone = population(obs), population.bind(population.theta, policy_only=True)(obs)
    assert_close(alone.policy.logits, whole.policy.logits, **EXACT)
    assert alone.value is None and not alone.heads


def test_initial_weights_of_an_action_conditional_agent():
    """Truncated normals, small where policies and values begin; biases are zero."""
    agent = ahead(hidden=(200, 300), model=100, head_hidden=(50,))[0].agent
    w = agent.initial(torch.Generator().manual_seed(0))
    assert all(not v.any() for k, v in w.items() if k.endswith("bias"))
    for name, std in {
        "torso1": 200**-0.5,
        "root": 300**-0.5,
        "model": 103**-0.5,
        "policy": 0.01,
        "head_y": 0.01,
    }.items():
        found = w[f"{name}.weight"]
        assert found.abs().max() <= 2 * std and float(found.std() / (0.88 * std)) == pytest.approx(1, abs=0.1), name


def test_depths_rise_from_the_observation_to_the_heads():
    agent = ahead()[0].agent
    parts = {p.name: p for p in agent.layout.parts}
    assert [p.name for p in agent.layout.parts] == list(agent.shapes)
    depth = lambda name: parts[f"{name}.weight"].depth  # noqa: E731
    for last in ("head_z", "head_q"):
        chain = [depth(x) for x in ("torso0", "torso1", "root", "model", f"{last}0", f"{last}1")]
        assert chain == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert depth("policy") == depth("head_y") == depth("value") == 1
    assert {name for name, part in parts.items() if part.critic} == {"value.weight", "value.bias"}
    assert all(parts[f"{x}.bias"].depth == depth(x) for x in ("torso0", "model", "policy"))
    plain = ahead(heads={"y": 4})[0].agent  # without a model
    assert {p.name: p.depth for p in plain.layout.parts if p.name.endswith("weight")} == {
        "torso0.weight": 0, "torso1.weight": 0.5, "policy.weight": 1, "head_y.weight": 1, "value.weight": 1
    }  # fmt: skip


def test_activity_of_an_action_conditional_agent_is_that_of_its_units():
    """A dead unit of the torso, of the model (all of its gates) and of a head's hidden layer is 0 for what feeds it."""
    population, obs = ahead(activation="relu")
    population.agent.watched = True
    w = population.weights(population.theta.data)
    w["torso0.bias"][:, 1] = w["head_q0.bias"][:, 2] = -1e3
    w["model.bias"][:, 3 * 4 + 3] = -1e3  # the output gate of the model's last unit
    out = population(obs)
    widths = {"torso0": 6, "torso1": 5, "policy": 3, "head_y": 4, "head_grid": 6, "root": 4, "model": 16}
    widths |= {"head_z0": 7, "head_z1": 4, "head_q0": 7, "head_q1": 5}
    assert {k: v.shape for k, v in out.units.items()} == {k: (5, P, N, n) for k, n in widths.items()}
    activity = population.weights(population.activity(out))
    assert not activity["torso0.weight"][:, :, 1].any() and not activity["torso0.bias"][:, 1].any()
    assert not activity["head_q0.weight"][:, :, 2].any() and activity["head_q0.weight"][:, :, :2].any()
    gates = activity["model.weight"].unflatten(-1, (4, 4))
    assert not gates[..., 3].any() and (gates[..., :3] > 0).all() and (gates == gates[:, :1, :1]).all()
    assert_close(activity["torso1.bias"].mean(1), torch.ones(P, dtype=torch.float64), rtol=0, atol=1e-6)
    hidden = out.units["model"][..., :4]
    assert_close(
        activity["model.bias"][:, :4], hidden.mean((0, 2)) / hidden.mean((0, 2, 3))[:, None], rtol=1e-6, atol=0
    )


@pytest.mark.parametrize(
    ("actions", "settings", "conditions", "message"),
    [
        (CONTINUOUS, {}, (), "needs discrete actions and at least one hidden layer"),
        (None, {}, (), "needs discrete actions and at least one hidden layer"),
        (Discrete(3), {"hidden": ()}, (), "needs discrete actions and at least one hidden layer"),
        (Discrete(3), {}, ("gamma", "ent_coef"), "cannot be told gamma, ent_coef: try kind='mlp'"),
    ],
)
def test_what_an_action_conditional_agent_does_not_take_is_refused(actions, settings, conditions, message):
    with pytest.raises(UserError, match=message):
        make_agent(AgentConfig("action_conditional", **settings), Box(0.0, 1.0, (3,)), actions, conditions=conditions)
    with pytest.raises(UserError, match="of kind 'action_conditional' does not take observations of Dict"):
        make_agent(AgentConfig("action_conditional"), Dict({"a": Discrete(2)}), Discrete(2))


def test_widths_of_an_action_conditional_agent_survive_as_plain_values():
    config = PPOConfig(agent=AgentConfig("action_conditional", hidden=(3, 4), model=5, head_hidden=(6, 7)))
    plain = json.loads(json.dumps(dataclasses.asdict(config)).replace("Infinity", '"inf"'))
    assert plain["agent"]["head_hidden"] == [6, 7] and PPOConfig.from_plain(plain) == config
    del plain["agent"]["model"], plain["agent"]["head_hidden"]  # as runs before there were such agents hold it
    assert PPOConfig.from_plain(plain).agent == AgentConfig("action_conditional", hidden=(3, 4))


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match="An agent of kind 'mpl' does not take"):
        make_agent(AgentConfig("mpl"), experience.SPACES["mlp"], experience.SPACES["tabular"])
