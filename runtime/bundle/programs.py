"""Programs: the graphs that run one after the other, and the place of each of their tensors.

A place is device memory with a name. A launch names the place of every input and output of its graph, so the place of an
input says where the tensor comes from: from an earlier launch, or from the host. The export writes programs from the graphs
that it builds; the runtime checks them when it opens a bundle, allocates their places and obeys. It need not know what a
tensor means, so it runs selectors that are newer than itself.

``prefix.hidden_states_out``  a tensor; by convention the graph's name and the output's
``new_rows[3]``               one of several equal tensors in a row, a stack
``cache.prefix[3]``           keys or values of a layer in a KV cache: a stack that launches read and rows are appended to
``zeros.plane``               never written, always zero
``prompt.length.0``           sent by the host before the program runs, see ``sent_by_host``
``results.scores.0``          read by the host afterwards, see ``read_by_host``

Two launches may write the same place; the later one replaces what the earlier one wrote.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import msgspec

from trio_edge.runtime.bundle import graph_io
from trio_edge.runtime.bundle.limits import Extent, Layer, Name, Symbol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.bundle.manifest import Manifest

Place: TypeAlias = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9_.]{1,200}(\[[0-9]{1,5}\])?\Z")]
HostFunction = Literal["enter_head", "likeliest_rows", "exact_nms"]
"""What the host does between two graphs: send probe rows to the head, look up the rows of the lm_head for the likeliest
tokens, or select in place of a select graph. See ``runtime/model``."""
ProgramName = Literal["vision", "reduce", "prefill", "question", "decode", "exact"]
"""Images to visual tokens; their selection before the decoder; the prompt; a question after kept rows of the first layer
range (--follow-ups); one new token; and the selection of each stage on the host, after which a prefill goes on."""

ZEROS = "zeros."
CACHE = "cache."
JOINT = ("prompt", "question", "step", "results", "top", "logits", "entering", "found", "likeliest")
"""Namespaces whose places one copy moves between host and device."""
SINGLE = ("image", "kept")
"""Namespaces whose places are copied one by one."""
SENT = ("prompt", "rows", "question", "step", "entering", "likeliest", "image", "zeros", "cache")
"""Namespaces that no launch writes; rows of KV caches are appended between launches."""


class Launch(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One run of a graph, or of a function on the host."""

    runs: Name
    """A graph, or a ``HostFunction`` if there are no profiles."""
    label: Name
    """Name of the device's time; consecutive launches with the same label are timed together."""
    profiles: tuple[Name, ...] = ()
    """Profile of the graph at each of the program's sizes."""
    inputs: dict[Name, Place]
    """By tensor. Tensors that are missing, here and below, have no elements at the profiles."""
    outputs: dict[Name, Place]
    stage: Layer = 0
    """Selections that are done before."""
    cache: Name | None = None
    """KV cache that the launch's new rows, its outputs in a stack, are appended to."""

    @property
    def places(self) -> dict[str, str]:
        """Places of inputs and outputs by tensor."""
        return self.inputs | self.outputs


class Program(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Launches in order."""

    name: ProgramName
    sizes: tuple[dict[Symbol, Extent], ...]
    """The sizes that it runs at: N visual tokens and T text tokens of a prefill, or those of the vision or reduce graph."""
    launches: tuple[Launch, ...]

    def at(self, sizes: Mapping[str, int]) -> int:
        """Return the index of ``sizes``."""
        return self.sizes.index(dict(sizes))


def stack_of(place: str) -> tuple[str, int] | None:
    """Return the name and the index of a place in a stack; None for other places."""
    name, bracket, index = place.partition("[")
    return (name, int(index[:-1])) if bracket else None


def stacks_of(places: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the tensors of each stack in ``places``, in their order in the stack."""
    found: dict[str, dict[int, str]] = {}
    for tensor, place in places.items():
        if (stack := stack_of(place)) is not None:
            found.setdefault(stack[0], {})[stack[1]] = tensor
    return {name: [tensors[index] for index in sorted(tensors)] for name, tensors in found.items()}


Array: TypeAlias = "tuple[str, tuple[int, ...]]"
"""Dtype and shape."""


def sent_by_host(manifest: Manifest, program: str, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return what the host sends before ``program`` runs at ``sizes``, or between its launches.

    ``rows`` are put together on the device from text and visual tokens. Inputs of the vision graph, ``image``, differ by
    family and are not listed.
    """
    width, dtype, axes = manifest.dimensions.hidden_size, manifest.dtype, manifest.position_axes
    if program == "decode":
        found: dict[str, Array] = {"step.embedding": (dtype, (1, 1, width))}
        for index in range(len(manifest.schedule.stages) + 1):
            found[f"step.position_ids.{index}"] = "int32", (axes, 1)
            found[f"step.past_length.{index}"] = "int32", (1,)
        return found
    if program == "question":
        rows = sizes["T"]
        return {
            "question.embeds": (dtype, (1, rows, width)),
            "question.position_ids": ("int32", (axes, rows)),
            "question.past_length": ("int32", (1,)),
        }
    if program not in ("prefill", "exact"):
        return {}
    visual, rows, num_probes = sizes["N"], sizes["N"] + sizes["T"], manifest.schedule.num_probe_rows
    found = {
        "rows.embeds": (dtype, (1, rows, width)),
        "prompt.position_ids": ("int32", (axes, rows)),
        "prompt.visual_rows": ("int32", (visual,)),
        "prompt.visual_images": ("int32", (visual,)),
        "prompt.is_visual": ("int32", (rows,)),
        "prompt.length": ("int32", (1,)),
        "prompt.last_row": ("int32", (1,)),
    }
    for layer in range(manifest.num_deepstack):
        found[f"rows.deepstack.{layer}"] = dtype, (1, rows, width)
    for stage in range(len(manifest.schedule.stages)):
        found[f"prompt.length.{stage}"] = found[f"prompt.num_visual.{stage}"] = "int32", (1,)
        found[f"prompt.probe_rows.{stage}"] = "int32", (num_probes,)
    count = graph_io.num_candidates(manifest.dimensions)
    found["entering.hidden_states"] = dtype, (1, num_probes, width)
    found["entering.rows"] = "int32", (num_probes,)
    found["likeliest.logits"] = "float32", (num_probes, count)
    found["likeliest.rows"] = dtype, (num_probes, count, width)
    return found


def read_by_host(manifest: Manifest, program: str, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Return what the host reads after ``program`` has run at ``sizes``, or writes in place of a select graph."""
    count, stages = graph_io.num_candidates(manifest.dimensions), manifest.schedule.stages
    logits: Array = ("float32", (1, manifest.dimensions.vocab_size))
    top = (1, count) if graph_io.is_shared(manifest.graph("head")) else (count,)
    if program == "decode":
        return {
            "logits.logits": logits,
            "top.top_logits": ("float32", top),
            "top.top_ids": ("int32", top),
        }
    if program == "vision":
        width, dtype = manifest.dimensions.hidden_size, manifest.dtype
        names = ["visual_tokens", *(f"deepstack_tokens.{plane}" for plane in range(manifest.num_deepstack))]
        return {f"vision.{name}": (dtype, (sizes["N"], width)) for name in names}
    if program == "reduce":
        width, dtype, keep = manifest.dimensions.hidden_size, manifest.dtype, manifest.token_keep or 0
        planes = [f"reduced_deepstack_tokens.{plane}" for plane in range(manifest.num_deepstack)]
        tokens: dict[str, Array] = {
            f"reduce.{name}": (dtype, (keep, width)) for name in ("reduced_tokens", *planes)
        }
        return {**tokens, "kept.reduce": ("int32", (keep,))}
    if program != "prefill":
        return {}
    found = {
        "results.logits": logits,
        "results.top_logits": ("float32", top),
        "results.top_ids": ("int32", top),
    }
    for index, stage in enumerate(stages):
        entering = sizes["N"] if index == 0 else stages[index - 1].keep
        found[f"results.kept_indices.{index}"] = "int32", (stage.keep,)
        found[f"results.scores.{index}"] = "float32", (entering,)
        found[f"results.unsettled.{index}"] = "int32", (1,)
        found[f"select_{index + 1}.{graph_io.KEPT_VISUAL_ROWS}"] = "int32", (stage.keep,)
        if manifest.schedule.budget == "image":
            found[f"select_{index + 1}.{graph_io.KEPT_VISUAL_IMAGES}"] = "int32", (stage.keep,)
    return found
