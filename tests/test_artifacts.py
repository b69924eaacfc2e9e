"""Component files: they come back as they were, or are refused with one sentence; nothing in them is executed."""

import dataclasses
import json
import os
import pickle
import stat
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from learned_rl import artifacts
from learned_rl.artifacts import FORMAT, get, load, read_header, save
from learned_rl.component import Component, NoConfig
from learned_rl.registry import components
from learned_rl.types import UserError
from objectives.disco import Disco
from objectives.dpo import DPO, DPOConfig
from objectives.lpg import LPG

PROVENANCE = {"family": "grid/small", "minutes": 1.5, "validation": {"final": 0.5}, "note": "ünïcode"}


@pytest.fixture
def lpg():
    torch.manual_seed(3)
    return LPG(predictions=2, width=3, core="gru", embedding=2)


@pytest.fixture
def file(lpg, tmp_path):
    path = tmp_path / "component.safetensors"
    save(lpg, path, PROVENANCE)
    return path


def refusal(path, reader=load):
    """The one sentence with which a file is refused; any other exception fails the test."""
    with pytest.raises(UserError) as error:
        reader(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message and message.endswith(".")
    return message


def rewrite(path, tensors=None, sign=True, **header):
    """The file again with other content, under a right checksum unless `sign` is false."""
    with safe_open(path, framework="pt") as f:
        old = dict(f.metadata())
    tensors = load_file(path) if tensors is None else tensors
    new = {k: v for k, v in (old | header).items() if v is not None}
    if sign:
        new["sha256"] = artifacts._digest(new, tensors)
    save_file(tensors, path, metadata=new)


def same(a: Component, b: Component) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return (
        type(a) is type(b) and a.config == b.config and x.keys() == y.keys() and all(map(torch.equal, *_values(x, y)))
    )


def _values(x, y):
    return [x[k] for k in x], [y[k] for k in x]


# --- what comes back ----------------------------------------------------------------------------------------------


def test_round_trip(lpg, file):
    assert same(load(file), lpg)
    assert load(file).state_dict()["core.weight_h"].dtype == torch.float32


def test_settings_that_the_weights_fit_may_be_others(tmp_path):
    torch.manual_seed(0)
    disco, path = Disco(predictions=3, width=2, lifetime_width=2, embedding=2), tmp_path / "rule.safetensors"
    save(disco, path)
    changed = load(path, support=2, target_decay=0.5)
    assert changed.config == dataclasses.replace(disco.config, support=2, target_decay=0.5)
    assert all(torch.equal(v, disco.state_dict()[k]) for k, v in changed.state_dict().items())
    assert "has shape [2, 3], expected [2, 4]" in refusal(path, lambda path: load(path, predictions=4))
    assert "'suport'" in refusal(path, lambda path: load(path, suport=4))


def test_double_precision_stays(lpg, tmp_path):
    path = tmp_path / "double.safetensors"
    save(lpg.double(), path)
    assert same(load(path), lpg) and next(load(path).parameters()).dtype == torch.float64


def test_a_component_without_weights(tmp_path):
    path = tmp_path / "dpo.safetensors"
    save(DPO(DPOConfig(alpha=3.0)), path)
    assert load(path).config == DPOConfig(alpha=3.0)


class Odd(Component):
    """Weights that share memory, a view that is not contiguous, a number without axes, and buffers that count."""

    slot, name, Config = "objective", "odd", NoConfig

    def __init__(self, config=None):
        super().__init__(config)
        self.one = torch.nn.Parameter(torch.randn(3, 2).T)
        self.two = self.one
        self.scalar = torch.nn.Parameter(torch.tensor(1.5))
        self.register_buffer("count", torch.tensor(7))
        self.register_buffer("mask", torch.tensor([True, False]))


def test_unusual_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "components", lambda: {"odd": Odd})
    path, odd = tmp_path / "odd.safetensors", Odd()
    save(odd, path)
    assert same(load(path), odd)
    wrong = load_file(path) | {"count": torch.tensor(7.0)}
    rewrite(path, wrong)
    assert "'count' holds torch.float32, expected torch.int64" in refusal(path)


def test_plain_safetensors_reads_it(lpg, file):
    with safe_open(file, framework="pt") as f:
        header = f.metadata()
        assert set(f.keys()) == set(lpg.state_dict())
    assert header["format"] == FORMAT and header["component"] == "lpg" and header["contract"] == "1"
    assert json.loads(header["config"]) == dataclasses.asdict(lpg.config)
    assert json.loads(header["provenance"]) == PROVENANCE
    assert read_header(file)["provenance"] == PROVENANCE and read_header(file)["config"]["width"] == 3


def test_get_takes_names_and_files(lpg, file, monkeypatch):
    assert type(get("dpo")) is DPO
    assert same(get(file), lpg) and same(get(str(file)), lpg)
    monkeypatch.chdir(file.parent)
    os.rename(file, "weights")  # an existing file needs no suffix
    assert same(get("weights"), lpg)
    Path("dpo").mkdir()  # and a folder does not hide a registered name
    assert type(get("dpo")) is DPO


# --- how it is written --------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_permissions_are_those_of_any_new_file(lpg, tmp_path, mask):
    before = os.umask(mask)
    try:
        save(lpg, tmp_path / "a.safetensors")
        (tmp_path / "b").write_text("")
    finally:
        os.umask(before)
    mode = stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o666 & ~mask


def test_nothing_else_is_left_and_folders_are_made(lpg, tmp_path):
    path = tmp_path / "new" / "deep" / "component.safetensors"
    save(lpg, path)
    save(lpg, path)
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_save_leaves_the_old_file(lpg, file, monkeypatch):
    old = file.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"Cannot write .*component\.safetensors: No space left on device\."):
        save(LPG(predictions=2, width=3, core="gru", embedding=2), file)
    assert file.read_bytes() == old and os.listdir(file.parent) == [file.name]


def test_unwritable_targets(lpg, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for target in (tmp_path / "file" / "x.safetensors", tmp_path / "folder", tmp_path / ("x" * 300)):
        assert "Cannot write" in refusal(target, lambda path: save(lpg, path))
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


# --- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_noticed(lpg, file, stride):
    """At every byte of the file, header and data, but for the padding in between."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    meaningless = {8 + i for i in range(length) if data[8 : 8 + length][i:].isspace()}  # padding after the header
    noticed = 0
    positions = range(0, len(data), stride)
    for position in positions:
        for bit in (position % 5, 5):  # 5 turns letters into the other case
            damaged = bytearray(data)
            damaged[position] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                loaded = load(file)
            except UserError as error:
                assert str(file) in str(error) and "\n" not in str(error)
                noticed += 1
            else:
                assert position in meaningless and same(loaded, lpg)
    assert noticed >= 2 * len(positions) - 2 * len(meaningless) > 100


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file(file, share):
    data = file.read_bytes()
    file.write_bytes(data[: int(share * len(data))])
    assert "damaged" in refusal(file)


def test_trailing_bytes(file):
    file.write_bytes(file.read_bytes() + b"\0")
    assert "damaged" in refusal(file)


def test_another_sort_of_file(lpg, tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    path = tmp_path / "weights.safetensors"
    for content in (pickle.dumps(Evil()), b"PK\x03\x04", b"\xff" * 64, b"", b"hello\n"):
        path.write_bytes(content)
        assert "is not a component file, or it is damaged" in refusal(path)
        assert "not a component file" in refusal(path, read_header)
    torch.save({"w": Evil()}, path)
    assert "not a component file" in refusal(path)
    assert not (tmp_path / "evil").exists()
    save_file(lpg.state_dict(), path)  # safetensors, but nobody's component
    assert "not a component saved by learned-rl" in refusal(path)


def test_no_file(file, tmp_path):
    wrong = tmp_path / "componnt.safetensors"
    assert f"the nearest there is '{file}'" in refusal(wrong)
    assert "There is no component file" in refusal(tmp_path / "none" / "x.safetensors")
    assert "There is no component file" in refusal(file / "x.safetensors")
    assert "There is no component file" in refusal(tmp_path / ("x" * 300))
    assert "is a folder" in refusal(tmp_path)


def test_an_edited_header_needs_its_checksum(file):
    rewrite(file, sign=False, provenance=json.dumps({"family": "grid/large"}))
    assert "checksum" in refusal(file)
    rewrite(file, provenance=json.dumps({"family": "grid/large"}))
    assert read_header(file)["provenance"] == {"family": "grid/large"}


@pytest.mark.parametrize("missing", ["format", "component", "contract", "config", "provenance"])
def test_an_incomplete_header(file, missing):
    rewrite(file, **{missing: None})
    refusal(file)


def test_an_unknown_component(file):
    rewrite(file, component="lpgg")
    with pytest.raises(UserError, match=r"'lpgg'.* is 'lpg'") as error:
        load(file)
    assert str(file) in str(error.value)


def test_another_component(file):
    rewrite(file, component="dpo")
    assert "has no setting 'predictions'" in refusal(file)


def test_another_contract(file):
    rewrite(file, contract="2")
    assert "contract version 2" in refusal(file) and "speaks 1" in refusal(file)


@pytest.mark.parametrize(
    "config",
    ["[]", "3", "null", '{"width": "wide"}', '{"width": -1}', '{"core": "rnn"}', '{"width": 1e300}', "{", "[" * 99999],
)
def test_settings_that_build_nothing(file, config):
    rewrite(file, config=config)
    refusal(file)


def test_wrong_shape(file):
    rewrite(file, load_file(file) | {"core.bias": torch.zeros(5)})
    assert "tensor 'core.bias' has shape [5], expected [9]" in refusal(file)


def test_missing_and_extra_tensors(file):
    tensors = load_file(file)
    rewrite(file, {k: v for k, v in tensors.items() if k != "core.bias"})
    assert "lacks the tensor 'core.bias'" in refusal(file)
    rewrite(file, tensors | {"more": torch.zeros(1)})
    assert "has a tensor 'more'" in refusal(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(file, value):
    tensors = load_file(file)
    tensors["core.bias"][1] = value
    rewrite(file, tensors)
    assert "'core.bias' holds values that are not finite numbers" in refusal(file)


def test_whole_numbers_for_real_ones(file):
    rewrite(file, load_file(file) | {"core.bias": torch.zeros(9, dtype=torch.int64)})
    assert "'core.bias' holds torch.int64, expected torch.float32" in refusal(file)


@pytest.mark.parametrize("name", sorted(components()))
def test_every_registered_component_has_a_file(name, tmp_path):
    path, component = tmp_path / "x.safetensors", components()[name]()
    save(component, path)
    assert same(load(path), component)
