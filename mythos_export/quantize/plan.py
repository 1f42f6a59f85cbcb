"""What a recipe means for one model: the format and algorithm of every matrix, checked before any work."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from calibration.rounding import Format
from mythos_export.config import ModelConfig
from mythos_export.quantize.recipe import Activations, Patterns, Recipe
from mythos_export.quantize.weights import matrix_shapes
from runtimes.errors import InputError

_log = logging.getLogger("mythos_export")
_SHARED = {"gate_up", "down", "w_uk", "w_uv"}  # two matrices of one operator
_CHANNEL_BLOCK = 128  # how a scale an output channel is stored: in blocks of this size, all the same


@dataclass(frozen=True)
class MatrixPlan:
    """One matrix [out, in], or a stack of such: what it becomes and how. looked_up: an embedding that is no head, so no product."""

    name: str
    shape: tuple[int, ...]
    form: Format
    algorithm: str
    smoothed: bool
    activations: Activations
    looked_up: bool = False

    @property
    def modules(self) -> tuple[str, ...]:
        """The Linear modules that hold it, one a matrix of a stack."""
        if self.looked_up:
            return ()
        return (self.name,) if len(self.shape) == 2 else tuple(f"{self.name}.{index}" for index in range(self.shape[0]))

    @property
    def looped(self) -> bool:
        """Whether it is read once a loop."""
        return self.name.startswith("recurrent.")

    @property
    def packed(self) -> bool:
        """Whether int4 comes two a byte: a mixture of experts gathers its matrices, which int4 tensors do not allow."""
        return self.form.kind == "int4" and is_mixture(self.name, self.shape)

    @property
    def n_bytes(self) -> int:
        """Size of its values and float16 scales."""
        *lead, channels = self.shape
        blocks = -(-channels // self.form.block_size)
        return math.prod(lead) * (channels * self.form.bits // 8 + 2 * blocks)


@dataclass(frozen=True)
class Plan:
    """matrices: those to quantize, by name. shapes: of every matrix there is."""

    recipe: Recipe
    config: ModelConfig
    matrices: dict[str, MatrixPlan]
    shapes: dict[str, tuple[int, ...]]

    def operators(self) -> Iterator[tuple[str, list[MatrixPlan]]]:
        """The matrices by the operator that reads them."""
        groups: dict[str, list[MatrixPlan]] = {}
        for matrix in self.matrices.values():
            groups.setdefault(operator_of(matrix.name), []).append(matrix)
        yield from groups.items()


def is_mixture(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and name.rpartition(".")[2] in {"gate_up", "down"}


def operator_of(name: str) -> str:
    """Matrices of one operator share this name."""
    owner, _, last = name.rpartition(".")
    return owner if last in _SHARED else name


def make_plan(recipe: Recipe, config: ModelConfig) -> Plan:
    """Resolves a recipe. Raises InputError for patterns that match nothing, listing what there is, and for what cannot be."""
    shapes = matrix_shapes(config)
    for what, patterns in _patterns(recipe):
        if not any(_fits(patterns, name) for name in shapes):
            raise InputError(f"{what} names {_text(patterns)}, which no matrix fits; there are: {', '.join(shapes)}")
    if recipe.kv_cache is None and not recipe.weights:
        raise InputError("the recipe changes nothing; give it [[weights]] rules or a [kv_cache]")
    planned = {name: _matrix(name, shape, recipe) for name, shape in shapes.items()}
    matrices = {name: matrix for name, matrix in planned.items() if matrix is not None}
    if "embed" in matrices and not config.tie_embeddings:
        nearest = replace(matrices["embed"], algorithm="round-to-nearest", activations=Activations(), looked_up=True)
        matrices["embed"] = nearest
    plan = Plan(recipe, config, matrices, shapes)
    _widen_odd(plan)
    _check_operators(plan)
    return plan


def _patterns(recipe: Recipe) -> Iterator[tuple[str, Patterns]]:
    for index, rule in enumerate(recipe.weights):
        yield f"rule {index + 1} of [[weights]]", rule.matrices
    for table in ("smoothing", "activations"):
        value = getattr(recipe, table)
        if value is not None:
            yield f"[{table}]", value.matrices


def _fits(patterns: Patterns, name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def _text(patterns: Patterns) -> str:
    return f'"{patterns}"' if isinstance(patterns, str) else ", ".join(f'"{pattern}"' for pattern in patterns)


def _matrix(name: str, shape: tuple[int, ...], recipe: Recipe) -> MatrixPlan | None:
    rule = next((rule for rule in reversed(recipe.weights) if _fits(rule.matrices, name)), None)
    if rule is None or rule.format == "float32":
        return None
    whole = rule.block == "channel"
    form = Format(rule.format, _CHANNEL_BLOCK if whole else int(rule.block), whole)
    smoothed = recipe.smoothing is not None and _fits(recipe.smoothing.matrices, name)
    activations = recipe.activations or Activations()
    if not _fits(activations.matrices, name):
        activations = Activations()
    if (form.kind == "fp8") != (activations.type == "fp8"):
        # A product is integers or float8; where a recipe mixes them, the inputs stay as they are.
        activations = activations if form.kind != "fp8" and activations.type == "int8" else Activations(type="float32")
    return MatrixPlan(name, shape, form, rule.algorithm, smoothed, activations)


def _widen_odd(plan: Plan) -> None:
    """int4 is stored two a byte, so an odd number of input channels keeps int8; the matrices of a mixture go together."""
    odd = {
        operator_of(m.name) if m.packed else m.name
        for m in plan.matrices.values()
        if m.form.kind == "int4" and m.shape[-1] % 2
    }
    for name, matrix in plan.matrices.items():
        if matrix.form.kind == "int4" and odd & {name, operator_of(name)}:
            plan.matrices[name] = replace(matrix, form=replace(matrix.form, kind="int8"))
    if odd:
        _log.warning("int8 instead of int4 where the number of input channels is odd: %s", ", ".join(sorted(odd)))


def _check_operators(plan: Plan) -> None:
    for operator, matrices in plan.operators():
        first = matrices[0]
        missing = [n for n in plan.shapes if operator_of(n) == operator and n not in plan.matrices]
        others = [
            m.name for m in matrices if m.form.block_size != first.form.block_size or m.activations != first.activations
        ]
        if is_mixture(first.name, first.shape):
            others += [m.name for m in matrices if m.form.kind != first.form.kind]
        if missing or others:
            raise InputError(
                f"{first.name} and {(missing or others)[0]} are read by one operator ({operator}), which needs the same block size "
                "and activations for both, and in a mixture of experts the same format; give them one rule"
            )


def matrix_table(plan: Plan) -> Mapping[str, dict[str, object]]:
    """The plan as the manifest holds it."""
    return {
        name: {
            "format": matrix.form.kind,
            "block": "channel" if matrix.form.whole_rows else matrix.form.block_size,
            "stored_block": matrix.form.block_size,
            "algorithm": matrix.algorithm,
        }
        for name, matrix in plan.matrices.items()
    }
