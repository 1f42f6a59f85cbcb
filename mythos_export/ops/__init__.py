"""The operators of the ONNX domain ai.mythos, a file each: torch op, ONNX schema, portable body."""

from __future__ import annotations

from onnx import defs

from mythos_export.ops import grouped_query_attention, latent_attention, mixture_of_experts
from mythos_export.ops.operator import DOMAIN, DOMAIN_VERSION, OPSET, Operator

OPERATORS: tuple[Operator, ...] = (
    latent_attention.OPERATOR,
    grouped_query_attention.OPERATOR,
    mixture_of_experts.OPERATOR,
)


def register_schemas() -> None:
    """Makes onnx know the operators in this process, once: shape inference and onnxscript look them up."""
    for operator in OPERATORS:
        if not defs.has(operator.name, domain=DOMAIN):
            defs.register_schema(operator.schema)


__all__ = ["DOMAIN", "DOMAIN_VERSION", "OPERATORS", "OPSET", "Operator", "register_schemas"]
