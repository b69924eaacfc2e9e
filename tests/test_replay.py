"""Replay: which trajectories are kept and drawn, and agents that learn from what it draws."""

import dataclasses
import math

import experience
import pytest
import torch
from probes import ProbeFamily

from learned_rl import PPO, PPOConfig
from learned_rl.agents import AgentConfig
from learned_rl.component import Hyper
from learned_rl.evaluation import learning_curves
from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, Slots
from learned_rl.replay import Replay
from learned_rl.streams import Streams, join, part
from learned_rl.tasks.catch import CatchFamily
from learned_rl.tasks.grids import GridFamily
from learned_rl.trajectory import Trajectory
from learned_rl.types import UserError
from meta_optimizers.self_tuning import SelfTuning
from meta_optimizers.trainer import MetaTrainConfig, MetaTrainer
from objectives.disco import Disco
from objectives.lpg import LPG

P = 2
SPACE = experience.SPACES["mlp"]
#: Two trajectories at a time, of which four are drawn: lifetimes learn from their second rollout on.
REPLAYING = PPOConfig(n_envs=2, n_steps=4, n_epochs=1, n_minibatches=1, replay_capacity=6, replay_batch=4)
DISCO = dataclasses.replace(
    REPLAYING,
    optimizer="clipped_adam",
    agent=AgentConfig("action_conditional", hidden=(8,), model=4, head_hidden=(4,)),
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(first, B, T=2):
    """Trajectories whose numbers, from `first` on, stand in their rewards; those of lifetime p have 1000 p more."""
    number = first + torch.arange(B) + 1000.0 * torch.arange(P)[:, None]
    rollout = experience.trajectory(SPACE, first, T, P, B)
    return dataclasses.replace(rollout, reward=number.expand(T, P, B).clone())


def filled(widths, capacity=5, batch=4):
    """A replay after rollouts of these widths, and how many trajectories those were."""
    replay, total = Replay(capacity, batch, P, "cpu"), 0
    for B in widths:
        replay.push(numbered(total, B))
        total += B
    return replay, total


def kept(replay, p):
    """Numbers of the trajectories from which a lifetime can draw."""
    return sorted(replay.kept["reward"][p, : replay.count[p].clamp(max=replay.capacity), 0].tolist())


def drawn(replay, seed=0, streams=None):
    return replay.sample(generator(seed), streams or Streams.apart(P)).reward[0]


# --- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("widths", [(2,), (5,), (2, 2), (2, 2, 2), (3,) * 7, (7,), (1, 7), (7, 1, 3), (4, 12, 2, 2)])
def test_the_latest_trajectories_are_kept_and_the_oldest_give_way(widths):
    replay, total = filled(widths)
    for p in range(P):
        assert kept(replay, p) == [1000 * p + k for k in range(max(total - 5, 0), total)]
    assert replay.count.tolist() == [total] * P and replay.ready.tolist() == [total >= 4] * P


def test_lifetimes_draw_only_from_what_they_have():
    replay, _ = filled((2, 2, 2))
    for p in range(P):
        assert sorted(set(torch.cat([drawn(replay, s)[p] for s in range(50)]).tolist())) == kept(replay, p)
    replay.reset(torch.tensor([False, True]))
    replay.push(numbered(6, 2))
    found = torch.cat([drawn(replay, s) for s in range(50)], 1)
    assert set(found[0].tolist()) == {3, 4, 5, 6, 7} and set(found[1].tolist()) == {1006, 1007}
    assert replay.count.tolist() == [8, 2] and replay.ready.tolist() == [True, False]


@pytest.mark.parametrize("widths", [(3,), (2, 2, 2, 2)], ids=["not yet full", "full"])
def test_draws_are_even(widths):
    """4000 draws of each lifetime; each trajectory within five standard deviations."""
    replay, _ = filled(widths, batch=4000)
    for row, there in zip(drawn(replay), replay.count.clamp(max=5), strict=True):
        n = int(there)
        counts = torch.unique(row, return_counts=True)[1]
        assert len(counts) == n and bool(((counts - 4000 / n).abs() < 5 * math.sqrt(4000 * (n - 1)) / n).all())


def test_what_is_drawn_is_whole():
    """Every field of the same trajectory, with the final observations of those that were truncated."""
    replay, rollouts = Replay(6, 40, P, "cpu"), []
    for k, truncate in enumerate((True, False, True)):
        tr = dataclasses.replace(
            experience.trajectory(SPACE, k, 4, P, 2, truncate=truncate), reward=numbered(2 * k, 2, 4).reward
        )
        replay.push(tr)
        rollouts.append(dataclasses.replace(tr, final_obs=tr.obs[1:]) if tr.final_obs is None else tr)
    found = replay.sample(generator(), Streams.apart(P))
    assert found.truncated.any() and found.reward.shape == (4, P, 40)
    for p in range(P):
        for b in range(40):
            k, own = divmod(int(found.reward[0, p, b]) - 1000 * p, 2)
            for field in dataclasses.fields(Trajectory):
                ours, theirs = getattr(found, field.name), getattr(rollouts[k], field.name)
                assert torch.equal(ours[:, p, b], theirs[:, p, own]), field.name
    replay = Replay(4, 4, P, "cpu")
    replay.push(rollouts[1])
    assert replay.sample(generator(), Streams.apart(P)).final_obs is None, "none of it was truncated"


def test_continuous_actions_have_no_logits_here_either():
    replay = Replay(3, 2, P, "cpu")
    replay.push(dataclasses.replace(numbered(0, 2), logits=None))
    assert replay.sample(generator(), Streams.apart(P)).logits is None


def test_draws_are_those_of_the_lifetimes_streams():
    replay, _ = filled((2, 2, 2))
    whole = drawn(replay)
    assert not torch.equal(whole[0], whole[1] - 1000)
    shared = drawn(replay, streams=Streams(torch.tensor([1, 1]), P))
    assert torch.equal(shared[0], shared[1] - 1000) and torch.equal(shared[1], whole[1])


def test_a_reset_and_a_copy_concern_their_lifetimes_alone():
    replay, _ = filled((2, 2, 2))
    replay.reset(torch.tensor([True, False]))
    assert replay.count.tolist() == [0, 6] and kept(replay, 1) == [1001, 1002, 1003, 1004, 1005]
    replay.copy(torch.tensor([1, 1]))
    assert replay.count.tolist() == [6, 6] and kept(replay, 0) == kept(replay, 1)
    replay.push(numbered(6, 1))  # what is written now is each one's own
    assert kept(replay, 0) == [6, 1002, 1003, 1004, 1005] and kept(replay, 1) == [1002, 1003, 1004, 1005, 1006]


def test_what_was_saved_is_not_written_to():
    replay, _ = filled((2, 2))
    state = {k: v.clone() for k, v in replay.state_dict().items()}
    for _ in range(2):
        other = Replay(5, 4, P, "cpu")
        other.load_state_dict(state)
        assert torch.equal(drawn(other), drawn(replay))
        other.push(numbered(50, 3))
        assert kept(other, 0) == [2, 3, 50, 51, 52]


def test_a_state_of_another_capacity_is_refused():
    state = filled((2, 2))[0].state_dict()
    for told, capacity, said in ((state, 6, 5), (state, 4, 5), ({}, 5, 0)):
        sentence = rf"^The state has a replay_capacity of {said}: expected {capacity}, as configured\.$"
        with pytest.raises(UserError, match=sentence):
            Replay(capacity, 4, P, "cpu").load_state_dict(told)
    longer = Replay(5, 4, P, "cpu")
    longer.load_state_dict(state)
    with pytest.raises(
        UserError, match=r"^The replay holds trajectories of 2 steps: expected an n_steps of 2, not 3\.$"
    ):
        longer.push(numbered(0, 2, 3))
    empty = Replay(6, 4, P, "cpu")
    empty.load_state_dict(Replay(6, 4, P, "cpu").state_dict())
    assert empty.count.tolist() == [0, 0] and not empty.kept


# --- lifetimes that learn from it ---------------------------------------------------------------------------------


def lifetimes(config=REPLAYING, n=P, family=None, seed=0, streams=None, **plugged):
    torch.manual_seed(0)
    algorithm = Algorithm(config, Slots.fill(config, **plugged))
    return Lifetimes(family or GridFamily("small"), algorithm, n, 20, seed, streams=streams)


def small_disco():
    torch.manual_seed(0)
    return Disco(predictions=5, support=4, width=6, lifetime_width=4, embedding=3)


def advanced(lives, updates):
    for _ in range(updates):
        lives.advance(lives.plain())
    return lives


def same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def moving(state):
    return {k: v for k, v in state.items() if k.startswith(("theta", "optimizer/", "memory/"))}


def test_a_lifetime_does_not_move_until_there_is_enough_to_draw():
    lives = lifetimes(DISCO, objective=small_disco())
    fresh = lives.state_dict()
    record, _ = lives.advance(lives.plain())
    assert record is None
    same(moving(fresh), moving(lives.state_dict()))
    assert lives.age.tolist() == [1, 1] and lives.earned.shape == (P,) and not torch.equal(lives.obs, fresh["obs"])
    advanced(lives, 1)
    assert (lives.population.theta != fresh["theta"]).any(1).all()
    lives.restart(torch.tensor([False, True]))  # now one has enough and the other one begins anew
    before = moving(lives.state_dict())
    record, _ = lives.advance(lives.plain())
    assert all(v.isfinite().tolist() == [True, False] for v in record.metrics.values())
    after = moving(lives.state_dict())
    assert {k.partition("/")[0] for k in after} == {"theta", "optimizer", "memory"}
    for name, value in after.items():
        assert torch.equal(value[1], before[name][1]), name
        assert not torch.equal(value[0], before[name][0]), name
    advanced(lives, 1)
    assert not torch.equal(lives.population.theta[1], after["theta"][1])


def test_what_was_paid_in_no_finite_number_is_not_kept():
    """Such a reward spoils no later update, and is told of the one in which it was paid."""
    lives = lifetimes(n=3)
    collect, spoiled = lives.collect, torch.tensor([False, True, False])

    def collected(inner):
        trajectory = collect(inner)
        if lives.age[0] == 2:
            trajectory.reward[1, :, 0] = torch.where(spoiled, math.inf, trajectory.reward[1, :, 0])
        return trajectory

    lives.collect = collected
    alive = [lives.advance(lives.plain())[0] for _ in range(6)]
    assert alive[0] is None
    assert [r.alive.tolist() for r in alive[1:]] == [[True] * 3, [True, False, True], *[[True] * 3] * 3]
    assert lives.replay.count.tolist() == [12, 10, 12] and lives.replay.kept["reward"].isfinite().all()
    assert lives.population.theta.isfinite().all()


def test_a_life_that_only_fills_its_replay_is_refused():
    assert (REPLAYING.collects, dataclasses.replace(REPLAYING, replay_batch=5, n_envs=2).collects) == (1, 2)
    assert dataclasses.replace(REPLAYING, replay_capacity=0).collects == 0
    REPLAYING.check_learns(2)
    with pytest.raises(
        UserError, match=r"^1 rollouts of 2 trajectories do not fill .* draws 4: .* at least 2 rollouts \(16 env"
    ):
        learning_curves(GridFamily("small"), Algorithm(REPLAYING, Slots.fill(REPLAYING)), 1)


def test_plain_training_that_only_fills_its_replay_is_refused():
    ppo = PPO("grid/small", REPLAYING)
    with pytest.raises(UserError, match=r"^1 rollouts of 2 trajectories do not fill"):
        ppo.learn(ppo.per_update)
    assert ppo.steps == 0
    ppo.learn(ppo.per_update, schedule=2 * ppo.per_update)  # a part of a longer life
    assert ppo.steps == ppo.per_update


def test_rewards_in_no_finite_number_are_told_of_before_there_is_an_update():
    ppo, told = PPO("grid/small", REPLAYING, seeds=3), []
    collect = ppo.lifetimes.collect

    def collected(inner):
        trajectory = collect(inner)
        trajectory.reward[0, :2] = math.nan
        return trajectory

    ppo.lifetimes.collect = collected
    ppo.learn(3 * ppo.per_update, lambda steps, metrics: told.append(metrics["broken"]))
    assert told[0] == 2 and len(told) == 3


def test_of_a_single_trajectory_an_update_is_that_without_replay():
    config = dataclasses.replace(REPLAYING, n_envs=1, replay_capacity=1, replay_batch=1, n_epochs=3, n_minibatches=2)
    catch = CatchFamily("5x5")
    one, two = (lifetimes(c, family=catch) for c in (config, dataclasses.replace(config, replay_capacity=0)))
    (ours, _), (theirs, _) = (x.advance(x.plain()) for x in (one, two))
    assert torch.equal(ours.trajectory.obs, theirs.trajectory.obs)
    same(moving(one.state_dict()), moving(two.state_dict()))
    assert not torch.equal(one.population.theta, lifetimes(config, family=catch).population.theta)


def test_where_one_rollout_fills_it_agents_learn_from_the_latest_alone():
    config = dataclasses.replace(REPLAYING, n_envs=3, replay_capacity=3, replay_batch=3)
    lives = lifetimes(config)
    collect, rollouts = lives.collect, []
    lives.collect = lambda inner: rollouts.append(collect(inner)) or rollouts[-1]
    for _ in range(4):
        record, _ = lives.advance(lives.plain())
        assert record.trajectory.reward.shape == (4, P, 3)
        for p in range(P):
            own = [rollouts[-1].obs[:, p, b] for b in range(3)]
            assert all(any(torch.equal(record.trajectory.obs[:, p, b], x) for x in own) for b in range(3))


def test_reported_episodes_are_those_that_were_lived_not_those_that_were_drawn():
    config = dataclasses.replace(REPLAYING, n_steps=3)
    lives = lifetimes(config, family=ProbeFamily("delayed"))  # episodes of two steps, of which the second one pays 1
    found = [lives.advance(lives.plain())[1] for _ in range(4)]
    assert [e.count.tolist() for e in found] == [[2, 2], [4, 4], [2, 2], [4, 4]]
    assert all(torch.equal(e.returns, e.count.float()) and torch.equal(e.lengths, 2.0 * e.count) for e in found)
    assert lives.earned.tolist() == [12, 12]


def test_a_copy_of_a_lifetime_takes_over_what_it_kept():
    lives = advanced(lifetimes(), 3)
    before = lives.state_dict()
    lives.copy(torch.tensor([0]), torch.tensor([1]))
    after = lives.state_dict()
    for name in (k for k in before if k.startswith("replay/")):
        assert torch.equal(after[name][0], before[name][0]) and torch.equal(after[name][1], before[name][0]), name
    assert not torch.equal(before["replay/obs"][0], before["replay/obs"][1])


@pytest.mark.parametrize("updates", [1, 5], ids=["before it is full", "after"])
def test_lifetimes_with_replay_go_on_from_where_they_were_saved(tmp_path, updates):
    """What was saved serves twice."""
    one = advanced(lifetimes(DISCO, objective=small_disco()), updates)
    torch.save(one.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert {"replay/reward", "replay/count", "replay/final_obs", "ended", "memory/target/theta"} <= set(saved)
    advanced(one, 3)
    for _ in range(2):
        two = lifetimes(DISCO, seed=7, objective=small_disco())
        two.load_state_dict(saved)
        same(advanced(two, 3).state_dict(), one.state_dict())


def test_ppo_with_replay_goes_on_from_where_it_was_saved():
    make = lambda seed=0: PPO("catch/5x5", DISCO, objective=small_disco(), seeds=2, seed=seed)  # noqa: E731
    whole, broken, resumed = make().learn(48), make().learn(24, schedule=48), make(3)
    resumed.load_state_dict(broken.state_dict())
    same(resumed.learn(48).state_dict(), whole.state_dict())
    assert resumed.steps == 48 and not torch.equal(
        resumed.lifetimes.population.theta, make().lifetimes.population.theta
    )


def test_processes_with_replay_live_as_one_does():
    split = [(0, 3), (3, 1)]  # lifetimes of two processes
    whole = advanced(lifetimes(n=4, streams=Streams.apart(4)), 4)
    each = [advanced(lifetimes(n=n, streams=Streams(torch.arange(i, i + n), 4)), 4) for i, n in split]
    same(join([x.state_dict() for x in each]), whole.state_dict())
    for (first, count), lives in zip(split, each, strict=True):
        same(part(whole.state_dict(), first, count, 4), lives.state_dict())


def test_learning_curves_with_replay():
    algorithm = Algorithm(REPLAYING, Slots.fill(REPLAYING))
    found = [
        learning_curves(GridFamily("small"), algorithm, 4, tasks=2, seeds=2, checkpoints=2, episodes=3) for _ in "ab"
    ]
    assert found[0].steps.tolist() == [0, 16, 32] and found[0].returns.shape == (3, 2, 2)
    assert (found[0].returns == found[1].returns).all()


def test_a_probe_is_learned_from_replay():
    """Of the last two rollouts."""
    config = PPOConfig(n_envs=4, n_steps=8, replay_capacity=8, replay_batch=8, hyper=Hyper(learning_rate=0.05))
    ppo = PPO(ProbeFamily("both"), config, seeds=2).learn(1500)
    assert (ppo.evaluate(episodes=64, greedy=True) > 0.9).all()


# --- settings and mistakes ----------------------------------------------------------------------------------------


def test_no_more_can_be_drawn_than_is_kept():
    with pytest.raises(UserError, match=r"^replay_batch is 7: expected at most the replay_capacity, 6\.$"):
        dataclasses.replace(REPLAYING, replay_batch=7)
    assert dataclasses.replace(REPLAYING, replay_capacity=0).replay_batch == 4  # without replay it is of no concern
    for name in ("replay_capacity", "replay_batch"):
        with pytest.raises(UserError, match=f"{name} is -1: expected at least"):
            dataclasses.replace(REPLAYING, **{name: -1})


def test_minibatches_are_cut_from_what_is_drawn():
    """16 steps of 4 trajectories, where a rollout has 8; and 8 of 2 where a rollout has 16."""
    assert dataclasses.replace(REPLAYING, n_minibatches=16).n_minibatches == 16
    with pytest.raises(UserError, match=r"n_minibatches is 17, .* only 16 steps \(4 trajectories x 4 steps\)"):
        dataclasses.replace(REPLAYING, n_minibatches=17)
    with pytest.raises(UserError, match=r"n_minibatches is 9, .* only 8 steps \(2 trajectories x 4 steps\)"):
        dataclasses.replace(REPLAYING, n_envs=4, replay_batch=2, n_minibatches=9)
    lives = advanced(lifetimes(dataclasses.replace(REPLAYING, n_minibatches=16)), 2)
    assert lives.optimizer_state["count"].flatten().tolist() == [16, 16]


SENTENCE = r"^replay_capacity is 6: while a part is learned, agents learn from each rollout once; expected 0\.$"


def test_meta_training_with_replay_is_refused():
    config = MetaTrainConfig(lifetimes=2, horizon=4, agent=REPLAYING)
    with pytest.raises(UserError, match=SENTENCE):
        MetaTrainer(GridFamily("small"), LPG(predictions=3, width=4), config, 0)


def test_parts_that_are_learned_online_with_replay_are_refused():
    with pytest.raises(UserError, match=SENTENCE):
        SelfTuning("catch/5x5", REPLAYING, hyperparameters="self_tuned")
    SelfTuning("catch/5x5", REPLAYING, hyperparameters="self_tuned", learned=[]).learn(24)  # learning nothing is PPO
