"""Grid worlds: each rule of a step on hand-made maps, the streams, the family's ranges, and the exact solver."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from learned_rl.tasks.grid_solver import MOVES
from learned_rl.tasks.grids import PRESETS, DrawnPreset, GridFamily
from learned_rl.types import UserError

UP, DOWN, LEFT, RIGHT, STAY, UP_LEFT, _, _, DOWN_RIGHT = range(9)
DEBUG = GridFamily("debug")  # 4x4 cells, 2 object slots, 5 actions
SMALL = GridFamily("small")
SPARSE = GridFamily("sparse")  # 13x13 cells, 2 object slots, 9 actions
SPARSE_18 = GridFamily("sparse", collect_actions=True)
STATIC = [name for name in GridFamily.presets if not name.startswith("rand")]


def task(rows, objects, max_steps=10, family=DEBUG):
    """One task from a map: `S` start, `#` wall, `0 1` objects; `objects[k]` is (reward, p_terminate, p_respawn)."""
    layout = family.layout
    walls = torch.ones(1, layout.cells, dtype=torch.bool)
    where = {}
    for r, row in enumerate(rows):
        for c, letter in enumerate(row):
            where[letter] = r * layout.width + c
            walls[0, r * layout.width + c] = letter == "#"
    padded = torch.zeros(layout.slots, 3)
    padded[: len(objects)] = torch.tensor(objects).view(-1, 3)
    reward, p_terminate, p_respawn = padded.T[:, None].clone()
    size, used = torch.tensor([[len(rows), len(rows[0])]]), torch.arange(layout.slots)[None] < len(objects)
    tasks = {"size": size, "walls": walls, "used": used, "max_steps": torch.tensor([max_steps])}
    tasks |= {"reward": reward, "p_terminate": p_terminate, "p_respawn": p_respawn}
    if family.source.random:
        return tasks
    cells = [[where.get(str(k), 0) for k in range(layout.slots)]]
    return tasks | {"start": torch.tensor([where["S"]]), "object_cell": torch.tensor(cells)}


def begin(family, tasks, copies, seed=0):
    env = family.make(tasks, copies, seed)
    env.reset()
    return env


def near(found, p, n=40_000):
    """Whether the share of trues among `n` draws agrees with the probability, within four standard errors."""
    return abs(float(found.float().mean()) - p) < 4 * (p * (1 - p) / n) ** 0.5


def walk(rows, objects, actions, family=DEBUG, **kwargs):
    """(cell, mask, reward) of each step of one copy that plays the actions."""
    env = begin(family, task(rows, objects, family=family, **kwargs), 1)
    seen = []
    for action in actions:
        _, reward, _, _, info = env.step(torch.tensor([action]))
        seen.append((*divmod(int(info["final_obs"]), family.layout.masks), float(reward)))
    return seen


def stream(env, steps, seed=3):
    """Everything that `steps` random steps return, one tensor per kind."""
    shape, generator = (steps, env.num_envs), torch.Generator().manual_seed(seed)
    out = []
    for action in torch.randint(int(env.single_action_space.n), shape, generator=generator):
        *kinds, info = env.step(action)
        out.append((*kinds, info["final_obs"]))
    return [torch.stack(kind) for kind in zip(*out, strict=True)]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- one step ------------------------------------------------------------------------------------------------------


def test_moves_walls_and_edges():
    rows = ["S.#", "...", "..."]  # a 3x3 grid in a 4x4 padding: cell = 4 * row + column
    seen = walk(rows, [], [UP, LEFT, RIGHT, RIGHT, DOWN, RIGHT, RIGHT, DOWN, DOWN, STAY])
    assert [row[0] for row in seen] == [0, 0, 1, 1, 5, 6, 6, 10, 10, 10]


def test_diagonals_pass_between_walls_but_not_into_them():
    rows = ["S#", "#."]
    seen = walk(rows, [], [RIGHT, DOWN, UP_LEFT, DOWN_RIGHT, DOWN_RIGHT, UP_LEFT], SPARSE)
    assert [row[0] for row in seen] == [0, 0, 0, 14, 14, 0]
    assert walk(["S.", ".#"], [], [DOWN_RIGHT], SPARSE)[0][0] == 0


def test_collecting_pays_once_and_removes_the_object():
    seen = walk(["S01"], [(0.5, 0.0, 0.0), (-1.0, 0.0, 0.0)], [RIGHT, STAY, LEFT, RIGHT, RIGHT])
    assert [row[1:] for row in seen] == [(2, 0.5), (2, 0.0), (2, 0.0), (2, 0.0), (0, -1.0)]


def test_objects_on_one_cell_are_collected_together_and_their_chances_to_end_add_up():
    tasks = task(["S0"], [(0.5, 0.25, 0.0), (0.25, 0.5, 0.0)])
    tasks["object_cell"][:] = 1
    env = begin(DEBUG, tasks, 40_000)
    _, reward, terminated, _, info = env.step(torch.full((40_000,), RIGHT))
    assert (reward == 0.75).all() and (info["final_obs"] == 4).all()
    assert near(terminated, 0.75)
    tasks["p_terminate"] += 0.3  # sums above one are one
    env = begin(DEBUG, tasks, 1000)
    assert env.step(torch.full((1000,), RIGHT))[2].all()


def test_respawn_at_probability_one_takes_two_steps_and_is_collected_one_later():
    seen = walk(["S0"], [(1.0, 0.0, 1.0)], [RIGHT, STAY, STAY, STAY, STAY])
    assert [row[1:] for row in seen] == [(0, 1.0), (1, 0.0), (0, 1.0), (1, 0.0), (0, 1.0)]


def test_respawn_statistics():
    env = begin(DEBUG, task(["S0"], [(1.0, 0.0, 0.3)]), 40_000)
    env.step(torch.full((40_000,), RIGHT))
    for expected in (0.3, 0.51):  # away from the object it accumulates
        assert near(env.step(torch.full((40_000,), LEFT))[0] & 1, expected)


def test_objects_respawn_independently():
    env = begin(DEBUG, task(["S", "0", "1"], [(1.0, 0.0, 0.5), (1.0, 0.0, 0.2)]), 40_000)
    env.step(torch.full((40_000,), DOWN))
    mask = env.step(torch.full((40_000,), DOWN))[0] & 3  # the second is collected while the first may come back
    assert set(mask.tolist()) == {0, 1}
    mask = env.step(torch.full((40_000,), STAY))[0] & 3
    for value, expected in enumerate((0.25 * 0.8, 0.75 * 0.8, 0.25 * 0.2, 0.75 * 0.2)):
        assert near(mask == value, expected)


def test_termination_resets_to_the_start_with_all_objects():
    env = DEBUG.make(task(["S01"], [(1.0, 0.0, 0.0), (0.5, 1.0, 0.0)]), 2, seed=0)
    assert env.reset()[0].tolist() == [3, 3]
    env.step(torch.tensor([RIGHT, STAY]))
    obs, reward, terminated, truncated, info = env.step(torch.tensor([RIGHT, STAY]))
    assert obs.tolist() == [3, 3] and info["final_obs"].tolist() == [8, 3]
    assert (reward.tolist(), terminated.tolist(), truncated.tolist()) == ([0.5, 0.0], [True, False], [False, False])
    assert env.elapsed.tolist() == [0, 2]


def test_time_limit_truncates_and_a_terminated_last_step_is_not_truncated():
    env = begin(DEBUG, task(["S.0"], [(1.0, 1.0, 0.0)], max_steps=2), 2)
    assert not env.step(torch.tensor([RIGHT, RIGHT]))[3].any()
    obs, _, terminated, truncated, info = env.step(torch.tensor([RIGHT, STAY]))
    assert (terminated.tolist(), truncated.tolist()) == ([True, False], [False, True])
    assert obs.tolist() == [1, 1] and info["final_obs"].tolist() == [8, 5]


def test_collect_actions_reach_the_neighbour_and_moves_collect_nothing():
    rows, objects = ["S0", "1#"], [(1.0, 0.0, 0.0), (-0.5, 0.0, 0.0)]
    seen = walk(rows, objects, [9 + RIGHT, RIGHT, STAY, LEFT, DOWN, 9 + STAY, 9 + LEFT], SPARSE_18)
    assert [row[0] for row in seen] == [0, 1, 1, 0, 13, 13, 13]
    assert [row[1:] for row in seen] == [(2, 1.0)] + 4 * [(2, 0.0)] + [(0, -0.5), (0, 0.0)]


def test_planes_show_agent_objects_and_walls():
    family = GridFamily("debug", observation="planes")
    env = begin(family, task(["S0", "#1"], [(1.0, 0.0, 0.0), (1.0, 0.0, 0.0)]), 1)
    planes = env.step(torch.tensor([RIGHT]))[0][0]
    assert planes.dtype == torch.float32 and planes.shape == (4, 4, 4)
    assert planes[0].nonzero().tolist() == [[0, 1]]
    assert planes[1].sum() == 0 and planes[2].nonzero().tolist() == [[1, 1]]
    assert (planes[3] == 0).nonzero().tolist() == [[0, 0], [0, 1], [1, 1]]


# --- random grids --------------------------------------------------------------------------------------------------


def test_random_grids_start_on_distinct_free_cells_uniformly():
    family = GridFamily("rand-small")
    env = begin(family, family.sample_split("train", 1), 33_000)
    drawn = torch.cat((env.cell[:, None], env.object_cell), 1)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    free = (~env.task["walls"][0]).nonzero()[:, 0]
    assert len(free) == 33
    for column in drawn.T:  # each of 33 cells 1000 times: chi-square with 32 degrees of freedom
        count = column.bincount(minlength=family.layout.cells)
        assert count[free].sum() == 33_000
        assert ((count[free] - 1000.0) ** 2 / 1000).sum() < 32 + 5 * 8


def test_random_grids_respawn_uniformly_on_vacant_cells():
    family = GridFamily("rand-small")
    objects = [(1.0, 0.0, 1.0), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0)]
    env = begin(family, task([".......", "..#.#..", "......."], objects, family=family), 30_000)
    env.cell[:] = 0
    env.object_cell[:] = torch.tensor([1, 2, 20, 0])
    assert env.step(torch.full((30_000,), RIGHT))[1].eq(1).all()
    reward = env.step(torch.full((30_000,), RIGHT))[1]  # object 1 is collected, object 0 comes back
    assert reward.eq(0).all() and env.present.eq(0b101).all()
    where = env.object_cell[:, 0].bincount(minlength=35)
    vacant = [cell for cell in range(21) if cell not in (2, 9, 11, 20)]
    assert where[vacant].sum() == 30_000  # not under the agent, not on the object left, not on walls
    expected = 30_000 / len(vacant)
    assert ((where[vacant] - expected) ** 2 / expected).sum() < 16 + 5 * 32**0.5
    assert (env.object_cell[:, 1:] == torch.tensor([2, 20, 0])).all()


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("rand")])
def test_random_grids_never_stack_objects(preset):
    family = GridFamily(preset)
    env = begin(family, family.sample_split("train", 2), 64)
    for action in torch.randint(9, (60, 128), generator=torch.Generator().manual_seed(0)):
        planes = env.step(action)[0]
        assert planes[:, 1:].sum(1).max() <= 1  # objects and walls share no cell
        assert (planes[:, 0].sum((1, 2)) == 1).all() and (planes[:, 0] * planes[:, -1]).sum() == 0


# --- streams -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", GridFamily.presets)
def test_observations_lie_in_their_space_and_streams_repeat(preset):
    family = GridFamily(preset)
    tasks = family.sample_split("train", 3)
    env, twin = (family.make(tasks, 2, seed=5) for _ in range(2))
    first, _ = env.reset(seed=1)
    assert family.observation_space.contains(np.asarray(first[0]).astype(family.observation_space.dtype)[()])
    assert torch.equal(first, twin.reset(seed=1)[0])
    found = stream(env, 30)
    assert equal(found, stream(twin, 30))
    for obs in found[0].flatten(0, 1):
        assert family.observation_space.contains(np.asarray(obs)[()])
    assert found[0].dtype == (torch.int64 if family.observation == "tabular" else torch.float32)
    assert (found[1].dtype, found[2].dtype, found[3].dtype) == (torch.float32, torch.bool, torch.bool)
    twin.reset(seed=2)
    assert "rand" not in preset or not torch.equal(stream(twin, 30)[0], found[0])


@pytest.mark.parametrize("preset", ["small", "rand-small", "debug-planes", "longer"])
def test_state_dict_round_trip_continues_bit_for_bit(preset):
    family = GridFamily(preset)
    env = begin(family, family.sample_split("train", 4), 8)
    stream(env, 15)
    saved = env.state_dict()
    expected = stream(env, 25, seed=9)
    other = family.make(family.sample_split("test", 4), 8, seed=77)
    other.reset()
    other.load_state_dict(saved)
    assert equal(stream(other, 25, seed=9), expected)
    env.load_state_dict(saved)
    assert equal(stream(env, 25, seed=9), expected)


@pytest.mark.parametrize("preset", ["small", "small-planes", "rand-small"])
def test_new_tasks_of_some_lifetimes_leave_the_others_untouched(preset):
    family = GridFamily(preset)
    tasks, fresh = family.sample_split("train", 4), family.sample_split("validation", 2)
    env, twin = (family.make(tasks, 5, seed=0) for _ in range(2))
    env.reset(), twin.reset()
    stream(env, 10), stream(twin, 10)
    changed = torch.tensor([3, 1])
    obs = env.set_tasks(changed, fresh)
    kept = torch.tensor([0, 2])[:, None] * 5 + torch.arange(5)
    assert torch.equal(obs[kept.flatten()], twin._observe()[kept.flatten()])
    whole = {key: value.clone() for key, value in tasks.items()}
    for key, value in fresh.items():
        whole[key][changed] = value
    oracle = family.make(whole, 5, seed=0)  # an environment that had the new tasks from the beginning
    oracle.load_state_dict(env.state_dict())
    found = stream(env, 40)
    assert equal(found, stream(oracle, 40))
    assert all(torch.equal(a[:, kept], b[:, kept]) for a, b in zip(found, stream(twin, 40), strict=True))


def test_new_tasks_begin_at_their_own_start():
    env = begin(
        DEBUG, {key: value.repeat_interleave(2, 0) for key, value in task(["S0"], [(1.0, 0.0, 0.0)]).items()}, 2
    )
    env.step(torch.tensor([RIGHT] * 4))
    obs = env.set_tasks(torch.tensor([1]), task(["0#", ".S"], [(0.5, 0.0, 0.0)], max_steps=3))
    assert obs.tolist() == [4, 4, 21, 21] and env.elapsed.tolist() == [1, 1, 0, 0]
    assert env.step(torch.tensor([STAY, STAY, UP, LEFT]))[0].tolist() == [4, 4, 21, 17]
    assert env.step(torch.tensor([STAY, STAY, STAY, UP]))[1].tolist() == [0, 0, 0, 0.5]
    assert env.step(torch.tensor([STAY] * 4))[3].tolist() == [False, False, True, True]


# --- the family ----------------------------------------------------------------------------------------------------


def test_spaces_and_sizes():
    sizes = {"all": 3200, "small": 288, "dense": 11 * 11 * 16, "sparse": 13 * 13 * 4, "longer": 7 * 9 * 128}
    assert {name: GridFamily(name).observation_space.n for name in sizes} == sizes
    assert [GridFamily(name).action_space.n for name in ("small", "dense")] == [5, 9]
    assert GridFamily("long", collect_actions=True).action_space.n == 18
    assert GridFamily("rand-dense").observation_space.shape == (6, 11, 11)
    assert GridFamily("all-planes").observation_space.shape == (7, 10, 10)
    assert GridFamily("dense", observation="planes").observation_space.shape == (6, 11, 11)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_drawn_quantity_stays_in_its_range_and_reaches_both_ends(preset):
    source = PRESETS[preset]
    tasks = GridFamily(preset).sample(4000, torch.Generator().manual_seed(0))
    assert not any(value.isnan().any() for value in tasks.values() if value.is_floating_point())
    inside = (tasks["size"].prod(1), (~tasks["walls"]).sum(1))
    if not isinstance(source, DrawnPreset):
        assert (tasks["size"] == torch.tensor(source.size)).all()
        assert (tasks["max_steps"] == source.max_steps).all() and tasks["used"].all()
        assert (inside[0] - inside[1] == len(source.walls)).all()
        found = torch.stack([tasks[key] for key in ("reward", "p_terminate", "p_respawn")], -1)
        assert (found == torch.tensor(source.objects)).all()
        return
    used, side = tasks["used"], tasks["size"][:, 0]
    assert (tasks["size"][:, 1] == side).all()
    assert set(side.tolist()) == set(range(source.sides[0], source.sides[1] + 1))
    assert set(used.sum(1).tolist()) == set(range(source.counts[0], source.counts[1] + 1))
    low, high = tasks["max_steps"].aminmax()
    assert low == source.steps[0] and 0.99 * source.steps[1] <= high <= source.steps[1]
    middle = (source.steps[0] * source.steps[1]) ** 0.5  # the median of a log-uniform number is the geometric mean
    assert abs(float((tasks["max_steps"] < middle).float().mean()) - 0.5) < (0.1 if preset == "debug" else 0.04)
    for key, low, high in (("p_terminate", 0.01, 1.0), ("p_respawn", 0.001, 0.1)):
        value = tasks[key][used]
        assert low <= value.min() < 1.01 * low and 0.99 * high < value.max() <= high
        assert abs(float((value < (low * high) ** 0.5).float().mean()) - 0.5) < 0.04
    first, rest = tasks["reward"][:, 0], tasks["reward"][:, 1:][used[:, 1:]]
    assert 0 <= first.min() < 0.01 and 0.99 < first.max() <= 1
    assert -1 <= rest.min() < -0.99 and 0.99 < rest.max() <= 1
    assert all((tasks[key][~used] == 0).all() for key in ("reward", "p_terminate", "p_respawn"))
    walls = inside[0] - inside[1]
    assert (walls[side == source.sides[1]] == source.walls).all() and (walls <= source.walls).all()
    expected = source.walls * (source.sides[0] / source.sides[1]) ** 2  # hypergeometric mean in the smallest grids
    assert abs(float(walls[side == source.sides[0]].float().mean()) - expected) < 0.2


@pytest.mark.parametrize("preset", STATIC)
def test_start_and_objects_lie_on_distinct_free_cells(preset):
    tasks = GridFamily(preset).sample_split("train", 500)
    drawn = torch.cat((tasks["start"][:, None], tasks["object_cell"]), 1)
    assert (drawn.sort(1).values.diff(dim=1) > 0).all()
    assert not tasks["walls"].gather(1, drawn).any()
    assert len(set(tasks["start"].tolist())) > 10


def test_walls_of_the_maze_like_presets():
    def picture(preset):
        family = GridFamily(preset)
        walls = family.sample_split("train", 1)["walls"].view(family.layout.height, family.layout.width)
        return ["".join("#" if wall else "." for wall in row) for row in walls.tolist()]

    wall, gap = "....#....", "........."
    assert picture("longer") == [wall, gap, *[wall] * 3, gap, wall]
    wall, gap = ".....#.....", "..........."
    assert picture("long-dense") == [gap, *[wall] * 3, "##.#####.##", *[wall] * 2, gap, *[wall] * 3]
    assert picture("rand-small") == [".......", "..#....", ".......", "....#..", "......."]
    assert set("".join(picture("dense") + picture("rand-small-sparse"))) == {"."}


def test_splits_and_seeds_differ_and_repeat():
    draws = [SMALL.sample_split(split, 8, seed) for split in ("train", "validation", "test") for seed in (0, 1)]
    assert len({tuple(draw["reward"].flatten().tolist()) for draw in draws}) == 6
    again = SMALL.sample_split("train", 8, 0)
    assert all(torch.equal(again[key], value) for key, value in draws[0].items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"preset": "smal"}, "'smal'.*nearest: 'small'"),
        ({"preset": "dense", "observation": "plane"}, "'plane'.*nearest: 'planes'"),
        ({"preset": "rand-dense", "observation": "tabular"}, "'rand-dense'.*'planes'"),
        ({"preset": "small-planes", "observation": "tabular"}, "'small-planes'.*'planes'"),
        ({"preset": "all", "collect_actions": True}, "'all'.*'dense'"),
    ],
)
def test_mistakes_are_named(arguments, words):
    with pytest.raises(UserError, match=words):
        GridFamily(**arguments)


def test_tasks_of_another_preset_are_refused_and_random_grids_have_no_exact_return():
    tasks = GridFamily("large").sample_split("train", 1)
    with pytest.raises(UserError, match=r"100 cells and 5 objects.*'small'.*36 and 3"):
        SMALL.make(tasks, 1, 0)
    with pytest.raises(UserError, match="'small'"):
        SMALL.optimal_return(tasks)
    family = GridFamily("rand-small")
    with pytest.raises(UserError, match="4 free cells"):
        family.make(task(["...."], [], family=family), 1, 0)
    tasks = family.sample_split("train", 2)
    assert family.optimal_return(tasks) is None and family.random_return(tasks) is None


# --- the solver ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "objects", "max_steps", "expected"),
    [
        (["S..0"], [(0.7, 1.0, 0.0)], 3, 0.7),  # at distance three
        (["S..0"], [(0.7, 1.0, 0.0)], 2, 0.0),  # out of time
        (["S#0."], [(0.7, 1.0, 0.0)], 10, 0.0),  # out of reach
        (["S0.."], [(-0.7, 1.0, 0.0)], 10, 0.0),  # better left alone
        (["S0.."], [(1.0, 0.0, 1.0)], 10, 5.0),  # collected at steps 1, 3, 5, 7, 9
        (["S0.."], [(1.0, 0.0, 0.5)], 3, 1.5),  # once more if it comes back in step 2
        (["S0.."], [(1.0, 0.5, 1.0)], 5, 1.75),  # 1 + 1/2 + 1/4
        (["S01."], [(-0.25, 0.0, 0.0), (1.0, 1.0, 0.0)], 5, 0.75),  # through the bad one
        (["0.S1"], [(1.0, 1.0, 0.0), (0.9, 0.0, 0.0)], 4, 1.9),  # the near one first, then the one that ends it
        (["0.S1"], [(1.0, 1.0, 0.0), (0.9, 0.0, 0.0)], 3, 1.0),  # no time for both
    ],
)
def test_optimal_return_by_hand(rows, objects, max_steps, expected):
    found = DEBUG.optimal_return(task(rows, objects, max_steps))
    assert found.dtype == torch.float32 and found.shape == (1,)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_random_return_by_hand():
    # One row of two cells: 1 of 5 actions moves right. Terminating: 1 - 0.8^T. Otherwise collected at most once, too.
    assert DEBUG.random_return(task(["S0"], [(1.0, 1.0, 0.0)], 3)).item() == pytest.approx(1 - 0.8**3, abs=1e-6)
    # Comes back at once but is only collected by an agent that is on its cell two steps later, four of five times each.
    expected = 1 - 0.8**3 + 0.2 * (0.8 * 0.8 + 0.2 * 0.2)
    assert DEBUG.random_return(task(["S0"], [(1.0, 0.0, 1.0)], 3)).item() == pytest.approx(expected, abs=1e-6)


def expectimax(tasks, family, best):
    """The rules once more, as plain recursion over one task; no table, no batch."""
    layout = family.layout
    walls, where = tasks["walls"][0].tolist(), tasks["object_cell"][0].tolist()
    reward, ending, respawn = (tasks[key][0].tolist() for key in ("reward", "p_terminate", "p_respawn"))

    def neighbour(cell, move):
        row, column = cell // layout.width + MOVES[move][0], cell % layout.width + MOVES[move][1]
        inside = 0 <= row < layout.height and 0 <= column < layout.width
        free = inside and not walls[row * layout.width + column]
        return row * layout.width + column if free else None

    @functools.cache
    def value(cell, present, to_go):
        if to_go == 0:
            return 0.0
        outcomes = []
        for action in range(layout.actions):
            collects = action >= layout.moves
            target = neighbour(cell, action % layout.moves)
            here = cell if collects or target is None else target
            at = target if collects else (None if layout.collect_actions else here)
            taken = [k for k in present if where[k] == at]
            q = sum(reward[k] for k in taken)
            go_on = 1 - min(1.0, sum(ending[k] for k in taken))
            absent = [k for k, used in enumerate(tasks["used"][0].tolist()) if used and k not in present]
            for back in range(2 ** len(absent)):
                chance, left = go_on, set(present) - set(taken)
                for i, k in enumerate(absent):
                    comes = back >> i & 1
                    chance *= respawn[k] if comes else 1 - respawn[k]
                    left |= {k} if comes else set()
                q += chance * value(here, tuple(sorted(left)), to_go - 1) if chance else 0.0
            outcomes.append(q)
        return max(outcomes) if best else sum(outcomes) / len(outcomes)

    start = tuple(k for k, used in enumerate(tasks["used"][0].tolist()) if used)
    return value(int(tasks["start"]), start, int(tasks["max_steps"]))


@pytest.mark.parametrize("family", [DEBUG, SPARSE_18], ids=["5 actions", "18 actions"])
def test_solver_agrees_with_plain_recursion(family):
    tasks = DEBUG.sample_split("test", 20)
    if family is SPARSE_18:  # the same small tasks in the corner of a larger grid
        corner = torch.arange(13).lt(4)
        walls = torch.ones(20, 169, dtype=torch.bool)
        walls[:, (corner[:, None] & corner).flatten()] = tasks["walls"]
        moved = {key: tasks[key] // 4 * 13 + tasks[key] % 4 for key in ("start", "object_cell")}
        tasks = tasks | moved | {"walls": walls, "max_steps": tasks["max_steps"] - 3}
    for best, found in ((True, family.optimal_return(tasks)), (False, family.random_return(tasks))):
        expected = [expectimax({k: v[i : i + 1] for k, v in tasks.items()}, family, best) for i in range(20)]
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
        assert max(expected) > 0.05


@pytest.mark.parametrize("preset", ["small", "debug", "sparse", "longer", "sparse-18"])
def test_random_return_agrees_with_rollouts(preset):
    family = SPARSE_18 if preset == "sparse-18" else GridFamily(preset)
    tasks, copies = family.sample_split("test", 4), 4000
    tasks["max_steps"].clamp_(max=100)  # keeps the test short
    env, generator = begin(family, tasks, copies), torch.Generator().manual_seed(0)
    total, alive = torch.zeros(4 * copies), torch.ones(4 * copies, dtype=torch.bool)
    for _ in range(int(tasks["max_steps"].max())):
        action = torch.randint(family.layout.actions, (4 * copies,), generator=generator)
        _, reward, terminated, truncated, _ = env.step(action)
        total += reward * alive
        alive &= ~(terminated | truncated)
    error = total.view(4, copies).std(1) / copies**0.5
    gap = (total.view(4, copies).mean(1) - family.random_return(tasks)).abs()
    assert not alive.any() and (gap <= 4 * error).all() and error.max() > 0


def test_optimal_is_at_least_random_never_negative_and_depends_on_the_task_alone():
    tasks = SMALL.sample_split("train", 64)  # several chunks, with mixed time limits
    best, uniform = SMALL.optimal_return(tasks), SMALL.random_return(tasks)
    assert (best >= uniform).all() and (best >= 0).all()
    assert (best > uniform + 0.05).float().mean() > 0.9
    alone = [SMALL.optimal_return({k: v[i : i + 1] for k, v in tasks.items()}) for i in range(40)]
    assert torch.equal(best[:40], torch.cat(alone))
