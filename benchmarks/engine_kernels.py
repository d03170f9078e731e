"""The kernels that TensorRT makes for a graph, read from the builder's log, without a GPU.

    python benchmarks/engine_kernels.py BUNDLE --graph prefix --compute-capability 86

Prints for each profile the kernels of the attention (from the product of queries and keys to that of probabilities and values),
of each RMS norm, and of each product with a weight. One kernel per pattern is the goal.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from parts.arguments import errors_in_one_line, parser_for
from parts.tables import markdown

from trio_edge.runtime.bundle.reader import Bundle, open_bundle
from trio_edge.runtime.engines.child import optimization_profile, set_flags
from trio_edge.runtime.engines.package import load_tensorrt
from trio_edge.runtime.engines.passes import Network, join_attention, separate_products

_PRODUCT = re.compile(r"node_linear(?:_\d+)?\.0")
_SCORES = re.compile(r"node_(?:matmul(?:_\d+)?|softmax|transpose_3)\.0")
_NORM = re.compile(r"node_(?:mean|rsqrt)(?:_\d+)?\.0")
WAITING = ("signal", "wait")
"""Layers that only order streams."""


class Kernel(NamedTuple):
    """One layer of an engine, as the builder lists it."""

    name: str
    kind: str
    """"kgen" is generated, "gemm" a product of the library, "runtime_fusion" a product with what follows."""
    nodes: frozenset[str]
    """Nodes of the ONNX graph that it computes."""


def kernels_of(
    bundle: Bundle, graph: str, *, compute_capability: int, join: bool = True
) -> dict[str, list[Kernel]]:
    """Return the kernels of each profile of a graph, by the profile's name, in the order in which they run."""
    lines = build_log(bundle, graph, compute_capability=compute_capability, join=join)
    kernels: dict[str, list[Kernel]] = defaultdict(list)
    profile_of: dict[
        str, int
    ] = {}  # empty profiles, such as those of other pieces, have no kernels and no group
    for line in lines:
        found = re.match(r"Name: (.*?_(myl\d+)_\d+), LayerType: (\w+),", line)
        if found:
            nodes = frozenset(re.findall(r"\[ONNX Layer: ([^\]]+)\]", line.partition("Metadata:")[2]))
            kernels[found[2]].append(Kernel(found[1], found[3], nodes))
            if number := re.search(r"\[profile (\d+)\]", line):
                profile_of[found[2]] = int(number[1])
    profiles = bundle.manifest.graph(graph).profiles
    return {profiles[profile_of.get(group, 0)].name: found for group, found in kernels.items()}


def build_log(bundle: Bundle, graph: str, *, compute_capability: int, join: bool) -> list[str]:
    """Return the detailed log of tensorrt-rtx while it builds a graph as ``trio-build`` does."""
    tensorrt, spec, lines = load_tensorrt("tensorrt-rtx"), bundle.manifest.graph(graph), list[str]()
    trt = tensorrt.module

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            lines.extend(message.splitlines())

    logger = Log()
    builder = trt.Builder(logger)
    definition = builder.create_network(0)
    parser = trt.OnnxParser(definition, logger)
    assert parser.parse_from_file(str(bundle.path(spec.file))), lines[-1]
    network = Network(tensorrt, definition)
    if join:
        join_attention(network)
    if len({profile.sizes.get("S", 0) for profile in spec.profiles}) > 1:
        separate_products(network)
    config = builder.create_builder_config()
    for profile in spec.profiles:
        config.add_optimization_profile(optimization_profile(builder, spec, profile))
    set_flags(config, trt, dtype=bundle.manifest.dtype)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{compute_capability}"), 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    assert builder.build_serialized_network(definition, config) is not None, lines[-1]
    return lines


def holding(kernels: list[Kernel], pattern: re.Pattern[str]) -> list[Kernel]:
    """Return the kernels that compute a node whose name matches ``pattern``."""
    return [kernel for kernel in kernels if any(pattern.fullmatch(node) for node in kernel.nodes)]


def summary(kernels: list[Kernel]) -> dict[str, str]:
    """Return one cell for each pattern of the graph's first decoder layer."""
    working = [kernel for kernel in kernels if kernel.kind not in WAITING]
    products = holding(working, _PRODUCT)
    # a kernel without a node before a product unpacks its weights, which are then read, written and read again
    unpacking = [kernel for kernel in working if re.match(r"__myl_CastMul(Cast)?_myl", kernel.name)]
    return {
        "attention": _count(holding(working, _SCORES)),
        "norms": _count(holding(working, _NORM)),
        "products": _count(products) + (f", {len(unpacking)} unpack weights first" if unpacking else ""),
        "all": str(len(working)),
    }


def _count(kernels: list[Kernel]) -> str:
    kinds = {
        re.sub(r"_myl\d+_\d+$", "", kernel.name)[:24] if "mha" in kernel.name else kernel.kind
        for kernel in kernels
    }
    return f"{len(kernels)} ({', '.join(sorted(kinds))})"


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "--graph", default="prefix", help="graph to build; one with a single decoder layer is easiest to read"
    )
    parser.add_argument("--compute-capability", type=int, default=86)
    parser.add_argument("--list", action="store_true", help="also list every kernel with its nodes")
    parser.add_argument("--as-exported", action="store_true", help="do not join attention, for comparison")
    options = parser.parse_args()
    with errors_in_one_line(parser):
        run(options)


def run(options: argparse.Namespace) -> None:
    bundle = open_bundle(options.bundle)
    found = kernels_of(
        bundle, options.graph, compute_capability=options.compute_capability, join=not options.as_exported
    )
    rows = {profile: summary(kernels) for profile, kernels in found.items()}
    heads = ["profile", *next(iter(rows.values()))]
    print(markdown(heads, [(profile, *cells.values()) for profile, cells in rows.items()]))
    for profile, kernels in found.items() if options.list else ():
        print(f"\n{profile}")
        for kernel in kernels:
            print(f"  {kernel.kind:14} {kernel.name[:60]:60} {' '.join(sorted(kernel.nodes))}")


if __name__ == "__main__":
    main()
