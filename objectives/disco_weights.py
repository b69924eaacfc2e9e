"""The published weights of Disco103, as this toolkit's component.

Users bring their own download of `disco_rl/update_rules/weights/disco_103.npz` from github.com/google-deepmind/disco_rl
(Apache-2.0): 42 arrays of float32, matrices as [in, out], LSTM gates in the order i, g, f, o with a bias of 1 added to
f when they run.
"""

from __future__ import annotations

import hashlib
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn

from learned_rl.types import UserError
from objectives.disco import Disco

#: Checksum of the published arrays.
PUBLISHED = "8308d6085f3f80f28539901c4c4684a3e3ad6fcb83a901ed9e200f57b222dc00"
_GATES = "igfo"  # theirs
_OURS = "ifog"


def read(path: Path) -> Disco:
    """The rule with the weights in a file.

    Raises:
        UserError: there is no such file, or an array in it is missing, too much, or of another shape or type.
    """
    arrays = _arrays(path)
    disco = Disco()
    expected = _shapes(disco)
    for name, shape in expected.items():
        if name not in arrays:
            raise UserError(f"{path} lacks the array {name!r}: expected the {len(expected)} arrays of Disco103.")
        if arrays[name].shape != shape or arrays[name].dtype != np.float32:
            found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            raise UserError(f"The array {name!r} of {path} is {found}: expected float32 {list(shape)}.")
        if not np.isfinite(arrays[name]).all():
            raise UserError(f"The array {name!r} of {path} holds numbers that are not finite.")
    for name in arrays:
        if name not in expected:
            raise UserError(f"{path} holds an array {name!r}: expected the {len(expected)} arrays of Disco103 alone.")
    with torch.no_grad():
        for name, index, view in pieces(disco, lambda p: p.data):
            view.copy_(torch.from_numpy(arrays[name][index]))
        for core in (disco.core, disco.life.cell):
            width = core.weight_h.shape[1]
            core.bias[width : 2 * width] += 1
    digest = _digest(arrays)
    known = {"published": "google-deepmind/disco_rl, disco_103.npz, Apache-2.0"} if digest == PUBLISHED else {}
    disco.provenance = known | {"arrays_sha256": digest}
    return disco


def _digest(arrays: dict[str, np.ndarray]) -> str:
    """A checksum of what the arrays say, however the file was written."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays in a file, and nothing that would be executed."""
    # What numpy says of it goes on to how one would load what is executed.
    other = UserError(f"{path} is not an .npz file of plain arrays: expected the downloaded disco_103.npz.")
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise other
        with file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(f"There is no file {str(path)!r}: expected the downloaded disco_103.npz.") from None
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from None
    except (ValueError, EOFError, RuntimeError, MemoryError, TokenError, BadZipFile, zlib.error, lzma.LZMAError):
        raise other from None
    if not all(isinstance(x, np.ndarray) for x in arrays.values()):  # of what is no array numpy gives the bytes
        raise other
    return arrays


#: A place in a published array.
Index = tuple[slice, ...] | tuple[int, slice, slice]


def pieces(disco: Disco, of: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Index, Tensor]]:
    """Name of a published array, a place in it, and the view of our parameter (or of `of` it, such as its gradient)
    which that place fills."""
    life = "lstm/~/meta_lstm/~unroll/"
    heads = (disco.scale, disco.summary, disco.y_head, disco.z_head, disco.policy_head)
    linear: dict[str, nn.Module] = {f"lstm/linear{f'_{i}' if i else ''}": layer for i, layer in enumerate(heads)}
    linear |= {"lstm/sequential_1/conv1_d": disco.mix.linear, f"{life}mlp_2/~/linear_0": disco.life.inputs}
    for prefix, reader in (("lstm/", disco.reader), (life, disco.life.reader)):
        for name, embed in (("mlp", reader.y), ("mlp_1", reader.z)):
            linear |= {f"{prefix}{name}/~/linear_{i}": embed[2 * i] for i in range(2)}
        linear |= {f"{prefix}sequential/conv1_d{s}": m.linear for s, m in (("", reader.mix0), ("_1", reader.mix1))}
    for name, layer in linear.items():
        assert isinstance(layer, nn.Linear)
        whole: Index = (0, slice(None), slice(None)) if "conv1_d" in name else (slice(None), slice(None))
        yield f"{name}/w", whole, of(layer.weight).T
        yield f"{name}/b", (slice(None),), of(layer.bias)
    for name, core in ((f"{life}lstm/linear", disco.life.cell), ("lstm/lstm/linear", disco.core)):
        (_, inputs), width = core.weight_x.shape, core.weight_h.shape[1]
        for ours, gate in enumerate(_OURS):
            rows = slice(ours * width, (ours + 1) * width)
            columns = slice(_GATES.index(gate) * width, (_GATES.index(gate) + 1) * width)
            yield f"{name}/w", (slice(0, inputs), columns), of(core.weight_x)[rows].T
            yield f"{name}/w", (slice(inputs, None), columns), of(core.weight_h)[rows].T
            yield f"{name}/b", (columns,), of(core.bias)[rows]


def _shapes(disco: Disco) -> dict[str, tuple[int, ...]]:
    """Shape of each published array."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, index, view in pieces(disco, lambda p: p):
        if "lstm/linear/" in name and not name.startswith("lstm/linear/"):  # of which pieces fill only parts
            core = disco.core if name.startswith("lstm/lstm/") else disco.life.cell
            rows, width = core.weight_x.shape[1] + core.weight_h.shape[1], 4 * core.weight_h.shape[1]
            shapes[name] = (width,) if name.endswith("/b") else (rows, width)
        else:
            shapes[name] = (1, *view.shape) if isinstance(index[0], int) else tuple(view.shape)
    return shapes
