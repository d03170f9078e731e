"""The ONNX Runtime backend, on the CPU. The only file that imports onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, final

import onnxruntime as ort

from trio_edge.runtime.backend import check_inputs
from trio_edge.runtime.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from trio_edge.runtime.manifest import GraphSpec, TensorSpec

_ORT_FROM_DTYPE = {
    "float32": "tensor(float)",
    "float16": "tensor(float16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
}


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


@final
class OnnxRuntimeBackend:
    """Loads graphs into ONNX Runtime's CPU execution provider."""

    name = "onnxruntime"

    def __init__(self, *, threads: int = 0) -> None:
        self._threads = threads

    def load(self, folder: Path, spec: GraphSpec) -> OnnxRuntimeSession:
        """See ``Backend.load``."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        # Each session has threads of its own; spinning while another session runs, they would take its cores
        # (measured on 2 cores with 9 sessions: 107 ms instead of 26 ms for one answer of the packaged model).
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = ort.InferenceSession(folder / spec.file, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's exceptions have no common public base
            raise BackendError(
                f"{folder / spec.file}: expected a graph that onnxruntime {ort.__version__} loads, got:"
                f" {_first_line(error)}; export the bundle again"
            ) from None
        _check_interface(spec.inputs, session.get_inputs(), where=f"{spec.file} inputs")
        _check_interface(spec.outputs, session.get_outputs(), where=f"{spec.file} outputs")
        return OnnxRuntimeSession(session, spec)


def _check_interface(expected: tuple[TensorSpec, ...], got: list[Any], *, where: str) -> None:
    wanted = [(tensor.name, _ORT_FROM_DTYPE[tensor.dtype]) for tensor in expected]
    found = [(tensor.name, tensor.type) for tensor in got]
    if wanted != found:
        odd = next((pair for pair in zip(wanted, found) if pair[0] != pair[1]), (len(wanted), len(found)))
        raise BackendError(f"{where}: expected {odd[0]} (manifest), got {odd[1]}; export the bundle again")


@final
class OnnxRuntimeSession:
    """One graph in ONNX Runtime."""

    def __init__(self, session: ort.InferenceSession, spec: GraphSpec) -> None:
        self._session: ort.InferenceSession | None = session
        self._spec = spec
        self._output_names = [tensor.name for tensor in spec.outputs]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See ``Session.run``."""
        if self._session is None:
            raise BackendError(
                f"{self._spec.name}: expected an open session, got a closed one; load the bundle again"
            )
        check_inputs(self._spec, inputs)
        try:
            values = self._session.run(self._output_names, dict(inputs))
        except Exception as error:  # onnxruntime's exceptions have no common public base
            raise BackendError(f"{self._spec.name}: onnxruntime failed: {_first_line(error)}") from None
        return dict(zip(self._output_names, values))

    def close(self) -> None:
        """See ``Session.close``."""
        self._session = None
