"""Architectures: P agents in one tensor equal P agents one by one, in every output and gradient."""

import experience
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from torch import nn
from torch.testing import assert_close

from learned_rl.agents import AgentConfig, ModuleAgent, PolicyHead, Population, make_agent
from learned_rl.distributions import Categorical, ClippedGaussian, SquashedGaussian
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
    return named if out.value is None else named | {"value": out.value}


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
        if case == "tabular":
            sizes = dict(zip(["policy0", *HEADS, "value"], last["table"].split([3, 2, 5, 1], -1), strict=True))
        else:
            sizes = {k: last[f"{'policy' if k == 'policy0' else k if k == 'value' else 'head_' + k}.bias"] for k in out}
        assert {k for k, g in sizes.items() if g.any()} == {name}


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
        (AgentConfig("tabular"), Box(0.0, 1.0, (3,)), Discrete(2), "'tabular' agent does not take"),
        (AgentConfig("mlp"), Discrete(3), Discrete(2), "'mlp' agent does not take"),
        (AgentConfig("conv"), Box(0.0, 1.0, (3,)), Discrete(2), "'conv' agent does not take"),
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
