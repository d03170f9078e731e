"""Passes over a parsed network.

``join_attention`` lets TensorRT fuse attention into one kernel, ``separate_products`` avoids duplicate weights, and
``split_lm_head`` splits the lm_head into blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trio_edge.runtime.bundle.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_edge.runtime.engines.network import Network, WeightProduct


def join_attention(network: Network) -> int:
    """Join past and new keys and values in each attention, and return the number of changed attentions.

    The graphs multiply the query with past and new keys separately and join the scores, so that ONNX Runtime need not copy
    the KV cache. TensorRT only fuses one product of scores, one softmax and one product of values. In decode it makes nine
    kernels of the two halves, one of which copies the past keys. With joined keys and values it makes one kernel in prefill
    and in decode, which reads both parts in place (tensorrt-rtx 1.7; docs/kernels.md). The sums are the same.
    """
    joined = 0
    for layer in network.layers():
        if layer.type == network.trt.LayerType.SOFTMAX and (parts := _attention_parts(network, layer)):
            _join(network, parts)
            joined += 1
    return joined


class _AttentionParts(NamedTuple):
    """Layers and tensors of one attention in the form of ``export/graphs/attention.py``."""

    past_scores: Any
    new_scores: Any
    scores: Any
    """The concatenation of both."""
    weights: Any
    """Tensor of both parts' weights, with the type and rank of the values."""
    past_output: Any
    new_output: Any
    output: Any
    """The sum of both."""


def _attention_parts(network: Network, softmax: Any) -> _AttentionParts | None:
    """Return the parts of the attention around a softmax; None if the softmax is not part of one."""
    types = network.trt.LayerType
    masked = network.maker(softmax.get_input(0))
    if masked is None or masked.type != types.ELEMENTWISE:
        return None
    scores = _source(network, masked.get_input(0), types.CONCATENATION, through=(types.CAST,))
    if scores is None or scores.num_inputs != 2:
        return None
    through = (types.SHUFFLE,)
    past, new = (
        _source(network, scores.get_input(index), types.MATRIX_MULTIPLY, through=through) for index in (0, 1)
    )
    weights = softmax.get_output(0)
    while len(users := network.users(weights)) == 1 and users[0].type in (types.CAST, types.SHUFFLE):
        weights = users[0].get_output(0)
    slices = [user for user in users if user.type == types.SLICE]
    outputs = [user for part in slices for user in network.users(part.get_output(0))]
    sums = [user for part in outputs for user in network.users(part.get_output(0))]
    if not past or not new or len(outputs) != 2 or len(sums) != 2 or sums[0].name != sums[1].name:
        return None
    # The graph adds the output for the new rows to that for the past rows.
    past_output, new_output = (network.maker(sums[0].get_input(index)) for index in (0, 1))
    return _AttentionParts(past, new, scores, weights, past_output, new_output, sums[0])


def _source(network: Network, tensor: Any, wanted: Any, *, through: tuple[Any, ...]) -> Any | None:
    """Return the layer of type ``wanted`` that makes ``tensor``, possibly through layers of the types ``through``."""
    layer = network.maker(tensor)
    while layer is not None and layer.type in through:
        layer = network.maker(layer.get_input(0))
    return layer if layer is not None and layer.type == wanted else None


def _join(network: Network, parts: _AttentionParts) -> None:
    definition, plain = network.definition, network.trt.MatrixOperation.NONE
    keys = definition.add_concatenation([parts.past_scores.get_input(1), parts.new_scores.get_input(1)])
    keys.axis = 3  # [1, G, E, C + S], transposed in the graph
    query = parts.past_scores.get_input(0)
    product = definition.add_matrix_multiply(query, plain, keys.get_output(0), plain).get_output(0)
    scores = definition.add_shuffle(product)
    scores.set_input(1, definition.add_shape(parts.scores.get_output(0)).get_output(0))
    network.connect(parts.scores.get_output(0), scores.get_output(0))
    values = definition.add_concatenation([parts.past_output.get_input(1), parts.new_output.get_input(1)])
    values.axis = 2  # [1, G, C + S, E]
    output = definition.add_matrix_multiply(parts.weights, plain, values.get_output(0), plain)
    network.connect(parts.output.get_output(0), output.get_output(0))


def separate_products(network: Network) -> int:
    """Give products that share an input separate inputs, and return the number of added inputs.

    TensorRT joins products with the same input (query, key and value; gate and up) into one with concatenated weights if the
    input has one row, as in decode, but not if it has many. An engine with both kinds of profiles would hold these weights
    twice. Measured with tensorrt-rtx 1.7 on one 7B layer with 405 MB of weights: 688 MB with profiles of 2960 rows and
    1 row, 407 MB with 2960 and 2 rows, and 407 MB after this pass. Results do not change.

    In the graph of a quantized layer and its probe, the query has other rows to add than key and value
    (``export/graphs/assembly/pieces.py``). In decode there are none, so the same happens; there the rows before the
    concatenation are separated.

    Only inputs that ``equal_tensor`` can repeat are separated.
    """
    users: dict[str, list[Any]] = {}
    joins = [layer for layer in network.layers() if layer.type == network.trt.LayerType.CONCATENATION]
    for layer in (*(product.layer for product in network.weight_products()), *joins):
        users.setdefault(layer.get_input(0).name, []).append(layer)
    added = 0
    for layers in users.values():
        for layer in layers[1:]:
            if (tensor := equal_tensor(network, layer.get_input(0))) is not None:
                layer.set_input(0, tensor)
                added += 1
    return added


def split_lm_head(network: Network, *, vocab_size: int, hidden_size: int, num_blocks: int) -> int:
    """Replace each product with the lm_head's weight by ``num_blocks`` smaller ones, and return the number of products.

    On small Jetsons, TensorRT's product with the whole lm_head asks for about 1 GB of contiguous memory and fails
    (hokwangchoi/jetson-orin-nano-benchmarks). Logits are concatenated blocks; the probe's backward product is a sum over
    blocks, in float32.

    The weight is [``vocab_size``, ``hidden_size``]. Block sizes are multiples of 8, so there may be fewer blocks.

    Raises:
        BackendError: If no product has such a weight.
    """
    shape = (vocab_size, hidden_size)
    products = [entry for entry in network.weight_products() if tuple(entry.weight.shape) == shape]
    if not products:
        raise BackendError(
            f"--split-lm-head: expected a product with an lm_head of {list(shape)}, got none; build without the option"
        )
    blocks: dict[str, list[Any]] = {}
    for product in products:
        name = product.weight.get_output(0).name
        if name not in blocks:
            blocks[name] = _blocks(network, product, block_sizes(vocab_size, num_blocks))
        split = _split_outputs if product.transposed else _split_inputs
        network.connect(product.layer.get_output(0), split(network, product.layer, blocks[name]))
    return len(products)


def block_sizes(total: int, num_blocks: int, *, multiple: int = 8) -> Sequence[int]:
    """Return ``num_blocks`` or fewer sizes that sum to ``total``, equal and multiples of ``multiple`` but for the last."""
    size = -(-total // num_blocks)
    size = -(-size // multiple) * multiple
    return [min(size, total - start) for start in range(0, total, size)]


def _blocks(network: Network, product: WeightProduct, sizes: Sequence[int]) -> list[Any]:
    weight = network.values(product.weight)
    starts = np.cumsum([0, *sizes[:-1]])
    # Views of the parsed weight, no copies.
    return [network.constant(weight[start : start + size]) for start, size in zip(starts, sizes)]


def _split_outputs(network: Network, layer: Any, blocks: list[Any]) -> Any:
    """Return logits: the products with the transposed blocks, concatenated.

    Each product has a separate input, because TensorRT would join products with a common one again.
    """
    operation, definition = network.trt.MatrixOperation, network.definition
    parts, source = [], layer.get_input(0)
    for index, block in enumerate(blocks):
        own = source if index == 0 else equal_tensor(network, source) or source
        weight = _of_rank(network, block, layer)
        part = definition.add_matrix_multiply(own, layer.op0, weight, operation.TRANSPOSE)
        parts.append(part.get_output(0))
    joined = definition.add_concatenation(parts)
    joined.axis = len(layer.get_output(0).shape) - 1
    return joined.get_output(0)


def _split_inputs(network: Network, layer: Any, blocks: list[Any]) -> Any:
    """Return the sum of the products of the input's columns with the blocks."""
    trt, definition = network.trt, network.definition
    source = layer.get_input(0)
    total, start = None, 0
    for block in blocks:
        size = block.shape[0]
        columns = _columns(network, source, start=start, size=size)
        weight = _of_rank(network, block, layer)
        part = definition.add_matrix_multiply(columns, layer.op0, weight, trt.MatrixOperation.NONE)
        wide = definition.add_cast(part.get_output(0), trt.float32).get_output(0)
        if total is not None:
            wide = definition.add_elementwise(total, wide, trt.ElementWiseOperation.SUM).get_output(0)
        total, start = wide, start + size
    return definition.add_cast(total, layer.get_output(0).dtype).get_output(0)


def _columns(network: Network, source: Any, *, start: int, size: int) -> Any:
    """Return ``size`` columns of ``source`` from ``start`` on; its other axes may be dynamic."""
    definition, rank = network.definition, len(source.shape)
    sizes = (*tuple(source.shape)[:-1], size)
    slices = definition.add_slice(source, (0,) * (rank - 1) + (start,), sizes, (1,) * rank)
    if min(sizes) < 0:
        shape = definition.add_shape(source).get_output(0)
        rows = definition.add_slice(shape, (0,), (rank - 1,), (1,)).get_output(0)
        width = network.constant(np.array([size], np.int64))
        slices.set_input(2, definition.add_concatenation([rows, width]).get_output(0))
    return slices.get_output(0)


def _of_rank(network: Network, block: Any, layer: Any) -> Any:
    """Return ``block`` with the leading axes of 1 that the product's first operand needs."""
    missing = len(layer.get_input(0).shape) - len(block.shape)
    if missing == 0:
        return block
    shuffle = network.definition.add_shuffle(block)
    shuffle.reshape_dims = (1,) * missing + tuple(block.shape)
    return shuffle.get_output(0)


def equal_tensor(network: Network, tensor: Any) -> Any | None:
    """Return a new tensor with the values of ``tensor`` that TensorRT does not recognize as equal.

    None unless ``tensor`` is a product with a constant vector, such as a norm's output, or such a product cast to a type.
    """
    trt, maker = network.trt, network.maker(tensor)
    if maker is None:
        return None
    if maker.type == trt.LayerType.CAST:
        inner = equal_tensor(network, maker.get_input(0))
        return None if inner is None else network.definition.add_cast(inner, tensor.dtype).get_output(0)
    if maker.type != trt.LayerType.ELEMENTWISE or maker.op != trt.ElementWiseOperation.PROD:
        return None
    operands = [maker.get_input(0), maker.get_input(1)]
    for operand, other in (operands, operands[::-1]):
        constant = network.maker(operand)
        while constant is not None and constant.type in (trt.LayerType.SHUFFLE, trt.LayerType.CAST):
            constant = network.maker(constant.get_input(0))
        if constant is not None and constant.type == trt.LayerType.CONSTANT:
            # The constant is copied, because with the same one TensorRT would recognize that both tensors are equal.
            copy = network.values(constant).astype(trt.nptype(operand.dtype)).reshape(tuple(operand.shape))
            product = network.definition.add_elementwise(
                network.constant(copy), other, trt.ElementWiseOperation.PROD
            )
            return product.get_output(0)
    return None
