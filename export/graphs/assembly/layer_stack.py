"""Makes the graph of many decoder layers from the trace of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trio_edge.export.graphs.assembly.copies import Copies

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    from trio_edge.runtime.bundle.manifest import TensorSpec

# inputs: hidden states, position ids, past length, then key and value of each layer
_HIDDEN, _FIRST_PAST = 0, 3
_VARYING = (_HIDDEN, _FIRST_PAST, _FIRST_PAST + 1)


def stack_layers(
    layer: ir.Model,
    *,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    num_layers: int,
    num_planes: int = 0,
    last_input: TensorSpec | None = None,
) -> ir.Model:
    """Return ``num_layers`` copies of ``layer``, one after the other; ``layer`` itself does not change.

    Inputs are in the order of ``DecoderRange``, then the DeepStack planes, which are added to the outputs of the first
    ``num_planes`` layers. Outputs are hidden states, key and value of each layer, then ``last_input``, if given: the
    hidden states that enter the last layer. Layer i's weights become initializers ``layers.{i}.…``.
    """
    graph = Copies(inputs)
    given, present = graph.inputs, []
    hidden, planes = given[_HIDDEN], given[len(given) - num_planes :]
    for index in range(num_layers):
        enters_last = hidden
        past = given[_FIRST_PAST + 2 * index :][:2]
        hidden, *new_rows = graph.add(
            layer,
            [hidden, *given[_HIDDEN + 1 : _FIRST_PAST], *past],
            varying=_VARYING,
            weights=f"layers.{index}.",
            own_suffix=f".{index}",
        )
        present += new_rows
        if index < num_planes:
            hidden = graph.add_node("Add", [hidden, planes[index]], name=f"with_deepstack.{index}")
    results = [hidden, *present]
    if last_input is not None:
        # Identity, because with one layer it is an input of the graph, which cannot be an output, too
        results.append(graph.add_node("Identity", [enters_last], name="last_input"))
        outputs = [*outputs, last_input]
    return graph.model(results, outputs, like=layer)
