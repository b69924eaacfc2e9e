"""Population based training: selection by hand, the paper's toy problem, populations that equal lone lifetimes,
schedules that replay."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from experiments.tuning.pbt import PBTConfig, PBTResult, exploit, explore, population_based_training
from learned_rl import PPO, artifacts
from learned_rl.component import Context, Hyper
from learned_rl.defaults import PPOClip
from learned_rl.evaluation import episode_returns, iqm, repeat_tasks
from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.spaces import Choice, LogOneMinus, LogUniform, Uniform
from learned_rl.tasks.bandits import BanditFamily
from learned_rl.tasks.chains import ChainFamily
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError, stream_seed
from objectives.schedule import Schedule, ScheduleConfig

CONFIG = PPOConfig(n_envs=4, n_steps=8, n_epochs=2, n_minibatches=2, hyper=Hyper(learning_rate=0.03, ent_coef=0.01))
RATES = {"learning_rate": LogUniform(1e-5, 1.0)}
BOTH = RATES | {"ent_coef": LogUniform(1e-4, 0.1)}
SIZE = {"tasks": 3, "seeds": 2, "episodes": 16}


def rng(seed=0):
    return np.random.default_rng(seed)


def algorithm(config=CONFIG, **plugged):
    return Algorithm(config, Slots.fill(config, **plugged))


def run(config, horizon=6, spaces=BOTH, family=None, seed=0, **changes):
    family = family or BanditFamily("bernoulli-5")
    return population_based_training(family, algorithm(), horizon, spaces, config, seed=seed, **SIZE | changes)


# --- exploit and explore ------------------------------------------------------------------------------------------


def test_the_worst_quarter_copies_the_best_quarter():
    scores = rng(1).permutation(16).astype(float)
    parents = exploit(scores, 0.25, rng())
    for member, score in enumerate(scores):
        assert scores[parents[member]] >= 12 if score < 4 else parents[member] == member
    chosen = np.array([scores[exploit(scores, 0.25, rng(i))[scores.argmin()]] for i in range(400)])
    counts = [(chosen == best).sum() for best in (12, 13, 14, 15)]
    assert sum(counts) == 400 and min(counts) > 70  # each of the best alike: 100 +- 9


@pytest.mark.parametrize(
    ("members", "quantile", "replaced"),
    [(2, 0.25, 1), (2, 0.5, 1), (3, 0.25, 1), (3, 0.5, 1), (5, 0.25, 2), (10, 0.1, 1), (10, 0.3, 3), (10, 0.0, 0)],
)
def test_how_many_are_replaced(members, quantile, replaced):
    parents = exploit(np.arange(float(members)), quantile, rng())
    assert parents[replaced:].tolist() == list(range(replaced, members))
    assert (parents[:replaced] >= members - replaced).all()


def test_of_two_the_worse_copies_the_better():
    assert exploit(np.array([1.0, 0.0]), 0.25, rng()).tolist() == [0, 0]
    assert exploit(np.array([0.0, 1.0]), 0.25, rng()).tolist() == [1, 1]
    tied = {tuple(exploit(np.zeros(2), 0.25, rng(i)).tolist()) for i in range(20)}
    assert tied == {(0, 0), (1, 1)}  # one of them, whichever


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("quantile", [0.0, 0.25])
def test_diverged_members_are_replaced_and_never_copied(bad, quantile):
    for seed in range(20):
        scores = rng(seed).normal(size=8)
        broken = rng(seed).permutation(8)[: 1 + seed % 7]
        scores[broken] = bad
        parents = exploit(scores, quantile, rng(seed))
        assert not set(parents) & set(broken)
        assert len(broken) >= 2 or quantile == 0 or (parents != np.arange(8)).sum() == 2
    assert exploit(np.full(3, bad), quantile, rng()).tolist() == [0, 1, 2]


def test_nobody_is_replaced_and_copied_at_once():
    for seed in range(200):
        scores = rng(seed).integers(0, 4, size=2 + seed % 9).astype(float)  # full of ties
        scores[rng(seed).random(len(scores)) < 0.2] = np.nan
        parents = exploit(scores, (0.0, 0.25, 0.5)[seed % 3], rng(seed))
        assert (parents[parents] == parents).all()
        if np.isfinite(scores).any():
            assert not (scores[parents] < np.nan_to_num(scores, nan=-np.inf)).any()  # a copy is of one as good


def test_only_copies_explore():
    numbers = {"a": np.array([1.0, 2.0, 3.0, 4.0]), "b": np.array([0.5, 0.6, 0.7, 0.8])}
    spaces, parents = {"a": Uniform(0, 10), "b": LogOneMinus(0.01, 0.9)}, np.array([3, 1, 2, 3])
    found = explore(numbers, parents, spaces, 0.0, rng())
    for name, values in numbers.items():
        assert found[name][1:].tolist() == values[1:].tolist()
    assert found["a"][0] in (pytest.approx(3.2), pytest.approx(4.8))
    assert found["b"][0] in (pytest.approx(1 - 0.8 * 0.2), pytest.approx(1 - 1.2 * 0.2))
    assert numbers["a"].tolist() == [1.0, 2.0, 3.0, 4.0]  # what was used before stays on record


def test_each_number_is_drawn_afresh_with_its_own_probability():
    n = 4000
    numbers, parents = {k: np.ones(n) for k in "ab"}, np.full(n, n - 1)
    found = explore(numbers, parents, {k: Uniform(0, 100) for k in "ab"}, 0.25, rng())
    afresh = {k: ~np.isclose(v, 0.8) & ~np.isclose(v, 1.2) for k, v in found.items()}
    for k in "ab":
        assert afresh[k].mean() == pytest.approx(0.25, abs=0.03)
        assert found[k][afresh[k]].mean() == pytest.approx(50, abs=4)
    assert (afresh["a"] & afresh["b"]).mean() == pytest.approx(0.0625, abs=0.02)


class Walk(Uniform):
    """Perturbed by adding noise."""

    def perturb(self, value, rng):
        return value + rng.normal(0, 0.1)


def toy(seed, quantile):
    """Best final value of Q = 1.2 - th0^2 - th1^2 where each of two workers ascends 1.2 - h0 th0^2 - h1 th1^2."""
    draws, theta = rng(seed), np.full((2, 2), 0.9)
    numbers = {"h0": np.array([1.0, 0.0]), "h1": np.array([0.0, 1.0])}
    for _ in range(20):
        for _ in range(10):
            theta = theta - 0.01 * 2 * np.stack([numbers["h0"], numbers["h1"]], 1) * theta
        scores = 1.2 - (theta**2).sum(1)
        parents = exploit(scores, quantile, draws)
        theta, numbers = theta[parents], explore(numbers, parents, {k: Walk(0, 1) for k in numbers}, 0.0, draws)
    return scores.max()


def test_the_toy_problem_of_the_paper():
    """Neither worker's own numbers reach the optimum 1.2; a population that changes them comes near it."""
    assert toy(0, quantile=0.0) == pytest.approx(1.2 - 0.81 - (0.9 * 0.98**200) ** 2)  # a grid of the two: 0.39
    found = [toy(seed, quantile=0.25) for seed in range(20)]
    assert np.mean(found) > 1.05 and min(found) > 0.5


# --- a population of lifetimes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PBTConfig(4, 10), PBTConfig(4, 6), PBTConfig(4, 2, quantile=0.0)])
def test_without_selection_members_are_lone_lifetimes_with_fixed_numbers(config):
    """Exactly: the numbers as rows, tasks outermost, members fastest."""
    family, M, agents = BanditFamily("bernoulli-5"), 4, 6
    result = run(config)
    numbers = {k: v[0] for k, v in result.numbers.items()}
    assert all((v == v[0]).all() for v in result.numbers.values()) and (result.parents == np.arange(M)).all()
    hyper = CONFIG.hyper.replace(**{k: torch.tensor(v).float().repeat(agents)[:, None] for k, v in numbers.items()})
    tasks = repeat_tasks(family.sample_split("validation", 3, 0), 2 * M)
    lone = Lifetimes(family, algorithm(), agents * M, 6, 0, tasks=tasks, split="validation", hyper=hyper)
    for i, mark in enumerate(result.steps // 32):
        while lone.age[0] < mark:
            lone.advance(lone.plain())
        policy = lone.population.bind(lone.population.theta.detach(), policy_only=True)
        returns = episode_returns(policy, family, tasks, 16, stream_seed("population", 0, mark)).double().numpy()
        scores = returns.reshape(3, 2, M) / tasks["mean"].amax(1).double().numpy().reshape(3, 2, M)
        assert result.scores[i] == pytest.approx([iqm(scores[..., m]) for m in range(M)], rel=1e-12)
    assert len(np.unique(result.scores[-1])) == M


def test_what_a_population_reports():
    result, again = (run(PBTConfig(8, 2, resample=0.0), horizon=7, seed=3) for _ in range(2))
    for field in dataclasses.fields(PBTResult):
        np.testing.assert_equal(getattr(result, field.name), getattr(again, field.name))
    other = run(PBTConfig(8, 2, resample=0.0), horizon=7, seed=4)
    assert not np.array_equal(result.scores, other.scores) and not np.array_equal(result.parents, other.parents)
    assert result.steps.tolist() == [64, 128, 192, 224]  # 32 environment steps an update, the last interval is short
    assert result.total_steps == 8 * 6 * 224 and result.evaluation_episodes == 8 * 6 * 4 * 16
    assert result.scores.shape == result.parents.shape == (4, 8)
    assert {k: v[0, 0] for k, v in result.numbers.items()} == pytest.approx({"learning_rate": 0.03, "ent_coef": 0.01})
    for i in range(1, 4):
        parents, rank = result.parents[i], result.scores[i - 1].argsort().argsort()
        for member in range(8):
            assert rank[parents[member]] >= 6 if rank[member] < 2 else parents[member] == member
            for name, values in result.numbers.items():
                low, high = BOTH[name].low, BOTH[name].high
                factors = (0.8, 1.2) if rank[member] < 2 else (1.0,)
                near = [np.clip(values[i - 1, parents[member]] * f, low, high) for f in factors]
                assert values[i, member] in [pytest.approx(x, rel=1e-12) for x in near]
    assert result.best == result.scores[-1].argmax()


def test_copies_go_on_from_their_parents_on_the_same_task_and_seed(monkeypatch):
    M, seen, copy = 8, [], Lifetimes.copy

    def spy(lifetimes, source, target):
        before = lifetimes.population.theta.clone()
        copy(lifetimes, source, target)
        seen.append((lifetimes, source, target, before))

    monkeypatch.setattr(Lifetimes, "copy", spy)
    result = run(PBTConfig(M, 2))
    assert len(seen) == 2
    for parents, (_, source, target, before) in zip(result.parents[1:], seen, strict=True):
        assert torch.equal(source // M, target // M)
        assert (parents[target % M] == (source % M).numpy()).all() and len(target) == 2 * 6
        assert not torch.equal(before[source], before[target])
    lifetimes, numbers = seen[-1][0], result.numbers["learning_rate"][-1]
    assert lifetimes.hyper.learning_rate.flatten().tolist() == pytest.approx(np.tile(numbers, 6).tolist())
    drawn = lifetimes.family.sample_split("validation", 3, 0)["mean"]
    assert torch.equal(lifetimes.tasks()["mean"], drawn.repeat_interleave(2 * M, 0))


def test_selection_leaves_no_member_behind():
    """Step sizes over five orders of magnitude: most of them learn nothing in so short a life."""
    family = ChainFamily()
    found = {q: run(PBTConfig(8, 5, quantile=q), 40, RATES, family).scores[-1] for q in (0.0, 0.25)}
    assert found[0.0].min() < 0.3 and found[0.25].min() > 0.7
    assert found[0.25].mean() > found[0.0].mean() + 0.2


def test_a_diverged_agent_marks_its_member_which_is_replaced(monkeypatch):
    advance = Lifetimes.advance

    def breaking(lifetimes, *args):
        record = advance(lifetimes, *args)
        if lifetimes.age[0] == 2:
            lifetimes.population.theta.data[4 * 3 + 1, 0] = torch.nan  # one of six agents of member 1
        return record

    monkeypatch.setattr(Lifetimes, "advance", breaking)
    result = run(PBTConfig(4, 2, quantile=0.0))
    assert np.isnan(result.scores).tolist() == [[False, True, False, False], [False] * 4, [False] * 4]
    best = np.nanargmax(result.scores[0])
    assert result.parents.tolist() == [[0, 1, 2, 3], [0, best, 2, 3], [0, 1, 2, 3]]


def test_a_population_that_diverged_says_so(monkeypatch):
    advance, closed = Lifetimes.advance, []

    def breaking(lifetimes, *args):
        record = advance(lifetimes, *args)
        lifetimes.population.theta.data[:, 0] = torch.inf
        lifetimes.env.close = lambda: closed.append(True)
        return record

    monkeypatch.setattr(Lifetimes, "advance", breaking)
    with pytest.raises(UserError, match="Every member has diverged after 2 updates"):
        run(PBTConfig(2, 2))
    assert closed == [True]


def test_an_interrupt_passes_through_and_leaves_nothing_behind():
    shared, family = algorithm(), BanditFamily("bernoulli-5")

    def interrupt(done, horizon):
        assert horizon == 6
        if done == 3:
            raise KeyboardInterrupt

    expected = run(PBTConfig(4, 2)).scores
    with pytest.raises(KeyboardInterrupt):
        population_based_training(family, shared, 6, BOTH, PBTConfig(4, 2), progress=interrupt, **SIZE)
    again = population_based_training(family, shared, 6, BOTH, PBTConfig(4, 2), **SIZE)
    assert np.array_equal(again.scores, expected)


@pytest.mark.parametrize(
    ("config", "spaces", "message"),
    [
        (CONFIG, {"n_steps": Uniform(1, 2)}, "'n_steps': the nearest of aux_coef"),
        (CONFIG, {"gama": Uniform(0, 1)}, "is 'gamma'"),
        (CONFIG, {}, "no numbers to schedule: name at least one of learning_rate"),
        (CONFIG, {"clip_range_vf": Uniform(0, 1)}, "clip_range_vf is None"),
        (CONFIG, {"gamma": Uniform(1.1, 1.2)}, "gamma is 1.1: expected at most 1"),
        (CONFIG, {"gamma": Choice(0.9, 0.95)}, "0.99 is not in the search space"),
        (dataclasses.replace(CONFIG, linear_decay=True), RATES, "constants with linear_decay"),
    ],
)
def test_what_cannot_be_scheduled(config, spaces, message):
    with pytest.raises(UserError, match=message):
        population_based_training(BanditFamily("bernoulli-5"), algorithm(config), 4, spaces, PBTConfig(2, 2), **SIZE)


def test_the_slot_of_the_schedule_has_to_be_free():
    slots = algorithm(hyperparameters=Schedule())
    with pytest.raises(UserError, match="slot holds schedule"):
        population_based_training(BanditFamily("bernoulli-5"), slots, 4, RATES, PBTConfig(2, 2), **SIZE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 1}, "population is 1: expected at least 2"),
        ({"interval": 0}, "interval is 0"),
        ({"quantile": 0.6}, "quantile is 0.6: expected a share from 0 to 0.5"),
        ({"resample": math.nan}, "resample is nan: expected a share from 0 to 1"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(UserError, match=message):
        PBTConfig(**changes)


# --- schedules ----------------------------------------------------------------------------------------------------


def test_the_schedule_is_that_of_the_best_member_and_its_ancestors():
    result = PBTResult(
        scores=np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 2.0], [3.0, 5.0, np.nan]]),
        numbers={"gamma": np.array([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])},
        parents=np.array([[0, 1, 2], [0, 0, 2], [0, 2, 2]]),
        steps=np.array([10, 20, 25]),
        total_steps=75,
        evaluation_episodes=9,
    )
    assert result.best == 1 and result.lineage().tolist() == [2, 2, 1]
    assert result.schedule()["gamma"].tolist() == [0.3, 0.6, 0.8]
    assert result.component().config == ScheduleConfig((0.4, 0.8), {"gamma": (0.3, 0.6, 0.8)})


def used(monkeypatch, agent, steps):
    """Numbers that reach the loss, update by update: name -> [updates]."""
    seen, loss = [], PPOClip.loss

    def spy(self, out, batch, hyper):
        seen.append({k: v for k, v in vars(hyper).items() if isinstance(v, torch.Tensor)})
        return loss(self, out, batch, hyper)

    with monkeypatch.context() as patch:
        patch.setattr(PPOClip, "loss", spy)
        agent.learn(steps)
    updates = seen[:: CONFIG.n_epochs * CONFIG.n_minibatches]
    assert all((row == row[0]).all() and row.shape == (2, 1) for u in updates for row in u.values())
    return {k: [u[k][0].item() for u in updates] for k in seen[0]}


def test_what_was_found_replays_from_its_file(monkeypatch, tmp_path):
    """At another length the same values hold for the same shares of the lifetime."""
    result = run(PBTConfig(8, 2), horizon=5)
    schedule, path = result.schedule(), tmp_path / "schedule.safetensors"
    assert len(np.unique(schedule["learning_rate"])) > 1
    artifacts.save(result.component(), path, {"steps": result.total_steps})
    for updates, pieces in ((5, [0, 0, 1, 1, 2]), (10, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]), (3, [0, 1, 2])):
        agent = PPO("bandit/bernoulli-5", CONFIG, hyperparameters=path, seeds=2, seed=7)
        found = used(monkeypatch, agent, 32 * updates)
        assert found.keys() == schedule.keys()
        for name, values in schedule.items():
            assert found[name] == pytest.approx([values[i] for i in pieces], rel=1e-6)


def test_a_schedule_equals_numbers_changed_by_hand():
    """Bit for bit, and boundaries stay where they are whatever age / horizon rounds to."""
    horizon, marks = 49, [7, 21, 22]
    rates = (0.1, 0.001, 0.3, 0.01)
    schedule = Schedule(ScheduleConfig([m / horizon for m in marks], {"learning_rate": rates}))
    family, by_hand = BanditFamily("bernoulli-5"), algorithm()
    one = Lifetimes(family, algorithm(hyperparameters=schedule), 3, horizon, 0)
    two = Lifetimes(family, by_hand, 3, horizon, 0)
    for update in range(horizon):
        rate = rates[sum(update >= m for m in marks)]
        two.hyper = CONFIG.hyper.replace(learning_rate=torch.full((3, 1), rate))
        for lifetimes in (one, two):
            lifetimes.advance(lifetimes.plain())
        assert torch.equal(one.population.theta, two.population.theta)
    assert one.population.theta.any()


def test_boundaries_are_exact_for_every_horizon():
    for horizon in (*range(2, 200), 9_973, 100_000):
        marks = np.unique(rng(horizon).integers(1, horizon, size=5)).tolist()
        values = tuple(float(i) for i in range(len(marks) + 1))
        schedule = Schedule(ScheduleConfig(tuple(m / horizon for m in marks), {"aux_coef": values}))
        age = torch.tensor([a for m in (*marks, horizon) for a in (m - 1, m)], dtype=torch.float32)
        expected = [sum(a >= m for m in marks) for a in age.tolist()]
        assert _piece(schedule, age, horizon) == expected


def test_a_boundary_in_the_middle_of_an_update_counts_as_passed():
    schedule = Schedule(ScheduleConfig((0.5,), {"aux_coef": (0.0, 1.0)}))
    assert _piece(schedule, torch.arange(5.0), 3) == [0.0, 1.0, 1.0, 1.0, 1.0]  # and beyond its horizon the last holds


def _piece(schedule, age, horizon):
    nothing = torch.zeros(1, len(age), 1)
    trajectory = Trajectory(nothing, nothing, nothing, nothing, nothing, nothing)
    hyper, _ = schedule(Hyper(), trajectory, Context(age, torch.full_like(age, horizon), {}))
    return hyper.aux_coef.flatten().tolist()


@pytest.mark.parametrize(
    ("boundaries", "numbers", "message"),
    [
        ((0.5, 0.5), {}, "expected rising shares"),
        ((0.0,), {}, "between 0 and 1"),
        ((1.0,), {}, "between 0 and 1"),
        ((math.nan,), {}, "expected rising shares"),
        ((), {"gama": (0.9,)}, "'gama'.* is 'gamma'"),
        ((), {"n_steps": (8,)}, "unknown number in a schedule 'n_steps'"),
        ((0.5,), {"gamma": (0.9,)}, "gamma has 1 values: expected 2 for 1 boundaries"),
        ((), {"gamma": (1.5,)}, "gamma is 1.5"),
        ((), {"ent_coef": (math.nan,)}, "ent_coef is nan"),
        ((), {"gamma": "high"}, "gamma is 'high': expected a sequence of numbers"),
        ((), {"clip_range_vf": (None,)}, "expected a sequence of numbers"),
        ((), {"gamma": 0.9}, "gamma is 0.9: expected a sequence of numbers"),
    ],
)
def test_schedules_that_cannot_be(boundaries, numbers, message):
    with pytest.raises(UserError, match=message):
        ScheduleConfig(boundaries, numbers)


def test_a_schedule_may_hold_infinity(tmp_path):
    component = Schedule(ScheduleConfig((0.5,), {"clip_range": (0.2, math.inf)}))
    artifacts.save(component, tmp_path / "x.safetensors")
    assert artifacts.load(tmp_path / "x.safetensors").config == component.config
