"""The tensors of a bundle, mapped from its weights file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mythos_export.config import ModelConfig
from mythos_export.model import Decoder


def stored_tensors(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    """What a graph reads from the weights file, by name, in the order of the graph."""
    return {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


class MappedWeights(Mapping[str, Tensor]):
    """Tensors by name, each mapped when asked for and let go with the last reference to it, so that what is read of one does not
    stay in memory with the next (copy-on-write: torch wants memory it could write to)."""

    def __init__(self, stored: Mapping[str, ir.ExternalTensor]) -> None:
        self._stored = stored

    def __getitem__(self, name: str) -> Tensor:
        source = self._stored[name]
        dtype, shape = source.dtype.numpy(), tuple(int(dim) for dim in source.shape)
        return torch.from_numpy(np.memmap(source.path, dtype, "c", source.offset or 0, shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The matrices that may be quantized, by name: [out, in], or stacks of such. Router, LoRA and tables are none."""
    with torch.device("meta"):
        decoder = Decoder(config, dtype=torch.float16)
    return dict(_matrices(decoder))


def _matrices(decoder: Decoder) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Those parameters that take the dtype of the matrices."""
    for name, parameter in decoder.named_parameters():
        if parameter.dtype == torch.float16 and parameter.dim() > 1:
            yield name, tuple(parameter.shape)
