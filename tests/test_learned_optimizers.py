"""Learned optimizers: neutral weights against the hand-made rule, formulas by hand, meta-gradients against differences,
one set of weights per lifetime, and what a torch optimizer owes to its users."""

import copy
import pickle
from dataclasses import replace

import experience
import higher
import numpy as np
import pytest
import torch
from test_inner_loop import HeldPPO, check_against_differences, meta_loss, unrolled
from torch import nn
from torch.testing import assert_close

from experiments.oracles.quadratic import Quadratic
from learned_rl import PPO, PPOConfig, UserError, save
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.layout import Layout, Part, StepContext, dormancy
from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, Slots
from learned_rl.registry import components, make_family
from learned_rl.rule_optimizer import RuleOptimizer
from learned_rl.streams import Streams
from learned_rl.substitute import substituted
from learned_rl.update_rules import SGD, Adam, AdamConfig, RMSProp
from meta_optimizers.coordinatewise import GRU, LSTM, log_and_sign
from meta_optimizers.estimators import estimator_config
from meta_optimizers.evolution import Evolution, EvolutionConfig
from meta_optimizers.l2l import L2L, L2LConfig
from meta_optimizers.learned_adam import LearnedAdam
from meta_optimizers.meta_sgd import MetaSGD, MetaSGDConfig
from meta_optimizers.mlp_optimizer import MLPOptimizer, MLPOptimizerConfig
from meta_optimizers.open import OPEN, OPENConfig
from meta_optimizers.optim4rl import Optim4RL, Optim4RLConfig
from meta_optimizers.problem import Eta, Moved
from meta_optimizers.self_tuning import SelfTuning
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from objectives.self_tuned import SelfTuned, SelfTunedConfig

TIGHT = {"rtol": 1e-12, "atol": 1e-14}
HAND_MADE = {"sgd": SGD, "rmsprop": RMSProp, "adam": Adam}

# A learned rule that says nothing yet -> the hand-made one that it then is.
NEUTRAL = {f"meta_sgd-{b}": (lambda b=b: MetaSGD(MetaSGDConfig(base=b)), rule) for b, rule in HAND_MADE.items()}
for _name, _kind, _config in (
    ("l2l", L2L, L2LConfig),
    ("optim4rl", Optim4RL, Optim4RLConfig),
    ("open", OPEN, OPENConfig),
    ("mlp", MLPOptimizer, MLPOptimizerConfig),
):
    NEUTRAL |= {
        f"{_name}-{b}": (lambda k=_kind, c=_config, b=b: k(c(nominal=b)), rule) for b, rule in HAND_MADE.items()
    }
neutral = pytest.mark.parametrize(("learned", "hand_made"), list(NEUTRAL.values()), ids=list(NEUTRAL))


def settings(**changes):
    values = {"n_envs": 3, "n_steps": 5, "n_epochs": 2, "n_minibatches": 1, "hyper": Hyper(learning_rate=0.05)}
    return PPOConfig(**values | changes)


# --- neutral weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner_type", [PlainInner, GraphInner])
@neutral
def test_neutral_weights_are_the_hand_made_rule_in_ppo(learned, hand_made, inner_type):
    thetas = []
    for rule in (learned().double(), hand_made()):
        agents, config = experience.population("mlp", value=True), settings()
        rule.fit_layout(agents.layout)
        agents.agent.watched = rule.reads_activity
        thetas.append(unrolled(agents, config, Slots.fill(config, optimizer=rule), inner_type=inner_type).theta)
    assert torch.equal(thetas[0], thetas[1])
    assert (thetas[0] != experience.population("mlp", value=True).theta).any()


@neutral
def test_neutral_weights_are_the_hand_made_rule_in_a_torch_loop(learned, hand_made):
    found = []
    for rule in (learned(), hand_made()):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizer = RuleOptimizer(module.parameters(), rule, lr=0.02)
        optimizer.watch(module)
        train(module, optimizer, 5)
        found.append(nn.utils.parameters_to_vector(module.parameters()))
    assert torch.equal(*found)


@pytest.mark.parametrize("inner_type", [PlainInner, GraphInner])
def test_neutral_learned_adam_is_adam_to_rounding(inner_type):
    """Powers of tensors round otherwise than powers of numbers, in the last digit."""
    thetas = []
    for rule in (LearnedAdam().double(), Adam()):
        agents, config = experience.population("mlp", value=True), settings()
        thetas.append(unrolled(agents, config, Slots.fill(config, optimizer=rule), inner_type=inner_type).theta)
    assert_close(*thetas, rtol=1e-13, atol=1e-14)


def train(module, optimizer, steps, begin=0):
    """Fit a fixed function; the loss before each step."""
    losses = []
    for k in range(begin, begin + steps):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(k)).to(next(module.parameters()).dtype)
        loss = (module(x) - torch.stack([x.sum(1), x.prod(1)], 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


# --- formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "weights"), [(Optim4RL, 514), (OPEN, 1211)])
def test_as_many_weights_as_published(kind, weights):
    assert sum(p.numel() for p in kind().parameters()) == weights


def test_the_larger_open_has_as_many_weights_as_published():
    assert sum(p.numel() for p in OPEN(OPENConfig(hidden=16, width=32)).parameters()) == 3571


def test_the_gru_equals_torch():
    ours, theirs = GRU(3, 4).double(), nn.GRUCell(3, 4).double()
    with torch.no_grad():
        ours.candidate.normal_()
        theirs.weight_ih.copy_(ours.input.weight)
        theirs.weight_hh.copy_(ours.recurrent)
        theirs.bias_ih.copy_(ours.input.bias.normal_())
        theirs.bias_hh.copy_(torch.cat([torch.zeros(8), ours.candidate]))
    x, h = torch.randn(5, 3).double(), torch.randn(5, 4).double()
    assert_close(ours(x.T[None], h.T[None])[0].T, theirs(x, h), **TIGHT)


def test_the_lstm_equals_torch():
    ours, theirs = LSTM(3, 4).double(), nn.LSTMCell(3, 4).double()
    order = torch.cat([torch.arange(8), torch.arange(12, 16), torch.arange(8, 12)])  # ours i f o g, torch i f g o
    with torch.no_grad():
        theirs.weight_ih.copy_(ours.input.weight[order])
        theirs.weight_hh.copy_(ours.recurrent[order])
        theirs.bias_ih.copy_(ours.input.bias[order])
        theirs.bias_hh.zero_()
    x, h, c = (torch.randn(5, n).double() for n in (3, 4, 4))
    found = [y[0].T for y in ours(x.T[None], h.T[None], c.T[None])]
    assert_close(found, list(theirs(x, (h, c))), **TIGHT)


def test_gradients_are_seen_as_log_and_sign():
    g = torch.tensor([0.0, 2.0, -0.5, 1e-6], dtype=torch.float64)
    log, sign = log_and_sign(g)
    assert_close(log, torch.tensor([-1, np.log(2) / 10, np.log(0.5) / 10, -1]), **TIGHT)
    assert_close(sign, torch.tensor([0, 1, -1, np.exp(10) * 1e-6], dtype=torch.float64), **TIGHT)


def test_optim4rl_by_hand():
    """One parameter, three steps; numpy."""
    rule = Optim4RL().double()
    w = {k: v.detach().numpy() for k, v in rule.named_parameters()}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731

    def gru(name, x, h):
        given, kept = w[f"{name}.input.weight"][:, 0] * x + w[f"{name}.input.bias"], w[f"{name}.recurrent"] @ h
        r, z = sigmoid(given[:8] + kept[:8]), sigmoid(given[8:16] + kept[8:16])
        return (1 - z) * np.tanh(given[16:] + r * (kept[16:] + w[f"{name}.candidate"])) + z * h

    theta = torch.zeros(1, 1, dtype=torch.float64)
    state, h_m, h_v = rule.initial_state(theta), np.zeros(8), np.zeros(8)
    for g in (0.3, -1.2, 0.7):
        step, state = rule.update(torch.full_like(theta, g), state, theta, 0.1)
        h_m, h_v = gru("m", g, h_m), gru("v", g * g, h_v)
        o1, o2 = (w[f"log_{k}.weight"][0] @ h + w[f"log_{k}.bias"][0] for k, h in (("m", h_m), ("v", h_v)))
        assert step.item() == pytest.approx(-0.1 * np.sign(g) * np.exp(o1) / np.sqrt(np.exp(o2) + 1e-8), rel=1e-12)


def test_open_by_hand():
    """The features of two tensors of one row, in the published order, and what becomes of the three outputs."""
    rule = OPEN().double()
    layout = Layout([Part("a", (2,), 0.0), Part("b", (1,), 1.0, critic=True)])
    g = np.array([0.3, -2.0, 0.5])
    theta = np.array([1.0, -1.0, 4.0])
    activity, noise = np.array([0.5, 1.5, 1.0]), np.array([0.1, -0.2, 3.0])
    heard = []
    rule.gru.register_forward_hook(lambda module, inputs, out: heard.append(inputs[0]))
    context = StepContext(layout, torch.tensor([0.25]), 0.75, torch.tensor([activity]), torch.tensor([noise]))
    rows = [torch.tensor([x]) for x in (g, theta)]
    step, state = rule.update(rows[0], rule.initial_state(rows[1]), rows[1], 0.01, context)

    decays = np.array([0.1, 0.5, 0.9, 0.99, 0.999, 0.9999])[:, None]
    m, log = (1 - decays) * g, lambda x: np.log(np.abs(x) + 1e-13)
    seen = np.concatenate([theta[None], np.sign(m), log(m), np.sign(g)[None], log(g)[None]])
    square = np.concatenate([np.repeat((seen[:, :2] ** 2).mean(1, keepdims=True), 2, 1), seen[:, 2:] ** 2], 1)
    known = [np.full(3, 0.25), [0.0, 0.0, 1.0], np.full(3, 0.75), activity]
    features = np.concatenate([seen / np.sqrt(1e-5 + square), known])
    assert_close(heard[0][0], torch.from_numpy(features), rtol=1e-9, atol=1e-9)
    assert_close(state["momenta"][0], torch.from_numpy(m), **TIGHT)

    o = rule.head(state["h"])[0].detach().numpy()
    u = o[0] * np.exp(1e-3 * o[1]) + o[2] * noise * [1, 1, 0]  # the value's parameter gets no noise
    assert_close(step[0], torch.from_numpy(-0.01 * (u - u.mean())), rtol=1e-9, atol=1e-12)


def test_dormancy():
    """Half of the units of a layer are dead, the others alike: 0 and 2; where nothing is known, 1."""
    said = torch.tensor([[[1.0, 0.0], [-1.0, 0.0]]])  # [P=1, n=2, H=2]
    layout = Layout([Part("w", (3, 2), layer="l"), Part("b", (2,), layer="l"), Part("t", (2, 2), layer="l", axis=0)])
    layout = Layout([*layout.parts, Part("other", (1,))])
    found = layout.spread(dormancy({"l": said}), torch.zeros(1, len(layout)))
    expected = [2, 0, 2, 0, 2, 0, 2, 0, 2, 2, 0, 0, 1]
    assert_close(found[0], torch.tensor(expected, dtype=torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_agents_tell_how_active_their_units_are(kind):
    """A unit whose weights and bias are zero is dormant, and so are the weights that feed it."""
    agents = experience.population(kind, value=True)
    agents.agent.watched = True
    weights = agents.weights(agents.theta)
    layer = "conv" if kind == "conv" else "trunk0"
    with torch.no_grad():
        weights[f"{layer}.bias"][0, 1] = 0
        unit = weights[f"{layer}.weight"][0]
        (unit[1] if kind == "conv" else unit[:, 1]).zero_()
    out = agents(experience.trajectory(experience.SPACES[kind], 0).obs)
    activity = agents.weights(agents.activity(out))
    where = activity[f"{layer}.bias"] < 1e-6
    assert where[0].nonzero().flatten().tolist() == [1] and not where[1].any()
    fed = activity[f"{layer}.weight"][0]
    assert not (fed[1] if kind == "conv" else fed[:, 1]).any()
    assert_close(activity[f"{layer}.bias"].mean(1), torch.ones(2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert_close(activity["value.bias"], torch.ones(2, 1, dtype=torch.float64))  # the only unit of its layer
    if kind == "mlp":
        assert [round(p.depth, 2) for p in agents.layout.parts if p.name.endswith("bias")] == [0, 0, 1, 1]
        assert [p.critic for p in agents.layout.parts if p.name.endswith("bias")] == [False, True, False, True]


# --- meta-gradients -----------------------------------------------------------------------------------------------


class HeldInputs:
    """Mixed into a rule: it sees the gradients and parameters of the base point, whatever they are now."""

    def update(self, grad, state, theta, learning_rate, context=None):
        if self.replaying:
            grad, theta, context = self.recorded[self.position]
            self.position += 1
        else:
            self.recorded.append((grad.detach(), theta.detach(), context))
        return super().update(grad, state, theta, learning_rate, context)


def _held(kind):
    return type(f"Held{kind.__name__}", (HeldInputs, kind), {})


def _rough(rule):
    """Weights that are no special case."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in rule.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return rule


# What is learned, and a learning rate with which three updates neither explode nor do nothing.
DIFFERENTIATED = {
    "meta_sgd": (MetaSGD, MetaSGDConfig(), 0.3),
    "meta_sgd-tensor-adam": (MetaSGD, MetaSGDConfig(per="tensor", base="adam"), 0.02),
    "learned_adam": (LearnedAdam, None, 0.02),
    "l2l": (L2L, L2LConfig(hidden=3), 0.1),
    "l2l-adam": (L2L, L2LConfig(hidden=3, nominal="adam"), 0.03),
    "optim4rl": (Optim4RL, Optim4RLConfig(hidden=3), 0.03),
    "optim4rl-sgd": (Optim4RL, Optim4RLConfig(hidden=3, nominal="sgd"), 0.1),
    "optim4rl-conditioned": (Optim4RL, Optim4RLConfig(hidden=3, conditioned=True), 0.03),
    "open": (OPEN, OPENConfig(hidden=3, width=4), 0.05),
    "mlp": (MLPOptimizer, MLPOptimizerConfig(hidden=4), 0.05),
}
differentiated = pytest.mark.parametrize("case", DIFFERENTIATED)


def meta_case(case, stop, kind="mlp"):
    """What meta-training differentiates: K = 3 updates of two epochs, one set of weights for both agents."""
    rule, config, rate = DIFFERENTIATED[case]
    torch.manual_seed(1)
    held = _held(rule)(config)
    held.recorded, held.replaying = [], False
    agents, objective = experience.population(kind, value=True), HeldPPO()
    held.fit_layout(agents.layout)
    held = _rough(held.double())
    held.stops_gradient = stop
    agents.agent.watched = held.reads_activity
    settled = settings(hyper=Hyper(learning_rate=rate, max_grad_norm=float("inf")))
    return agents, settled, Slots.fill(settled, objective=objective, optimizer=held)


@differentiated
def test_meta_gradient_with_stopped_gradients(case):
    agents, config, slots = meta_case(case, stop=True)
    slots.objective.hold()
    meta_loss(agents, config, slots)

    def evaluate():
        slots.objective.replay()
        slots.optimizer.replaying, slots.optimizer.position = True, 0
        return meta_loss(agents, config, slots)

    check_against_differences(slots.optimizer, evaluate)


@pytest.mark.parametrize("case", [c for c in DIFFERENTIATED if c not in ("open", "optim4rl-conditioned")])
def test_meta_gradient_without_stopping(case):
    """Logarithms of what passes zero (OPEN's, and the conditioned features) have no derivative to compare with."""
    agents, config, slots = meta_case(case, stop=False)
    slots.objective.hold()
    meta_loss(agents, config, slots)

    def evaluate():
        slots.objective.replay()
        slots.optimizer.replaying, slots.optimizer.recorded = False, []
        return meta_loss(agents, config, slots)

    check_against_differences(slots.optimizer, evaluate)


@differentiated
def test_one_set_of_weights_for_each_lifetime(case):
    """As evolution runs them: each agent as it is alone with its weights."""
    agents, config, slots = meta_case(case, stop=True)
    rule = slots.optimizer
    names, P = dict(rule.named_parameters()), len(agents.theta)
    g = torch.Generator().manual_seed(2)
    stacked = {k: v.detach() + 0.1 * torch.randn(P, *v.shape, generator=g, dtype=v.dtype) for k, v in names.items()}

    begin = agents.theta.detach().clone()

    def lived(values, many):
        rule.recorded, rule.replaying = [], False
        agents.theta.data.copy_(begin)
        slots.objective.hold()
        filled = Slots.fill(config, optimizer=substituted(rule, values, many))
        return unrolled(agents, config, filled, inner_type=PlainInner).theta.detach().clone()

    together = lived(stacked, True)
    for p in range(P):
        alone = lived({k: v[p] for k, v in stacked.items()}, False)
        assert_close(together[p], alone[p], rtol=1e-10, atol=1e-12)
    assert (together[0] != lived({k: v[1] for k, v in stacked.items()}, False)[0]).any()


def test_stopped_gradients_build_no_second_derivatives():
    """The loss's own graph is not followed, and the meta-gradient is that of the same rule with detached inputs."""
    found = []
    for through in (True, False):
        agents, config, slots = meta_case("optim4rl", stop=True)
        rule = slots.optimizer
        slots.objective.hold()
        rule.stops_gradient = through
        if not through:  # the inner loop keeps the graph, and the rule itself cuts it
            rule.update = lambda grad, state, theta, lr, context, own=rule.update: own(
                grad.detach(), state, theta.detach(), lr, context
            )
        found.append(torch.autograd.grad(meta_loss(agents, config, slots), list(rule.parameters())))
    assert_close(found[0], found[1], rtol=1e-10, atol=1e-14)


# --- in PPO -------------------------------------------------------------------------------------------------------


def test_open_is_told_progress_epochs_depth_and_noise():
    heard = []

    class Spy(OPEN):
        def update(self, grad, state, theta, learning_rate, context=None):
            heard.append(context)
            return super().update(grad, state, theta, learning_rate, context)

    config = PPOConfig(n_envs=2, n_steps=8, n_epochs=3, n_minibatches=2, agent=AgentConfig(hidden=(4,)))
    agent = PPO("CartPole-v1", config, optimizer=Spy(), seeds=2)
    agent.learn(3 * 16)
    assert [float(c.progress[0]) for c in heard] == [k for k in (0.0, 0.5, 1.0) for _ in range(6)]
    assert [c.epoch for c in heard[:6]] == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    noise = torch.stack([c.noise for c in heard])
    assert noise.shape == (18, *agent.lifetimes.population.theta.shape)
    assert 0.95 < float(noise.std()) < 1.05 and len(noise[:, 0, 0].unique()) == 18
    assert heard[0].activity.shape == noise[0].shape and heard[0].activity.std() > 0.1


def test_lifetimes_on_one_stream_have_the_same_noise():
    config = PPOConfig(n_envs=2, n_steps=4, n_epochs=1, n_minibatches=1, agent=AgentConfig(hidden=(4,)))
    torch.manual_seed(0)
    algorithm = Algorithm(config, Slots.fill(config, optimizer=OPEN()))
    streams = Streams(torch.tensor([0, 0, 1, 1]), 2)
    lives = Lifetimes(make_family("catch/5x5"), algorithm, 4, 5, 0, streams=streams)
    inner = lives.plain()
    for _ in range(3):
        lives.advance(inner)
    theta = lives.population.theta
    assert_close(theta[0], theta[1], rtol=1e-5, atol=1e-6)
    assert (theta[0] - theta[2]).abs().max() > 1e-3


def test_meta_sgd_fits_one_architecture():
    agent = PPO("CartPole-v1", optimizer="meta_sgd")
    rule = agent.algorithm.slots.optimizer
    assert rule.log_rate.numel() == agent.lifetimes.population.theta.shape[1]
    with pytest.raises(UserError, match="expected the same agents, or a fresh 'meta_sgd'"):
        PPO("Acrobot-v1", optimizer=rule)
    with pytest.raises(UserError, match="call its `fit_layout`"):
        MetaSGD().update(torch.ones(1, 1), {}, torch.ones(1, 1), 0.1)


# --- as a torch optimizer -----------------------------------------------------------------------------------------

LEARNED = [k for k, c in components().items() if c.slot == "optimizer" and c.__module__.startswith("meta_optimizers")]
each = pytest.mark.parametrize("name", LEARNED)


def made(name, module, **changes):
    torch.manual_seed(3)
    optimizer = RuleOptimizer(module.parameters(), _rough(components()[name]()), lr=0.003, total_steps=40, **changes)
    optimizer.watch(module)
    return optimizer


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))


@each
def test_saved_and_loaded_it_goes_on_with_the_same_numbers(name, tmp_path):
    module = network()
    optimizer = made(name, module)
    train(module, optimizer, 4)
    torch.save([module.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")
    save(optimizer.rule, tmp_path / "rule.safetensors")
    expected = train(module, optimizer, 4, begin=4)

    other = network()
    again = RuleOptimizer(other.parameters(), tmp_path / "rule.safetensors", lr=9.0, total_steps=40)
    again.watch(other)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    assert train(other, again, 4, begin=4) == expected
    assert expected != train(network(), made(name, module), 4, begin=4)


@each
def test_the_learning_rate_multiplies_the_step(name):
    moved = []
    for rate in (0.003, 0.006):
        module = network()
        before = nn.utils.parameters_to_vector(module.parameters()).detach()
        optimizer = made(name, module)
        optimizer.param_groups[0]["lr"] = rate  # as schedulers write it
        train(module, optimizer, 1)
        moved.append(nn.utils.parameters_to_vector(module.parameters()).detach() - before)
    assert_close(moved[1], 2 * moved[0], rtol=1e-3, atol=1e-6)
    assert moved[0].abs().max() > 0


@each
def test_a_parameter_without_gradient_stays_as_does_its_state(name):
    module = network()
    optimizer = made(name, module)
    train(module, optimizer, 2)
    first, second = module[0].weight.detach().clone(), module[2].weight.detach().clone()
    state = copy.deepcopy(optimizer.state_dict()["state"])[0]
    module.requires_grad_(True)
    for p in module[0].parameters():
        p.grad = None
    for p in module[2].parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(module[0].weight, first) and (module[2].weight != second).any()
    here = sum(p.numel() for p in module[0].parameters())
    after = optimizer.state_dict()["state"][0]
    for k, v in after.items():
        if v.shape[-1] > 1:
            assert torch.equal(v[..., :here], state[k][..., :here]) and (v[..., here:] != state[k][..., here:]).any()


@each
def test_higher_takes_it_and_its_weights_get_a_gradient(name):
    module = network().double()
    optimizer = made(name, module)
    optimizer.rule.double()
    twin = copy.deepcopy(module)
    plain = made(name, twin)
    plain.rule.double()
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(16, 3, generator=g, dtype=torch.float64) for _ in range(3)]
    with higher.innerloop_ctx(module, optimizer) as (fast, steps):
        for x in batches:
            steps.step((fast(x) - x[:, :2]).square().mean())
        grads = torch.autograd.grad(fast(batches[0]).square().sum(), list(optimizer.rule.parameters()))
        for x in batches:
            plain.zero_grad()
            (twin(x) - x[:, :2]).square().mean().backward()
            plain.step()
        if not optimizer.rule.reads_activity:  # copies made by higher have no hooks
            assert_close(list(fast.parameters()), [p.detach() for p in twin.parameters()], rtol=1e-9, atol=1e-12)
    assert sum(float(v.abs().sum()) for v in grads) > 0


def test_higher_takes_adamw_and_a_stopped_denominator():
    """AdamW as torch has it, with its state; a stopped denominator has Adam's steps and another meta-gradient."""
    module = network().double()
    x = torch.randn(16, 3, dtype=torch.float64)
    loss = lambda m: (m(x) - x[:, :2]).square().mean()  # noqa: E731
    adamw = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.3)
    for _ in range(3):
        adamw.zero_grad()
        loss(module).backward()
        adamw.step()
    rate = torch.tensor(0.02, dtype=torch.float64, requires_grad=True)
    twin = copy.deepcopy(module)
    other = torch.optim.AdamW(twin.parameters())
    other.load_state_dict(adamw.state_dict())
    with higher.innerloop_ctx(module, adamw, override={"lr": [rate]}) as (fast, steps):
        for _ in range(3):
            steps.step(loss(fast))
            other.zero_grad()
            loss(twin).backward()
            other.step()
        assert_close(list(fast.parameters()), [p.detach() for p in twin.parameters()], rtol=1e-10, atol=1e-12)
        assert torch.autograd.grad(loss(fast), rate)[0].abs() > 0
    slopes = []
    for stop in (False, True):
        rule = Adam(AdamConfig(stop_denominator=stop))
        inner = RuleOptimizer(module.parameters(), rule)
        with higher.innerloop_ctx(module, inner, copy_initial_weights=False, override={"lr": [rate]}) as (fast, steps):
            steps.step(loss(fast))
            steps.step(loss(fast))
            slopes.append((loss(fast).detach(), *torch.autograd.grad(loss(fast), [rate, module[0].weight])))
    assert_close(slopes[0][0], slopes[1][0], **TIGHT)
    assert (slopes[0][2] - slopes[1][2]).abs().max() > 1e-6


def test_mistakes_are_said():
    module = network()
    with pytest.raises(UserError, match=r"'dpo' is a component of the slot 'objective': expected an optimizer"):
        RuleOptimizer(module.parameters(), "dpo")
    optimizer = RuleOptimizer(module.parameters(), OPEN())
    module(torch.ones(1, 3)).sum().backward()
    with pytest.raises(UserError, match=r"'open' reads how active units are: call the optimizer's `watch\(module\)`"):
        optimizer.step()
    with pytest.raises(UserError, match="total_steps is 0: expected at least 1"):
        RuleOptimizer(module.parameters(), OPEN(), total_steps=0)
    with pytest.raises(UserError, match="unknown nominal 'adamw': the nearest of adam, none, rmsprop, sgd is 'adam'"):
        OPENConfig(nominal="adamw")
    with pytest.raises(UserError, match="hidden is 0: expected at least 1"):
        Optim4RLConfig(hidden=0)


def test_what_a_watched_module_tells():
    """Progress and epochs by the number of steps; units where the next layer reads them, behind the activation."""
    module = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        module[0].bias[:] = torch.tensor([-100.0, 1, 1, 1])  # the first unit is dead
    optimizer = RuleOptimizer(module.parameters(), OPEN(), total_steps=8, steps_per_update=4, epochs=2)
    optimizer.watch(module)
    seen = []
    for age in range(8):
        module(torch.randn(5, 3))
        context = optimizer.context(0, age, module[0].weight)
        seen.append((context.progress, context.epoch))
    assert seen == [(p, e) for p in (0.0, 1.0) for e in (0.0, 0.0, 1.0, 1.0)]
    activity = context.activity[0]
    assert (activity[:3] == 0).all() and (activity[3:12] > 0).all()
    assert context.layout.depth.unique().tolist() == [0.0, 1.0]
    other = optimizer.context(0, 3, module[0].weight)
    assert torch.equal(optimizer.context(0, 3, module[0].weight).noise, other.noise)
    assert not torch.equal(context.noise, other.noise)


# --- evolution ----------------------------------------------------------------------------------------------------


class Ruled(Quadratic):
    """Quadratics that a learned rule descends, all of them the same one."""

    def __init__(self, lifetimes, rule):
        super().__init__(lifetimes, dimensions=2, streams=torch.zeros(lifetimes, dtype=torch.int64))
        numbers = [[0.6, 1.8], [-0.5, 0.7], [1.2, -1.6]]  # whatever the number of lifetimes
        rows = (torch.tensor(x, dtype=torch.float64).expand(lifetimes, 2) for x in numbers)
        self.curvature, self.centre, self.start = rows
        self.rule = rule
        self._state = {"theta": self.start.clone()} | rule.initial_state(self.start)

    def step(self, state, data, eta):
        theta = state["theta"]
        own = {k: v for k, v in state.items() if k != "theta"}
        rule = substituted(self.rule, eta.values, eta.stacked)
        step, own = rule.update(self.curvature * (theta - self.centre), own, theta, 0.3)
        loss, zero = self.judge(state, data, eta), theta.new_zeros(self.lifetimes)
        return Moved({"theta": theta + step} | own, loss, zero, zero, theta.isfinite().all(1))


def test_the_mean_of_evolution_is_the_smoothed_gradient():
    """Of the cost after four updates, over sigma = 1, by quadrature; the gradient at the mean itself is another one."""
    rule = MetaSGD(MetaSGDConfig(per="parameter", base="adam", sizes=(2,))).double()
    updates, sigma = 4, 1.0
    config = EvolutionConfig(window=updates, sigma=sigma, fitness="last", sharing="population")
    mean = {"log_rate": torch.tensor([-0.5, 0.5], dtype=torch.float64)}

    def costs(points):
        """[n] of rules at eta [n, 2]; differentiable."""
        problem = Ruled(len(points), rule)
        state = problem.present()
        for _ in range(updates):
            state = problem.step(state, problem.collect(state), Eta({"log_rate": points}, stacked=True)).state
        return 0.5 * state["theta"].square().sum(1)

    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z = torch.cartesian_prod(*[torch.from_numpy(nodes)] * 2)
    w = torch.outer(*[torch.from_numpy(weights / weights.sum())] * 2).flatten()
    smoothed = (w * costs(mean["log_rate"] + sigma * z)) @ z / sigma
    point = mean["log_rate"].clone().requires_grad_()
    (plain,) = torch.autograd.grad(costs(point.unsqueeze(0)).sum(), point)

    found = [Evolution(config, seed=seed)(Ruled(2000, rule), Eta(mean)).grads["log_rate"] for seed in range(30)]
    error = torch.stack(found).std(0) / len(found) ** 0.5
    assert ((torch.stack(found).mean(0) - smoothed).abs() < 3 * error).all()
    assert ((smoothed - plain).abs() > 10 * error).any()


def test_evolution_meta_trains_open_and_goes_on_as_if_without_break():
    """Weights that are all zero at first; noise, activity and progress in every member; a checkpoint in the middle."""
    small, hyper = AgentConfig(hidden=(4,)), Hyper(learning_rate=1.0)  # large steps, so that members differ
    agent = PPOConfig(n_envs=2, n_steps=9, n_epochs=2, n_minibatches=1, agent=small, hyper=hyper)
    estimator = EvolutionConfig(window=2, sigma=0.3)
    config = MetaTrainConfig(lifetimes=4, horizon=2, learning_rate=0.1, agent=agent, estimator=estimator)

    def trainer():
        return MetaTrainer(make_family("catch/5x5"), OPEN(OPENConfig(start="zero")), config)

    whole, first, second = trainer(), trainer(), trainer()
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for _ in range(2):
        second.step()
    flat = nn.utils.parameters_to_vector(whole.component.parameters())
    assert (flat != 0).any() and torch.equal(flat, nn.utils.parameters_to_vector(second.component.parameters()))


@pytest.mark.parametrize("estimator", ["truncated", "rematerialised", "first_order", "bmg"])
def test_estimators_of_windows_move_every_learned_optimizer(estimator):
    small, hyper = AgentConfig(hidden=(4,)), Hyper(learning_rate=0.01)
    agent = PPOConfig(n_envs=2, n_steps=9, n_epochs=1, n_minibatches=1, agent=small, hyper=hyper)
    for name in LEARNED:
        torch.manual_seed(0)
        rule = _rough(components()[name]()) if name != "meta_sgd" else MetaSGD()
        config = MetaTrainConfig(
            lifetimes=3, horizon=4, agent=agent, estimator=replace(estimator_config(estimator), window=2)
        )
        trainer = MetaTrainer(make_family("catch/5x5"), rule, config)
        before = nn.utils.parameters_to_vector(rule.parameters()).detach().clone()
        seen = [trainer.step() for _ in range(3)]
        assert all(row["skipped"] == 0 and row["broken"] == 0 for row in seen), name
        assert (nn.utils.parameters_to_vector(rule.parameters()) != before).any(), name


# --- what users do with optimizers --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in LEARNED if n != "open"])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
def test_a_copy_of_module_and_optimizer_goes_on_as_they_do(name, how):
    module = network()
    optimizer = made(name, module)
    train(module, optimizer, 3)
    other, again = how((module, optimizer))
    assert train(module, optimizer, 3, begin=3) == train(other, again, 3, begin=3)


def test_a_copy_is_not_watched_and_disturbs_nobody():
    """Neither a copied optimizer, which says so, nor a copy of the module that runs on other data."""
    module = network()
    optimizer = made("open", module)
    module(torch.ones(2, 3))
    other, again = copy.deepcopy((module, optimizer))
    before = {k: v.clone() for k, v in optimizer._watchers[0].units.items()}
    other(torch.zeros(5, 3)).sum().backward()
    pickle.loads(pickle.dumps(module))(torch.zeros(5, 3))
    assert all(torch.equal(v, before[k]) for k, v in optimizer._watchers[0].units.items())
    with pytest.raises(UserError, match=r"call the optimizer's `watch\(module\)`"):
        again.step()
    again.watch(other)
    again.step()


@pytest.mark.parametrize("name", LEARNED)
def test_parameters_of_another_precision(name):
    """The rule's own weights stay as they are; a change of them is seen."""
    module = network().double()
    optimizer = made(name, module)
    train(module, optimizer, 2)
    assert {p.dtype for p in optimizer.rule.parameters()} == {torch.float32}
    assert all(v.dtype == torch.float64 for v in optimizer.state[next(module.parameters())].values())
    before = nn.utils.parameters_to_vector(module.parameters()).detach().clone()
    with torch.no_grad():
        for p in optimizer.rule.parameters():
            p.fill_(0.0 if name != "meta_sgd" else -100.0)
    train(module, optimizer, 1)
    moved = (nn.utils.parameters_to_vector(module.parameters()) - before).abs().max()
    assert moved < 1e-9 or name in ("optim4rl", "learned_adam")  # exp(0) = 1: these go on with a step of one


def test_a_second_branch_that_is_as_wide_as_a_layer_reads_the_observation():
    actor, critic = nn.Linear(4, 4), nn.Linear(4, 4)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.actor, self.critic = actor, critic

        def forward(self, x):
            return self.actor(x), self.critic(x)

    module = Both()
    optimizer = RuleOptimizer(module.parameters(), OPEN())
    optimizer.watch(module, critic=lambda name: name.startswith("critic"))
    x = torch.randn(6, 4)
    said = module(x)
    units = optimizer._watchers[0].units
    assert torch.equal(units["actor"][0], said[0]) and torch.equal(units["critic"][0], said[1])


def test_several_modules_are_watched_one_after_the_other():
    actor, critic = network(), network()
    optimizer = RuleOptimizer([*actor.parameters(), *critic.parameters()], OPEN())
    optimizer.watch(actor)
    optimizer.watch(critic, critic=lambda name: True)
    optimizer.watch(actor)  # again: nothing is counted twice
    for module, x in ((actor, torch.ones(2, 3)), (critic, torch.ones(5, 3))):
        module(x)
    context = optimizer.context(0, 0, actor[0].weight)
    half = sum(p.numel() for p in actor.parameters())
    assert not context.layout.critic[:half].any() and context.layout.critic[half:].all()
    assert len({p.name for p in context.layout.parts}) == 8
    assert (context.activity[0, :half] != 1).any() and (context.activity[0, half:] != 1).any()


def test_groups_have_rows_and_noise_of_their_own():
    one, two = network(), network()
    optimizer = RuleOptimizer([{"params": one.parameters()}, {"params": two.parameters(), "lr": 0.0}], OPEN())
    optimizer.watch(one)
    noise = [optimizer.context(i, 0, one[0].weight).noise for i in range(2)]
    assert noise[0].shape == noise[1].shape and (noise[0] != noise[1]).all()


def test_mistakes_with_parameters_and_states_are_said():
    module = network()
    with pytest.raises(UserError, match=r"rows is on, and parameters have shapes .*: expected one first axis"):
        RuleOptimizer(module.parameters(), SGD(), rows=True)
    with pytest.raises(UserError, match="rows is on: the parameters are those of many lifetimes"):
        RuleOptimizer([nn.Parameter(torch.ones(2, 3))], SGD(), rows=True).watch(module)
    with pytest.raises(UserError, match="The saved state is of the rule 'sgd': expected that of 'adam'"):
        RuleOptimizer(module.parameters(), Adam()).load_state_dict(
            RuleOptimizer(module.parameters(), SGD()).state_dict()
        )
    for wrong, said in (
        ({"rule": OPEN}, r"The rule is the class OPEN: expected one that is made, OPEN\(\)"),
        ({"rule": None}, "None is no component: expected an optimizer"),
        ({"rule": SGD(), "lr": -1.0}, "lr is -1.0: expected a number that is at least 0"),
        ({"rule": SGD(), "lr": "x"}, "lr is 'x': expected a number that is at least 0"),
        ({"rule": SGD(), "total_steps": 10, "steps_per_update": 4}, "total_steps is 10: expected a multiple of .* 4"),
    ):
        with pytest.raises(UserError, match=said):
            RuleOptimizer(module.parameters(), **wrong)


# --- beside other parts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["l2l", "open", "mlp_optimizer"])
def test_numbers_that_networks_are_told_are_not_moved(name):
    """Rules may move parameters whose gradient is zero; these are no parameters."""
    config = PPOConfig(n_envs=2, n_steps=8, n_epochs=2, n_minibatches=1, agent=AgentConfig(hidden=(4,)))
    agent = PPO("CartPole-v1", config, hyperparameters="mgrl", optimizer=name).learn(3 * 16)
    told = agent.lifetimes.population.theta[:, -2:]
    hyper = config.hyper
    assert_close(told, torch.tensor([[hyper.gamma, hyper.gae_lambda]]), rtol=1e-5, atol=0)


def test_what_acts_through_the_gradient_cannot_be_learned_beside_a_rule_that_stops_it():
    for plugged in ({"hyperparameters": "self_tuned"}, {"reward": "lirpg"}):
        with pytest.raises(
            UserError, match=r"which the optimizer 'l2l' takes as a constant: expected stop_gradient off"
        ):
            SelfTuning("CartPole-v1", optimizer="l2l", **plugged)
        SelfTuning("CartPole-v1", optimizer=L2L(L2LConfig(stop_gradient=False)), **plugged)
    rate = SelfTuned(SelfTunedConfig(("learning_rate",)))
    agent = SelfTuning("CartPole-v1", optimizer="l2l", hyperparameters=rate).learn(3 * 1024)
    assert agent.component("hyperparameters", 0).eta["learning_rate"].abs().max() > 0


def test_a_bootstrapped_target_is_told_where_it_stands():
    heard = []

    class Spy(OPEN):
        def update(self, grad, state, theta, learning_rate, context=None):
            heard.append(context)
            return super().update(grad, state, theta, learning_rate, context)

    agent = PPOConfig(n_envs=2, n_steps=9, n_epochs=1, n_minibatches=1, agent=AgentConfig(hidden=(4,)))
    config = MetaTrainConfig(lifetimes=2, horizon=8, agent=agent, estimator=replace(estimator_config("bmg"), window=1))
    MetaTrainer(make_family("catch/5x5"), Spy(), config).step()
    last, before = heard[-1], heard[-2]
    assert (last.progress > before.progress).any() and (last.progress >= before.progress).all() and last.epoch == 1.0
    assert (last.activity == 1).all() and not last.noise.any()


def test_a_lifetime_whose_gradient_is_not_finite_breaks_alone():
    """Its parameters become NaN, and the others keep their steps and their meta-gradient."""
    rule = _rough(L2L(L2LConfig(hidden=3)).double())
    agents = experience.population("mlp", value=True)
    inner = GraphInner(agents, rule, rule.initial_state(agents.theta.detach()))
    grad = torch.randn(agents.theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hyper = Hyper(learning_rate=0.1, max_grad_norm=float("inf"))
    whole, _ = inner.move(grad, inner.theta, hyper)
    expected = torch.autograd.grad(whole[0].square().sum(), list(rule.parameters()), retain_graph=True)
    grad[1, 0] = float("inf")
    step, _ = inner.move(grad, inner.theta, hyper)
    assert step[1].isnan().all() and torch.equal(step[0], whole[0])
    assert_close(torch.autograd.grad(step[0].square().sum(), list(rule.parameters())), expected, **TIGHT)
