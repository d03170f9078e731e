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

from trio_edge.runtime.bundle.limits import Extent, Layer, Name, Symbol

if TYPE_CHECKING:
    from collections.abc import Mapping

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
