"""PPO and its five slots: neutral parts change nothing, others do; oracles; probe environments."""

import dataclasses

import experience
import pytest
import torch
from gymnasium.spaces import Discrete
from probes import GAMMA, PROBES, ProbeFamily
from torch.nn.functional import one_hot
from torch.testing import assert_close

from learned_rl.agents import AgentConfig, Population, make_agent
from learned_rl.architecture import AgentOutput
from learned_rl.component import Auxiliary, Hyper, Hyperparameters, NoConfig, Reward, UpdateRule, lifetime_mean
from learned_rl.defaults import Constants, ConstantsConfig, PPOClip, PPOClipConfig
from learned_rl.distributions import Categorical
from learned_rl.inner_loop import PlainInner
from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.registry import make_component
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError
from learned_rl.update_rules import SGD
from learned_rl.values import CategoricalValue, signed_hyperbolic
from objectives.lpg import LPG

SMALL = PPOConfig(n_envs=3, n_steps=5, n_epochs=2, n_minibatches=3, hyper=Hyper(learning_rate=0.01, ent_coef=0.01))


def run(config=SMALL, kind="mlp", updates=2, agents=None, trajectories=None, hyper=None, age=0.0, **plugged):
    """Updates on fixed experience; returns the population's inner loop and the last record."""
    slots = Slots.fill(config, **plugged)
    algorithm = Algorithm(config, slots)
    if agents is None:
        heads = {k: v for _, c in slots.items() for k, v in c.heads(None).items()}
        agents = experience.population(kind, heads, value=True)
    inner = PlainInner(agents, slots.optimizer, slots.optimizer.initial_state(agents.theta.detach()))
    generator = torch.Generator().manual_seed(11)
    space = experience.SPACES[kind]
    trajectories = trajectories or [experience.trajectory(space, k, P=len(agents.theta)) for k in range(updates)]
    for k, tr in enumerate(trajectories):
        context = experience.context(len(agents.theta), age=age + k)
        record = algorithm.update(inner, tr, context, hyper or config.hyper, generator)
    return inner, record


# --- neutral parts ------------------------------------------------------------------------------------------------


class SameReward(Reward):
    name, Config = "same_reward", NoConfig
    factor = 1.0

    def forward(self, trajectory, context):
        return self.factor * trajectory.reward, {}


class LearnedReward(SameReward):
    """A learned multiple, which it also remembers."""

    def __init__(self):
        super().__init__()
        self.multiple = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self, trajectory, context):
        reward = self.multiple * trajectory.reward
        return reward, {"sum": reward.sum((0, 2))}


class DoubleReward(SameReward):
    factor = 2.0


class SameNumbers(Hyperparameters):
    name, Config = "same_numbers", NoConfig
    changes: dict = {}  # noqa: RUF012

    def forward(self, base, trajectory, context):
        return base.replace(**self.changes), {}


class LearnedStepSize(SameNumbers):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(0.01))

    def forward(self, base, trajectory, context):
        return base.replace(learning_rate=self.rate), {}


class Myopic(SameNumbers):
    changes = {"gamma": 0.0}  # noqa: RUF012


class NoPrediction(Auxiliary):
    name, Config = "no_prediction", NoConfig
    weight = 0.0

    def prepare(self, trajectory, out, next_heads, hyper, context):
        return {"wanted": torch.ones_like(trajectory.reward)}

    def loss(self, out, batch, hyper):
        return self.weight * lifetime_mean((out.value - batch["wanted"]).square())


class ValuePrediction(NoPrediction):
    weight = 1.0


class HeadPrediction(Auxiliary):
    """A head of its own that predicts 1 everywhere."""

    name, Config = "head_prediction", NoConfig

    def heads(self, action_space):
        return {"guess": 1}

    def prepare(self, trajectory, out, next_heads, hyper, context):
        return {}

    def loss(self, out, batch, hyper):
        return lifetime_mean((out.heads["guess"].squeeze(-1) - 1).square())


class SameObjective(PPOClip):
    name = "same_objective"


class Opposite(PPOClip):
    name = "opposite"

    def loss(self, out, batch, hyper):
        loss, metrics = super().loss(out, batch, hyper)
        return -loss, metrics


class PlainAdam(UpdateRule):
    """Adam written out once more, with PPO's eps."""

    name, Config = "plain_adam", NoConfig

    def initial_state(self, theta):
        zeros = torch.zeros_like(theta)
        return {"m": zeros, "v": zeros.clone(), "t": theta.new_zeros(len(theta), 1)}

    def update(self, grad, state, theta, learning_rate, context=None):
        t = state["t"] + 1
        m, v = 0.9 * state["m"] + 0.1 * grad, 0.999 * state["v"] + 0.001 * grad**2
        step = -learning_rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-5)
        return step, {"m": m, "v": v, "t": t}


class Still(SGD):
    name = "still"

    def update(self, grad, state, theta, learning_rate, context=None):
        return 0 * grad, state


NEUTRAL = {
    "reward": SameReward,
    "hyperparameters": SameNumbers,
    "auxiliary": NoPrediction,
    "objective": SameObjective,
}


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("slot", NEUTRAL)
def test_a_neutral_component_changes_nothing(slot, minibatches):
    config = dataclasses.replace(SMALL, n_minibatches=minibatches)
    neutral, _ = run(config, **{slot: NEUTRAL[slot]()})
    plain, _ = run(config)
    assert torch.equal(neutral.theta, plain.theta)
    assert not torch.equal(plain.theta, experience.population("mlp", value=True).theta)


def test_an_adam_written_out_again_changes_nothing():
    assert_close(run(optimizer=PlainAdam())[0].theta, run()[0].theta, rtol=1e-10, atol=1e-12)


def test_an_auxiliary_of_weight_zero_leaves_policy_and_value_alone():
    hyper = SMALL.hyper.replace(aux_coef=0.0)
    one, two = run(kind="tabular", hyper=hyper)[0], run(kind="tabular", hyper=hyper, auxiliary=HeadPrediction())[0]
    assert two.theta.shape[1] == one.theta.shape[1] + experience.STATES
    # The two populations differ in size and so in their random weights: run again from the same ones.
    table = one.theta.detach().unflatten(1, (experience.STATES, -1))
    with_head = torch.cat([table[..., :3], torch.zeros_like(table[..., :1]), table[..., 3:]], -1).flatten(1)
    agents = [experience.population("tabular", h, value=True) for h in ({}, {"guess": 1})]
    agents[0].theta.data.copy_(one.theta)
    agents[1].theta.data.copy_(with_head)
    one, _ = run(kind="tabular", hyper=hyper, agents=agents[0])
    two, _ = run(kind="tabular", hyper=hyper, agents=agents[1], auxiliary=HeadPrediction())
    states = torch.arange(experience.STATES).expand(2, -1)
    a, b = one.agent(states), two.agent(states)
    assert_close(a.policy.logits, b.policy.logits, rtol=1e-12, atol=1e-12)
    assert_close(a.value, b.value, rtol=1e-12, atol=1e-12)
    assert not b.heads["guess"].any()


# --- parts with an effect -----------------------------------------------------------------------------------------


def test_reward_component_scales_the_advantage():
    agents = [experience.population("tabular", value=True, scale=0.0) for _ in range(2)]
    _, plain = run(kind="tabular", updates=1, agents=agents[0])
    _, double = run(kind="tabular", updates=1, agents=agents[1], reward=DoubleReward())
    assert_close(double.batch["returns"], 2 * plain.batch["returns"], rtol=1e-12, atol=1e-12)
    assert torch.equal(double.trajectory.reward, plain.trajectory.reward)  # the record keeps the environment's


def test_hyperparameter_component_sets_gamma():
    _, record = run(kind="tabular", updates=1, hyperparameters=Myopic())
    assert_close(record.batch["returns"], record.trajectory.reward, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(run(kind="tabular", updates=1)[1].batch["returns"], record.trajectory.reward)


def test_objective_component_is_what_is_minimised():
    config = dataclasses.replace(SMALL, n_epochs=1, n_minibatches=1, optimizer="sgd")
    start = experience.population("mlp", value=True).theta
    moves = [run(config, updates=1, objective=o)[0].theta - start for o in (PPOClip(), Opposite())]
    assert_close(moves[0], -moves[1], rtol=1e-10, atol=1e-12)
    assert moves[0].abs().max() > 1e-5


def test_auxiliary_component_adds_its_loss_with_its_weight():
    config = dataclasses.replace(SMALL, n_epochs=1, n_minibatches=1, optimizer="sgd")
    hyper = config.hyper.replace(max_grad_norm=float("inf"))
    start = experience.population("mlp", value=True).theta
    moves = []
    for coef in (0.0, 1.0, torch.tensor([[2.0], [3.0]], dtype=torch.float64)):
        inner, _ = run(config, updates=1, hyper=hyper.replace(aux_coef=coef), auxiliary=ValuePrediction())
        moves.append(inner.theta - start)
    extra = moves[1] - moves[0]
    assert extra.abs().max() > 1e-5
    assert_close(moves[2] - moves[0], extra * torch.tensor([[2.0], [3.0]]), rtol=1e-9, atol=1e-12)


def test_auxiliary_head_learns():
    agents = experience.population("mlp", {"guess": 1}, value=True)
    error = lambda: (agents(experience.trajectory(experience.SPACES["mlp"], 0).obs).heads["guess"] - 1).abs().mean()  # noqa: E731
    before = error()
    run(updates=30, agents=agents, auxiliary=HeadPrediction())
    assert error() < 0.3 * before


def test_optimizer_component_moves_the_parameters():
    inner, _ = run(optimizer=Still())
    assert torch.equal(inner.theta, experience.population("mlp", value=True).theta)


def test_heads_of_one_name_must_agree_in_size():
    class Other(HeadPrediction):
        def heads(self, action_space):
            return {"prediction": 7}

    slots = Slots.fill(SMALL, objective=LPG(predictions=4, width=3), auxiliary=Other())
    with pytest.raises(UserError, match="prediction"):
        Algorithm(SMALL, slots).make_agent(experience.SPACES["mlp"], ProbeFamily("both").action_space)


def test_a_target_for_a_divergence_that_nobody_says_is_refused():
    config = PPOConfig(n_minibatches=1, target_kl=0.1)
    with pytest.raises(UserError, match=r"^target_kl is 0\.1, but 'lpg' reports no approx_kl: expected none\."):
        Algorithm(config, Slots.fill(config, objective=LPG()))


def test_a_component_in_the_wrong_slot_is_refused():
    with pytest.raises(UserError, match="'same_reward' fits the slot 'reward', not 'objective'"):
        Slots.fill(SMALL, objective=SameReward())


@pytest.mark.parametrize(
    "setting", [{"n_envs": 0}, {"n_steps": 0}, {"n_epochs": 0}, {"n_minibatches": 16}, {"optimizer": "adaam"}]
)
def test_impossible_settings_are_refused(setting):
    (value,) = setting.values()
    with pytest.raises(UserError, match=str(value)):
        dataclasses.replace(SMALL, **setting)


# --- oracles ------------------------------------------------------------------------------------------------------


def naive_advantage(tr, value, next_value, gamma, lam):
    """GAE by its definition as a double sum over steps within each episode."""
    T, P, B = tr.reward.shape
    result = torch.zeros(T, P, B, dtype=torch.float64)
    for p in range(P):
        for b in range(B):
            for t in range(T):
                weight = 1.0
                for k in range(t, T):
                    bootstrap = 0.0 if tr.terminated[k, p, b] else next_value[k, p, b]
                    result[t, p, b] += weight * (tr.reward[k, p, b] + gamma * bootstrap - value[k, p, b])
                    if tr.done[k, p, b]:
                        break
                    weight *= gamma * lam
    return result


def test_one_update_is_the_a2c_gradient_in_closed_form():
    """Tabular actor-critic: each term of the gradient by hand, with episode ends and final observations."""
    hyper = Hyper(
        learning_rate=1.0, gamma=0.9, gae_lambda=0.7, clip_range=float("inf"), ent_coef=0.03, vf_coef=0.4,
        max_grad_norm=float("inf"),
    )  # fmt: skip
    config = PPOConfig.a2c(n_envs=3, n_steps=5, optimizer="sgd", hyper=hyper)
    agents = experience.population("tabular", value=True)
    table = agents.theta.detach().clone().unflatten(1, (experience.STATES, -1))
    tr = experience.trajectory(experience.SPACES["tabular"], 4)
    first = agents(tr.obs).policy.map(lambda x: x[:-1])
    tr = dataclasses.replace(tr, log_prob=first.log_prob(tr.action).detach())
    assert tr.truncated.any() and tr.terminated.any()
    inner, _ = run(config, kind="tabular", agents=agents, trajectories=[tr])
    moved = table - inner.theta.detach().unflatten(1, (experience.STATES, -1))

    row = torch.arange(2)[:, None]
    logits, value = table[..., :-1], table[..., -1]
    pi = logits.softmax(-1)
    next_obs = torch.where(tr.truncated, tr.final_obs, tr.obs[1:])
    values, next_values = value[row, tr.obs[:-1]], value[row, next_obs]
    advantage = naive_advantage(tr, values, next_values, 0.9, 0.7)
    n = tr.reward[:, 0].numel()
    expected = torch.zeros_like(table)
    for t in range(len(tr.reward)):
        for p in range(2):
            for b in range(3):
                s, a = tr.obs[t, p, b], tr.action[t, p, b]
                prob, log_prob = pi[p, s], pi[p, s].log()
                d_entropy = -prob * (log_prob - (prob * log_prob).sum())
                d_policy = -advantage[t, p, b] * (one_hot(a, experience.ACTIONS) - prob)
                expected[p, s, :-1] += (d_policy - 0.03 * d_entropy) / n
                expected[p, s, -1] += 0.4 * 2 * (value[p, s] - (advantage + values)[t, p, b]) / n
    assert_close(moved, expected, rtol=1e-10, atol=1e-12)


def _slice(tr, p):
    return Trajectory(*[None if x is None else x[:, p : p + 1] for x in vars(tr).values()])


@pytest.mark.parametrize("minibatches", [1, 3])
@pytest.mark.parametrize("kind", ["tabular", "mlp", "conv"])
def test_seeds_side_by_side_equal_seeds_alone(kind, minibatches):
    config = dataclasses.replace(SMALL, n_minibatches=minibatches, target_kl=0.02)
    rates = torch.tensor([[0.01], [0.002], [0.05]], dtype=torch.float64)
    together = experience.population(kind, value=True, P=3)
    data = [experience.trajectory(experience.SPACES[kind], k, P=3) for k in range(2)]
    begin = together.theta.detach().clone()
    inner, record = run(config, kind, agents=together, trajectories=data, hyper=Hyper(learning_rate=rates))
    for p in range(3):
        alone = experience.population(kind, value=True, P=1)
        alone.theta.data.copy_(begin[p : p + 1])
        hyper = Hyper(learning_rate=rates[p : p + 1])
        one, own = run(config, kind, agents=alone, trajectories=[_slice(tr, p) for tr in data], hyper=hyper)
        assert_close(one.theta[0], inner.theta[p], rtol=1e-10, atol=1e-12)
        assert_close(own.batch["returns"][:, 0], record.batch["returns"][:, p], rtol=1e-10, atol=1e-12)


class Spy(PPOClip):
    """Notes which rows each gradient step reads."""

    def prepare(self, trajectory, out, next_value, hyper, context):
        batch, memory = super().prepare(trajectory, out, next_value, hyper, context)
        T, P, B = trajectory.reward.shape
        self.rows = []
        return batch | {"row": torch.arange(T * B).view(T, 1, B).expand(T, P, B)}, memory

    def loss(self, out, batch, hyper):
        self.rows.append(batch["row"])
        return super().loss(out, batch, hyper)


@pytest.mark.parametrize("minibatches", [1, 2, 4, 7, 15])
def test_minibatches_cover_every_row_once_an_epoch(minibatches):
    spy = Spy()
    inner, _ = run(dataclasses.replace(SMALL, n_epochs=3, n_minibatches=minibatches), updates=1, objective=spy)
    assert inner.theta.isfinite().all()
    assert len(spy.rows) == 3 * minibatches
    epochs = [spy.rows[i * minibatches : (i + 1) * minibatches] for i in range(3)]
    for epoch in epochs:
        for p in range(2):
            rows = torch.cat([r.transpose(0, -2)[p].flatten() for r in epoch]).sort().values
            assert torch.equal(rows, torch.arange(15))
    if 1 < minibatches < 15:
        assert not torch.equal(epochs[0][0], epochs[1][0])  # each epoch is cut afresh


def test_target_kl_stops_each_lifetime_by_itself():
    rates = torch.tensor([[0.5], [1e-5]], dtype=torch.float64)
    config = dataclasses.replace(SMALL, n_epochs=8, n_minibatches=1, target_kl=0.01)
    tr = experience.trajectory(experience.SPACES["mlp"], 0)
    agents = experience.population("mlp", value=True)
    acted = agents(tr.obs).policy.map(lambda x: x[:-1].detach())
    tr = dataclasses.replace(tr, log_prob=acted.log_prob(tr.action))
    inner, _ = run(config, agents=agents, trajectories=[tr], hyper=Hyper(learning_rate=rates))
    counts = inner.state["count"].flatten().tolist()
    assert 1 <= counts[0] < 8 and counts[1] == 8


class ScriptedKL(PPOClip):
    """Reports given divergences, one row [P] for each gradient step."""

    name = "scripted_kl"

    def prepare(self, *args):
        self.script = iter([[0.0, 0.0], [9.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
        return super().prepare(*args)

    def loss(self, out, batch, hyper):
        loss, metrics = super().loss(out, batch, hyper)
        return loss, metrics | {"approx_kl": torch.tensor(next(self.script))}


def test_a_lifetime_that_stopped_does_not_go_on_in_the_same_update():
    config = dataclasses.replace(SMALL, n_epochs=2, n_minibatches=2, target_kl=0.01)
    inner, _ = run(config, updates=2, objective=ScriptedKL())
    assert inner.state["count"].flatten().tolist() == [2, 8]  # one step of four in each of two updates


def test_linear_decay_reaches_zero():
    start = experience.population("mlp", value=True).theta
    config = dataclasses.replace(SMALL, linear_decay=True, n_epochs=1, n_minibatches=1, optimizer="sgd")
    moves = [run(config, updates=1, age=age)[0].theta - start for age in (0.0, 5.0, 10.0)]
    assert moves[0].abs().max() > 1e-5
    assert_close(moves[1], 0.5 * moves[0], rtol=1e-9, atol=1e-12)
    assert not moves[2].any()
    constants = Constants(ConstantsConfig(linear_decay=True))
    tr = experience.trajectory(experience.SPACES["mlp"], 0)
    rates = [constants(Hyper(learning_rate=0.2), tr, experience.context(age=a))[0].learning_rate for a in (0, 9, 10)]
    assert_close(torch.stack(rates).flatten(), torch.tensor([0.2, 0.2, 0.02, 0.02, 0, 0], dtype=torch.float64))


def test_value_clipping_bounds_what_a_value_may_move():
    objective, value = PPOClip(PPOClipConfig()), torch.tensor([[0.0, 2.0, -2.0]], requires_grad=True)
    batch = {"value": torch.zeros(1, 3), "returns": torch.tensor([[5.0, 5.0, 5.0]])}
    out = AgentOutput(Categorical(torch.zeros(1, 3, 2)), value)
    loss = objective.value_loss(out, batch, Hyper(clip_range_vf=1.0))
    assert_close(loss, torch.tensor([[25.0, 16.0, 49.0]]))  # beyond the range on the way to the target: no gradient
    (grad,) = torch.autograd.grad(loss.sum(), value)
    assert grad[0].tolist() == [-10.0, 0.0, -14.0]


@pytest.mark.parametrize("objective", ["ppo_clip", "impala"])
def test_a_categorical_value_learns_by_cross_entropy(objective):
    """Of the two bins next to the squeezed target, in the place of the squared error; nothing else is another."""
    value, rule = CategoricalValue(3), make_component(objective)
    g = torch.Generator().manual_seed(4)
    config = dataclasses.replace(SMALL, n_minibatches=1, agent=AgentConfig("mlp", hidden=(6,), value_support=3))
    agents = Population(make_agent(config.agent, experience.SPACES["mlp"], Discrete(3)), 2, torch.float64)
    agents.theta.data.copy_(torch.randn(agents.theta.shape, generator=g, dtype=torch.float64))
    tr = experience.trajectory(experience.SPACES["mlp"], 0)
    tr = dataclasses.replace(tr, reward=8 * tr.reward)  # so that some returns are beyond the bins
    out = agents(tr.obs)
    assert out.bins.shape == (6, 2, 3, 7) and torch.equal(out.value, value.mean(out.bins))
    hyper = Hyper(vf_coef=0.7)
    batch, _ = rule.prepare(tr, out, tr.next_value(out.value, lambda o: agents(o).value), hyper, experience.context())
    rows = {"action": tr.action, "log_prob": tr.log_prob} | batch
    now = out.map(lambda x: x[:-1])
    loss, metrics = rule.loss(now, rows, hyper)
    told = dataclasses.replace(now, bins=None)
    scalar, of_scalar = rule.loss(told, rows, hyper)
    target = (
        batch["returns"]
        if "returns" in batch
        else rule.targets(now.value, now.policy.log_prob(tr.action) - tr.log_prob, batch, hyper)[0]
    )
    entropy = -(value.two_hot(target) * now.bins.log_softmax(-1)).sum(-1).mean((0, 2))
    assert_close(metrics["value_loss"], entropy.detach())
    assert_close(loss - scalar, 0.7 * (metrics["value_loss"] - of_scalar["value_loss"]))
    beyond = (signed_hyperbolic(target).abs() > 3).double().mean((0, 2))
    assert (beyond > 0).all() and (beyond < 1).all() and "beyond_bins" not in of_scalar
    assert_close(metrics["beyond_bins"], beyond)


def test_a_categorical_value_has_no_distance_to_clip():
    with pytest.raises(UserError, match=r"clip_range_vf is 0\.2, but a categorical value"):
        PPOConfig(agent=AgentConfig(value_support=300), hyper=Hyper(clip_range_vf=0.2))
    with pytest.raises(UserError, match="value_support is -1"):
        AgentConfig(value_support=-1)


def test_ratio_clipping_by_hand():
    objective, ratio = PPOClip(), torch.tensor([[0.5, 0.5, 1.5, 1.5, 1.1]], requires_grad=True)
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]])
    loss = objective.policy_loss(ratio, ratio.log(), advantage, Hyper(clip_range=0.2))
    assert_close(loss, torch.tensor([[-0.5, 0.8, -1.2, 1.5, -2.2]]))
    (grad,) = torch.autograd.grad(loss.sum(), ratio)
    assert grad[0].tolist() == [-1.0, 0.0, 0.0, 1.0, -2.0]


def test_plain_updates_leave_no_graph_behind():
    numbers = LearnedStepSize()
    inner, record = run(reward=LearnedReward(), hyperparameters=numbers)
    assert not inner.theta.grad_fn and not any(v.requires_grad for v in inner.state.values())
    assert not any(v.requires_grad for v in record.batch.values())
    assert not any(v.requires_grad for v in record.metrics.values())
    assert not any(v.requires_grad for v in record.memory.values())
    assert numbers.rate.requires_grad and numbers.rate.grad is None


# --- probes -------------------------------------------------------------------------------------------------------


def learn_probe(name, kind, updates, support):
    family = ProbeFamily(name, as_numbers=kind == "mlp")
    config = PPOConfig(
        n_envs=8,
        n_steps=16,
        n_epochs=4,
        n_minibatches=2,
        linear_decay=True,
        hyper=Hyper(0.03 if support else 0.1, GAMMA, 0.95),  # values move by more than their logits
        agent=AgentConfig(hidden=(16,), value_support=support),
    )
    lifetimes = Lifetimes(family, Algorithm(config, Slots.fill(config)), 3, updates, seed=1)
    inner = lifetimes.plain()
    for _ in range(updates):
        lifetimes.advance(inner)
    states = family.show(torch.arange(family.probe.states).expand(3, -1))
    with torch.no_grad():
        return family.probe, lifetimes.population(states)


UPDATES = {"truncated": (75, 450), "terminated": (50, 240)}  # where values are numbers, and where they are bins


@pytest.mark.parametrize("support", [0, 5], ids=["", "categorical"])
@pytest.mark.parametrize("kind", ["tabular", "mlp"])
@pytest.mark.parametrize("name", PROBES)
def test_probe_environments(name, kind, support):
    """All three agents know the values and take the right actions."""
    updates = UPDATES.get(name, (30, 100))[support > 0]
    probe, out = learn_probe(name, kind, updates, support)
    expected = torch.tensor([probe.values[s] for s in range(probe.states)]).expand(3, -1)
    assert (out.value - expected).abs().max() < 0.05, out.value
    for state, action in probe.best.items():
        assert (out.policy.logits.softmax(-1)[:, state, action] > 0.9).all()
