"""What a torch module is made of, and what its units say: seen by forward hooks, for update rules that ask."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Self

from torch import Tensor, nn

from learned_rl.layout import Part

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Watcher:
    """The linear and convolutional layers of a module.

    Their depth is their order in their network. Their units are seen where another layer reads them: what modules make
    of a layer's output is followed from one to the next, and where a function that is no module stands between, the
    layer before is taken if it is as wide. What such a function makes of a layer is then seen only if a layer reads it
    directly.

    Args:
        prefix:   of all names, which tells several modules apart.
        critic:   whether only the value depends on the layer of that name; those are a network of their own.
        activity: whether units are looked at in each forward pass.

    Attributes:
        parts: parameter -> what is known of it.
        units: layer -> [1, n, H] what its units said in the latest forward pass.
    """

    def __init__(self, module: nn.Module, prefix: str, critic: Callable[[str], bool], activity: bool) -> None:
        names = [name for name, m in module.named_modules() if isinstance(m, _LAYERS)]
        policy, value = [n for n in names if not critic(n)], [n for n in names if critic(n)]
        depth = {n: i / max(len(policy) - 1, 1) for i, n in enumerate(policy)}
        depth |= {n: i / (len(value) - 1) if len(value) > 1 else 1.0 for i, n in enumerate(value)}
        self.module, self.prefix = weakref.ref(module), prefix
        self.parts: dict[Tensor, Part] = {}
        for name in names:
            for tensor, p in module.get_submodule(name).named_parameters(recurse=False):
                layer = prefix + name
                self.parts[p] = Part(f"{layer}.{tensor}", tuple(p.shape), depth[name], name in value, layer, 0)
        self.units: dict[str, Tensor] = {}
        self._before: str | None = None
        self._axis: dict[str, int] = {}
        self._said: dict[str, tuple[weakref.ref[Tensor], str | None]] = {}
        self._handles: list[Any] = []
        if activity:
            leaves = [(name, m) for name, m in module.named_modules() if next(m.children(), None) is None]
            self._handles = [m.register_forward_hook(_Look(self, prefix + n, n in depth)) for n, m in leaves]
            self._handles.append(module.register_forward_pre_hook(_Begin(self)))

    def remove(self) -> None:
        """Look no more."""
        for handle in self._handles:
            handle.remove()

    def begin(self, inputs: tuple[Any, ...]) -> None:
        """A forward pass begins: what the module reads is no layer's."""
        self._before, self._said = None, {}
        for i, x in enumerate(inputs):
            if isinstance(x, Tensor):
                self._said[f"input {i}"] = (weakref.ref(x), None)

    def look(self, name: str, layer: bool, module: nn.Module, inputs: tuple[Any, ...], said: Any) -> None:
        """A submodule spoke: the units of a layer are what another one reads; its own, until then, what it says."""
        if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(said, Tensor):
            return
        read, axis = inputs[0], 1 if isinstance(module, _LAYERS[1:]) else -1
        source = self._source(read, axis)
        if source is not None and not layer and said.shape == read.shape:
            self.units[source] = _units(said, self._axis[source])  # an activation
        elif source is not None and layer and read.shape[axis] == self.units[source].shape[-1]:
            self.units[source] = _units(read, axis)
        if layer:
            self.units[name], self._axis[name] = _units(said, axis), axis
            self._before = name
        self._said[name] = (weakref.ref(said), name if layer else source)

    def _source(self, x: Tensor, axis: int) -> str | None:
        """The layer of whose units, along that axis, x is made; None: it is none's, such as an observation."""
        for said, source in self._said.values():
            if said() is x:
                return source
        if self._before is None or not x.dim() or x.shape[axis] != self.units[self._before].shape[-1]:
            return None
        return self._before


class _Hook:
    """A hook that a copy of the module, or a saved one, does not inherit: nobody looks at those."""

    def __init__(self, watcher: Watcher | None = None, name: str = "", layer: bool = False) -> None:
        self.watcher, self.name, self.layer = None if watcher is None else weakref.ref(watcher), name, layer

    @property
    def watching(self) -> Watcher | None:
        return None if self.watcher is None else self.watcher()

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        return type(self), ()


class _Look(_Hook):
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], said: Any) -> None:
        if (watcher := self.watching) is not None:
            watcher.look(self.name, self.layer, module, inputs, said)


class _Begin(_Hook):
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if (watcher := self.watching) is not None:
            watcher.begin(inputs)


def _units(x: Tensor, axis: int) -> Tensor:
    """[1, n, H] what H units said, from activations with the units along that axis."""
    return x.detach().movedim(axis, -1).reshape(1, -1, x.shape[axis])  # stop: a look
