"""Recipes: what becomes of which matrix, of activations and of the cache, as TOML files.

A recipe names matrices by patterns (`*`, `recurrent.*.down`); of the rules that fit one, the last holds. Several recipes combine:
their rules follow each other, and a later recipe's tables replace an earlier one's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import msgspec

from calibration.rounding import BLOCK_SIZES
from runtimes.errors import InputError

Patterns = str | tuple[str, ...]
LoopMerge = Literal["sum", "contribution", "max", "last", "first"]


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of a recipe: an unknown key is an error."""


class WeightRule(_Table, frozen=True):
    """One rule for matrices.

    matrices: a pattern over their names, or several. format: what their numbers become. block: input channels a scale, or "channel"
    for one scale an output channel. algorithm: round-to-nearest needs no text; search finds each block's best scale by the
    channels' mean squares; gptq (arXiv 2210.17323) searches too and then lets later columns make up for earlier errors.
    """

    matrices: Patterns
    format: Literal["int4", "int8", "fp8", "float32"]
    block: int | Literal["channel"] = 32
    algorithm: Literal["round-to-nearest", "search", "gptq"] = "round-to-nearest"


class Smoothing(_Table, frozen=True):
    """Factors moved between a layer and what produces its input.

    method: awq (arXiv 2306.00978) or smoothquant (arXiv 2211.10438). strength: smoothquant's, of activations against weights.
    """

    method: Literal["awq", "smoothquant"]
    matrices: Patterns = "*"
    strength: float = 0.5


class Activations(_Table, frozen=True):
    """Inputs of products.

    type: what they are rounded to; a matrix of another kind of numbers (float8, integers) keeps its inputs as they are. scale:
    "block", found for every block of every token as it runs; "tensor", one from calibration; "loop", one a loop from calibration.
    method: how calibration chooses it from a histogram.
    """

    type: Literal["float32", "int8", "fp8"] = "int8"
    scale: Literal["block", "tensor", "loop"] = "block"
    method: Literal["minmax", "percentile", "entropy", "mse"] = "minmax"
    matrices: Patterns = "*"


class KvCache(_Table, frozen=True):
    """The cache's rows. scale: "row", by its largest magnitude; "channel", one a channel from calibration, folded into weights."""

    type: Literal["int8"] = "int8"
    scale: Literal["row", "channel"] = "row"


class Calibration(_Table, frozen=True):
    """How statistics are gathered and used.

    loops: how those of the loops become one: sum; contribution, the sum with every token weighed by how much of its result is still
    open; max, the loop with the largest inputs; last; first. every_token: every expert sees every token, routing as it is.
    """

    loops: LoopMerge = "sum"
    every_token: bool = False


class Recipe(_Table, frozen=True):
    """A whole recipe."""

    description: str = ""
    weights: tuple[WeightRule, ...] = ()
    smoothing: Smoothing | None = None
    activations: Activations | None = None
    kv_cache: KvCache | None = None
    calibration: Calibration = Calibration()

    @property
    def needs_statistics(self) -> bool:
        """Whether weights or cache rest on statistics of activations."""
        searched = any(rule.algorithm != "round-to-nearest" for rule in self.weights)
        return bool(searched or self.smoothing or (self.kv_cache and self.kv_cache.scale == "channel"))

    @property
    def needs_ranges(self) -> bool:
        """Whether activations have static scales."""
        return self.activations is not None and self.activations.scale != "block"


def shipped() -> dict[str, Recipe]:
    """The recipes that come along, by name."""
    folder = resources.files(__package__) / "recipes"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): _decode(file.read_text("utf-8"), file.name) for file in files}


def load_recipe(names: str) -> Recipe:
    """The recipe of a name, of a .toml file, or of several joined by commas. Raises InputError for one that cannot be read."""
    parts = [part.strip() for part in names.split(",")]
    return combine([_load_one(part) for part in parts])


def _load_one(name: str) -> Recipe:
    known = shipped()
    if name in known:
        return known[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise InputError(f'recipe is "{name}"; expected one of {", ".join(known)}, or a .toml file')
    if not path.is_file():
        raise InputError(f"{name}: no such recipe file; shipped ones are {', '.join(known)}")
    try:
        return _decode(path.read_text("utf-8"), name)
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text: {error}") from error


def _decode(text: str, where: str) -> Recipe:
    try:
        recipe = msgspec.toml.decode(text, type=Recipe)
    except msgspec.DecodeError as error:
        raise InputError(f"{where}: not a recipe: {error}") from error
    for rule in recipe.weights:
        if rule.block != "channel" and rule.block not in BLOCK_SIZES:
            raise InputError(
                f'{where}: block is {rule.block} for {rule.matrices}; expected {", ".join(map(str, BLOCK_SIZES))} or "channel"'
            )
    smoothing, activations = recipe.smoothing, recipe.activations
    if smoothing and not 0 <= smoothing.strength <= 1:
        raise InputError(f"{where}: smoothing.strength is {smoothing.strength}; expected 0 to 1")
    if activations and activations.type == "fp8" and activations.scale == "block":
        raise InputError(f'{where}: fp8 activations need a static scale; expected activations.scale "tensor" or "loop"')
    return recipe


def combine(recipes: Sequence[Recipe]) -> Recipe:
    """One recipe of several, in order."""
    first, *others = recipes
    for other in others:
        first = Recipe(
            description="; ".join(text for text in (first.description, other.description) if text),
            weights=first.weights + other.weights,
            smoothing=other.smoothing or first.smoothing,
            activations=other.activations or first.activations,
            kv_cache=other.kv_cache or first.kv_cache,
            calibration=other.calibration if other.calibration != Calibration() else first.calibration,
        )
    return first


def with_overrides(recipe: Recipe, block: int | None, activation_bits: int | None) -> Recipe:
    """The recipe with every block size, or the rounding of activations, replaced. Raises InputError for values that are none."""
    if block is not None:
        if block not in BLOCK_SIZES:
            raise InputError(f"block is {block}; expected one of {', '.join(map(str, BLOCK_SIZES))}")
        rules = tuple(msgspec.structs.replace(rule, block=block) for rule in recipe.weights)
        recipe = msgspec.structs.replace(recipe, weights=rules)
    if activation_bits is not None:
        if activation_bits not in (8, 32):
            raise InputError(f"activation bits are {activation_bits}; expected 8 or 32")
        if activation_bits == 32:
            recipe = msgspec.structs.replace(recipe, activations=Activations(type="float32"))
    return recipe


def to_toml(recipe: Recipe) -> str:
    """The recipe as load_recipe reads it from a file."""
    plain = msgspec.to_builtins(recipe)
    lines = [f"description = {_toml(recipe.description)}"] if recipe.description else []
    for rule in plain["weights"]:
        lines += ["", "[[weights]]", *_toml_lines(rule)]
    for name in ("smoothing", "activations", "kv_cache", "calibration"):
        if plain[name] is not None:
            lines += ["", f"[{name}]", *_toml_lines(plain[name])]
    return "\n".join(lines).lstrip("\n") + "\n"


def _toml_lines(table: dict[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in table.items()]


def _toml(value: str | float | list[str] | tuple[str, ...]) -> str:
    """A value of a recipe: all kinds there are, JSON writes as TOML does, but for one control character."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
