"""One graph at one profile with its own inputs and outputs, for comparisons and timing.

graphs = make_backend("onnxruntime").load(bundle, ["head"])
head = SingleGraph(graphs, "head", profile="decode")
outputs = head.run({"hidden_states": hidden, "last_row": np.zeros(1, np.int32)})
print(head.milliseconds(100))
graphs.close()
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any, final

from trio_edge.runtime.bundle.errors import BackendError, ShapeError
from trio_edge.runtime.bundle.manifest import shape_at
from trio_edge.runtime.devices.interface import DeviceTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray

    from trio_edge.runtime.devices.interface import LoadedGraphs


@final
class SingleGraph:
    """A graph bound to its own buffers."""

    def __init__(self, graphs: LoadedGraphs, name: str, *, profile: str) -> None:
        """Allocate the buffers of the graph ``name`` for one of its profiles; they are released with ``graphs``.

        Raises:
            BackendError: If there is no such profile, or the device has too little memory.
        """
        self._device, self._engine = graphs.device, graphs.engines[name]
        whole = self._engine.spec
        found = next((entry for entry in whole.profiles if entry.name == profile), None)
        if found is None:
            known = ", ".join(entry.name for entry in whole.profiles)
            raise BackendError(
                f"{name}: expected one of the profiles {known}, got {profile!r}; choose one of them"
            )
        self.profile = found
        self.spec = whole.part_at(found)
        """The graph, or the piece of it that runs at the profile."""
        self._tensors: dict[str, DeviceTensor] = {}
        self._arrays: dict[str, NDArray[Any]] = {}
        for tensor in whole.tensors:
            placed = DeviceTensor(0, shape_at(tensor.shape, found), tensor.dtype)
            purpose = f"{tensor.name} of {name}"
            address = self._device.allocate(placed.num_bytes, purpose=purpose)
            self._tensors[tensor.name] = placed._replace(address=address)
            pinned = self._device.allocate_pinned(placed.num_bytes, purpose=purpose)
            self._arrays[tensor.name] = pinned.view(placed.dtype).reshape(placed.shape)
        self._launch = self._engine.prepare(found, self._tensors)
        self._enqueue: Callable[[], None] = self._launch.enqueue
        self._start, self._end = self._device.event(), self._device.event()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return all outputs by name for ``inputs``, all inputs by name, at the profile's shapes.

        Raises:
            ShapeError: If an input is missing, unknown, or of another dtype or shape.
            BackendError: If the backend fails.
        """
        self.send(inputs)
        self._launch.enqueue()
        names = [tensor.name for tensor in self.spec.outputs]
        for name in names:
            self._device.download(self._arrays[name], self._tensors[name])
        self._device.synchronize()
        return {name: self._arrays[name].copy() for name in names}

    def send(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Enqueue the copies of all inputs to the device; see ``run``."""
        for tensor in self.spec.inputs:
            array, shape = inputs.get(tensor.name), self._tensors[tensor.name].shape
            if array is None or array.shape != shape or array.dtype != tensor.dtype:
                got = "none" if array is None else f"{array.dtype} {list(array.shape)}"
                raise ShapeError(
                    f"{self.spec.name} input {tensor.name!r}: expected {tensor.dtype} {list(shape)}, got {got}"
                )
            self._arrays[tensor.name][...] = array
            self._device.upload(self._tensors[tensor.name], self._arrays[tensor.name])
        if unknown := sorted(inputs.keys() - set(self.spec.input_names)):
            raise ShapeError(
                f"{self.spec.name}: expected inputs {', '.join(self.spec.input_names[:5])}…, got {unknown[0]!r}; remove it"
            )

    def milliseconds(self, count: int) -> float:
        """Return the mean time of ``count`` consecutive runs with the last inputs."""
        self._start.record()
        for _ in range(count):
            self._enqueue()
        self._end.record()
        self._end.wait()
        return self._end.milliseconds_since(self._start) / count

    def capture(self) -> None:
        """Let ``milliseconds`` replay a CUDA graph, where the backend can; the graph must have run once.

        The CUDA graph is valid until another profile of this graph runs.
        """
        if self._launch.capturable:
            with suppress(BackendError):  # TensorRT cannot be asked before
                self._enqueue = self._device.capture(self._launch.enqueue)
