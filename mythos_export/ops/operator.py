"""What the three operators have in common: how one is described, and how ONNX learns of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import onnx
import torch
from onnx import defs, parser
from onnxscript import values as onnxscript_values

DOMAIN = "ai.mythos"
DOMAIN_VERSION = 1
OPSET = 21  # the first with blocked DequantizeLinear, which quantized bundles use

FLOATS = ("tensor(float)", "tensor(float16)", "tensor(bfloat16)")

Dim = int | str | None
Shape = Sequence[Dim]


def wide(x: torch.Tensor) -> torch.Tensor:
    """x in float32, or in float64 if it is: what norms, softmax, router and sums are computed in."""
    return x if x.dtype == torch.float64 else x.float()


@dataclass(frozen=True)
class Operator:
    """One operator of the domain: its torch op, its ONNX schema with shape inference, its portable body.

    inputs and outputs are (name, type, description), the type "T" for the model's dtype or an ONNX type string.
    infer_shapes maps the input shapes and the attributes to the output shapes; an unknown dimension is None.
    body is the statements of the ONNX function, over the input names, defining the output names.
    """

    name: str
    doc: str
    inputs: tuple[tuple[str, str, str], ...]
    outputs: tuple[tuple[str, str, str], ...]
    attributes: dict[str, tuple[str, str]]  # name -> (ONNX attribute type, description)
    torch_op: Any
    infer_shapes: Callable[[list[Shape], dict[str, Any]], list[Shape]]
    body: str

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
            type_constraints=[("T", list(FLOATS), "the model's dtype")],
            attributes=[
                defs.OpSchema.Attribute(name, getattr(defs.OpSchema.AttrType, kind), text)
                for name, (kind, text) in self.attributes.items()
            ],
        )
        schema.set_type_and_shape_inference_function(self._infer)
        return schema

    def _infer(self, context: Any) -> None:
        types = [context.get_input_type(i) for i in range(context.get_num_inputs())]
        model_type = next(
            (kind for kind, (_, spec, _) in zip(types, self.inputs, strict=True) if spec == "T" and kind is not None),
            None,
        )
        if model_type is None or any(kind is None or not kind.tensor_type.HasField("shape") for kind in types):
            return
        attributes = {
            name: onnx.helper.get_attribute_value(context.get_attribute(name))
            for name in self.attributes
            if context.get_attribute(name) is not None
        }
        shapes = self.infer_shapes([_dims(kind) for kind in types], attributes)
        for index, shape in enumerate(shapes):
            elem_type = model_type.tensor_type.elem_type
            context.set_output_type(index, onnx.helper.make_tensor_type_proto(elem_type, list(shape)))

    @cached_property
    def function(self) -> onnx.FunctionProto:
        """The portable body as a function of standard operators, carried inside every model file."""
        inputs = ", ".join(name for name, _, _ in self.inputs)
        outputs = ", ".join(name for name, _, _ in self.outputs)
        function = parser.parse_function(
            f'<domain: "{DOMAIN}", opset_import: ["": {OPSET}]>\n'
            f"{self.name} <{', '.join(self.attributes)}> ({inputs}) => ({outputs}) {{{self.body}}}"
        )
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
