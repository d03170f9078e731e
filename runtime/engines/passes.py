"""Passes over a parsed TensorRT network.

``join_attention`` lets TensorRT fuse attention into one kernel, ``split_sliced_products`` and ``separate_products`` avoid
duplicate weights, and ``split_lm_head`` splits the lm_head into blocks. ``Network`` has the lookups that they need: the layer
that makes a tensor, the layers that use it, products with weights.

Layers cannot be removed from a TensorRT network. A pass adds layers and connects users to them; TensorRT drops layers
without users when it builds the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

from trio_edge.runtime.bundle.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from trio_edge.runtime.engines.package import TensorRT


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """A matrix product whose second operand is a weight."""

    layer: Any
    """Its IMatrixMultiplyLayer."""
    weight: Any
    """The IConstantLayer of the weight, of rank 2."""
    transposed: bool
    """Whether the stored weight is transposed: [outputs, inputs], as in checkpoints."""


@final
class Network:
    """A parsed network with the lookups that passes need."""

    def __init__(self, tensorrt: TensorRT, definition: Any) -> None:
        self.trt = tensorrt.module
        self.definition = definition
        self._arrays: list[NDArray[Any]] = []
        # By name, because each get_layer or get_input returns a new Python object.
        self._makers: dict[str, Any] = {}
        self._users: dict[str, list[tuple[Any, int]]] = {}
        for layer in self.layers():
            for index in range(layer.num_outputs):
                self._makers[layer.get_output(index).name] = layer
            for index in range(layer.num_inputs):
                if (tensor := layer.get_input(index)) is not None:
                    self._users.setdefault(tensor.name, []).append((layer, index))

    def layers(self) -> list[Any]:
        """Return all layers in order."""
        return [self.definition.get_layer(index) for index in range(self.definition.num_layers)]

    def maker(self, tensor: Any) -> Any | None:
        """Return the layer that makes ``tensor``, as the class of its type; None for an input of the network."""
        layer, types = self._makers.get(tensor.name), self.trt.LayerType
        classes = {  # get_layer gives the base class, which lacks most attributes
            types.CONSTANT: self.trt.IConstantLayer,
            types.SHUFFLE: self.trt.IShuffleLayer,
            types.ELEMENTWISE: self.trt.IElementWiseLayer,
        }
        if layer is not None and layer.type in classes:
            layer.__class__ = classes[layer.type]
        return layer

    def users(self, tensor: Any) -> list[Any]:
        """Return the layers that used ``tensor`` when the network was parsed."""
        return [layer for layer, _ in self._users.get(tensor.name, [])]

    def connect(self, old: Any, new: Any) -> None:
        """Replace ``old`` by ``new`` in every layer of the parsed network that uses it, and as an output."""
        for layer, index in self._users.get(old.name, []):
            layer.set_input(index, new)
        if old.is_network_output:
            name = old.name
            self.definition.unmark_output(old)
            old.name = f"{name} (whole)"  # names are unique in a network
            new.name = name
            self.definition.mark_output(new)

    def constant(self, array: NDArray[Any]) -> Any:
        """Return the tensor of a new constant. ``array`` is kept, not copied, and may be a view."""
        self._arrays.append(array)  # TensorRT reads it only when it builds the engine
        return self.definition.add_constant(array.shape, self.trt.Weights(array)).get_output(0)

    def weight_products(self) -> list[WeightProduct]:
        """Return all matrix products with a constant second operand, in order."""
        found = []
        for layer in self.layers():
            if layer.type != self.trt.LayerType.MATRIX_MULTIPLY:
                continue
            layer.__class__ = self.trt.IMatrixMultiplyLayer
            weight, transposed = self._source_constant(layer.get_input(1))
            if weight is not None:
                flag = layer.op1 == self.trt.MatrixOperation.TRANSPOSE
                found.append(WeightProduct(layer, weight, transposed != flag))
        return found

    def values(self, constant: Any) -> NDArray[Any]:
        """Return a view of a constant layer's values in its shape."""
        return np.asarray(constant.weights).reshape(tuple(constant.shape))

    def _source_constant(self, tensor: Any) -> tuple[Any | None, bool]:
        """Return the rank-2 constant that ``tensor`` reshapes to leading axes of 1 or transposes, and whether it transposes."""
        transposed = False
        while (layer := self.maker(tensor)) is not None and layer.type == self.trt.LayerType.SHUFFLE:
            source = layer.get_input(0)
            if len(source.shape) != 2 or layer.num_inputs > 1:
                return None, False
            orders = (layer.first_transpose, layer.second_transpose)
            first, second = (tuple(order)[:2] == (1, 0) for order in orders)
            swapped = first ^ (second and len(tensor.shape) == 2)
            if tuple(tensor.shape)[-2:] != tuple(source.shape)[:: -1 if swapped else 1]:
                return None, False  # a reshape
            transposed ^= swapped
            tensor = source
        is_weight = layer is not None and layer.type == self.trt.LayerType.CONSTANT and len(tensor.shape) == 2
        return (layer, transposed) if is_weight else (None, False)


def join_attention(network: Network) -> int:
    """Join past and new keys and values in each attention, and return the number of changed attentions.

    The graphs multiply the query with past and new keys separately and join the scores, so that ONNX Runtime need not copy
    the KV cache. TensorRT only fuses one product of scores, one softmax and one product of values. In decode it makes nine
    kernels of the two halves, one of which copies the past keys. With joined keys and values it makes one kernel in prefill
    and in decode, which reads both parts in place (tensorrt-rtx 1.7; docs/runtime.md). The sums are the same.
    """
    softmax = network.trt.LayerType.SOFTMAX
    return sum(_join_around(network, layer) for layer in network.layers() if layer.type == softmax)


def _join_around(network: Network, softmax: Any) -> bool:
    """Join keys and values around a softmax; return False if it is no part of an attention as in ``export/graphs/attention.py``."""
    definition, types, plain = network.definition, network.trt.LayerType, network.trt.MatrixOperation.NONE
    masked = network.maker(softmax.get_input(0))
    if masked is None or masked.type != types.ELEMENTWISE:
        return False
    scores = _source(network, masked.get_input(0), types.CONCATENATION, through=(types.CAST,))
    if scores is None or scores.num_inputs != 2:
        return False
    past, new = (
        _source(network, scores.get_input(index), types.MATRIX_MULTIPLY, through=(types.SHUFFLE,))
        for index in (0, 1)
    )
    # The tensor of both parts' weights, with the type and rank of the values.
    weights = softmax.get_output(0)
    while len(users := network.users(weights)) == 1 and users[0].type in (types.CAST, types.SHUFFLE):
        weights = users[0].get_output(0)
    slices = [user for user in users if user.type == types.SLICE]
    outputs = [user for part in slices for user in network.users(part.get_output(0))]
    sums = [user for part in outputs for user in network.users(part.get_output(0))]
    if not past or not new or len(outputs) != 2 or len(sums) != 2 or sums[0].name != sums[1].name:
        return False
    keys = definition.add_concatenation([past.get_input(1), new.get_input(1)])
    keys.axis = 3  # [1, G, E, C + S], transposed in the graph
    product = definition.add_matrix_multiply(past.get_input(0), plain, keys.get_output(0), plain)
    joined = definition.add_shuffle(product.get_output(0))
    joined.set_input(1, definition.add_shape(scores.get_output(0)).get_output(0))
    network.connect(scores.get_output(0), joined.get_output(0))
    # The graph adds the output for the new rows to that for the past rows.
    halves: list[Any] = [network.maker(sums[0].get_input(index)) for index in (0, 1)]
    values = definition.add_concatenation([half.get_input(1) for half in halves])
    values.axis = 2  # [1, G, C + S, E]
    output = definition.add_matrix_multiply(weights, plain, values.get_output(0), plain)
    network.connect(sums[0].get_output(0), output.get_output(0))
    return True


def _source(network: Network, tensor: Any, wanted: Any, *, through: tuple[Any, ...]) -> Any | None:
    """Return the layer of type ``wanted`` that makes ``tensor``, possibly through layers of the types ``through``."""
    layer = network.maker(tensor)
    while layer is not None and layer.type in through:
        layer = network.maker(layer.get_input(0))
    return layer if layer is not None and layer.type == wanted else None


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


def split_sliced_products(network: Network) -> int:
    """Give each slice of a product, as of a short convolution's ``in_proj``, a product of its own; return how many were split.

    TensorRT does so if the input has one row, but not if it has many. An engine with both kinds of profiles would hold these
    weights twice. Measured with tensorrt-rtx 1.7 on two layers of LFM2, 2048 wide, with 134 MB of weights: 163 MB, and 138 MB
    after this pass and ``separate_products``. Results do not change.
    """
    count = 0
    for product in network.weight_products():
        whole = product.layer.get_output(0)
        slices = [user for user in network.users(whole) if user.type == network.trt.LayerType.SLICE]
        if len(slices) > 1 and product.transposed:
            blocks = np.array_split(network.values(product.weight), len(slices))
            parts = [network.constant(block) for block in blocks]
            network.connect(whole, _split_outputs(network, product.layer, parts))
            count += 1
    return count


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
            ends = np.cumsum(block_sizes(vocab_size, num_blocks))
            # Views of the parsed weight, no copies.
            parts = np.split(network.values(product.weight), ends[:-1])
            blocks[name] = [network.constant(part) for part in parts]
        split = _split_outputs if product.transposed else _split_inputs
        network.connect(product.layer.get_output(0), split(network, product.layer, blocks[name]))
    return len(products)


def block_sizes(total: int, num_blocks: int, *, multiple: int = 8) -> Sequence[int]:
    """Return ``num_blocks`` or fewer sizes that sum to ``total``, equal and multiples of ``multiple`` but for the last."""
    size = -(-total // num_blocks)
    size = -(-size // multiple) * multiple
    return [min(size, total - start) for start in range(0, total, size)]


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
        if (values := _constant_values(network, operand)) is not None:
            # The constant is copied, because with the same one TensorRT would recognize that both tensors are equal.
            factor = network.constant(np.array(values).reshape(tuple(operand.shape)))
            return network.definition.add_elementwise(
                factor, other, trt.ElementWiseOperation.PROD
            ).get_output(0)
    return None


def _constant_values(network: Network, tensor: Any) -> NDArray[Any] | None:
    """Return the values of a constant, also of 1 + a constant as in zero-centred norms; None for any other tensor."""
    trt, maker = network.trt, network.maker(tensor)
    if maker is None:
        return None
    if maker.type == trt.LayerType.CONSTANT:
        return network.values(maker)
    if maker.type in (trt.LayerType.SHUFFLE, trt.LayerType.CAST):
        values = _constant_values(network, maker.get_input(0))
        return None if values is None else values.astype(trt.nptype(tensor.dtype))
    if maker.type != trt.LayerType.ELEMENTWISE or maker.op != trt.ElementWiseOperation.SUM:
        return None
    terms = [_constant_values(network, maker.get_input(index)) for index in (0, 1)]
    return None if terms[0] is None or terms[1] is None else terms[0] + terms[1]
