"""Options that say what goes into the slots, and with which settings."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Annotated, Any

import tyro
from gymnasium import Space

from experiments.config_file import configured
from experiments.options import listed
from learned_rl import artifacts
from learned_rl.agents import KINDS, agent_kind
from learned_rl.component import NUMBERS, SLOTS, Component
from learned_rl.ppo import PPOConfig, Slots
from learned_rl.registry import components
from learned_rl.tasks.base import unknown
from learned_rl.training import Plug
from learned_rl.types import UserError


@dataclass(frozen=True)
class Plugged:
    objective: str | None = None
    """component file, or a registered name such as dpo (a learned one has fresh weights then); default: PPO's own"""
    reward: str | None = None
    """component file or registered name, such as lirpg, for the reward slot; default: the environment's reward"""
    hyperparameters: str | None = None
    """component file (such as a schedule) or registered name for the hyperparameters slot; default: constants"""
    auxiliary: str | None = None
    """component file or registered name for the auxiliary slot; default: nothing"""
    optimizer: str | None = None
    """component file or registered name for the optimizer slot; default: the config's rule"""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """a setting of the part in a slot, as SLOT.NAME=VALUE, such as reward.scale=0.1; as often as needed"""
    self_tune: str | None = None
    """numbers of the update that are learned online, separated by commas, such as gamma=0.9:1,ent_coef, where the
    first one has bounds; by --hyperparameters, or else by self_tuned"""
    learn: str | None = None
    """slots whose parts are learned online, separated by commas, or none; default: those whose part is made for it"""

    @property
    def learned(self) -> list[str] | None:
        """The slots that are learned online; None: those whose part is made for it."""
        if self.learn is None:
            return None
        return [] if self.learn == "none" else listed(self.learn)


def plugs(args: Plugged, linear_decay: bool) -> dict[str, Plug]:
    """What goes into each slot: a name or a file, or what makes a part with settings of its own.

    Args:
        linear_decay: whether the learning rate falls over the lifetime, which a part that learns numbers must know.

    Raises:
        UserError: settings of a slot that is empty, or that its part does not know.
    """
    settings: dict[str, dict[str, Any]] = {slot: {} for slot in SLOTS}
    named: dict[str, str | None] = {slot: getattr(args, slot) for slot in SLOTS}
    for word in args.set:
        slot, _, name = word.partition("=")[0].partition(".")
        if not (name and "=" in word):
            raise UserError(f"--set has the word {word!r}: expected SLOT.NAME=VALUE, such as reward.scale=0.1.")
        if slot not in SLOTS:
            raise unknown("slot in --set", slot, SLOTS)
        settings[slot][name] = _value(word.partition("=")[2])
    numbers = settings["hyperparameters"]
    if args.self_tune is not None:
        kind = named["hyperparameters"] = args.hyperparameters or "self_tuned"
        told = _tuned(kind, listed(args.self_tune))
        if twice := [k for k in told if k in numbers]:
            raise UserError(f"--self-tune and --set both say hyperparameters.{twice[0]}: expected one of them.")
        numbers |= told
    if linear_decay and "linear_decay" in _known(named["hyperparameters"]):
        numbers.setdefault("linear_decay", True)
    return {slot: _made(slot, named[slot], settings[slot]) if settings[slot] else named[slot] for slot in SLOTS}


def file_digests(args: Plugged) -> dict[str, str]:
    """Slot -> the checksum of the file that is plugged into it, where it is one."""
    files = {slot: name for slot in SLOTS if (name := getattr(args, slot)) is not None and name not in components()}
    return {slot: artifacts.read_header(name)["sha256"] for slot, name in files.items()}


def unread(config: PPOConfig, slots: Slots, plugged: Collection[str], observation_space: Space) -> dict[str, str]:
    """Settings of an algorithm on which nothing depends: path in `PPOConfig` -> who does not read it.

    Args:
        plugged: the slots that do not hold what the configuration says.
    """
    objective, numbers, rule = slots.objective, slots.hyperparameters, slots.optimizer
    name = repr(objective.name)
    found = {f"hyper.{k}": name for k in NUMBERS if k not in slots.reads}
    if "hyper.aux_coef" in found:
        found["hyper.aux_coef"] = "the empty auxiliary slot"
    kind = agent_kind(config.agent, observation_space)
    own = {k for agent in KINDS.values() for k in agent.reads} - {*KINDS[kind].reads}
    found |= {f"agent.{k}": f"an agent of kind {kind!r}" for k in own}
    if not objective.needs_value:
        found |= {"agent.shared": name, "agent.value_support": name}
    if "objective" in plugged:
        found["normalize_advantage"] = name
    if "hyperparameters" in plugged and getattr(numbers.config, "linear_decay", None) != config.linear_decay:
        found["linear_decay"] = repr(numbers.name)
    if "optimizer" in plugged:
        found |= {"optimizer": repr(rule.name), "stop_denominator": repr(rule.name)}
    if not config.replay_capacity:
        found["replay_batch"] = "an update without replay"
    return found


def check_settings(
    given: PPOConfig, usual: PPOConfig, slots: Slots, plugged: Collection[str], observation_space: Space
) -> None:
    """Whether something depends on the settings that are others than usual.

    Raises:
        UserError: one that would change nothing.
    """
    for path, reader in unread(given, slots, plugged, observation_space).items():
        value, suits = attrgetter(path)(given), attrgetter(path)(usual)
        if value != suits:
            raise UserError(
                f"config.{path} is {value}, but {reader} does not read it: expected {suits}, which changes as little."
            )


def _made(slot: str, name: str | None, settings: dict[str, Any]) -> Callable[[], Component]:
    """What makes the registered part, or the one in a file, with these settings."""
    if name is None:
        raise UserError(f"--set has settings for the {slot} slot, which holds its default: expected a name or a file.")
    kind = components().get(name)
    given = kind.Config() if kind else artifacts.get(name).config
    known = [f.name for f in fields(given)]
    if wrong := [k for k in settings if k not in known]:
        raise unknown(f"setting of {name}", wrong[0], known)
    config = configured(given, settings, f"settings of {name}")
    if kind:
        return lambda: kind(config)
    changes = {k: getattr(config, k) for k in settings}
    artifacts.load(name, **changes)  # so that weights which do not fit are told before anything is made
    return lambda: artifacts.load(name, **changes)


def _known(name: str | None) -> list[str]:
    """Names of the settings of a registered part."""
    return [f.name for f in fields(components()[name].Config)] if name in components() else []


def _value(text: str) -> Any:
    """A plain value as TOML writes it; a word that is none is itself."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _tuned(kind: str, words: list[str]) -> dict[str, Any]:
    """Settings of a part that learns the numbers of --self-tune: their names, and bounds where NAME=LOW:HIGH.

    Raises:
        UserError: a part that learns no numbers it is told, or bounds that are none.
    """
    able = [n for n, c in components().items() if c.online and "numbers" in _known(n)]
    if kind not in able:
        raise unknown("part for the numbers of --self-tune", kind, able)
    numbers, bounds = [], {}
    for word in words:
        name, _, interval = word.partition("=")
        numbers.append(name)
        if interval or "=" in word:
            try:
                low, high = map(float, interval.split(":"))
            except ValueError as error:
                raise UserError(
                    f"--self-tune has the word {word!r}: expected NAME=LOW:HIGH, as gamma=0.9:1."
                ) from error
            bounds[name] = (low, high)
    return {"numbers": tuple(numbers)} | ({"bounds": bounds} if bounds else {})
