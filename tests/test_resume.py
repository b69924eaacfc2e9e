"""A run that is killed with SIGKILL and resumed ends with the same numbers, bit for bit, as one that was left alone."""

from __future__ import annotations

import csv
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from experiments.cli import main
from experiments.runs import ARTIFACT, CHECKPOINT, METRICS, SCORES
from learned_rl import artifacts

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")]

META_TRAIN = shlex.split(
    "meta-train lpg-gridworld --seed 3 --recipe.family grid/small --recipe.train.lifetimes 4 --recipe.train.horizon 6 "
    "--recipe.train.agent.n-envs 2 --recipe.train.agent.n-steps 5 --recipe.train.estimator.window 2 "
    "--recipe.meta-steps 24 --recipe.validate-every 12 --recipe.validation-tasks 2 --recipe.checkpoint-every 3"
)
TRAIN = shlex.split(
    "train control/cartpole --seed 3 --seeds 2 --steps 6000 --checkpoints 12 --episodes 2 "
    "--config.n-steps 16 --config.n-envs 4 --config.agent.hidden 8"
)
ONLINE = [*TRAIN, "--self-tune", "gamma,ent_coef", "--reward", "lirpg"]
WALL_TIME = {"time/fps", "meta/minutes"}


def rows(path: Path) -> list[list[str]]:
    """Complete rows of a CSV that someone may be writing, but for those that depend on the clock."""
    text = path.read_text() if path.exists() else ""
    return [r for r in csv.reader(text[: text.rfind("\n") + 1].splitlines()) if not WALL_TIME & set(r)]


def steps(folder: Path) -> int:
    """The last step that was logged."""
    return int([["0"], *rows(folder / METRICS)[1:]][-1][0])


def killed(words: list[str], folder: Path, moment: random.Random, last: int) -> int:
    """Starts a run and kills it after its first checkpoint, before step `last`; returns the step it had reached."""
    command = [sys.executable, "-c", "from experiments.cli import main; main()", *words, "--out", str(folder)]
    said = folder.with_suffix(".log")
    with said.open("w") as log:
        process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    try:
        while not (folder / CHECKPOINT).exists():
            assert process.poll() is None, f"it ended before its first checkpoint: {said.read_text()}"
            time.sleep(0.01)
        target = moment.randint(steps(folder), last)
        while steps(folder) < target:
            assert process.poll() is None, f"it ended before step {target}: {said.read_text()}"
            time.sleep(0.01)
        time.sleep(moment.random() * 0.03)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    return steps(folder)


def run(monkeypatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["learned-rl", *words])
    main()


def same_checkpoints(a: Path, b: Path) -> None:
    ours, theirs = (torch.load(x / CHECKPOINT, weights_only=True) for x in (a, b))
    assert ours.keys() == theirs.keys() and len(theirs) > 10
    for name in theirs.keys() - {"elapsed"}:
        x, y = (torch.as_tensor(tree[name]) for tree in (ours, theirs))
        assert x.dtype == y.dtype and torch.equal(x.nan_to_num(7.5), y.nan_to_num(7.5)), name


def test_meta_training(tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    seed = random.randrange(10**6)
    at = killed(META_TRAIN, broken, random.Random(seed), last=15)
    said = f"killed at step {at} (moment {seed})"
    assert 3 <= at < 24, said
    run(monkeypatch, *META_TRAIN, "--out", str(broken), "--resume")
    run(monkeypatch, *META_TRAIN, "--out", str(whole))
    assert rows(broken / METRICS) == rows(whole / METRICS), said
    assert {int(r[0]) for r in rows(whole / METRICS)[1:]} == set(range(25))
    same_checkpoints(broken, whole)
    ours, theirs = (artifacts.load(x / ARTIFACT).state_dict() for x in (broken, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs), said
    provenance = [artifacts.read_header(x / ARTIFACT)["provenance"] | {"minutes": 0} for x in (broken, whole)]
    assert provenance[0] == provenance[1], said


@pytest.mark.parametrize("words", [TRAIN, ONLINE], ids=["plain", "online"])
def test_training(tmp_path, monkeypatch, words):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    seed = random.randrange(10**6)
    at = killed(words, broken, random.Random(seed), last=4000)
    said = f"killed at step {at} (moment {seed})"
    assert at < 6000, said
    run(monkeypatch, *words, "--out", str(broken), "--resume")
    run(monkeypatch, *words, "--out", str(whole))
    assert rows(broken / METRICS) == rows(whole / METRICS), said
    assert rows(broken / SCORES) == rows(whole / SCORES) and len(rows(whole / SCORES)) == 1 + 2 * 13, said
    same_checkpoints(broken, whole)


@pytest.mark.parametrize(("words", "first"), [(META_TRAIN, 1), (TRAIN, 64)])
def test_killed_before_the_first_checkpoint(tmp_path, monkeypatch, words, first):
    """What had been logged by then is forgotten, not repeated."""
    words = [*words[:2], "--seed", "3", *words[4:]]
    words += ["--recipe.meta-steps", "2"] if "meta-train" in words else ["--steps", "128", "--checkpoints", "1"]
    run(monkeypatch, *words, "--out", str(tmp_path))
    whole = rows(tmp_path / METRICS)
    assert any(int(r[0]) == first for r in whole[1:])
    (tmp_path / CHECKPOINT).unlink()  # as if killed just before it was written
    run(monkeypatch, *words, "--out", str(tmp_path), "--resume")
    assert rows(tmp_path / METRICS) == whole
