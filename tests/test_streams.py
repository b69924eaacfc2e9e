"""Random streams: as before by default, shared by pairs, the same lifetimes whether in one process or in several."""

from __future__ import annotations

import pytest
import torch
from gymnasium.spaces import Discrete

from learned_rl.agents import AgentConfig
from learned_rl.distributions import Categorical, ClippedGaussian, SquashedGaussian
from learned_rl.lifetimes import Lifetimes
from learned_rl.ppo import Algorithm, PPOConfig, Slots
from learned_rl.streams import Streams, join, part
from learned_rl.tasks.alternating import AlternatingFamily
from learned_rl.tasks.bandits import BanditFamily
from learned_rl.tasks.base import TaskFamily
from learned_rl.tasks.catch import CatchFamily
from learned_rl.tasks.chains import ChainFamily
from learned_rl.tasks.control import ControlFamily
from learned_rl.tasks.delayed import DelayedFamily
from learned_rl.tasks.grids import GridFamily
from learned_rl.tasks.gym import GymFamily
from learned_rl.tasks.random_walk import RandomWalkFamily
from learned_rl.tasks.two_colours import TwoColoursFamily
from learned_rl.types import Tree, UserError, stream, stream_seed

P, B = 8, 4
SPLITS = {2: [4, 4], 4: [2, 2, 2, 2], 3: [2, 4, 2]}
FAMILIES = [
    GridFamily("small"),
    GridFamily("rand-small"),
    GridFamily("debug-planes"),
    GridFamily("sparse", collect_actions=True),
    ControlFamily("cartpole"),
    ControlFamily("pendulum"),
    ControlFamily("acrobot"),
    ControlFamily("mountain-car"),
    ChainFamily("short-noisy"),
    ChainFamily("distractor"),
    BanditFamily("bernoulli-5"),
    BanditFamily("gaussian-5"),
    CatchFamily("5x5"),
    TwoColoursFamily("50"),
    TwoColoursFamily("50-respawn"),
    AlternatingFamily("4"),
    RandomWalkFamily("3"),
    DelayedFamily("3/chain/short-noisy"),
    GymFamily("CartPole-v1"),
    DelayedFamily("3/CartPole-v1"),
]
EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.name}-{FAMILIES.index(f)}")
SAVED = pytest.mark.parametrize("family", FAMILIES[:-2], ids=lambda f: f"{f.name}-{FAMILIES.index(f)}")


def lives(family: TaskFamily, streams: Streams | None = None, lifetimes: int = P, horizon=(2, 5)) -> Lifetimes:
    # Perceptrons, since convolutions of other numbers of agents round differently.
    agent = AgentConfig("auto" if family.observation_space.shape == () else "mlp", hidden=(8,))
    config = PPOConfig(n_envs=B, n_steps=8, n_epochs=2, n_minibatches=2, optimizer="adam", agent=agent)
    return Lifetimes(family, Algorithm(config, Slots.fill(config)), lifetimes, horizon, 3, streams=streams)


def processes(family: TaskFamily, counts: list[int], total: int = P) -> list[Lifetimes]:
    """Lifetimes in a row, as several processes hold them."""
    return [lives(family, Streams(i, total), len(i)) for i in torch.arange(total).split(counts)]


def update(group: list[Lifetimes]) -> tuple[list[torch.Tensor], int]:
    """One update of all processes: what the agents lived through, and how many lifetimes restarted after it."""
    seen = [each.advance(each.plain())[0].trajectory for each in group]
    ended = [each.finished() for each in group]
    for each, which in zip(group, ended, strict=True):
        each.restart(which, elsewhere=any(bool(e.any()) for e in ended))
    names = ("obs", "action", "log_prob", "reward", "terminated", "truncated")
    return [torch.cat([getattr(t, n) for t in seen], 1) for n in names], int(sum(e.sum() for e in ended))


def same(a: Tree, b: Tree) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- single draws --------------------------------------------------------------------------------------------------


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DRAWS = {
    "uniform": (lambda s, shape, g: s.uniform(shape, g), lambda shape, g: torch.rand(shape, generator=g)),
    "normal": (lambda s, shape, g: s.normal(shape, g), lambda shape, g: torch.randn(shape, generator=g)),
    "integers": (lambda s, shape, g: s.integers(9, shape, g), lambda shape, g: torch.randint(9, shape, generator=g)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_rows_of_what_all_streams_draw(name):
    draw, plain = DRAWS[name]
    whole = plain((8, 5, 2), generator())
    assert torch.equal(draw(Streams.apart(8), (8, 5, 2), generator()), whole)
    assert torch.equal(draw(Streams(torch.arange(4, 8), 8), (4, 5, 2), generator()), whole[4:])
    mixed = torch.tensor([3, 3, 7])
    assert torch.equal(draw(Streams(mixed, 8), (3, 5, 2), generator()), whole[mixed])
    copies = Streams(mixed, 8).copies(5)
    assert torch.equal(draw(copies, (15, 2), generator()), whole[mixed].flatten(0, 1))
    assert len(copies) == 15 and copies.total == 40


@pytest.mark.parametrize("kind", [Categorical, ClippedGaussian, SquashedGaussian])
def test_actions_are_drawn_by_streams(kind):
    params = torch.randn(8, 5, 3, generator=generator(1)), torch.randn(8, 5, 3, generator=generator(2))
    bounds = -torch.ones(3), torch.ones(3)
    make = lambda rows: kind(params[0][rows]) if kind is Categorical else kind(*(p[rows] for p in params), *bounds)  # noqa: E731
    every = torch.arange(8)
    whole = make(every).sample(generator())
    if kind is Categorical:
        race = torch.empty(8, 5, 3).exponential_(generator=generator())
        assert torch.equal(whole, (params[0] - race.log()).argmax(-1))
    else:
        assert torch.equal(whole, params[0] + params[1].exp() * torch.empty(8, 5, 3).normal_(generator=generator()))
    assert torch.equal(make(every).sample(generator(), Streams.apart(8)), whole)
    assert torch.equal(make(every[4:]).sample(generator(), Streams(every[4:], 8)), whole[4:])
    once, twice = generator(), generator()
    make(every).sample(once), make(every[:1]).sample(twice, Streams(every[:1], 8))
    assert torch.equal(once.get_state(), twice.get_state())  # the next draw is in step too


def test_streams_know_when_nothing_need_be_taken():
    assert Streams.apart(3).whole and not Streams(torch.tensor([0, 2, 1]), 3).whole
    assert not Streams(torch.arange(3), 4).whole and not Streams(torch.tensor([0, 0]), 2).whole


# --- the default ---------------------------------------------------------------------------------------------------


def test_by_default_every_lifetime_has_a_stream_and_the_numbers_are_those_without_streams():
    """Tasks, agents, first states, actions and restarts, reconstructed draw by draw."""
    family = ControlFamily("cartpole")
    found = lives(family, horizon=3)
    for p in range(P):
        task = family.sample(1, stream("train", 3, p, 0))
        assert all(found.tasks()[k][p] == v for k, v in task.items())
        assert torch.equal(found.population.theta[p], found.population.initial(stream("agent", "train", 3, p, 0)))
    seed = stream_seed("environment", "train", 3) % 2**31
    start = lambda uniform: (-0.05 + 0.1 * uniform).unflatten(0, (P, B))  # noqa: E731
    torch.testing.assert_close(found.obs, start(torch.rand(P * B, 4, generator=generator(seed))), rtol=1e-6, atol=1e-8)
    policy = found.population.bind(found.population.theta.detach(), policy_only=True)
    trajectory, source = found.collect(found.plain()), generator(stream_seed("policy", "train", 3))
    for obs, action in zip(trajectory.obs[:-1], trajectory.action, strict=True):
        logits = policy(obs).policy.logits.detach()
        race = torch.empty_like(logits).exponential_(generator=source)
        assert torch.equal(action, (logits - race.log()).argmax(-1))
    found.restart(torch.arange(P) == 5)
    again = start(torch.rand(P * B, 4, generator=generator(stream_seed("restarts", seed))))
    torch.testing.assert_close(found.obs[5], again[5], rtol=1e-6, atol=1e-8)


class Stubborn(ControlFamily):
    """A family of somebody who has never heard of streams."""

    def make(self, tasks, copies, seed, device="cpu"):
        return ControlFamily.make(self, tasks, copies, seed, device)


def test_a_family_without_streams_serves_by_default():
    same(lives(Stubborn()).state_dict(), lives(ControlFamily()).state_dict())


# --- lifetimes in several processes --------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("counts", [SPLITS[2], SPLITS[3]], ids=str)
def test_lifetimes_in_several_processes_are_those_of_one(family, counts):
    one, several = [lives(family)], processes(family, counts)
    for each in (*one, *several):
        each.stagger()
    restarts = ended = 0
    for _ in range(7):
        (ours, restarted), (theirs, _) = update(one), update(several)
        assert equal(ours, theirs)
        restarts, ended = restarts + restarted, ended + int((ours[-2] | ours[-1]).sum())
        same(one[0].state_dict(), join([each.state_dict() for each in several]))
    assert restarts > P
    assert ended or family.max_episode_steps > 40  # so that beginnings within a rollout were compared


def test_a_restart_elsewhere_keeps_processes_in_step():
    """Without being told of the others' restarts, a process falls behind."""
    one, told, untold = (lives(ControlFamily("cartpole"), s, n) for s, n in ((None, P), *[(last_four(), 4)] * 2))
    one.restart(torch.arange(P) == 0)
    before = told.state_dict()
    told.restart(torch.zeros(4, dtype=torch.bool), elsewhere=True)
    after = told.state_dict()
    assert not torch.equal(after.pop("env/restart_generator"), before.pop("env/restart_generator"))
    same(after, before)
    for each, rows in ((one, torch.arange(P)), (told, torch.arange(4, 8)), (untold, torch.arange(4, 8))):
        each.restart(rows == 6)
    assert torch.equal(told.obs, one.obs[4:]) and not torch.equal(untold.obs, one.obs[4:])


def last_four() -> Streams:
    return Streams(torch.arange(4, 8), 8)


# --- lifetimes that share their luck -------------------------------------------------------------------------------


@EVERY
def test_lifetimes_on_one_stream_with_equal_agents_live_alike(family):
    """Pairs in one process equal each other, and the same pairs in two processes."""
    index = torch.arange(4).repeat_interleave(2)
    pairs = lives(family, Streams(index, 4))
    halves = [lives(family, Streams(i, 4), 4) for i in index.split(4)]
    restarts = ended = 0
    for _ in range(7):
        (seen, restarted), (theirs, _) = update([pairs]), update(halves)
        assert all(torch.equal(x[:, ::2], x[:, 1::2]) for x in seen) and equal(seen, theirs)
        restarts, ended = restarts + restarted, ended + int((seen[-2] | seen[-1]).sum())
    assert restarts > P
    state = pairs.state_dict()
    for name in ("theta", "horizon", "age", "life", "optimizer/first"):
        assert torch.equal(state[name][::2], state[name][1::2]), name
    luck = seen[1] if family.action_space != Discrete(1) else seen[3]  # actions, or else rewards
    assert any(not torch.equal(luck[:, 0], luck[:, p]) for p in (2, 4, 6))  # streams differ


def test_antithetic_agents_see_the_same_luck_and_act_differently():
    family = ControlFamily("cartpole")
    pairs = lives(family, Streams(torch.arange(4).repeat_interleave(2), 4))
    with torch.no_grad():
        pairs.population.theta[1::2] += 3.0
    (obs, action, *_), _ = update([pairs])
    assert torch.equal(obs[0, ::2], obs[0, 1::2]) and not torch.equal(action[:, ::2], action[:, 1::2])
    pairs.restart(torch.ones(P, dtype=torch.bool))
    assert torch.equal(pairs.obs[::2], pairs.obs[1::2])
    tasks = pairs.tasks()
    assert all(torch.equal(v[::2], v[1::2]) and not torch.equal(v[0], v[2]) for v in tasks.values())


def test_staggered_lifetimes_follow_their_streams():
    index = torch.tensor([3, 3, 0, 0])
    shared = lives(GridFamily("small"), Streams(index, 4), 4, horizon=12)
    shared.stagger(multiple=3)
    assert shared.horizon.tolist() == [12, 12, 3, 3]
    one, several = lives(GridFamily("small"), horizon=12), processes(GridFamily("small"), SPLITS[3])
    one.stagger()
    assert one.horizon.tolist() == [2, 3, 5, 6, 8, 9, 11, 12]
    for each in several:
        each.horizon[:] = 12
        each.stagger()
    assert torch.equal(torch.cat([each.horizon for each in several]), one.horizon)


# --- states --------------------------------------------------------------------------------------------------------


def resumed(family: TaskFamily, whole: Tree, counts: list[int]) -> list[Lifetimes]:
    group, first = processes(family, counts), 0
    for each in group:
        for _ in range(2):  # whatever it was before, it is what it loads
            each.advance(each.plain())
        each.load_state_dict(part(whole, first, len(each), P))
        first += len(each)
    return group


@SAVED
def test_a_run_goes_on_in_other_numbers_of_processes(family):
    one, group = [lives(family)], [lives(family)]
    restarts = 0
    for counts in (SPLITS[2], SPLITS[4], [P]):
        for _ in range(2):
            (ours, restarted), (theirs, _) = update(one), update(group)
            restarts += restarted
            assert equal(ours, theirs)
        states = [each.state_dict() for each in group]
        same(join(states), one[0].state_dict())
        group = resumed(family, join(states), counts)
    assert restarts and equal(update(one)[0], update(group)[0])


def test_states_of_gymnasium_environments_join_too():
    """They cannot be restored within an episode, but begin the same new ones in one process or two."""
    family = GymFamily("CartPole-v1")
    one = lives(family)
    update([one])
    state = one.state_dict()
    with pytest.warns(UserWarning, match="new episodes"):
        one.load_state_dict(state)
        group = resumed(family, state, SPLITS[2])
    assert equal(update([one])[0], update(group)[0])
    same(join([each.state_dict() for each in group]), one.state_dict())


@EVERY
def test_every_entry_has_rows_or_is_shared(family):
    """What the rule says of names is so: shared entries agree, all others have P or N rows."""
    state = lives(family).state_dict()
    shared = {k for k, v in state.items() if v.dim() == 0 or k.endswith("generator")}
    env, inner = ("env/inner", family.inner) if isinstance(family, DelayedFamily) else ("env", family)
    names = ("seed", "restarts") if isinstance(inner, GymFamily) else ("generator", "restart_generator")
    assert shared == {"generator", "shuffle_generator", *(f"{env}/{name}" for name in names)}
    for name in state.keys() - shared - {"running"}:
        assert len(state[name]) in (P, P * B), name
    assert state["running"].shape == (2, P, B)
    pieces = [part(state, first, 2, P) for first in (0, 2, 4, 6)]
    same(join(pieces), state)
    assert pieces[1]["running"].shape == (2, 2, B) and torch.equal(pieces[1]["obs"], state["obs"][2:4])
    pieces[0]["theta"] += 1.0
    assert not torch.equal(pieces[0]["theta"], state["theta"][:2])  # a copy


def test_entries_under_a_prefix_and_memory_named_alike():
    state = {"lives/running": torch.arange(16.0).view(2, 4, 2), "lives/memory/reward/running": torch.arange(4.0)}
    half = part(state, 2, 2, 4)
    assert half["lives/running"].tolist() == [[[4, 5], [6, 7]], [[12, 13], [14, 15]]]
    assert half["lives/memory/reward/running"].tolist() == [2, 3]


# --- mistakes ------------------------------------------------------------------------------------------------------


def test_streams_that_do_not_exist_or_fit_are_user_errors():
    with pytest.raises(UserError, match="stream 4: expected 0 to 3"):
        Streams(torch.tensor([0, 4]), 4)
    with pytest.raises(UserError, match="stream -1"):
        Streams(torch.tensor([-1]), 4)
    with pytest.raises(UserError, match="4 streams were given for 8 lifetimes"):
        lives(GridFamily("small"), last_four())
    for family in (GridFamily("small"), GymFamily("CartPole-v1")):
        with pytest.raises(UserError, match="4 streams were given for 3 lifetimes"):
            family.make(family.sample_split("train", 3), B, 0, streams=last_four())


def test_states_that_do_not_belong_together_are_user_errors():
    family = BanditFamily()
    a, b = processes(family, SPLITS[2])
    a.advance(a.plain())
    with pytest.raises(UserError, match="generator' differs"):
        join([a.state_dict(), b.state_dict()])
    with pytest.raises(UserError, match="'env/state/ball'"):
        join([a.state_dict(), lives(CatchFamily("5x5"), last_four(), 4).state_dict()])
    with pytest.raises(UserError, match="4 lifetimes was given: expected one of 8"):
        lives(family).load_state_dict(a.state_dict())
    with pytest.raises(UserError, match="lifetimes 6 to 9"):
        part(lives(family).state_dict(), 6, 4, P)
    with pytest.raises(UserError, match="multiple of 3 lifetimes"):
        part(lives(family).state_dict(), 0, 1, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_draws_on_a_gpu_are_rows_too():
    source = lambda: torch.Generator("cuda").manual_seed(0)  # noqa: E731
    whole, last = Streams.apart(8).to("cuda"), last_four().to("cuda")
    for draw, _ in DRAWS.values():
        assert torch.equal(draw(last, (4, 5), source()), draw(whole, (8, 5), source())[4:])
