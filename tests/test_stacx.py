"""STACX: each head is an actor-critic of its own, the trunk alone joins them, and every number has its slope."""

import math

import experience
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from probes import ProbeFamily
from torch.testing import assert_close

from learned_rl import PPO
from learned_rl.agents import AgentConfig
from learned_rl.architecture import AgentOutput
from learned_rl.component import Hyper, lifetime_mean
from learned_rl.defaults import NoAuxiliary, PPOClip
from learned_rl.distributions import Categorical
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.substitute import substituted
from learned_rl.types import UserError
from learned_rl.update_rules import SGD
from objectives.impala import Impala
from objectives.stacx import RETURNS, STACX, WEIGHTS, STACXConfig

P, HEADS = 2, 2
HYPER = Hyper(learning_rate=0.3, max_grad_norm=math.inf, ent_coef=0.01)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stacx(seed=0):
    """In float64, no two of its numbers alike."""
    component = STACX(STACXConfig(heads=HEADS, ent_coef=0.5)).double()
    for i, weight in enumerate(component.parameters()):
        weight.data = normal(HEADS, seed=100 * seed + i)
    return component


def rollout(component, seed=1):
    """Agents, their experience with ends of episodes, outputs [T+1, P, B] with a graph, and what heads say next."""
    agents = experience.population("mlp", component.heads(Discrete(experience.ACTIONS)), value=True)
    data = experience.trajectory(experience.SPACES["mlp"], seed)
    out, final = agents(data.obs), agents(data.final_obs).heads
    return agents, data, out, {k: data.following(v, final[k]).detach() for k, v in out.heads.items()}


def loss_of(component):
    """[P], and the agents."""
    agents, data, out, next_heads = rollout(component)
    batch = component.prepare(data, out, next_heads, HYPER, experience.context())
    rows = {"action": data.action, "log_prob": data.log_prob} | batch
    return component.loss(out.map(lambda x: x[:-1]), rows, HYPER), agents


# --- heads and numbers --------------------------------------------------------------------------------------------


def test_heads_are_policies_and_values():
    sizes = {"stacx_policy0": 3, "stacx_value0": 1, "stacx_policy1": 3, "stacx_value1": 1}
    assert STACX().heads(Discrete(3)) == sizes
    _, data, out, next_heads = rollout(component := stacx())
    batch = component.prepare(data, out, next_heads, HYPER, experience.context())
    assert {k: v.shape for k, v in batch.items()} == dict.fromkeys(("stacx_target", "stacx_advantage"), (5, 2, 3, 2))
    assert STACX.online and {k: v.shape for k, v in component.eta.items()} == dict.fromkeys(RETURNS + WEIGHTS, (2,))


def test_continuous_actions_are_refused():
    with pytest.raises(UserError, match=r"'stacx' needs Discrete actions: this task has Box"):
        STACX().heads(Box(-1.0, 1.0, (2,)))


def test_numbers_start_where_they_were_configured_and_stay_in_their_intervals():
    config = STACXConfig(
        gamma=0.9, gae_lambda=0.7, vtrace_alpha=0.3, pg_coef=2.0, vf_coef=0.25, ent_coef=0.1, start=0.8
    )
    component = STACX(config).double()
    expected = [0.9, 0.7, 0.3, 2.0 * 0.8, 0.25 * 0.8, 0.1 * 0.8]
    assert [x.tolist() for x in component.numbers().values()] == [[x, x] for x in expected]
    bounds = {"pg_coef": 2.0, "vf_coef": 0.25, "ent_coef": 0.1}
    for eta in component.parameters():
        eta.data = torch.tensor([-5.0, 5.0]).double()
    for name, number in component.numbers().items():
        low, high = number.tolist()
        assert 0 < low < 0.2 * bounds.get(name, 1) and 0.98 * bounds.get(name, 1) < high < bounds.get(name, 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heads": 0}, "heads is 0"),
        ({"gamma": 1.5}, "gamma is 1.5: expected at most 1"),
        ({"vtrace_alpha": -0.1}, "vtrace_alpha is -0.1"),
        ({"ent_coef": 0.0}, "ent_coef is 0.0: expected a positive bound, such as 0.01"),
        ({"pg_coef": math.inf}, "pg_coef is inf: expected a positive bound, such as 1.0"),
        ({"start": 1.0}, "start is 1.0: expected a share between 0 and 1, such as 0.95"),
    ],
)
def test_settings_that_no_head_can_have_are_refused(settings, said):
    with pytest.raises(UserError, match=said):
        STACXConfig(**settings)


# --- what it minimises --------------------------------------------------------------------------------------------


def test_its_loss_is_the_sum_of_impalas_of_each_head():
    """Each with its own numbers, policy and value, off-policy; the gradients too."""
    component = stacx()
    found, agents = loss_of(component)
    _, data, _, next_heads = rollout(component)
    out, expected = agents(data.obs), torch.zeros(P, dtype=torch.float64)
    for i in range(HEADS):
        own = HYPER.replace(**{k: v[i].item() for k, v in component.numbers().items()})
        head = AgentOutput(Categorical(out.heads[f"stacx_policy{i}"]), out.heads[f"stacx_value{i}"].squeeze(-1))
        next_value = next_heads[f"stacx_value{i}"].squeeze(-1)
        batch, _ = Impala().prepare(data, head, next_value, own, experience.context())
        rows = {"action": data.action, "log_prob": data.log_prob} | batch
        expected = expected + Impala().loss(head.map(lambda x: x[:-1]), rows, own)[0]
    assert_close(found, expected, rtol=1e-11, atol=1e-13)
    slopes = [torch.autograd.grad(x.sum(), agents.theta)[0] for x in (found, expected)]
    assert slopes[0].abs().max() > 0.01
    assert_close(*slopes, rtol=1e-10, atol=1e-12)


def test_targets_are_constants_of_the_agents():
    """Even where an objective lets the outer gradient through what they read."""
    component = stacx()
    agents, data, out, next_heads = rollout(component)
    batch = component.prepare(data, out, next_heads, HYPER, experience.context())
    said = sum(x.sum() for x in batch.values())
    assert torch.autograd.grad(said, agents.theta, allow_unused=True)[0] is None


@pytest.mark.parametrize("name", RETURNS + WEIGHTS)
def test_slopes_against_differences(name):
    """Of a random function of the loss's gradient."""
    component, step = stacx(), 1e-5
    eta = component.eta[name]

    def descended():
        loss, agents = loss_of(component)
        (gradient,) = torch.autograd.grad(loss.sum(), agents.theta, create_graph=True)
        return (gradient * normal(*agents.theta.shape, seed=3)).sum()

    (exact,) = torch.autograd.grad(descended(), eta)
    start = eta.detach().clone()
    for i, direction in enumerate(torch.eye(HEADS, dtype=torch.float64)):
        sides = []
        for sign in (1, -1):
            eta.data = start + sign * step * direction
            sides.append(descended().item())
        assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(exact[i].item(), rel=1e-6)
        assert exact[i].abs() > 1e-6


def test_every_lifetime_may_have_numbers_of_its_own():
    """Side by side under `vmap`, what each says is what it says alone."""
    members = [stacx(seed) for seed in range(P)]
    stacked = {k: torch.stack([m.state_dict()[k] for m in members]) for k in members[0].state_dict()}
    together, _ = loss_of(substituted(members[0], stacked, stacked=True))
    for p, member in enumerate(members):
        assert_close(together[p], loss_of(member)[0][p], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(together, loss_of(members[0])[0])


# --- in an update -------------------------------------------------------------------------------------------------


def updated(component, hyper=HYPER, objective=None, epochs=2, parts=2, graph=False):
    """Agents with STACX's heads after one update, and an inner loop that can be asked about them."""
    config = PPOConfig(n_envs=3, n_steps=5, n_epochs=epochs, n_minibatches=parts, hyper=hyper)
    slots = Slots.fill(config, objective=objective or PPOClip(), optimizer=SGD(), auxiliary=component)
    agents = experience.population("mlp", STACX().heads(Discrete(experience.ACTIONS)), value=True)
    inner = (GraphInner if graph else PlainInner)(agents, SGD(), {})
    data, generator = experience.trajectory(experience.SPACES["mlp"], seed=1), torch.Generator().manual_seed(5)
    Algorithm(config, slots).update(inner, data, experience.context(), hyper, generator)
    return inner


def test_without_weights_an_update_is_that_of_the_algorithm_alone():
    silent = stacx()
    for name in WEIGHTS:
        silent.eta[name].data.fill_(-50.0)
    alone = updated(NoAuxiliary()).theta
    assert_close(updated(silent).theta, alone, rtol=1e-13, atol=1e-15)
    assert torch.equal(updated(stacx(), HYPER.replace(aux_coef=0.0)).theta, alone)


def test_it_moves_the_trunk_and_its_own_heads_alone():
    inner = updated(stacx())
    weights, alone = (inner.population.weights(x.theta) for x in (inner, updated(NoAuxiliary())))
    moved = {name for name, x in weights.items() if not torch.allclose(x, alone[name], rtol=0, atol=1e-6)}
    own = {f"head_{name}.{x}" for name in STACX().heads(Discrete(3)) for x in ("weight", "bias")}
    assert own | {"trunk0.weight", "trunk0.bias"} <= moved
    assert not any(name.startswith("value") for name in moved)  # a trunk of its own


@pytest.mark.parametrize(("objective", "epochs", "parts"), [(PPOClip(), 2, 2), (Impala(), 1, 1)], ids=["ppo", "impala"])
def test_the_meta_gradient_of_an_update_against_differences(objective, epochs, parts):
    """Of how the agent's own policy is judged afterwards: each number reaches it through the trunk."""
    component, step = stacx(), 1e-5
    outer = experience.trajectory(experience.SPACES["mlp"], seed=99)

    def judged():
        policy = updated(component, HYPER, objective, epochs, parts, graph=True).agent(outer.obs[:-1]).policy
        return lifetime_mean(policy.log_prob(outer.action) * outer.reward).sum()

    exact = torch.autograd.grad(judged(), list(component.parameters()))
    largest = max(x.abs().max().item() for x in exact)
    for eta, slope in zip(component.parameters(), exact, strict=True):
        assert slope.abs().min() > 1e-3 * largest
        start = eta.detach().clone()
        for i, direction in enumerate(torch.eye(HEADS, dtype=torch.float64)):
            sides = []
            for sign in (1, -1):
                eta.data = start + sign * step * direction
                sides.append(judged().item())
            assert (sides[0] - sides[1]) / (2 * step) == pytest.approx(slope[i].item(), rel=1e-5, abs=1e-6 * largest)
        eta.data = start


@pytest.mark.parametrize("objective", ["ppo_clip", "impala"])
def test_agents_with_it_learn(objective):
    """Every seed takes the better action in both states; so do the heads that never acted."""
    family = ProbeFamily("both", as_numbers=True)
    hyper = Hyper(learning_rate=3e-3, ent_coef=0.01)
    config = PPOConfig(n_epochs=2, n_steps=20, n_minibatches=1, hyper=hyper, agent=AgentConfig(hidden=(16,)))
    agent = PPO(family, config, objective=objective, auxiliary=STACX(), seeds=3)
    agent.learn(60 * 160, lambda steps, metrics: None)
    with torch.no_grad():
        out = agent.lifetimes.population(family.show(torch.arange(2).expand(3, -1)))
    said = [out.policy.mode(), *(out.heads[f"stacx_policy{i}"].argmax(-1) for i in range(2))]
    assert [x.tolist() for x in said] == [[[0, 1]] * 3] * 3
