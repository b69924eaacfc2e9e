"""Published weights as component files: every array in its place, and nothing written of what is not theirs."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.convert import convert
from learned_rl import artifacts
from learned_rl.types import UserError
from objectives.disco import Disco
from objectives.disco_weights import pieces, read

#: Name -> shape of a few of the published arrays, by the authors' code: matrices [in, out], kernels of width one.
SHAPES = {
    "lstm/mlp/~/linear_0/w": (600, 16),
    "lstm/sequential/conv1_d/w": (1, 18, 16),
    "lstm/lstm/linear/w": (27 + 256, 4 * 256),
    "lstm/lstm/linear/b": (4 * 256,),
    "lstm/~/meta_lstm/~unroll/lstm/linear/w": (16 + 128, 4 * 128),
    "lstm/~/meta_lstm/~unroll/mlp_2/~/linear_0/w": (29, 16),
    "lstm/sequential_1/conv1_d/w": (1, 2 * 258, 16),
    "lstm/linear/w": (128, 256),
    "lstm/linear_2/b": (600,),
}


def rule(seed=0):
    """Of random weights, biases too."""
    torch.manual_seed(seed)
    disco = Disco()
    for weight in disco.parameters():
        weight.data.add_(0.1 * torch.randn(weight.shape))
    return disco


def published(disco):
    """The arrays as the authors would have saved them: 1 is added to the forget gates' biases when they run."""
    sizes: dict[str, tuple[int, ...]] = {}
    filled = [(name, index, view.detach().numpy()) for name, index, view in pieces(disco, lambda p: p)]
    for name, index, view in filled:
        flat = [
            (0, n) if i == 0 else (i.start or 0, n) for i, n in zip(index, (1, *view.shape)[-len(index) :], strict=True)
        ]
        ends = tuple(first + n for first, n in flat)
        sizes[name] = tuple(map(max, ends, sizes.get(name, ends)))
    arrays = {name: np.full(size, np.nan, np.float32) for name, size in sizes.items()}
    for name, index, view in filled:
        assert np.isnan(arrays[name][index]).all(), f"two weights have one place in {name}"
        arrays[name][index] = view
    for name, width in (("lstm/lstm/linear/b", 256), ("lstm/~/meta_lstm/~unroll/lstm/linear/b", 128)):
        arrays[name][2 * width : 3 * width] -= 1  # gates in the order i, g, f, o
    return arrays


@pytest.fixture(scope="module")
def arrays():
    return published(rule())


@pytest.fixture
def file(tmp_path, arrays, monkeypatch):
    """Writes the arrays with some changes, in a folder where the command would leave its own file; None drops one."""
    monkeypatch.chdir(tmp_path)

    def write(**changes):
        path = tmp_path / "weights.npz"
        np.savez(path, **{k: v for k, v in (arrays | changes).items() if v is not None})
        return path

    return write


def said(path, kind="disco103", out=None):
    """The sentence of a refusal, which leaves the folder as it was."""
    before = {p: p.stat().st_mtime_ns for p in path.parent.iterdir()}
    with pytest.raises(UserError) as error:
        convert(kind, path, out)
    assert {p: p.stat().st_mtime_ns for p in path.parent.iterdir()} == before
    sentence = str(error.value)
    assert "\n" not in sentence and "allow_pickle" not in sentence  # which is how one would run what is in it
    return sentence


# --- what is right ------------------------------------------------------------------------------------------------


def test_arrays_have_the_published_names_and_shapes(arrays):
    assert len(arrays) == 42 and not any(np.isnan(x).any() for x in arrays.values())
    assert {k: arrays[k].shape for k in SHAPES} == SHAPES
    assert sum(x.size for x in arrays.values()) == sum(p.numel() for p in Disco().parameters())


def test_weights_survive_publication_and_conversion(file):
    expected, found = rule().state_dict(), read(file()).state_dict()
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        # to rounding where 1 is taken from the forget gates and given back
        exact = not name.endswith(("core.bias", "cell.bias"))
        torch.testing.assert_close(found[name], value, rtol=0, atol=0 if exact else 1e-6, msg=name)


def test_places_of_weights_are_those_of_the_authors(file, arrays):
    """Matrices are transposed, gates i, g, f, o become i, f, o, g with 1 more in f, and inputs come before states."""
    found = read(file())
    w, b = (torch.from_numpy(arrays[f"lstm/lstm/linear/{x}"]) for x in "wb")
    i, g, f, o = w.T.split(256)
    assert torch.equal(torch.cat([i, f, o, g]), torch.cat([found.core.weight_x, found.core.weight_h], 1))
    i, g, f, o = b.split(256)
    assert torch.equal(torch.cat([i, f + 1, o, g]), found.core.bias)
    assert torch.equal(torch.from_numpy(arrays["lstm/linear_3/w"]).T, found.z_head.weight)
    assert torch.equal(torch.from_numpy(arrays["lstm/sequential/conv1_d_1/w"][0]).T, found.reader.mix1.linear.weight)
    inner = "lstm/~/meta_lstm/~unroll/mlp_1/~/linear_1/b"
    assert torch.equal(torch.from_numpy(arrays[inner]), found.life.reader.z[2].bias)


def test_a_component_file_is_written_and_says_whose_weights_it_has(file, tmp_path):
    out = convert("disco103", file(), None)
    assert out.resolve() == tmp_path / "disco103.safetensors"
    loaded, expected = artifacts.load(out), read(file())
    assert type(loaded) is Disco and loaded.config == expected.config
    assert loaded.provenance == expected.provenance and set(loaded.provenance) == {"arrays_sha256"}, "not theirs"
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in expected.state_dict().items())


# --- mistakes -----------------------------------------------------------------------------------------------------

NAME = "lstm/linear_1/b"  # of one number


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (None, [f"lacks the array '{NAME}'", "the 42 arrays"]),
        (np.zeros(2, np.float32), [f"'{NAME}'", "float32 [2]", "expected float32 [1]"]),
        (np.zeros((1, 1), np.float32), [f"'{NAME}'", "float32 [1, 1]", "expected float32 [1]"]),
        (np.zeros(1, np.float64), [f"'{NAME}'", "float64 [1]", "expected float32 [1]"]),
        (np.zeros(1, np.int32), [f"'{NAME}'", "int32 [1]", "expected float32 [1]"]),
        (np.array([np.nan], np.float32), [f"'{NAME}'", "not finite"]),
        (np.array([np.inf], np.float32), [f"'{NAME}'", "not finite"]),
    ],
    ids=["missing", "longer", "deeper", "double", "integer", "nan", "infinite"],
)
def test_an_array_that_does_not_fit_is_named(file, value, parts):
    sentence = said(file(**{NAME: value}))
    assert all(part in sentence for part in [*parts, "weights.npz"])


def test_an_array_too_many_is_named(file):
    assert "holds an array 'lstm/linear_9/b': expected the 42" in said(file(**{"lstm/linear_9/b": np.zeros(3)}))


def test_matrices_that_were_transposed_already_are_refused(file, arrays):
    sentence = said(file(**{"lstm/linear/w": arrays["lstm/linear/w"].T.copy()}))
    assert "float32 [256, 128]: expected float32 [128, 256]" in sentence


class Trap:
    """What would run if it were unpickled."""

    def __reduce__(self):
        return (pytest.fail, ("it was unpickled",))


def test_pickled_objects_are_not_opened(file):
    assert "is not an .npz file of plain arrays" in said(file(**{NAME: np.array([Trap()], object)}))


def written(write):
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def header(text):
    """Of an array, with nothing behind it."""
    return b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text.encode() + b"\n"


def archive(name, content, compression=zipfile.ZIP_STORED):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello there",
        b"PK\x03\x04 and so on",
        json.dumps({"a": 1}).encode(),
        written(lambda file: np.save(file, np.zeros(3, np.float32))),
        archive(NAME, "no array"),
        archive(f"{NAME}.npy", "no array either"),
        archive(f"{NAME}.npy", header("{'descr': '<f4', 'fortran_order': False, 'shape': (3,")),
        archive(f"{NAME}.npy", header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({1 << 58},)}}")),
        archive(NAME, bytes(range(256)) * 9, zipfile.ZIP_LZMA).replace(bytes([93, 0, 0, 128]), bytes([225] * 4)),
        written(lambda file: torch.save({"a": torch.zeros(2)}, file)),
    ],
    ids=["empty", "text", "broken zip", "json", "array", "text in it", "no arrays", "header", "huge", "lzma", "torch"],
)
def test_what_is_no_npz_is_refused(tmp_path, content):
    path = tmp_path / "disco_103.npz"
    path.write_bytes(content)
    assert said(path) == f"{path} is not an .npz file of plain arrays: expected the downloaded disco_103.npz."


def test_a_download_that_was_cut_off_is_refused(file):
    path = file()
    path.write_bytes(path.read_bytes()[:100_000])
    assert "is not an .npz file" in said(path)


def test_a_download_in_which_a_byte_changed_is_refused(file):
    path = file()
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert "is not an .npz file" in said(path)


def test_there_must_be_a_file(tmp_path):
    sentence = said(tmp_path / "disco_13.npz")
    assert "There is no file" in sentence and "disco_13.npz'" in sentence and "expected the downloaded" in sentence
    (tmp_path / "folder").mkdir()
    assert said(tmp_path / "folder").startswith(f"Cannot read {tmp_path / 'folder'}: ")


def test_weights_that_nobody_knows_are_refused(tmp_path):
    assert "kind of published weights 'disco104'" in said(tmp_path / "x", "disco104")


def test_a_component_file_has_its_own_suffix(file):
    assert "'rule.npz': expected a name that ends with .safetensors" in said(file(), out=Path("rule.npz"))


def test_no_file_is_overwritten(file, tmp_path):
    out = tmp_path / "disco103.safetensors"
    out.write_text("mine")
    assert "There is a file 'disco103.safetensors' already" in said(file())
    assert str(out) in said(file(), out=out) and out.read_text() == "mine"


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_says_where_the_component_is(say, file, tmp_path):
    code, out, err = say("convert", "disco103", file(), "--out", "rules/mine.safetensors")
    assert (code, err) == (0, "") and "component: rules/mine.safetensors" in out
    code, out, _ = say("show", "rules/mine.safetensors")
    assert code == 0 and "disco103" in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("disco103", "nothing.npz"), ["There is no file 'nothing.npz'"]),
        (("disco13", "weights.npz"), ["'disco13'", "'disco103'"]),
        (("disco103", "text.npz"), ["text.npz is not an .npz file"]),
        (("disco103", "weights.npz", "--out", "rule.pt"), ["'rule.pt'", ".safetensors"]),
        (("disco103", "weights.npz", "--out", "text.npz/rule.safetensors"), ["text.npz/rule.safetensors"]),
        (("disco103",), ["your download of them"]),
        ((), ["whose they are: disco103"]),
        (("disco103", "weights.npz", "--ot", "x"), ["'--ot'", "'--out'"]),
    ],
)
def test_mistakes_at_the_command_are_one_line(refused, file, tmp_path, words, parts):
    file()
    (tmp_path / "text.npz").write_text("hello")
    sentence = refused("convert", *words)
    assert all(part in sentence for part in parts), sentence
    assert {p.name for p in tmp_path.iterdir()} == {"weights.npz", "text.npz"}
