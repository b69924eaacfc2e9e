"""LIRPG: the learned reward by hand, that a fresh one changes nothing, its meta-gradient, and where episodes end."""

import dataclasses
import math

import experience
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete
from test_inner_loop import HeldPPO, check_against_differences
from torch.nn.functional import one_hot
from torch.testing import assert_close

from experiments.show import show
from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.agents import AgentConfig, Population, make_agent
from learned_rl.component import Hyper
from learned_rl.defaults import PPOClipConfig
from learned_rl.inner_loop import GraphInner
from learned_rl.ppo import Algorithm, Slots
from learned_rl.substitute import substituted
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError
from learned_rl.update_rules import SGD
from objectives.lirpg import LIRPG, LIRPGConfig

T, P, B = 5, 2, 3
ACTIONS = Discrete(experience.ACTIONS)
PAIRS = {
    "tabular": (experience.SPACES["tabular"], ACTIONS),
    "mlp": (experience.SPACES["mlp"], ACTIONS),
    "conv": (experience.SPACES["conv"], ACTIONS),
    "continuous": (experience.SPACES["mlp"], Box(-1.0, 1.0, (2,))),
    "states, continuous": (experience.SPACES["tabular"], Box(-1.0, 1.0, (2,))),
}
each = pytest.mark.parametrize("pair", PAIRS)


def lirpg(pair="mlp", seed=0, **settings):
    """Fitted, in float64, and random unless asked to be neutral."""
    torch.manual_seed(seed)
    reward = LIRPG(LIRPGConfig(**{"hidden": (7, 5), "zero": False} | settings))
    reward.fit(*PAIRS[pair], ())
    return reward.double()


def rollout(pair="mlp", seed=0, dtype=torch.float64):
    space, actions = PAIRS[pair]
    data = experience.trajectory(space, seed, T, P, B, dtype=dtype)
    if isinstance(actions, Discrete):
        return data
    drawn = torch.randn(T, P, B, *actions.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return dataclasses.replace(data, action=2 * drawn)


def paid(reward, trajectory):
    found, memory = reward(trajectory, experience.context(P))
    assert memory == {}
    return found


# --- what it pays -------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(reward, obs, action):
    """tanh f(s, a) of one step, layer by layer."""
    if hasattr(reward, "table"):
        return math.tanh(reward.table[obs, action])
    seen = one_hot(obs, reward.config.observation).double() if obs.dim() == 0 else obs.flatten()
    x = seen if action.dim() == 0 else torch.cat([seen, action])
    first, second, last = (m for m in reward.net if isinstance(m, torch.nn.Linear))
    said = last.weight @ torch.tanh(second.weight @ torch.tanh(first.weight @ x + first.bias) + second.bias) + last.bias
    return math.tanh(said[action] if action.dim() == 0 else said)


@each
def test_the_learned_reward_by_hand(pair):
    reward, tr = lirpg(pair, extrinsic=0.5, scale=0.2), rollout(pair)
    found = paid(reward, tr)
    assert found.shape == (T, P, B)
    for t, p, b in [(0, 0, 0), (1, 1, 2), (T - 1, 1, 1)]:
        expected = 0.5 * tr.reward[t, p, b] + 0.2 * by_hand(reward, tr.obs[t, p, b], tr.action[t, p, b])
        assert found[t, p, b].item() == pytest.approx(float(expected), rel=1e-12)


@each
def test_it_stays_within_its_scale(pair):
    reward, tr = lirpg(pair, extrinsic=0.0, scale=0.3), rollout(pair)
    with torch.no_grad():
        for weight in reward.parameters():
            weight.mul_(1e3)
    found = paid(reward, tr)
    assert 0.29 < found.abs().max().item() <= 0.3


@each
@pytest.mark.parametrize("settings", [{"zero": True, "scale": 3.0}, {"scale": 0.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_neutral_one_pays_what_the_environment_pays(pair, settings, dtype):
    tr = rollout(pair, dtype=dtype)
    assert torch.equal(paid(lirpg(pair, **settings).to(dtype), tr), tr.reward)
    assert not torch.equal(paid(lirpg(pair).to(dtype), tr), tr.reward)


@pytest.mark.parametrize("env", ["grid/small", "control/cartpole", "control/pendulum"])
def test_a_neutral_one_trains_as_without(env):
    """Bit by bit, through epochs and minibatches of several updates; another one trains otherwise."""
    hyper = Hyper(learning_rate=3e-2, clip_range=0.1, ent_coef=0.01)
    config = PPOConfig(n_envs=4, n_steps=16, n_epochs=2, n_minibatches=2, hyper=hyper, agent=AgentConfig(hidden=(8,)))

    def trained(reward):
        return PPO(env, config, reward=reward, seeds=2, seed=3).learn(3 * 64).lifetimes.population.theta

    expected = trained(None)
    assert torch.equal(trained("lirpg"), expected)
    assert not torch.allclose(trained(LIRPG(LIRPGConfig(scale=1.0, zero=False))), expected)


def test_random_weights_have_the_documented_spread():
    torch.manual_seed(0)
    table, net = (
        LIRPG(LIRPGConfig(zero=False, observation=400, action=5)),
        LIRPG(LIRPGConfig(zero=False, observation=(10,), action=(3,))),
    )
    assert table.table.std().item() == pytest.approx(0.5, rel=0.05)
    said = net.intrinsic(torch.randn(2000, 10), torch.randn(2000, 3))
    assert 0.3 < said.std().item() < 0.7
    for layer, gain in zip(net.net[::2], [2, 2, 1], strict=True):
        rows, columns = layer.weight.shape
        w = layer.weight if rows <= columns else layer.weight.T
        assert_close(w @ w.T, gain * torch.eye(len(w)), rtol=0, atol=1e-5)
        assert not layer.bias.any()


def test_numbers_of_any_type_are_observed():
    """Planes of truth values, bytes and single precision: what the parameters' type can hold of them."""
    reward, tr = lirpg("conv"), rollout("conv")
    planes = (tr.obs > 0) * 1.0
    expected = reward.intrinsic(planes[:-1], tr.action)
    for kind in (torch.bool, torch.uint8, torch.float32):
        assert torch.equal(reward.intrinsic(planes[:-1].to(kind), tr.action), expected)


# --- its gradient -------------------------------------------------------------------------------------------------


@each
def test_gradient_of_the_reward_against_differences(pair):
    reward, tr = lirpg(pair, scale=0.5), rollout(pair)
    noise = torch.randn(T, P, B, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    check_against_differences(reward, lambda: (paid(reward, tr) * noise).sum())


@each
@pytest.mark.parametrize("lifetimes", [P, 1])
def test_every_lifetime_may_have_its_own(pair, lifetimes):
    """Stacked parameters under vmap: what as many components of their own pay, and their gradients."""
    tr = rollout(pair)
    tr = dataclasses.replace(tr, **{k: v[:, :lifetimes] for k, v in vars(tr).items()})
    alone = [lirpg(pair, seed, scale=0.5) for seed in range(lifetimes)]
    own = [dict(r.named_parameters()) for r in alone]
    values = {k: torch.stack([w[k].detach() for w in own]).requires_grad_() for k in own[0]}
    context = experience.context(lifetimes)
    found, _ = substituted(alone[0], values, True)(tr, context)
    grads = torch.autograd.grad(found.square().sum(), list(values.values()))
    for p, reward in enumerate(alone):
        one = dataclasses.replace(tr, **{k: v[:, p : p + 1] for k, v in vars(tr).items()})
        expected, _ = reward(one, experience.context(1))
        assert_close(found[:, p : p + 1], expected, rtol=1e-12, atol=1e-14)
        slopes = torch.autograd.grad(expected.square().sum(), list(reward.parameters()))
        assert_close([g[p] for g in grads], list(slopes), rtol=1e-11, atol=1e-13)


ALGORITHMS = {
    "ppo": PPOConfig(n_envs=B, n_steps=T, n_epochs=2, n_minibatches=2),
    "a2c": PPOConfig.a2c(n_envs=B, n_steps=T),
}


def agents_of(pair, config):
    space, actions = PAIRS[pair]
    population = Population(make_agent(config.agent, space, actions), P, torch.float64)
    noise = torch.randn(population.theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    population.theta.data.copy_(0.5 * noise)
    return population


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("pair", ["tabular", "mlp", "continuous"])
def test_gradient_of_the_agents_against_differences(pair, algorithm, updates):
    """New parameters after updates on fixed experience; values that targets are made of are held, being constants."""
    hyper = Hyper(
        learning_rate=0.3, ent_coef=0.01, max_grad_norm=0.3, clip_range=ALGORITHMS[algorithm].hyper.clip_range
    )
    config = dataclasses.replace(ALGORITHMS[algorithm], hyper=hyper, agent=AgentConfig(hidden=(6,)))
    reward, agents = lirpg(pair, scale=0.5), agents_of(pair, config)
    objective = HeldPPO(PPOClipConfig(config.normalize_advantage))
    machine = Algorithm(config, Slots.fill(config, objective=objective, reward=reward, optimizer=SGD()))
    noise = torch.randn(agents.theta.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)

    def judged():
        inner, generator = GraphInner(agents, SGD(), {}), torch.Generator().manual_seed(5)
        for k in range(updates):
            machine.update(inner, rollout(pair, k), experience.context(P, k), hyper, generator)
        return (inner.theta.sin() * noise).sum()

    objective.hold()
    judged()

    def evaluate():
        objective.replay()
        return judged()

    check_against_differences(reward, evaluate)


def fragment(**ends):
    """Five steps of one agent through three states, and how they end: flag -> the steps at which it is true."""
    flags = {k: torch.zeros(T, 1, 1, dtype=torch.bool) for k in ("terminated", "truncated")}
    for name, steps in ends.items():
        flags[name][list(steps)] = True
    states, actions = torch.tensor([0, 2, 1, 0, 2, 1]), torch.tensor([1, 0, 0, 1, 1])
    pay = torch.tensor([0.3, -1.0, 0.5, 0.0, 2.0], dtype=torch.float64)
    final = torch.full((T,), 2) if ends.get("truncated") else None
    return Trajectory(
        obs=states.view(-1, 1, 1),
        action=actions.view(-1, 1, 1),
        log_prob=torch.zeros(T, 1, 1, dtype=torch.float64),
        reward=pay.view(-1, 1, 1),
        final_obs=None if final is None else final.view(-1, 1, 1),
        **flags,
    )


def small(scale=0.4):
    torch.manual_seed(2)
    return LIRPG(LIRPGConfig(scale=scale, zero=False, observation=3, action=2)).double()


def test_the_meta_gradient_is_credit_times_alignment():
    """Plain SGD without a value loss, one step: the formula of the module's docstring, all of it written down."""
    scale, rate, gamma = 0.4, 0.7, 0.9
    reward, tr = small(scale), fragment(terminated=[1])
    agents = Population(make_agent(AgentConfig(), Discrete(3), Discrete(2)), 1, torch.float64)
    table = torch.tensor([[0.2, -0.1, 0.0], [0.5, 0.3, 0.0], [-0.4, 0.1, 0.0]], dtype=torch.float64)  # and values
    agents.theta.data.copy_(table.view(1, -1))
    s, a = tr.obs[:-1].flatten(), tr.action.flatten()
    tr = dataclasses.replace(tr, log_prob=torch.log_softmax(table[:, :2], 1)[s, a].view(-1, 1, 1))
    hyper = Hyper(learning_rate=rate, gamma=gamma, gae_lambda=1.0, clip_range=math.inf, vf_coef=0.0)
    config = PPOConfig.a2c(n_envs=1, n_steps=T, hyper=hyper.replace(max_grad_norm=math.inf))
    machine = Algorithm(config, Slots.fill(config, reward=reward, optimizer=SGD()))
    inner = GraphInner(agents, SGD(), {})
    machine.update(inner, tr, experience.context(1), config.hyper, torch.Generator())
    judgement = torch.tensor([0.7, -0.2, 1.1, 0.4, -0.9], dtype=torch.float64)  # stands for extrinsic advantages
    loss = -(inner.agent(tr.obs[:-1]).policy.log_prob(tr.action).flatten() * judgement).sum()
    (found,) = torch.autograd.grad(loss, [reward.table])

    def score(logits, state, action):
        """grad log pi(action|state) in the logits [3, 2]."""
        g = torch.zeros(3, 2, dtype=torch.float64)
        g[state] = one_hot(action, 2) - torch.softmax(logits[state], 0)
        return g

    after = inner.theta.detach().view(3, 3)[:, :2]
    uphill = sum(j * score(after, x, u) for j, x, u in zip(judgement, s, a, strict=True))
    expected = torch.zeros(3, 2, dtype=torch.float64)
    for t in range(T):
        alignment = (uphill * score(table[:, :2], s[t], a[t])).sum()
        for k in range(t, 2 if t < 2 else T):  # the first episode ends with step 1
            slope = 1 - reward.table.detach()[s[k], a[k]].tanh() ** 2
            expected[s[k], a[k]] -= rate * scale * alignment * gamma ** (k - t) * slope / T  # losses are means
    assert_close(found, expected, rtol=1e-12, atol=1e-15)
    assert bool((expected[s, a] != 0).all()) and expected[1, 1] == 0  # which nobody did


# --- where episodes end -------------------------------------------------------------------------------------------

VALUE = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)  # of the three states
ENDS = {
    "goes on": ({}, float(VALUE[1])),  # the last observation bootstraps
    "terminated": ({"terminated": [1, T - 1]}, 0.0),
    "truncated": ({"terminated": [1], "truncated": [T - 1]}, float(VALUE[2])),  # its own last observation does
}


@pytest.mark.parametrize("case", ENDS)
def test_the_end_of_a_fragment_ends_the_mixed_return_too(case):
    """Advantages of the mixed reward by hand, and where the learned reward's gradient goes."""
    ends, bootstrap = ENDS[case]
    reward, tr, hyper = small(), fragment(**ends), Hyper(gamma=0.9, gae_lambda=0.8)
    agents = Population(make_agent(AgentConfig(), Discrete(3), Discrete(2)), 1, torch.float64)
    agents.theta.data.view(3, 3)[:, 2] = VALUE
    config = PPOConfig(n_envs=1, n_steps=T, n_minibatches=1)
    machine = Algorithm(config, Slots.fill(config, reward=reward, optimizer=SGD()))
    record = machine.update(GraphInner(agents, SGD(), {}), tr, experience.context(1), hyper, torch.Generator())
    found, states = record.batch["advantage"].flatten(), tr.obs.flatten()
    learned = torch.tanh(reward.table[states[:-1], tr.action.flatten()])
    expected, trace = [], torch.zeros(())
    for t in reversed(range(T)):
        ended = bool(tr.done[t])
        following = bootstrap if t == T - 1 else 0.0 if ended else VALUE[states[t + 1]]
        error = tr.reward[t, 0, 0] + 0.4 * learned[t] + 0.9 * following - VALUE[states[t]]
        trace = error if ended else error + 0.9 * 0.8 * trace
        expected.insert(0, trace)
    assert_close(found, torch.stack(expected), rtol=1e-13, atol=1e-14)
    for ours, by_hand in zip(found, expected, strict=True):
        slopes = [torch.autograd.grad(x, reward.table, retain_graph=True)[0] for x in (ours, by_hand)]
        assert_close(*slopes, rtol=1e-13, atol=1e-15)


# --- sizes and files ----------------------------------------------------------------------------------------------


@each
def test_it_takes_the_size_of_the_agents_once(pair):
    space, actions = PAIRS[pair]
    reward = LIRPG(LIRPGConfig(hidden=(7, 5)))
    assert not list(reward.parameters())
    reward.fit(space, actions, ())
    before = {k: v.clone() for k, v in reward.state_dict().items()}
    sizes = [int(s.n) if isinstance(s, Discrete) else s.shape for s in (space, actions)]
    assert [reward.config.observation, reward.config.action] == sizes and before
    reward.fit(space, actions, ("any", "layers"))
    assert before.keys() == reward.state_dict().keys()
    assert all(torch.equal(v, reward.state_dict()[k]) for k, v in before.items())
    again = LIRPG.from_config(dataclasses.asdict(reward.config))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in before.items()}


def test_the_shapes_of_its_weights():
    def shapes(pair, **settings):
        return {k: tuple(v.shape) for k, v in lirpg(pair, **settings).named_parameters()}

    assert shapes("tabular") == {"table": (experience.STATES, experience.ACTIONS)}
    default = shapes("mlp", hidden=LIRPGConfig().hidden)
    assert [default[f"net.{i}.weight"] for i in (0, 2, 4)] == [(64, 3), (64, 64), (experience.ACTIONS, 64)]
    assert shapes("conv", hidden=()) == {"net.0.weight": (experience.ACTIONS, 40), "net.0.bias": (experience.ACTIONS,)}
    assert shapes("continuous", hidden=(4,))["net.0.weight"] == (4, 3 + 2)
    assert shapes("states, continuous", hidden=(4,))["net.0.weight"] == (4, experience.STATES + 2)


@each
def test_a_file_brings_back_the_same_reward(pair, tmp_path):
    reward, path, tr = lirpg(pair, scale=0.3), tmp_path / "reward.safetensors", rollout(pair)
    artifacts.save(reward, path, {"family": "made up"})
    loaded = artifacts.get(path)
    assert type(loaded) is LIRPG and loaded.config == reward.config and loaded.provenance == {"family": "made up"}
    assert torch.equal(paid(loaded, tr), paid(reward, tr))


def test_one_without_a_size_can_be_saved_too(tmp_path):
    artifacts.save(LIRPG(LIRPGConfig(hidden=(4,), scale=0.5)), tmp_path / "fresh.safetensors")
    loaded = artifacts.get(tmp_path / "fresh.safetensors")
    loaded.fit(*PAIRS["mlp"], ())
    assert loaded.config == LIRPGConfig(hidden=(4,), scale=0.5, observation=(3,), action=experience.ACTIONS)


OTHERS = {
    "more states": ("tabular", Discrete(9), ACTIONS, "4 states and 3 actions.*9 states and 3 actions"),
    "other actions": (
        "mlp",
        experience.SPACES["mlp"],
        Discrete(2),
        r"shape \(3,\) and 3 actions.*shape \(3,\) and 2 ac",
    ),
    "continuous": ("mlp", experience.SPACES["mlp"], Box(-1, 1, (3,)), r"3 actions.*actions of shape \(3,\)"),
    "as many numbers": ("conv", Box(0, 1, (40,)), ACTIONS, r"shape \(2, 5, 4\).*shape \(40,\)"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_spaces_are_refused(other):
    pair, space, actions, said = OTHERS[other]
    with pytest.raises(UserError, match=f"made for.*{said}.*fresh 'lirpg'"):
        lirpg(pair).fit(space, actions, ())


def test_a_reward_for_another_environment_is_refused(tmp_path):
    artifacts.save(lirpg("tabular"), tmp_path / "reward.safetensors")
    with pytest.raises(UserError, match="4 states and 3 actions, and here are observations"):
        PPO("control/cartpole", reward=tmp_path / "reward.safetensors")


@pytest.mark.parametrize("space", [Dict(a=Discrete(2)), MultiDiscrete([2, 3])])
def test_spaces_of_other_kinds_are_refused(space):
    for spaces in ((space, ACTIONS), (Discrete(3), space)):
        with pytest.raises(UserError, match=r"lirpg does not take.*expected Discrete or Box"):
            LIRPG().fit(*spaces, ())


def test_it_says_that_it_has_no_size_yet():
    with pytest.raises(UserError, match=r"no size yet.*`fit`"):
        LIRPG()(rollout("mlp"), experience.context(P))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"scale": -0.1}, "scale is -0.1.*at least 0"),
        ({"extrinsic": -1.0}, "extrinsic is -1.0.*at least 0"),
        ({"hidden": (8, 0)}, "hidden is 0.*at least 1"),
        ({"observation": 0, "action": 2}, "observation is 0: expected at least 1"),
        ({"observation": (3,)}, r"observation is \(3,\) and action None.*both"),
    ],
)
def test_settings_that_make_no_reward_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        LIRPGConfig(**settings)


def test_the_settings_are_the_published_ones():
    assert LIRPGConfig() == LIRPGConfig(extrinsic=1.0, scale=0.01, hidden=(64, 64), zero=True)
    assert LIRPG.online


def test_a_table_has_a_picture(tmp_path, capsys):
    table, net = tmp_path / "table.safetensors", tmp_path / "net.safetensors"
    artifacts.save(lirpg("tabular"), table)
    artifacts.save(lirpg("mlp"), net)
    assert show(str(table), None) == table.with_suffix(".png") and table.with_suffix(".png").stat().st_size > 5000
    assert show(str(net), None) is None
    assert "lirpg (reward)" in capsys.readouterr().out
