"""Lookups in a parsed TensorRT network: the layer that makes a tensor, the layers that use it, products with weights.

Layers cannot be removed from a TensorRT network. A pass adds layers and connects users to them; TensorRT drops layers
without users when it builds the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np

if TYPE_CHECKING:
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
        layer = self._makers.get(tensor.name)
        return None if layer is None else self._typed(layer)

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
            first, second = (
                tuple(order)[:2] == (1, 0) for order in (layer.first_transpose, layer.second_transpose)
            )
            swapped = first ^ (second and len(tensor.shape) == 2)
            if tuple(tensor.shape)[-2:] != tuple(source.shape)[:: -1 if swapped else 1]:
                return None, False  # a reshape
            transposed ^= swapped
            tensor = source
        if layer is None or layer.type != self.trt.LayerType.CONSTANT or len(tensor.shape) != 2:
            return None, False
        return layer, transposed

    def _typed(self, layer: Any) -> Any:
        """Return ``layer`` as the class of its type: get_layer gives the base class, which lacks most attributes."""
        classes = {
            self.trt.LayerType.CONSTANT: self.trt.IConstantLayer,
            self.trt.LayerType.SHUFFLE: self.trt.IShuffleLayer,
            self.trt.LayerType.ELEMENTWISE: self.trt.IElementWiseLayer,
        }
        if (wanted := classes.get(layer.type)) is not None:
            layer.__class__ = wanted
        return layer
