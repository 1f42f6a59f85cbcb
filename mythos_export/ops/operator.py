"""What the three operators have in common: how one is described, and how ONNX learns of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import onnx
import torch
from onnx import defs, parser
from onnxscript import values as onnxscript_values

from mythos_export.overloads import DEQUANTIZED, DOMAIN, DOMAIN_VERSION, OPSET, PORTABLE

FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
TYPES = {
    "T": (FLOATS, "the dtype of the matrices"),
    "X": (FLOATS, "float32, or the dtype of the matrices"),
    "C": ([*FLOATS, "tensor(int8)"], "the dtype of the cache"),
    "Q": (["tensor(int8)", "tensor(int4)", "tensor(float8e4m3fn)"], "quantized weights"),
    "Q2": (["tensor(int8)", "tensor(int4)", "tensor(float8e4m3fn)"], "quantized weights of a second matrix"),
    "P": (
        ["tensor(int8)", "tensor(uint8)", "tensor(float8e4m3fn)"],
        "quantized weights; uint8: int4, two a byte, the first in the low half",
    ),
    "S": (["tensor(float)", "tensor(float16)"], "scales of quantized weights"),
}

_ELEMENT_TYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(int64)": onnx.TensorProto.INT64,
    "tensor(int8)": onnx.TensorProto.INT8,
}

Dim = int | str | None
Shape = Sequence[Dim]


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is: what norms, softmax, router and sums are computed in."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """RMSNorm (arXiv 1910.07467) over the last dimension, in the dtype of x (float32 where it matters)."""
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight


@dataclass(frozen=True)
class Body:
    """Statements of an overload; inputs: its own names for them, where they are not the operator's."""

    text: str
    inputs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Operator:
    """One operator of the domain: its torch op, its ONNX schema with shape inference, its portable body.

    inputs and outputs are (name, type, description), the type an ONNX type string or one of TYPES: "T", the matrices' dtype, and
    so on. infer_shapes maps the input shapes and the attributes to the output shapes; an unknown dimension is None.
    body is the statements of the ONNX function, over the input names, defining the output names. other_bodies are those of its
    overloads (mythos_export.overloads). defaults: what attributes are that a node may lack, as those of earlier bundles do.
    """

    name: str
    doc: str
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, str, str], ...]
    attributes: dict[str, tuple[str, str]]  # name -> (ONNX attribute type, description)
    torch_op: Any
    infer_shapes: Callable[[list[Shape], dict[str, Any]], list[Shape]]
    body: str
    other_bodies: Mapping[str, Body] = field(default_factory=dict)
    defaults: Mapping[str, int | float] = field(default_factory=dict)

    @cached_property
    def schema(self) -> defs.OpSchema:
        parameter = defs.OpSchema.FormalParameter
        schema = defs.OpSchema(
            self.name,
            DOMAIN,
            DOMAIN_VERSION,
            doc=self.doc,
            inputs=[parameter(name, kind, text) for name, kind, text in self.inputs],
            outputs=[parameter(name, kind, text) for name, kind, text in self.outputs],
            type_constraints=[(kind, *TYPES[kind]) for kind in TYPES if kind in self._kinds],
            attributes=[
                defs.OpSchema.Attribute(name, onnx.helper.make_attribute(name, self.defaults[name]), text)
                if name in self.defaults
                else defs.OpSchema.Attribute(name, getattr(defs.OpSchema.AttrType, kind), text)
                for name, (kind, text) in self.attributes.items()
            ],
        )
        schema.set_type_and_shape_inference_function(self._infer)
        return schema

    @property
    def _kinds(self) -> set[str]:
        return {kind for _, kind, _ in (*self.inputs, *self.outputs)}

    def _infer(self, context: Any) -> None:
        types = [context.get_input_type(i) for i in range(context.get_num_inputs())]
        if any(kind is None or not kind.tensor_type.HasField("shape") for kind in types):
            return
        known = {
            spec: kind.tensor_type.elem_type
            for kind, (_, spec, _) in zip(types, self.inputs, strict=True)
            if spec in TYPES
        }
        attributes = {
            name: onnx.helper.get_attribute_value(context.get_attribute(name))
            for name in self.attributes
            if context.get_attribute(name) is not None
        }
        shapes = self.infer_shapes([_dims(kind) for kind in types], attributes)
        for index, (shape, (_, spec, _)) in enumerate(zip(shapes, self.outputs, strict=True)):
            elem_type = known[spec] if spec in TYPES else _ELEMENT_TYPES[spec]
            context.set_output_type(index, onnx.helper.make_tensor_type_proto(elem_type, list(shape)))

    @cached_property
    def functions(self) -> dict[str, onnx.FunctionProto]:
        """The bodies as functions of standard operators, carried inside every model file, by their overload."""
        bodies = {PORTABLE: Body(self.body), **self.other_bodies}
        return {overload: self._function(overload, body) for overload, body in bodies.items()}

    def overload_for(self, types: Iterable[int | None]) -> str:
        """Which of `functions` a node takes to run anywhere; types: the ONNX element types of its inputs. float8e4m3fn is picked
        from by no standard operator, so it is dequantized before."""
        wanted = DEQUANTIZED in self.functions and onnx.TensorProto.FLOAT8E4M3FN in types
        return DEQUANTIZED if wanted else PORTABLE

    def _function(self, overload: str, body: Body) -> onnx.FunctionProto:
        inputs = ", ".join(body.inputs or [name for name, _, _ in self.inputs])
        outputs = ", ".join(name for name, _, _ in self.outputs)
        declared = [
            f"{name}: {kind.lower()} = {self.defaults[name]}" if name in self.defaults else name
            for name, (kind, _) in self.attributes.items()
        ]
        attributes = f"<{', '.join(declared)}> " if declared else ""
        function = parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n'
            f"{self.name} {attributes}({inputs}) => ({outputs}) {{{body.text}}}"
        )
        function.overload = overload
        function.doc_string = self.doc
        return function

    @property
    def translation(self) -> Callable[..., Any]:
        """What makes the torch op a node of the traced graph: its tensors become inputs, what follows them attributes."""
        node = getattr(onnxscript_values.Opset(DOMAIN, DOMAIN_VERSION), self.name)
        n_inputs = len(self.inputs)

        def translate(*args: Any) -> Any:
            return node(*args[:n_inputs], **dict(zip(self.attributes, args[n_inputs:], strict=True)))

        return translate


def _dims(kind: onnx.TypeProto) -> list[Dim]:
    fields = {"dim_value", "dim_param"}
    return [
        getattr(dim, dim.WhichOneof("value")) if dim.WhichOneof("value") in fields else None
        for dim in kind.tensor_type.shape.dim
    ]
