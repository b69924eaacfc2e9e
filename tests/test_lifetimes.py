"""Lifetimes and the outer loop around them: resuming, restarts, broken lifetimes, the critic, every tensor moving."""

import dataclasses

import experience
import pytest
import torch
from probes import ProbeFamily
from torch.testing import assert_close

from learned_rl.component import NoConfig, Reward
from learned_rl.defaults import PPOClip
from learned_rl.distributions import Categorical
from learned_rl.inner_loop import GraphInner, PlainInner
from learned_rl.lifetimes import EpisodeTracker, Lifetimes
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.tasks.bandits import BanditFamily
from learned_rl.tasks.control import ControlFamily
from learned_rl.tasks.grids import GridFamily
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError, stream
from meta_optimizers.agent_bandit import AgentBanditConfig
from meta_optimizers.learning import OuterLossConfig
from meta_optimizers.outer_critic import OuterCritic, OuterCriticConfig
from meta_optimizers.problem import Eta
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from meta_optimizers.truncated import TruncatedConfig
from objectives.lpg import LPG

P = 4
AGENT = PPOConfig(n_envs=3, n_steps=6, n_epochs=1, n_minibatches=1, optimizer="adam")
META = MetaTrainConfig(
    lifetimes=P,
    horizon=6,
    agent=AGENT,
    estimator=TruncatedConfig(window=2),
    loss=OuterLossConfig(regularisers={"prediction_entropy": -0.01, "pi_hat_square": 0.01}),
    bandit=AgentBanditConfig(learning_rates=(0.01, 0.1), prediction_coefs=(0.5, 1.0)),
)


def grid():
    return GridFamily("small")


def trainer(seed=0, config=META, **lpg):
    torch.manual_seed(seed)
    return MetaTrainer(grid(), LPG(**{"predictions": 4, "width": 8} | lpg), config, seed)


def ppo_lifetimes(lifetimes=P, horizon=5, seed=0, config=None, dtype=torch.float32, family=None, **plugged):
    config = config or dataclasses.replace(AGENT, n_epochs=2, n_minibatches=2)
    algorithm = Algorithm(config, Slots.fill(config, **plugged))
    return Lifetimes(family or grid(), algorithm, lifetimes, horizon, seed, dtype=dtype)


# --- counting episodes --------------------------------------------------------------------------------------------


def test_episode_tracker_equals_a_loop():
    tracker = EpisodeTracker(2, 3, "cpu", torch.float64)
    running = torch.zeros(2, 3, 2, dtype=torch.float64)
    for seed in range(6):
        tr = experience.trajectory(experience.SPACES["tabular"], seed, T=1 + seed)
        count, total = torch.zeros(2), torch.zeros(2, 2, dtype=torch.float64)
        for t in range(len(tr.reward)):
            running[..., 0] += tr.reward[t]
            running[..., 1] += 1
            ended = tr.done[t]
            count += ended.sum(1)
            total += (running * ended[..., None]).sum(1)
            running[ended] = 0
        episodes = tracker(tr)
        assert torch.equal(episodes.count, count.long())
        assert_close(episodes.returns, total[:, 0], rtol=1e-12, atol=1e-12)
        assert_close(episodes.lengths, total[:, 1], rtol=1e-12, atol=1e-12)
    tracker.reset(1)
    assert not tracker.running[:, 1].any() and tracker.running[:, 0].any()


# --- resuming -----------------------------------------------------------------------------------------------------


def through_disk(state, tmp_path):
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


def test_lifetimes_continue_to_the_same_numbers(tmp_path):
    one = ppo_lifetimes()
    for _ in range(8):
        one.advance(one.plain())
    assert one.population.theta.any(1).all() and one.episodes.running.any()
    saved = through_disk(one.state_dict(), tmp_path)
    two = ppo_lifetimes(seed=7)
    two.load_state_dict(saved)
    for _ in range(3):
        a, b = (x.advance(x.plain()) for x in (one, two))
        assert torch.equal(a[0].trajectory.reward, b[0].trajectory.reward)
        assert torch.equal(a[1].returns, b[1].returns)
    assert torch.equal(one.population.theta, two.population.theta)
    final = [x.state_dict() for x in (one, two)]
    assert final[0].keys() == final[1].keys()
    assert all(torch.equal(final[0][k], final[1][k]) for k in final[0])


def test_meta_training_continues_bit_for_bit(tmp_path):
    one = trainer()
    for _ in range(4):
        one.step()
    assert one.problem.restarts > 0
    saved = through_disk(one.state_dict(), tmp_path)
    expected = [one.step() for _ in range(3)]
    two = trainer(seed=0)
    with torch.no_grad():
        for p in two.eta.values():
            p.add_(1.0)
    two.load_state_dict(saved)
    for metrics in expected:
        assert two.step() == pytest.approx(metrics, rel=0, abs=0, nan_ok=True)
    assert all(torch.equal(a, b) for a, b in zip(one.eta.values(), two.eta.values(), strict=True))
    final = [x.state_dict() for x in (one, two)]
    assert all(torch.equal(final[0][k].nan_to_num(), final[1][k].nan_to_num()) for k in final[0])


def test_saving_does_not_disturb_what_follows():
    one, two = trainer(), trainer()
    one.state_dict()
    for _ in range(2):
        state = one.state_dict()
        one.step()
        two.step()
    assert not torch.equal(state["problem/lifetimes/theta"], one.lifetimes.population.theta)  # a copy, not a view
    assert all(torch.equal(a, b) for a, b in zip(one.eta.values(), two.eta.values(), strict=True))


# --- restarts -----------------------------------------------------------------------------------------------------


def test_a_restart_touches_only_its_lifetime():
    lifetimes = ppo_lifetimes()
    for _ in range(2):
        lifetimes.advance(lifetimes.plain())
    for value in (lifetimes.population.theta.data, *lifetimes.optimizer_state.values()):
        value.add_(1.0)  # so that nothing is at its fresh value by chance
    before = lifetimes.state_dict()
    which = torch.tensor([False, True, False, False])
    lifetimes.restart(which)
    after = lifetimes.state_dict()
    keep = ~which
    for name in ("theta", "age", "life", "horizon", "obs", "optimizer/first", "optimizer/second", "optimizer/count"):
        assert torch.equal(after[name][keep], before[name][keep]), name
    copies = keep.repeat_interleave(AGENT.n_envs)
    for name in before:
        if name.startswith(("env/state", "env/task")):
            assert torch.equal(after[name][copies], before[name][copies]), name
    assert torch.equal(after["running"][:, keep], before["running"][:, keep])
    assert after["age"][1] == 0 and after["life"][1] == 1 and not after["running"][:, 1].any()
    assert not any(after[f"optimizer/{k}"][1].any() for k in ("first", "second", "count"))
    fresh = lifetimes.population.initial(stream("agent", "train", 0, 1, 1))
    assert torch.equal(after["theta"][1], fresh) and not torch.equal(before["theta"][1], fresh)
    tasks = [k for k in before if k.startswith("env/task")]
    assert any(not torch.equal(after[k][~copies], before[k][~copies]) for k in tasks)


def test_a_restart_does_not_change_what_others_draw():
    """Tasks, fresh agents and horizons come from a stream for each lifetime and each life."""
    one, two = (ppo_lifetimes(horizon=(5, 50)) for _ in range(2))
    one.restart(torch.tensor([True, False, False, False]))
    for lifetimes in (one, two):
        lifetimes.restart(torch.tensor([False, False, True, False]))
    a, b = one.state_dict(), two.state_dict()
    copies = torch.arange(P).repeat_interleave(AGENT.n_envs) == 2
    assert a["horizon"][2] == b["horizon"][2] and 5 <= a["horizon"][2] <= 50
    assert a["horizon"][0] != b["horizon"][0]
    for name in a:
        if name.startswith("env/task"):
            assert torch.equal(a[name][copies], b[name][copies])


def test_a_restart_does_not_change_the_others_experience():
    """Numbers where the physics and the first states are random, bit for bit."""
    one, two = (ppo_lifetimes(family=ControlFamily("cartpole")) for _ in range(2))
    for lifetimes in (one, two):
        lifetimes.advance(lifetimes.plain())
    one.restart(torch.tensor([True, False, False, True]))
    ended = 0
    for _ in range(5):
        (a, _), (b, _) = (x.advance(x.plain()) for x in (one, two))
        for name in ("obs", "action", "log_prob", "reward", "terminated"):
            x, y = getattr(a.trajectory, name), getattr(b.trajectory, name)
            assert torch.equal(x[:, 1:3], y[:, 1:3]), name
        assert not torch.equal(a.trajectory.obs[:, 0], b.trajectory.obs[:, 0])
        ended += int(a.trajectory.terminated[:, 1:3].sum())
    assert ended > 0 and torch.equal(one.population.theta[1:3], two.population.theta[1:3])


def test_the_sides_of_a_family_have_unrelated_agents_and_environments():
    algorithm, family = Algorithm(AGENT, Slots.fill(AGENT)), ControlFamily("cartpole-default")
    train, same, test, other = (
        Lifetimes(family, algorithm, P, 5, seed, split=split)
        for split, seed in (("train", 0), ("train", 0), ("test", 0), ("train", 1))
    )
    assert torch.equal(train.population.theta, same.population.theta) and torch.equal(train.obs, same.obs)
    for lifetimes in (test, other):
        assert not (lifetimes.obs == train.obs).any()
        assert not (lifetimes.population.theta == train.population.theta).all(1).any()
        draws = [torch.rand(20, generator=x.generator) for x in (same, lifetimes)]
        assert not (draws[0] == draws[1]).any()


def test_every_lifetime_needs_a_task():
    tasks = grid().sample_split("test", P - 1)
    with pytest.raises(UserError, match="3 tasks were given for 4 lifetimes"):
        Lifetimes(grid(), Algorithm(AGENT, Slots.fill(AGENT)), P, 5, 0, tasks=tasks)


def test_given_tasks_stay_through_a_restart():
    family = grid()
    algorithm = Algorithm(AGENT, Slots.fill(AGENT))
    tasks = family.sample_split("test", P, 3)
    lifetimes = Lifetimes(family, algorithm, P, 5, 0, tasks=tasks)
    before = {k: v for k, v in lifetimes.state_dict().items() if k.startswith("env/task")}
    lifetimes.restart(torch.ones(P, dtype=torch.bool))
    after = lifetimes.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())


def test_staggered_lifetimes_end_one_after_the_other():
    lifetimes = ppo_lifetimes(horizon=12)
    lifetimes.stagger(multiple=3)
    assert lifetimes.horizon.tolist() == [3, 6, 9, 12]
    lifetimes.age += 6
    assert lifetimes.finished().tolist() == [True, True, False, False]


class Remembering(Reward):
    """The environment's reward times a learned scale that accumulates in the lifetime's memory."""

    name, Config = "remembering", NoConfig

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(0.5))

    def initial_memory(self, lifetimes):
        return {"sum": torch.ones(lifetimes)}

    def forward(self, trajectory, context):
        total = context.memory["sum"] + self.scale
        return trajectory.reward * total[:, None], {"sum": total}


def test_memory_of_components_is_carried_saved_and_restarted():
    lifetimes = ppo_lifetimes(reward=Remembering())
    for _ in range(3):
        lifetimes.advance(lifetimes.plain())
    assert lifetimes.memory["reward/sum"].tolist() == [2.5] * P
    assert not lifetimes.memory["reward/sum"].requires_grad  # plain training builds no graph over updates
    lifetimes.restart(torch.tensor([True, False, False, False]))
    assert lifetimes.state_dict()["memory/reward/sum"].tolist() == [1.0, 2.5, 2.5, 2.5]
    window = lifetimes.window()
    lifetimes.advance(window)
    lifetimes.advance(window)
    (slope,) = torch.autograd.grad(lifetimes.memory["reward/sum"].sum(), lifetimes.algorithm.slots.reward.scale)
    assert slope == 2 * P  # inside a window memory keeps its graph
    lifetimes.commit(window)
    assert not lifetimes.memory["reward/sum"].requires_grad


# --- broken lifetimes ---------------------------------------------------------------------------------------------


def present(trainer):
    return Eta({k: p.detach() for k, p in trainer.eta.items()})


def estimate(trainer, break_it=None, monkeypatch=None):
    """Gradient and broken mask of one window, with lifetime 1 broken in the given way."""
    if break_it == "theta":
        trainer.lifetimes.population.theta.data[1, 0] = float("nan")
    if break_it in ("reward", "first reward"):
        collect, calls = Lifetimes.collect, []

        def broken(self, inner, steps=None):
            tr = collect(self, inner, steps)
            calls.append(tr)
            if break_it == "first reward" and len(calls) > 1:
                return tr
            reward = tr.reward.clone()
            reward[2, 1, 0] = float("nan")
            return dataclasses.replace(tr, reward=reward)

        monkeypatch.setattr(Lifetimes, "collect", broken)
    return trainer.estimator(trainer.problem, present(trainer))


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("where", ["theta", "reward", "first reward"])
def test_a_broken_lifetime_leaves_the_mean_of_the_others(where, stop, monkeypatch):
    """Its actions may be anything, but nobody else's draws depend on them: so take P lifetimes and leave one out."""
    healthy = trainer(stop_inputs=stop)
    alone = []
    for keep in (0, 2, 3):
        # The mean over one lifetime: every other meta-loss masked out by hand.
        single = trainer(stop_inputs=stop)
        original = single.problem._loss

        def masked(*args, original=original, keep=keep):
            loss, parts = original(*args)
            mask = torch.arange(P) == keep
            return torch.where(mask, loss, float("nan")), parts

        single.problem._loss = masked
        alone.append(single.estimator(single.problem, present(single)).grads)
    result = estimate(healthy, where, monkeypatch)
    assert result.broken.tolist() == [False, True, False, False]
    for name, grad in result.grads.items():
        assert grad.isfinite().all()
        assert_close(grad, torch.stack([g[name] for g in alone]).mean(0), rtol=1e-4, atol=1e-7)
    assert any(g.abs().max() > 1e-4 for g in result.grads.values())


@pytest.mark.parametrize("where", ["theta", "reward", "first reward"])
def test_a_broken_lifetime_is_counted_and_restarted(where, monkeypatch):
    t = trainer(config=dataclasses.replace(META, horizon=1000))
    life = t.lifetimes.life.clone()
    with monkeypatch.context() as patch:
        original = type(t.estimator).__call__
        patch.setattr(type(t.estimator), "__call__", lambda *args: estimate_once(original, t, where, patch))
        metrics = t.step()
    assert metrics["broken"] == 1 and t.problem.broken == 1 and metrics["skipped"] == 0
    assert (t.lifetimes.life - life).tolist() == [0, 1, 0, 0]
    assert all(p.isfinite().all() for p in t.eta.values())
    assert t.lifetimes.population.theta.isfinite().all() and t.critic.population.theta.isfinite().all()
    assert all(v.isfinite().all() for v in t.lifetimes.optimizer_state.values())
    assert all(v.isfinite().all() for v in t.critic._inner.state.values())
    assert t.lifetimes.episodes.running.isfinite().all()
    metrics = t.step()
    assert metrics["broken"] == 0 and metrics["skipped"] == 0


def estimate_once(original, t, where, patch):
    patch.setattr(type(t.estimator), "__call__", original)
    return estimate(t, where, patch)


class ScaledPPO(PPOClip):
    """An objective with a meta-parameter inside its loss, not in what it prepares."""

    name = "scaled_ppo"

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

    def loss(self, out, batch, hyper):
        loss, metrics = super().loss(out, batch, hyper)
        return self.scale * loss, metrics


@pytest.mark.parametrize(("epochs", "minibatches"), [(1, 1), (2, 1), (1, 3)])
def test_a_broken_lifetime_stays_out_of_the_meta_gradient_of_a_loss(epochs, minibatches):
    grads = []
    for broken in (False, True):
        config = dataclasses.replace(AGENT, n_steps=5, n_epochs=epochs, n_minibatches=minibatches, optimizer="sgd")
        objective = ScaledPPO()
        slots = Slots.fill(config, objective=objective)
        agents = experience.population("mlp", value=True)
        if broken:
            agents.theta.data[1, 3] = float("nan")
        inner = GraphInner(agents, slots.optimizer, {})
        data = experience.trajectory(experience.SPACES["mlp"], 0)
        generator = torch.Generator().manual_seed(0)
        record = Algorithm(config, slots).update(inner, data, experience.context(), config.hyper, generator)
        assert record.alive.tolist() == [True, not broken]
        grads.append(torch.autograd.grad(inner.theta[0].square().sum(), objective.scale)[0])
    assert torch.equal(*grads) and grads[0] != 0


def test_when_every_lifetime_is_broken_the_step_is_skipped():
    t = trainer()
    t.lifetimes.population.theta.data.fill_(float("nan"))
    eta = [p.clone() for p in t.eta.values()]
    metrics = t.step()
    assert metrics["broken"] == P and metrics["skipped"] == 1
    assert all(torch.equal(a, b) for a, b in zip(eta, t.eta.values(), strict=True))
    with pytest.raises(UserError, match="finite in none of 1 meta-steps"):
        t.check_moved()
    assert t.step()["skipped"] == 0
    t.check_moved()


def test_a_broken_lifetime_does_not_disturb_plain_training():
    one, two = ppo_lifetimes(), ppo_lifetimes()
    two.population.theta.data[1] = float("nan")
    for _ in range(2):
        for lifetimes in (one, two):
            record, _ = lifetimes.advance(lifetimes.plain())
    assert record.alive.tolist() == [True, False, True, True]
    keep = torch.tensor([0, 2, 3])
    assert torch.equal(one.population.theta[keep], two.population.theta[keep])


# --- the outer loop learns ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["auto", "mlp"])
def test_the_outer_critic_learns_and_every_parameter_moves(kind):
    family = BanditFamily("bernoulli-5") if kind == "auto" else _numbers_family()
    config = OuterCriticConfig(learning_rate=0.02, gamma=0.9)
    critic = OuterCritic(config, family, torch.arange(2), 0, torch.device("cpu"), torch.float32)
    before = critic.population.theta.detach().clone()
    space = family.observation_space
    tr = experience.trajectory(space, 0, T=20, dtype=torch.float32)
    tr = dataclasses.replace(tr, reward=tr.reward.float() + 1)
    losses = torch.stack([critic.learn(tr, critic.judge(tr)[1]) for _ in range(40)])
    assert (losses[-1] < 0.7 * losses[0]).all()
    assert ((critic.population.theta - before) != 0).all()


def _numbers_family():
    family = BanditFamily("bernoulli-5")
    family.observation_space = experience.SPACES["mlp"]
    return family


def test_the_critic_s_advantages_are_normalised_constants():
    family = BanditFamily("bernoulli-5")
    critic = OuterCritic(OuterCriticConfig(), family, torch.arange(2), 0, torch.device("cpu"), torch.float64)
    advantage, _ = critic.judge(experience.trajectory(family.observation_space, 0, T=20))
    assert not advantage.requires_grad
    assert_close(advantage.mean((0, 2)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    assert_close(advantage.std((0, 2)), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("core", ["gru", "lstm"])
def test_every_tensor_of_eta_gets_a_gradient_and_moves(core):
    """Prediction parts act on the policy only through the network's own inputs, a window later."""
    t = trainer(core=core, embedding=8)
    before = [p.detach().clone() for p in t.eta.values()]
    seen = [torch.zeros_like(p) for p in t.eta.values()]
    descent = t._descent

    def spy(grads, whole):
        for s, g in zip(seen, t.present.unflatten(grads[0]).values(), strict=True):
            s += g.abs()
        return descent(grads, whole)

    t._descent = spy
    for _ in range(4):
        t.step()
    for (name, p), b, s in zip(t.component.named_parameters(), before, seen, strict=True):
        assert s.max() > 0, f"{name} never had a gradient"
        assert not torch.equal(p, b), f"{name} did not move"


def test_counters_and_bandit_of_the_trainer():
    t = trainer()
    assert t.problem.bandit.count.tolist() == [1, 1, 1, 1]  # P first lifetimes, P arms: each untried arm once
    steps, arms = [], set(t.problem.bandit.arm.tolist())
    for _ in range(6):
        steps.append(t.step())
        arms |= set(t.problem.bandit.arm.tolist())
    assert len(arms) > 1
    assert t.steps == 6 and t.environment_steps == 6 * 3 * P * AGENT.n_envs * AGENT.n_steps
    assert t.problem.restarts > 0 and any("final_return" in m for m in steps)
    rates = t.lifetimes.hyper.learning_rate
    assert rates.shape == (P, 1) and all(r in (pytest.approx(0.01), pytest.approx(0.1)) for r in rates.flatten())
    assert t.problem.bandit.count.sum() == P + t.problem.restarts


def test_acting_follows_the_present_parameters():
    """`collect` inside a window acts with the window's parameters, not with those it began with."""
    lifetimes = ppo_lifetimes(family=BanditFamily("bernoulli-5"))
    inner = PlainInner(lifetimes.population, lifetimes.algorithm.slots.optimizer, lifetimes.optimizer_state)
    lifetimes.population.theta.data[:, 3] = 50.0  # the logit of arm 3
    tr = lifetimes.collect(inner)
    assert isinstance(tr, Trajectory) and (tr.action == 3).all()
    assert_close(tr.log_prob, torch.zeros_like(tr.log_prob))


# --- copies -------------------------------------------------------------------------------------------------------


def different_lifetimes():
    """Lifetimes of other tasks, weights, optimizer states, memories, ages, horizons and step sizes."""
    lifetimes = ppo_lifetimes(reward=Remembering(), horizon=(20, 200))
    rates = torch.tensor([[0.01], [0.02], [0.03], [0.04]])
    lifetimes.hyper = lifetimes.hyper.replace(learning_rate=rates)
    for _ in range(3):
        lifetimes.advance(lifetimes.plain())
    lifetimes.age += torch.arange(P)
    lifetimes.memory["reward/sum"] += torch.arange(P)
    return lifetimes


AGENT_STATE = ("theta", "age", "horizon", "hyper/", "optimizer/", "memory/")


def test_a_copy_takes_over_the_agent_and_keeps_its_world():
    lifetimes = different_lifetimes()
    before = lifetimes.state_dict()
    lifetimes.copy(torch.tensor([2, 1, 3]), torch.tensor([1, 3, 2]))  # all at once: 1 and 3 are overwritten and read
    after = lifetimes.state_dict()
    rows = [0, 2, 3, 1]
    taken = [k for k in before if k.startswith(AGENT_STATE)]
    assert {k.partition("/")[0] for k in taken} == {k.rstrip("/") for k in AGENT_STATE}
    for name in taken:
        assert torch.equal(after[name], before[name][rows]), name
        # counts of steps are alike in all lifetimes; everything else tells them apart
        assert name == "optimizer/count" or not torch.equal(after[name], before[name]), name
    for name in before.keys() - set(taken):
        assert torch.equal(after[name], before[name]), name


def test_a_copy_behaves_as_its_parent_on_the_same_experience():
    """Bit for bit, through an inner loop that was there before; with equal weights alone it does not."""
    ends = {}
    for kind in ("copied", "weights only", "left alone"):
        lifetimes = different_lifetimes()
        inner = lifetimes.plain()
        if kind == "copied":
            lifetimes.copy(torch.tensor([0]), torch.tensor([2]))
        elif kind == "weights only":
            lifetimes.population.theta.data[2] = lifetimes.population.theta.data[0]
        for seed in range(3):
            tr = experience.trajectory(lifetimes.family.observation_space, seed, T=6, P=P, actions=4)
            tr = Trajectory(**{k: v.float() if v.is_floating_point() else v for k, v in _same(tr).items()})
            lifetimes.advance(inner, tr)
        state = lifetimes.state_dict()
        ends[kind] = {k: torch.equal(v[0], v[2]) for k, v in state.items() if k.startswith(AGENT_STATE)}
    assert all(ends["copied"].values())
    assert not ends["weights only"]["theta"] and not ends["left alone"]["theta"]


def _same(tr):
    """Lifetime 2 lives through what lifetime 0 does."""
    order = [0, 1, 0, 3]
    return {k: v[:, order] for k, v in vars(tr).items()}


# --- what is recorded of the policy and of beginnings -------------------------------------------------------------


def delayed_lifetimes(seed=0, **settings):
    """Episodes of two steps, of which rollouts of three cut every other one."""
    return ppo_lifetimes(
        2, config=dataclasses.replace(AGENT, n_steps=3, **settings), family=ProbeFamily("delayed"), seed=seed
    )


def collected(lifetimes, rollouts):
    return [lifetimes.collect(lifetimes.plain()) for _ in range(rollouts)]


def test_steps_that_follow_an_end_are_known_beyond_their_rollout():
    rollouts = collected(delayed_lifetimes(), 4)
    done, follows = (torch.cat([getattr(tr, k) for tr in rollouts]) for k in ("done", "follows"))
    assert not follows[0].any() and torch.equal(follows[1:], done[:-1])
    assert rollouts[2].follows[0].all() and not rollouts[1].follows[0].any()
    truncated = collected(ppo_lifetimes(2, family=ProbeFamily("truncated")), 2)  # after four steps; rollouts have six
    assert truncated[0].truncated.any() and torch.equal(truncated[0].follows[1:], truncated[0].truncated[:-1])
    assert torch.equal(truncated[1].follows[2:], truncated[1].truncated[1:-1])


def test_nothing_comes_before_a_fresh_lifetime():
    lifetimes = delayed_lifetimes()
    collected(lifetimes, 2)  # six steps: an episode has just ended
    lifetimes.restart(torch.tensor([False, True]))
    (tr,) = collected(lifetimes, 1)
    assert tr.follows[0].all(1).tolist() == [True, False] and not tr.follows[0, 1].any()
    assert torch.equal(tr.follows[1:], tr.done[:-1])


def test_that_a_step_follows_an_end_is_saved(tmp_path):
    one, two = delayed_lifetimes(), delayed_lifetimes(seed=7)
    collected(one, 2)
    two.load_state_dict(through_disk(one.state_dict(), tmp_path))
    (a,), (b,) = (collected(x, 1) for x in (one, two))
    assert (
        a.follows[0].all()
        and torch.equal(a.follows, b.follows)
        and not collected(delayed_lifetimes(), 1)[0].follows[0].any()
    )


def test_the_policy_that_acted_is_recorded():
    lifetimes = ppo_lifetimes(family=ControlFamily("cartpole"))
    tr = lifetimes.collect(lifetimes.plain())
    out = lifetimes.population(tr.obs[:-1])
    assert_close(tr.logits, out.policy.logits, rtol=1e-5, atol=1e-6)
    assert torch.equal(Categorical(tr.logits).log_prob(tr.action), tr.log_prob) and not tr.logits.requires_grad
    continuous = ppo_lifetimes(family=ControlFamily("pendulum"))
    assert continuous.collect(continuous.plain()).logits is None


# --- target networks ----------------------------------------------------------------------------------------------


class Lagging(PPOClip):
    """PPO with a target network of which nothing is made, that keeps what it was shown."""

    name, target_rate = "lagging", 0.25

    def prepare(self, trajectory, out, next_value, hyper, context):
        self.seen = out
        return super().prepare(trajectory, out, next_value, hyper, context)


def lagging(seed=0, **settings):
    return ppo_lifetimes(objective=Lagging(), family=ControlFamily("cartpole"), seed=seed, **settings)


def test_a_target_network_averages_the_parameters_with_which_updates_began():
    lifetimes = lagging()
    average = lifetimes.population.theta.detach().clone()
    lifetimes.population.theta.data.add_(0.1)
    assert torch.equal(lifetimes.memory["target/theta"], average)  # a copy, not a view
    for _ in range(4):
        theta = lifetimes.population.theta.detach().clone()
        record, _ = lifetimes.advance(lifetimes.plain())
        seen, at = lifetimes.algorithm.slots.objective.seen, lifetimes.population
        # What it says is from before it moves.
        assert_close(seen.target.policy.logits, at.bind(average)(record.trajectory.obs).policy.logits)
        assert_close(seen.target.value, at.bind(average)(record.trajectory.obs).value)
        assert_close(seen.policy.logits, at.bind(theta)(record.trajectory.obs).policy.logits)
        average = 0.75 * average + 0.25 * theta
        assert_close(lifetimes.memory["target/theta"], average, rtol=1e-6, atol=1e-8)
        assert not lifetimes.memory["target/theta"].requires_grad and (lifetimes.population.theta != theta).any()
    assert (lifetimes.memory["target/theta"] != lifetimes.population.theta).any(1).all()


def test_objectives_that_ask_for_none_have_no_target_network():
    lifetimes = ppo_lifetimes()
    record, _ = lifetimes.advance(lifetimes.plain())
    assert not lifetimes.memory and record.out.target is None


def test_a_target_network_begins_anew_with_its_lifetime():
    lifetimes = lagging()
    for _ in range(3):
        lifetimes.advance(lifetimes.plain())
    before = lifetimes.memory["target/theta"].clone()
    lifetimes.restart(torch.tensor([False, True, False, False]))
    after, theta = lifetimes.memory["target/theta"], lifetimes.population.theta
    assert torch.equal(after[1], theta[1]) and torch.equal(
        theta[1], lifetimes.population.initial(stream("agent", "train", 0, 1, 1))
    )
    assert torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_a_target_network_is_copied_and_saved(tmp_path):
    one, two = lagging(), lagging(seed=7)
    for _ in range(2):
        one.advance(one.plain())
    one.copy(torch.tensor([3]), torch.tensor([0]))
    assert torch.equal(one.memory["target/theta"][0], one.memory["target/theta"][3])
    assert not torch.equal(one.memory["target/theta"][0], one.memory["target/theta"][1])
    two.load_state_dict(through_disk(one.state_dict(), tmp_path))
    for lifetimes in (one, two):
        lifetimes.advance(lifetimes.plain())
    assert torch.equal(one.memory["target/theta"], two.memory["target/theta"])


def test_a_target_network_of_a_broken_lifetime_says_nothing_and_the_others_go_on():
    one, two = lagging(), lagging()
    two.population.theta.data[1] = float("nan")
    for _ in range(3):
        for lifetimes in (one, two):
            lifetimes.advance(lifetimes.plain())
    keep = torch.tensor([0, 2, 3])
    assert torch.equal(one.memory["target/theta"][keep], two.memory["target/theta"][keep])
    assert not two.algorithm.slots.objective.seen.target.policy.logits[:, 1].any()


def test_a_meta_gradient_passes_through_the_target_network():
    """Inside a window the average keeps its graph: theta_1 counts 0.25 in it after the second update."""
    config = dataclasses.replace(AGENT, optimizer="sgd")
    lifetimes = lagging(config=config)
    window, start = lifetimes.window(), lifetimes.population.theta.detach().clone()
    lifetimes.advance(window)
    first = window.theta
    lifetimes.advance(window)
    assert torch.equal(
        torch.autograd.grad(lifetimes.memory["target/theta"].sum(), first)[0], torch.full_like(start, 0.25)
    )
    lifetimes.commit(window)
    assert not lifetimes.memory["target/theta"].requires_grad


def test_memory_has_the_precision_of_its_lifetimes():
    """Or what is in double precision could not read it."""
    lifetimes = ppo_lifetimes(reward=Remembering().double(), dtype=torch.float64)
    assert lifetimes.memory["reward/sum"].dtype == torch.float64
    lifetimes.advance(lifetimes.plain())
    lifetimes.restart(torch.tensor([True] + [False] * (P - 1)))
    assert lifetimes.memory["reward/sum"].dtype == torch.float64 and lifetimes.memory["reward/sum"].tolist()[0] == 1
