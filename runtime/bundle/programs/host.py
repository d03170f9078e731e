"""What the host sends to programs and reads from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from trio_edge.runtime.bundle import graph_io

if TYPE_CHECKING:
    from collections.abc import Mapping

    from trio_edge.runtime.bundle.manifest import Manifest

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
