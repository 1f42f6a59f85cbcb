"""What a checkpoint family is: functions from its own config and tensor names to ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from torch import Tensor

from mythos_export.config import ModelConfig

Get = Callable[[str], Tensor]  # a checkpoint's tensor by name
Pack = Callable[[], Iterator[Tensor]]  # the pieces of one of our tensors, joined along its first dimension


@dataclass(frozen=True)
class Family:
    """One family of checkpoints.

    name: for messages. architectures: what its config.json names; none where it names nothing. settings: its own config, by field.
    model_config: our description of the model that settings make; raises ConfigError where they contradict each other.
    tensor_shapes: name and shape of every tensor a checkpoint must hold. pack: for every tensor of Decoder, how to make it from the
    checkpoint's, piece by piece, so that few are in memory at once; takes the settings, Get and the rows of tables over loops.
    ignored: whether a tensor of that name may be there and is not read. leftover: the same of what only training needs, which is
    reported. tied: head and embedding where the two are one, else None.
    variants: named settings of random checkpoints. random_moments: mean and standard deviation of a random tensor, by name.
    """

    name: str
    architectures: tuple[str, ...]
    settings: type[msgspec.Struct]
    model_config: Callable[[Any], ModelConfig]
    tensor_shapes: Callable[[Any], dict[str, tuple[int, ...]]]
    pack: Callable[[Any, Get, int], dict[str, Pack]]
    ignored: Callable[[str], bool]
    tied: Callable[[Any], tuple[str, str] | None]
    variants: Mapping[str, msgspec.Struct]
    random_moments: Callable[[str], tuple[float, float]]
    leftover: Callable[[Any, str], bool] = lambda settings, name: False
