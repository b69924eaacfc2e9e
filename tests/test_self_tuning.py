"""Parts learned in the agent's own lifetime: what changes nothing, whether the meta-gradients of single seeds are those
of differences, that seeds never meet, and what a long run keeps, saves and says."""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import math

import pytest
import torch
from example_components import RewardHead
from gymnasium.spaces import Box, Discrete
from probes import Probe, ProbeFamily
from torch.nn.functional import one_hot
from torch.testing import assert_close

from learned_rl import PPO, PPOConfig, artifacts
from learned_rl.agents import AgentConfig, Population
from learned_rl.component import Hyper
from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, Slots
from learned_rl.types import UserError
from learned_rl.update_rules import RULES, SGD, Adam, AdamConfig
from meta_optimizers.bootstrapped import Bootstrapped
from meta_optimizers.estimators import ESTIMATORS
from meta_optimizers.first_order import FirstOrder
from meta_optimizers.forward_mode import ForwardMode
from meta_optimizers.learning import Learning, OuterLossConfig
from meta_optimizers.outer_critic import OuterCriticConfig
from meta_optimizers.problem import Eta
from meta_optimizers.rematerialised import Rematerialised
from meta_optimizers.self_tuning import SelfTuning, SelfTuningConfig, initial
from meta_optimizers.truncated import TruncatedMetaGradient
from objectives.bijectors import NUMBERS
from objectives.contextual import Contextual, ContextualConfig
from objectives.impala import Impala
from objectives.lirpg import LIRPG, LIRPGConfig
from objectives.lpg import LPG
from objectives.mgrl import MGRL
from objectives.schedule import Schedule, ScheduleConfig
from objectives.self_tuned import SelfTuned, SelfTunedConfig
from objectives.soft_clip import PPOSoftClip
from objectives.stac import STAC
from objectives.stacx import STACX, STACXConfig

P = 3
STAGES = Probe(4, 2, 4, lambda s, a, t: 2.0 * (a == s % 2) - 1 + 0.5 * s, {}, chain=True, timeout=True)


class Stages(ProbeFamily):
    """Episodes of four stages, each with an action of its own that pays; they end by their time limit."""

    def __init__(self, as_numbers=True, dtype=torch.float32):
        self.probe, self.as_numbers, self.dtype = STAGES, as_numbers, dtype
        self.max_episode_steps = STAGES.length
        self.observation_space = Box(0.0, 1.0, (STAGES.states,)) if as_numbers else Discrete(STAGES.states)
        self.action_space = Discrete(STAGES.actions)

    def show(self, state):
        return super().show(state).to(self.dtype) if self.as_numbers else state


# --- meta-gradients --------------------------------------------------------------------------------------------------


class Tape:
    """What is said to it while it records, it says when it is played."""

    def __init__(self):
        self.record()

    def record(self):
        self.said, self.at = [], None

    def play(self):
        self.at = 0

    def __call__(self, *said):
        if self.at is None:
            self.said.append(said)
            return said
        self.at += 1
        return self.said[self.at - 1]


class Taped(Learning):
    """Agents of which whatever an update takes for constant is on tape, so that differences see it as constant too."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.tape, population = Tape(), self.lives.population
        if isinstance(objective := self.algorithm.slots.objective, TapedImpala):
            objective.tape = self.tape
        population.told = functools.partial(self._told, population)

    def _told(self, population, theta, hyper):
        """The numbers that networks are told."""
        if not (n := len(population.agent.conditions)):
            return theta
        (told,) = self.tape(Population.told(population, theta, hyper)[:, -n:])
        return torch.cat([theta[:, :-n], told], 1)

    def _slots(self, eta):
        slots = super()._slots(eta)
        for part in (slots.objective, slots.auxiliary):
            part.prepare = functools.partial(self._prepared, part)
        return slots

    def _prepared(self, part, trajectory, out, following, hyper, context):
        """What targets are made of, unless the outer gradient passes through it."""
        if not getattr(part, "differentiates_inputs", False):
            out, following = self.tape(out, following)
        return type(part).prepare(part, trajectory, out, following, hyper, context)


class TapedImpala(Impala):
    def targets(self, value, log_ratio, batch, hyper):
        return super().targets(*self.tape(value, log_ratio), batch, hyper)


def tuned(*numbers, **settings):
    return SelfTuned(SelfTunedConfig(numbers, **settings))


def contextual(*numbers, **settings):
    return Contextual(ContextualConfig(numbers, memory=1, hidden=(4,), **settings))


def lirpg(**settings):
    return LIRPG(LIRPGConfig(scale=0.5, hidden=(2,), **settings))


READ = tuple(k for k in NUMBERS if k not in ("vtrace_alpha", "prediction_coef", "aux_coef"))  # by PPO
STATES = ("gamma", "gae_lambda", "vtrace_alpha")
CASES = {
    "numbers": lambda: {
        "hyperparameters": tuned(*READ, "aux_coef"),
        "auxiliary": RewardHead(),
        "objective": PPOSoftClip(),
    },
    "layers": lambda: {"hyperparameters": tuned("learning_rate", "gamma", per_layer=True)},
    "states": lambda: {"hyperparameters": tuned(*STATES, per_state=STATES), "objective": TapedImpala()},
    "mgrl": lambda: {"hyperparameters": MGRL()},
    "stac": lambda: {"hyperparameters": STAC(), "objective": TapedImpala()},
    "stacx": lambda: {"auxiliary": STACX(STACXConfig(ent_coef=0.5))},
    "contextual": lambda: {"hyperparameters": contextual("ent_coef", "gamma", normalise=False)},
    "lirpg": lambda: {"reward": lirpg(zero=False)},
    "together": lambda: {
        "hyperparameters": tuned("gamma", "prediction_coef"),
        "reward": lirpg(),
        "objective": LPG(predictions=3, width=8, core="gru", embedding=4),
    },
}
TABLES, WHOLE = ("states", "together"), ("states", "stac", "together")  # agents, and rollouts that are not cut


def tuning(case, rule="sgd", critic="own", **loss):
    """A problem in float64 and, for each of P lifetimes, meta-parameters of its own, apart from each other."""
    torch.manual_seed(0)
    parts = {k: v.double() for k, v in CASES[case]().items()}
    if rule == "adam":
        parts["optimizer"] = Adam(AdamConfig(eps=1e-2))  # no cliffs
    numbers = {"gamma": 0.9, "gae_lambda": 0.8, "vtrace_alpha": 0.5, "ent_coef": 0.3, "clip_range_vf": 0.3}
    hyper = Hyper(learning_rate={"sgd": 1.0, "adam": 0.1}[rule], max_grad_norm=0.2, prediction_coef=0.7, **numbers)
    config = PPOConfig(2, 6, 2, 1 if case in WHOLE else 2, hyper=hyper, agent=AgentConfig(hidden=(4,), shared=True))
    algorithm = Algorithm(config, Slots.fill(config, **{"optimizer": SGD()} | parts))
    lives = Lifetimes(Stages(case not in TABLES, torch.float64), algorithm, P, 10, 0, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    theta = lives.population.theta
    theta.data.add_(0.5 * torch.randn(theta.shape, generator=g, dtype=theta.dtype))
    learned = [k for k, v in algorithm.slots.items() if list(v.parameters())]
    problem = Taped(lives, learned, OuterLossConfig(**loss), OuterCriticConfig(critic, epochs=1), restarts=False)
    eta = {f"{s}.{k}": v for s, c in problem.learned.items() for k, v in initial(c.double(), P, 0, False).items()}
    away = {k: v + 0.3 * torch.randn(v.shape, generator=g, dtype=v.dtype) for k, v in eta.items()}
    return problem, Eta(away, stacked=True)


def against_differences(estimator, problem, eta, eps=3e-6):
    """The gradient of each lifetime by its own meta-parameters, along random directions and single entries.

    The strongest entries are dealt to the lifetimes, one of them after the other.
    """
    length = estimator.config.window
    problem.tape.record()
    window = estimator.differentiate(problem, eta.leaf(), length, False)
    grads, first = eta.flatten(window.grads), {k: v.detach() for k, v in window.states[0].items()}
    size, g = grads.shape[1], torch.Generator().manual_seed(3)
    strongest = grads.abs().mean(0).topk(min(size, 4 * P)).indices
    rounds = -(-len(strongest) // P)
    dealt = strongest[torch.arange(rounds * P) % len(strongest)].view(rounds, P)
    directions = [torch.randn(P, size, generator=g, dtype=grads.dtype), *one_hot(dealt, size).to(grads)]
    assert bool(window.alive.all())
    for d in directions:
        sides = []
        for sign in (1, -1):
            problem.tape.play()
            moved = Eta(eta.unflatten(eta.flatten() + sign * eps * d), stacked=True)
            with torch.no_grad():
                sides.append(estimator.run(problem, moved, first, length, window.data).loss)
        difference, slope = (sides[0] - sides[1]) / (2 * eps), (grads * d).sum(1)
        assert_close(difference, slope, rtol=1e-5, atol=1e-9)
    for name, own in window.grads.items():
        assert bool(own.any()), name
    return window


def made(kind, **settings):
    return kind(kind.Config(**settings))


def judged(case):
    """All terms of the outer loss that these agents have."""
    lpg = {"regularisers": {"prediction_entropy": -0.1, "pi_hat_square": 0.2}}
    return {"kl": 0.4} | (lpg if case == "together" else {"value": 0.3})


@pytest.mark.parametrize("rule, data", [("adam", "fresh_reuse"), ("sgd", "same_is")])
@pytest.mark.parametrize("case", CASES)
def test_the_meta_gradient_of_one_update_is_that_of_differences(case, rule, data):
    problem, eta = tuning(case, rule, **judged(case))
    against_differences(made(TruncatedMetaGradient, window=1, outer_data=data), problem, eta)


@pytest.mark.parametrize("case", CASES)
def test_and_of_two(case):
    problem, eta = tuning(case, "adam", **judged(case))
    against_differences(made(TruncatedMetaGradient, window=2), problem, eta)


@pytest.mark.parametrize("case", CASES)
def test_and_towards_a_bootstrapped_target(case):
    problem, eta = tuning(case, "adam")
    value = {} if case == "together" else {"value": 0.3}
    window = against_differences(made(Bootstrapped, window=1, bootstrap=2, parameters=0.1, **value), problem, eta)
    assert window.loss.min().item() > 1e-5


@pytest.mark.parametrize("case", CASES)
def test_rematerialised_it_is_the_same(case):
    (whole, eta), (anew, _) = (tuning(case, "adam") for _ in range(2))
    found = [made(k, window=2)(problem, eta) for k, problem in ((TruncatedMetaGradient, whole), (Rematerialised, anew))]
    assert_close(found[1].grads, found[0].grads, rtol=1e-10, atol=1e-12)
    assert_close(anew.present(), whole.present(), rtol=1e-10, atol=1e-12)


FEW = ("layers", "mgrl", "stac")
MANY = [case for case in CASES if case not in (*FEW, "together")]  # numbers, each of which costs a run


@pytest.mark.parametrize("case", [*FEW, *(pytest.param(c, marks=pytest.mark.slow) for c in MANY)])
def test_forward_it_is_that_of_everything_so_far(case):
    (ahead, eta), (back, _) = (tuning(case, "adam") for _ in range(2))
    forward = made(ForwardMode, every=1)
    for _ in range(3):
        found = forward(ahead, eta)
    expected = made(TruncatedMetaGradient, window=3, outer_terms="last", outer_data="shifted")(back, eta)
    assert_close(found.grads, expected.grads, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_without_second_derivatives_it_is_another_one_from_the_second_update_on(case):
    for window, same in ((1, True), (2, False)):
        kinds = (TruncatedMetaGradient, FirstOrder)
        found = [made(kind, window=window)(*tuning(case)) for kind in kinds]
        exact, cheap = (tuning(case)[1].flatten(f.grads) for f in found)
        assert bool((torch.isclose(exact, cheap, rtol=1e-9, atol=1e-14).all(1) == same).all())


# --- nothing to learn ------------------------------------------------------------------------------------------------

AGENT = PPOConfig(2, 6, 2, 2, hyper=Hyper(learning_rate=0.05, ent_coef=0.01), agent=AgentConfig(hidden=(4,)))
WHOLE_ROLLOUTS = dataclasses.replace(AGENT, n_minibatches=1)
ALONE = ("truncated", "rematerialised", "first_order", "forward", "bmg")


def online(estimator=None, config=AGENT, family=None, learned=None, rate=0.1, seeds=P, seed=3, loss=None, **parts):
    """P seeds that learn online, quickly."""
    family = family or Stages()
    outer = SelfTuningConfig.suited(family.observation_space, estimator)
    outer = dataclasses.replace(outer, learning_rate=rate, loss=OuterLossConfig(**loss or {}))
    return SelfTuning(family, config, learned=learned, outer=outer, seeds=seeds, seed=seed, **parts)


def theta(agent):
    return agent.lifetimes.population.theta.detach()


def updated(agent, updates):
    """What was logged of each of so many steps of the outer loop."""
    return [agent._advance() for _ in range(updates)]


def same(a, b):
    """Bit by bit, wherever numbers are."""
    assert a.keys() == b.keys()
    for k in a:
        x, y = (torch.as_tensor(tree[k]).nan_to_num(7.5) for tree in (a, b))
        assert x.dtype == y.dtype and torch.equal(x, y), k


@pytest.mark.parametrize("parts, learned", [({}, None), ({"hyperparameters": "mgrl", "reward": "lirpg"}, ())])
@pytest.mark.parametrize("config", [AGENT, PPOConfig.a2c(n_envs=2)], ids=["ppo", "a2c"])
def test_with_nothing_to_learn_it_is_ppo(config, parts, learned):
    """Also where parts that could be learned are frozen."""
    torch.manual_seed(0)
    ours = SelfTuning(Stages(), config, learned=learned, seeds=P, seed=3, **parts)
    torch.manual_seed(0)
    plain = PPO(Stages(), config, seeds=P, seed=3, **parts)
    logs = [], []
    for agent, log in zip((ours, plain), logs, strict=True):
        agent.learn(4 * agent.per_update, lambda steps, said, log=log: log.append({"steps": steps} | said))
    assert len(logs[1]) == 4 and ours.learned == [] and ours.outer is None
    for a, b in zip(*logs, strict=True):
        same(a, b)
    same(ours.state_dict(), plain.state_dict())
    assert not torch.equal(theta(ours), theta(PPO(Stages(), config, seeds=P, seed=3, **parts)))


NEUTRAL = {
    "self_tuned": lambda: {"hyperparameters": tuned(*READ)},
    "contextual": lambda: {"hyperparameters": contextual("ent_coef", "gamma")},
    "lirpg": lambda: {"reward": lirpg()},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", NEUTRAL)
def test_at_an_outer_learning_rate_of_0_it_is_ppo_with_its_numbers(case, rule):
    """The batch that judged the last update has been collected already, and is learned from next."""
    updates, parts = 4, NEUTRAL[case]() | {"objective": "ppo_soft_clip"}
    hyper = AGENT.hyper.replace(clip_range_vf=0.3, max_grad_norm=0.3)
    config = dataclasses.replace(AGENT, optimizer=rule, hyper=hyper)
    plain = PPO(Stages(), config, objective="ppo_soft_clip", seeds=P, seed=3)
    names = parts["hyperparameters"].tuned if "hyperparameters" in parts else ()
    rows = {k: torch.full((P, 1), getattr(hyper, k)) for k in names}
    plain.lifetimes.hyper = hyper.replace(**rows)
    plain.learn(updates * plain.per_update)
    for rate in (0.0, 0.1):
        ours = online(config=config, rate=rate, **parts).learn((updates + 1) * plain.per_update)
        assert ours.outer.steps == updates and ours.steps == plain.steps + plain.per_update
        assert torch.equal(theta(ours), theta(plain)) == (rate == 0)
        if rate == 0:
            same(ours.lifetimes.optimizer_state, plain.lifetimes.optimizer_state)


# --- seeds never meet ------------------------------------------------------------------------------------------------

BOTH = {"hyperparameters": MGRL, "reward": lirpg}


def few(estimator):
    """What is learned: not much, where every number costs an update."""
    return {"hyperparameters": MGRL} | ({} if estimator == "forward" else {"reward": lirpg})


def spoilt(agent, how, seed=1):
    """From now on one of the seeds earns something else, or breaks."""
    lives = agent.lifetimes
    if how == "theta":
        lives.population.theta.data[seed] = torch.nan
    if how == "overflow":
        lives.hyper.learning_rate[seed] = 1e38
    if how in ("other", "reward"):
        plain, factor = lives.env.step, torch.ones(P, 1)
        factor[seed] = -3.0 if how == "other" else torch.nan

        def step(action):
            obs, reward, *rest = plain(action)
            return obs, (reward.view(P, -1) * factor).flatten(), *rest

        lives.env.step = step
    return agent


@pytest.mark.parametrize("how", ["other", "reward", "theta", "overflow"])
@pytest.mark.parametrize("estimator", ALONE)
def test_what_happens_to_one_seed_is_no_concern_of_the_others(estimator, how):
    parts = few(estimator)
    agents = [online(estimator, loss={"kl": 0.1, "value": 0.2}, **parts) for _ in range(2)]
    for agent in agents:
        agent.lifetimes.hyper = AGENT.hyper.replace(learning_rate=torch.full((P, 1), 0.05))
        updated(agent, 2)
    healthy, other = agents[0], spoilt(agents[1], how)
    before = {k: v.detach().clone() for k, v in other.outer.eta.items()}
    said, expected = updated(other, 3), updated(healthy, 3)
    rest = [0, 2]
    assert torch.equal(theta(other)[rest], theta(healthy)[rest]) and not torch.equal(theta(other), theta(healthy))
    for k, v in other.outer.eta.items():
        assert torch.equal(v[rest], healthy.outer.eta[k][rest]), k
        assert not torch.equal(v[rest], before[k][rest]), k
        assert not torch.equal(v[1], healthy.outer.eta[k][1]), k
        assert torch.equal(v[1], before[k][1]) == (how != "other"), k
    assert [x["broken"] for x in expected] == [0.0] * 3
    if how != "other":
        assert said[-1]["broken"] == 1.0 and not theta(other)[1].isfinite().all()
        assert all(math.isfinite(said[-1][k]) for k in ("meta/loss", "meta/grad_norm"))


# --- a long run ------------------------------------------------------------------------------------------------------


def tensors():
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def carried(agent):
    """Every tensor that the next step depends on, itself rather than its saved copy."""
    loop, lives = agent.outer, agent.lifetimes
    own = [*loop.eta.values(), *loop._state.values(), loop._before]
    pending = getattr(loop.estimator, "_pending", None) or getattr(loop.estimator, "trace", {})
    critic = [] if agent.problem.critic is None else agent.problem.critic._inner.state.values()
    live = [lives.population.theta, lives.obs, lives.age, *lives.optimizer_state.values(), *lives.memory.values()]
    return [*own, *pending.values(), *critic, *live]


@pytest.mark.parametrize(
    "estimator, early, late",
    [
        pytest.param("truncated", 200, 1000, marks=pytest.mark.slow),
        *((name, 3, 9) for name in ALONE),
    ],
)
def test_memory_is_constant(estimator, early, late):
    config = dataclasses.replace(AGENT, n_envs=1, n_steps=4, n_epochs=1, n_minibatches=1)
    agent = online(estimator, config, seeds=2, hyperparameters=MGRL)
    agent.learn(early * agent.per_update)
    held = tensors()
    assert len(carried(agent)) > 10
    agent.learn(late * agent.per_update)
    assert tensors() == held
    assert all(x.grad_fn is None for x in carried(agent))
    assert not any(x.requires_grad for x in agent.state_dict().values())


# --- save and resume -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ALONE)
def test_it_goes_on_from_where_it_was_saved(estimator):
    parts = few(estimator)
    if estimator != "forward":
        parts["hyperparameters"] = lambda: contextual("ent_coef", "gamma")  # which remembers
    make = functools.partial(online, estimator, loss={"kl": 0.1}, **parts)
    left_alone, resumed = make(seed=3), make(seed=4)
    updated(left_alone, 3)
    saved = left_alone.state_dict()
    expected = updated(left_alone, 3)
    resumed.load_state_dict(saved)
    for a, b in zip(updated(resumed, 3), expected, strict=True):
        same(a, b)
    same(resumed.state_dict(), left_alone.state_dict())


# --- what is learned, and by whom ------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [name for name, kind in ESTIMATORS.items() if kind.stacked])
def test_estimators_that_compare_lifetimes_are_refused(estimator):
    assert {*ESTIMATORS} - {*ALONE} == {"es", "pes", "nres", "cma"}
    with pytest.raises(UserError) as error:
        online(estimator, hyperparameters="self_tuned")
    assert str(error.value) == (
        f"estimator is {estimator!r}, which compares lifetimes: expected one that serves a single lifetime, such as "
        "'truncated' or 'bmg'."
    )


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"learned": ["rewards"]}, "slot .*'rewards'.*reward"),
        ({"learned": ["optimizer"]}, "^The optimizer slot holds 'adam', which has no parameters to learn.$"),
        ({"estimator": "trunkated", "reward": "lirpg"}, "estimator .*'trunkated'.*truncated"),
        ({"estimator": "forward", "reward": "lirpg"}, "^eta has [0-9]+ numbers: expected at most 64"),
        ({"reward": "lirpg", "objective": "lpg", "loss": {"value": 1.0}}, "^Agents of 'lpg' have no value"),
        ({"hyperparameters": tuned("clip_range")}, "^clip_range cannot be learned with 'ppo_clip'"),
    ],
)
def test_what_cannot_be_learned_is_refused(settings, said):
    with pytest.raises(UserError, match=said) as error:
        online(config=WHOLE_ROLLOUTS, **settings)
    assert "\n" not in str(error.value)


def test_a_number_without_a_derivative_may_be_there_and_not_be_learned():
    parts = {"hyperparameters": tuned("clip_range"), "reward": "lirpg"}
    assert online(learned=["reward"], **parts).learned == ["reward"]
    assert online(objective="ppo_soft_clip", **parts).learned == ["reward", "hyperparameters"]


@pytest.mark.parametrize(
    "learned, expected",
    [(None, ["reward", "hyperparameters"]), (["objective", "reward"], ["objective", "reward"]), ((), [])],
)
def test_what_is_made_for_it_is_learned_unless_said_otherwise(learned, expected):
    agent = online(learned=learned, hyperparameters="self_tuned", reward="lirpg", objective="lpo")
    assert agent.learned == expected
    assert {k.partition(".")[0] for k in (agent.outer.eta if expected else {})} == set(expected)


def test_the_outer_learning_rate_is_that_of_the_most_careful_part():
    for parts, expected in (({"hyperparameters": MGRL}, MGRL), (BOTH, LIRPG)):
        assert SelfTuning(Stages(), AGENT, **parts).outer.outer.learning_rate == expected.outer_rate
    assert MGRL.outer_rate > LIRPG.outer_rate


NET = "hyperparameters.net.0.weight"


@pytest.mark.parametrize("plug", ["contextual", Contextual, lambda: contextual("gamma")], ids=["name", "kind", "maker"])
def test_seeds_begin_with_weights_of_their_own(plug):
    first, again, others = (online(hyperparameters=plug, seed=seed).outer.eta[NET] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    rows = [*first, *others]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(rows, 2))


@pytest.mark.parametrize("filed", [False, True])
def test_or_with_those_that_they_are_given(filed, tmp_path):
    given = contextual("gamma")
    artifacts.save(given, tmp_path / "given.safetensors")
    eta = online(hyperparameters=str(tmp_path / "given.safetensors") if filed else given).outer.eta
    for k, v in given.named_parameters():
        assert torch.equal(eta[f"hyperparameters.{k}"], v.expand(P, *v.shape)), k


def test_what_a_seed_has_learned_is_a_component_of_its_own(tmp_path):
    agent = online(**BOTH)
    updated(agent, 2)
    for slot, seed in itertools.product(BOTH, range(P)):
        part, eta = agent.component(slot, seed), {k: v.clone() for k, v in agent.outer.eta.items()}
        artifacts.save(part, tmp_path / f"{slot}{seed}.safetensors")
        updated(agent, 1)
        loaded = artifacts.load(tmp_path / f"{slot}{seed}.safetensors")
        assert type(loaded) is type(part) and loaded.config == part.config
        weights = {f"{slot}.{k}": v for k, v in loaded.named_parameters()}
        assert weights.keys() == {k for k in eta if k.startswith(slot)}
        same(weights, {k: eta[k][seed] for k in weights})
        assert not any(torch.equal(v, eta[k][seed - 1]) for k, v in weights.items())
    parts = {slot: tmp_path / f"{slot}1.safetensors" for slot in BOTH}
    assert bool(theta(PPO(Stages(), AGENT, **parts).learn(12)).isfinite().all())


def test_numbers_a_reward_and_an_objective_are_learned_together():
    parts = CASES["together"]()
    agent = online(None, WHOLE_ROLLOUTS, Stages(False), learned=list(parts), loss=judged("together"), **parts)
    before = {k: v.detach().clone() for k, v in agent.outer.eta.items()}
    said = updated(agent, 3)[-1]
    assert {k.partition(".")[0] for k in before} == set(parts) and "tuned/prediction_coef" in said
    for k, v in agent.outer.eta.items():
        assert (v != before[k]).flatten(1).any(1).tolist() == [True] * P, k


def test_the_log_says_how_the_seeds_tuned_numbers_lie():
    agent = online(hyperparameters=tuned("gamma"), seeds=5)
    updated(agent, 3)
    eta = agent.outer.eta["hyperparameters.eta.gamma"].detach().clone()
    (said,) = updated(agent, 1)
    number = SelfTuned(agent.problem.learned["hyperparameters"].config).learned("gamma", AGENT.hyper.gamma, eta)
    low, _, high = sorted(number.flatten().tolist())[1:4]
    expected = {"tuned/gamma": number.mean().item(), "tuned/gamma_low": low, "tuned/gamma_high": high}
    assert low < high and {k: said[k] for k in expected} == pytest.approx(expected, rel=1e-6)


# --- what judges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["own", "agent"])
def test_no_learned_number_enters_the_outer_loss(source):
    problem, eta = tuning("mgrl", critic=source, **judged("mgrl"))
    state = problem.present()
    data = problem.collect(state)
    for how in ({}, {"importance": True}, {"bare": True}):
        expected = problem.judge(state, data, eta.leaf(), **how)
        assert not expected.requires_grad and bool(expected.any())
        for value in (-3.0, 0.0, 3.0):
            other = Eta({k: torch.full_like(v, value) for k, v in eta.values.items()}, stacked=True)
            assert torch.equal(problem.judge(state, data, other, **how), expected)


@pytest.mark.parametrize("source", ["own", "agent"])
def test_nor_does_a_configured_one(source):
    """Agents that begin alike and learn with other numbers are judged alike, at first."""
    seen = []
    for gamma, gae_lambda in ((0.9, 0.8), (0.5, 0.3)):
        hyper = AGENT.hyper.replace(gamma=gamma, gae_lambda=gae_lambda)
        outer = SelfTuningConfig(critic=OuterCriticConfig(source), loss=OuterLossConfig(**judged("")))
        config = dataclasses.replace(AGENT, hyper=hyper)
        agent = SelfTuning(Stages(), config, outer=outer, hyperparameters="self_tuned", seeds=P)
        state = agent.problem.present()
        seen.append(agent.problem.collect(state))
        seen[-1]["loss"] = agent.problem.judge(state, seen[-1], agent.outer.present)
    same(*seen)


@pytest.mark.parametrize(
    "parts, learned, own",
    [
        ({"hyperparameters": "mgrl"}, None, True),
        ({"hyperparameters": tuned("gae_lambda", "ent_coef")}, None, False),
        ({"reward": "lirpg"}, None, True),
        ({"reward": "lirpg", "auxiliary": "stacx"}, ["auxiliary"], True),
        ({"hyperparameters": Schedule(ScheduleConfig(numbers={"gamma": (0.5,)})), "auxiliary": "stacx"}, None, True),
        (
            {"hyperparameters": Schedule(ScheduleConfig(numbers={"ent_coef": (0.5,)})), "auxiliary": "stacx"},
            None,
            False,
        ),
        ({"objective": "lpo", "auxiliary": "stacx"}, ["objective"], True),
        ({"objective": "lpo", "auxiliary": "stacx"}, None, False),
        ({"objective": "lpg", "auxiliary": "stacx"}, None, True),
    ],
)
def test_who_values_states(parts, learned, own):
    """The agents, unless what they predict is learned, is nothing, or another reward's or discount's; or as asked."""
    for source, gamma, expected in (("auto", 0.99, own), ("auto", 0.9, True), ("own", 0.99, True)):
        config = dataclasses.replace(WHOLE_ROLLOUTS, hyper=AGENT.hyper.replace(gamma=gamma))
        outer = SelfTuningConfig(critic=OuterCriticConfig(source))
        agent = SelfTuning(Stages(), config, learned=learned, outer=outer, **parts)
        assert (agent.problem.critic is not None) == expected, (source, gamma)


def test_a_judge_that_breaks_leaves_the_agents_alone():
    """Its advantages overflow at once; agents are still those of PPO, and eta does not move."""
    critic = OuterCriticConfig("own", learning_rate=1e30)
    outer = SelfTuningConfig(critic=critic, learning_rate=0.1)
    agent = SelfTuning(Stages(), AGENT, outer=outer, seeds=P, seed=3, hyperparameters=tuned("ent_coef"))
    metrics = updated(agent, 6)
    plain = PPO(Stages(), AGENT, seeds=P, seed=3)
    plain.lifetimes.hyper = AGENT.hyper.replace(ent_coef=torch.full((P, 1), AGENT.hyper.ent_coef))
    skipped = [m["meta/skipped"] for m in metrics]
    assert skipped[-1] == 1 and theta(agent).isfinite().all()
    still = SelfTuning(
        Stages(),
        AGENT,
        outer=dataclasses.replace(outer, learning_rate=0.0),
        seeds=P,
        seed=3,
        hyperparameters=tuned("ent_coef"),
    )
    updated(still, 6)
    plain.learn(6 * plain.per_update)
    assert torch.equal(theta(still), theta(plain))


@pytest.mark.parametrize(
    "slot, seed, sentence",
    [
        ("reward", 0, "reward slot is not learned: expected one of hyperparameters"),
        ("hyperparameters", P, f"seed is {P}"),
    ],
)
def test_only_what_was_learned_can_be_taken(slot, seed, sentence):
    with pytest.raises(UserError, match=sentence):
        online(hyperparameters="mgrl").component(slot, seed)
    with pytest.raises(UserError, match="expected one of none"):
        online().component(slot, seed)


def test_a_soft_clip_of_0_lets_nothing_pass():
    x = torch.linspace(-1, 1, 5)
    assert not PPOSoftClip().clip(x, 0.0).any() and torch.equal(PPOSoftClip().clip(x, float("inf")), x)


def test_what_has_moved_is_known_after_a_resume():
    """A run that learned, broke, was saved and went on broken is not one in which nothing was ever learned."""
    agent = online(hyperparameters=tuned("ent_coef"))
    updated(agent, 2)
    theta(agent).fill_(float("nan"))
    again = online(hyperparameters=tuned("ent_coef"))
    again.load_state_dict(agent.state_dict())
    assert updated(again, 1)[0]["meta/skipped"] == 1
    again.outer.check_moved()
