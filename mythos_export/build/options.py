"""What a build may be told; light, so that the command line can show its defaults."""

from __future__ import annotations

from dataclasses import dataclass

MAX_CONTEXT = 4096  # tokens, where nothing else is asked for and the model has positions for them


@dataclass(frozen=True)
class Limits:
    """What an engine must serve. batch: sequences. seq: new tokens of each in a prefill step. context: tokens of each; None for
    MAX_CONTEXT, at most what the model has positions for."""

    batch: int = 1
    seq: int = 512
    context: int | None = None


@dataclass(frozen=True)
class Options:
    """workspace: bytes of device memory for scratch, None for all there is. optimization_level: 0 to 5, None for TensorRT's own.
    compute_capabilities: what TensorRT-RTX builds for, like "8.9"; none for the GPU at hand. check: hold the engine against
    onnxruntime where the GPU is at hand. plugins: leave the operators to the TensorRT plugins; None where they can be used."""

    workspace: int | None = None
    optimization_level: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    check: bool = True
    plugins: bool | None = None
