"""The chain of graphs without a device: every graph called with arrays, KV rows concatenated by numpy. Slow and obvious."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from trio_edge.runtime.bundle.graph_io import PROBE_OUTPUT, SALIENCY_SCORES, gradient_graph
from trio_edge.runtime.bundle.manifest import GraphSpec, Manifest
from trio_edge.runtime.bundle.reader import open_bundle
from trio_edge.runtime.engines.cpu import set_cpu_options
from trio_edge.runtime.model.host_selection import greedy_nms

Arrays = dict[str, Any]


def plain_session(folder: Path, spec: GraphSpec) -> ort.InferenceSession:
    """Return a session of one graph with the runtime's own settings: others may add in another order."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    set_cpu_options(options, open_bundle(folder), spec, accuracy="auto")
    return ort.InferenceSession(folder / spec.file, options, providers=["CPUExecutionProvider"])


class PlainDecoder:
    """Prefill and decode of one sequence with inputs_embeds [1, S, D]."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.manifest = manifest
        # of a graph with pieces the first is what the decoder runs, the others are its probe
        self.parts = {part.name: part for spec in manifest.graphs for part in spec.split()}
        self.parts |= {spec.name: spec.split()[0] for spec in manifest.graphs}
        self.sessions = {name: plain_session(folder, part) for name, part in self.parts.items()}
        self.kept: list[Any] = []
        self.scores: list[Any] = []
        self.num_repaired = 0

    def run(self, name: str, inputs: Arrays) -> Arrays:
        outputs = [tensor.name for tensor in self.parts[name].outputs]
        return dict(zip(outputs, self.sessions[name].run(outputs, inputs)))

    def prefill(
        self,
        embeds: Any,
        *,
        positions: Any,
        next_position: int,
        start: int,
        num_visual: int,
        rows: int,
        length: int,
    ) -> Any:
        """Return the logits [V] of row ``length - 1``."""
        self.caches: list[Arrays] = []
        self.lengths: list[int] = []
        self.kept, self.scores, self.num_repaired, self.next_position = [], [], 0, next_position
        original = np.arange(num_visual)
        hidden = embeds
        is_visual = np.zeros(embeds.shape[1], np.int32)
        is_visual[start : start + num_visual] = 1
        more: Arrays = {
            "prompt_embeds": embeds,
            "prompt_is_visual": is_visual,
            "prompt_length": np.array([length], np.int32),
        }
        for index, spec in enumerate(self.manifest.ranges):
            if index:
                keep = self.manifest.schedule.stages[index - 1].keep
                select = self.manifest.selects[index - 1]
                given = more | {
                    "hidden_states": hidden,
                    "position_ids": positions,
                    "visual_rows": np.arange(start, start + rows, dtype=np.int32),
                    "num_visual": np.array([num_visual], np.int32),
                    "length": np.array([length], np.int32),
                }
                if "saliency" in select.input_names:
                    given["saliency"] = self._saliency(index - 1, given)
                outputs = self.run(select.name, {name: given[name] for name in select.input_names})
                count = min(keep, num_visual)
                kept = outputs["kept_indices"][:count]
                next_hidden, next_positions = outputs["kept_hidden_states"], outputs["kept_position_ids"]
                scores = outputs["scores"][:num_visual]
                if outputs["unsettled"][0]:
                    self.num_repaired += 1
                    features = hidden[0, start : start + num_visual]
                    threshold = self.manifest.schedule.nms_threshold
                    kept = greedy_nms(features, scores, num_keep=count, threshold=threshold)
                    before, after = np.arange(start), np.arange(start + num_visual, length)
                    used = np.concatenate([before, start + kept, after])
                    next_hidden = np.zeros((1, hidden.shape[1] - rows + keep, hidden.shape[2]), hidden.dtype)
                    next_hidden[0, : len(used)] = hidden[0, used]
                    if self.manifest.schedule.positions == "preserved":
                        next_positions = next_positions.copy()
                        next_positions[:, : len(used)] = positions[:, used]
                hidden, positions = next_hidden, next_positions
                original = original[kept]
                self.kept.append(original)
                self.scores.append(scores)
                length, num_visual, rows = length - num_visual + count, count, keep
            empty = {name: rows_[:, :, :0] for name, rows_ in self._buffers(spec, index).items()}
            inputs = {spec.inputs[0].name: hidden, "position_ids": positions}
            outputs = self.run(spec.name, inputs | {"past_length": np.zeros(1, np.int32)} | empty)
            self.caches.append(self._buffers(spec, index))
            self._append(index, outputs, at=0, count=length)
            self.lengths.append(length)
            hidden, more = outputs["hidden_states_out"], more | outputs
        return self._logits(hidden, length - 1)

    def _saliency(self, stage: int, given: Arrays) -> Any:
        """Return the scores of the probe of ``stage``: forwards, through the head and back."""
        schedule, gradient = self.manifest.schedule, gradient_graph(self.manifest)
        assert gradient is not None
        graphs = [spec for spec in self.manifest.graphs if spec.first_layer == schedule.stages[stage].layer]
        forward, backward = (
            next(spec.name for spec in graphs if any(tensor.name == output for tensor in spec.outputs))
            for output in (PROBE_OUTPUT, SALIENCY_SCORES)
        )
        last = given["length"][0] - schedule.last_probe_offset
        rows = np.arange(last - schedule.num_probe_rows + 1, last + 1, dtype=np.int32)
        shared = {name: given[name] for name in ("hidden_states", "position_ids", "visual_rows")}
        state = self.run(
            f"{forward}.probe",
            {f"probe_{name}": value for name, value in shared.items()}
            | {"probe_rows": np.maximum(rows, 0), "probe_length": given["length"]},
        )
        (found,) = self.run(f"{gradient.name}.gradient", {"probe_output": state.pop("probe_output")}).values()
        (scores,) = self.run(
            f"{backward}.saliency",
            {f"gradient_{name}": value for name, value in shared.items()}
            | {name.replace("probe", "gradient"): value for name, value in state.items()}
            | {"gradient_num_visual": given["num_visual"], "gradient": found},
        ).values()
        return scores

    def decode(self, embedding: Any) -> Any:
        """Return the logits [V] after one more token."""
        hidden = embedding.reshape(1, 1, -1)
        for index, spec in enumerate(self.manifest.ranges):
            length = self.lengths[index]
            position = length if self.manifest.schedule.positions == "compact" else self.next_position
            inputs = {
                spec.inputs[0].name: hidden,
                "position_ids": np.full((self.manifest.position_axes, 1), position, np.int32),
                "past_length": np.array([length], np.int32),
            }
            outputs = self.run(spec.name, inputs | self.caches[index])
            self._append(index, outputs, at=length, count=1)
            self.lengths[index] += 1
            hidden = outputs["hidden_states_out"]
        self.next_position += 1
        return self._logits(hidden, 0)

    def _buffers(self, spec: GraphSpec, index: int) -> Arrays:
        capacity, dims = self.manifest.kv_capacities[index], self.manifest.dimensions
        shape = (1, dims.num_kv_heads, capacity, dims.head_size)
        names = [name for name in spec.input_names if name.startswith("past_key_values.")]
        return {name: np.zeros(shape, self.manifest.kv_dtype) for name in names}

    def _append(self, index: int, outputs: Arrays, *, at: int, count: int) -> None:
        for name, buffer in self.caches[index].items():
            new = outputs[name.replace("past_key_values", "present")]
            buffer[:, :, at : at + count] = new[:, :, :count]

    def _logits(self, hidden: Any, last_row: int) -> Any:
        inputs = {"hidden_states": hidden, "last_row": np.array([last_row], np.int32)}
        return self.run("head", inputs)["logits"][0]
