"""The operators of the ONNX domain ai.mythos, a file each: torch op, ONNX schema, portable body."""

from __future__ import annotations

from onnx import defs

from mythos_export.ops import (
    feed_forward,
    grouped_query_attention,
    latent_attention,
    linear,
    mixture_of_experts,
    recurrent,
)
from mythos_export.ops.operator import Operator
from mythos_export.overloads import DOMAIN, DOMAIN_VERSION, OPSET

OPERATORS: tuple[Operator, ...] = (
    linear.NORMALIZED_LINEAR,
    linear.QUANTIZED_NORMALIZED_LINEAR,
    linear.RESIDUAL_LINEAR,
    linear.QUANTIZED_RESIDUAL_LINEAR,
    feed_forward.OPERATOR,
    feed_forward.QUANTIZED,
    mixture_of_experts.OPERATOR,
    mixture_of_experts.QUANTIZED,
    latent_attention.OPERATOR,
    latent_attention.INT8_CACHE,
    latent_attention.QUANTIZED,
    latent_attention.QUANTIZED_INT8_CACHE,
    grouped_query_attention.OPERATOR,
    grouped_query_attention.INT8_CACHE,
    recurrent.INPUT,
    recurrent.UPDATE,
)


def register_schemas() -> None:
    """Makes onnx know the operators in this process, once: shape inference and onnxscript look them up."""
    for operator in OPERATORS:
        if not defs.has(operator.name, domain=DOMAIN):
            defs.register_schema(operator.schema)


__all__ = ["DOMAIN", "DOMAIN_VERSION", "OPERATORS", "OPSET", "Operator", "register_schemas"]
