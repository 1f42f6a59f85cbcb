"""Which body of each operator an engine is built from, and what that body is fed with."""

from __future__ import annotations

import onnx_ir as ir

from mythos_export import overloads
from mythos_export.build.initializers import initializer, seen_as
from mythos_export.config import RoutingConfig
from runtimes.errors import BackendError

PARTS = ("routed", "shared")  # of a stack of experts


def choose_bodies(model: ir.Model, form: str) -> None:
    """Makes every operator call the body for engine builders, with the inputs and outputs that one has. form: FEW_TOKENS or
    MANY_TOKENS of mythos_export.overloads."""
    for node in list(ir.traversal.RecursiveGraphIterator(model.graph)):
        if node.domain == overloads.DOMAIN:
            _choose(model, node, form)


def input_names(model: ir.Model, node: ir.Node) -> list[str]:
    """Names of a call's inputs, in the body it calls."""
    function = model.functions.get(node.op_identifier())
    if function is None:
        raise BackendError(f"{node.name}: the graph holds no body of {node.op_type}; export the checkpoint again")
    return [value.name or "" for value in function.inputs]


def matrix_of(name: str) -> str:
    """The operator's name for what an input of a body holds or scales."""
    name = name.removesuffix("_scale")
    for part in PARTS:
        name = name.removesuffix(f"_{part}")
    return name


def split_linears(model: ir.Model) -> None:
    """Makes a NormalizedLinear whose result is taken apart one for each part: TensorRT 8.6 compiles wrongly, or not at all, what
    takes a part of a product's part."""
    for node in list(model.graph):
        uses = list(node.outputs[0].uses()) if node.op_type.endswith("NormalizedLinear") else []
        if len(uses) != 1 or uses[0].node.op_type != "Split" or node.outputs[0].is_graph_output():
            continue
        split = uses[0].node
        sizes = [int(part.shape[-1]) for part in split.outputs if part.shape is not None]
        if len(sizes) != len(split.outputs):
            raise BackendError(f"{split.name}: parts without a shape; export the checkpoint again")
        for index, part in enumerate(split.outputs):
            rows = range(sum(sizes[:index]), sum(sizes[: index + 1]))
            inputs = [_rows(model, value, rows, sum(sizes)) for value in node.inputs]
            attributes = node.attributes.values()
            one = ir.Node(
                node.domain, node.op_type, inputs, attributes, overload=node.overload, name=f"{node.name}.{index}"
            )
            one.outputs[0].shape, one.outputs[0].type = part.shape, node.outputs[0].type
            node.graph.insert_before(split, one)
            ir.convenience.replace_all_uses_with(part, one.outputs[0])
        node.graph.remove([split, node], safe=True)


def _rows(model: ir.Model, value: ir.Value | None, rows: range, n_rows: int) -> ir.Value | None:
    """Those rows of a matrix (or of its scales) that has n_rows of them; anything else as it is."""
    tensor = None if value is None else value.const_value
    if value is None or not isinstance(tensor, ir.ExternalTensor) or len(tensor.shape) < 2 or tensor.shape[0] != n_rows:
        return value
    row_bytes = (tensor.length or tensor.nbytes) // n_rows
    part = seen_as(tensor, tensor.dtype, [len(rows), *_static(value)[1:]], rows.start * row_bytes)
    of_rows = initializer(model.graph, f"{value.name}.{rows.start}", part)
    of_rows.type = value.type
    return of_rows


def _choose(model: ir.Model, node: ir.Node, form: str) -> None:
    given = dict(zip(input_names(model, node), node.inputs, strict=True))
    overload = _overload(model, node, form, given)
    function = model.functions.get((overloads.DOMAIN, node.op_type, overload))
    if function is None and overload == overloads.ENGINE:
        return  # the portable body serves
    if function is None:
        raise BackendError(
            f"{node.name}: the graph holds no body of {node.op_type} for engine builders; export the checkpoint again"
        )
    inputs = [_input(model, given, value.name or "") for value in function.inputs]
    outputs = list(node.outputs)[: len(function.outputs)]
    new = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values(),
        overload=overload,
        num_outputs=len(outputs),
        name=node.name,
    )
    for before, output in zip(outputs, new.outputs, strict=True):
        output.name, output.shape, output.type = before.name, before.shape, before.type
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [new], outputs, new.outputs)


def _overload(model: ir.Model, node: ir.Node, form: str, given: dict[str, ir.Value | None]) -> str:
    """The body for this form where there is one, else that for any."""
    if node.op_type.endswith("MixtureOfExperts"):
        _check_routing(node)
        n_shared = _static(given["gate_up"])[0] - _static(given["router"])[0]
        form += overloads.WITH_SHARED if n_shared else ""
    return form if (overloads.DOMAIN, node.op_type, form) in model.functions else overloads.ENGINE


def _check_routing(node: ir.Node) -> None:
    """The bodies for engine builders know one way to choose experts."""
    for name, value in RoutingConfig().attributes.items():
        found = node.attributes.get(name)
        if found is not None and found.value != value:
            raise BackendError(
                f"{node.name}: {name} is {found.value}, and engines know experts with {name} {value} only; run the bundle with "
                "--backend onnxruntime"
            )


def _static(value: ir.Value | None) -> list[int]:
    if value is None or value.shape is None or not value.shape.is_static():
        raise BackendError(
            f"{value.name if value else 'an input'}: its shape is not static; export the checkpoint again"
        )
    return [int(dim) for dim in value.shape]  # type: ignore[arg-type]


def _input(model: ir.Model, given: dict[str, ir.Value | None], name: str) -> ir.Value | None:
    """What a body's input is fed with: the operator's input of that name, or the part of a stack that the name ends in."""
    if name in given:
        return given[name]
    for part in PARTS:
        for suffix in ("", "_scale"):
            stack = name.removesuffix(f"_{part}{suffix}") + suffix
            if name.endswith(f"_{part}{suffix}") and stack in given:
                return _part(model, given[stack], part, _static(given["router"])[0])
    raise BackendError(
        f"a body for engine builders wants {name}, which its operator does not have; export the checkpoint again"
    )


def _part(model: ir.Model, stack: ir.Value | None, part: str, n_routed: int) -> ir.Value:
    """The routed or the shared experts of a stack: an initializer of its own over the same bytes."""
    if stack is None or not isinstance(stack.const_value, ir.ExternalTensor):
        raise BackendError("a stack of experts is not stored in the bundle's weights; export the checkpoint again")
    tensor, (n_experts, *of_one) = stack.const_value, _static(stack)
    if n_experts == n_routed:
        return stack
    first, last = (0, n_routed) if part == PARTS[0] else (n_routed, n_experts)
    expert_bytes = (tensor.length or tensor.nbytes) // n_experts
    experts = seen_as(tensor, tensor.dtype, [last - first, *of_one], first * expert_bytes)
    value = initializer(model.graph, f"{stack.name}.{part}", experts)
    value.type = stack.type
    return value
