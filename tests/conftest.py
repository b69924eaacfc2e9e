import pathlib

import pytest
import torch

torch.set_num_threads(1)

GOLDEN = pathlib.Path(__file__).resolve().parents[2] / "shared" / "golden"


@pytest.fixture
def golden():
    """Reads a golden file of reference numbers; skips where the folder is not beside the checkout."""
    import numpy as np

    def load(name: str):
        path = GOLDEN / name
        if not path.exists():
            pytest.skip(f"reference numbers {name} are not beside this checkout (../shared/golden)")
        return {k: torch.as_tensor(v) for k, v in np.load(path).items()}

    return load
