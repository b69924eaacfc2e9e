import gc
import pathlib
import sys

import pytest
import torch

torch.set_num_threads(1)

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden"


def pytest_collection_finish():
    """What was imported stays until the end: the collector need not look at it a hundred times."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def golden():
    """Reads a golden file of reference numbers; skips where the folder is not beside the checkout."""
    import numpy as np

    def load(name: str):
        path = GOLDEN / name
        if not path.exists():
            pytest.skip(f"reference numbers {name} are not beside this checkout (../shared/golden)")
        return {k: v if v.dtype.kind == "U" else torch.as_tensor(v) for k, v in np.load(path).items()}

    return load


@pytest.fixture
def say(monkeypatch, capsys, tmp_path):
    """Runs a command in an empty folder; returns (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # or tables would wrap what is looked for

    def run(*words: str | pathlib.Path) -> tuple[int, str, str]:
        from experiments.cli import main

        monkeypatch.setattr(sys, "argv", ["learned-rl", *map(str, words)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = 0 if end.code is None else int(end.code)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def refused(say):
    """Runs a command that must fail as a user's mistake does; returns its sentence."""

    def run(*words: str | pathlib.Path) -> str:
        code, out, err = say(*words)
        assert code == 2, f"exit code {code}: {out}{err}"
        assert err.startswith("learned-rl: ") and err.count("\n") == 1 and "Traceback" not in err and "│" not in err
        return err

    return run
