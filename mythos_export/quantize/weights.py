"""The tensors of a bundle, mapped from its weights file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from mythos_export.config import ModelConfig
from mythos_export.model import Decoder
from runtimes.bundle import Graph


def stored_tensors(model: ir.Model) -> dict[str, ir.ExternalTensor]:
    """What a graph reads from the weights file, by name, in the order of the graph."""
    return {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
    }


def mapped(source: ir.ExternalTensor) -> Tensor:
    """The tensor as it lies in the file (mapped copy-on-write: torch wants memory it could write to)."""
    dtype, shape = source.dtype.numpy(), tuple(int(dim) for dim in source.shape)
    return torch.from_numpy(np.memmap(source.path, dtype, "c", source.offset or 0, shape))


def bundle_weights(folder: Path, graph: Graph) -> dict[str, Tensor]:
    """Every tensor of a bundle's graph, mapped."""
    return {name: mapped(source) for name, source in stored_tensors(ir.load(folder / graph.file)).items()}


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
