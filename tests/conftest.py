"""Shared fixtures: one random small checkpoint, its bundles, and what Hugging Face's processors give."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings

from tests.shared_folder import create_shared_folder, made_once, remove_shared_folder
from tests.torchvision_reference import TorchvisionReference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trio_edge.runtime.bundle.schedule import Schedule

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the Hub

# The same examples on every run and every machine; HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

ROOT = Path(__file__).parents[1]
TORCHVISION_FOLDER = Path(sys.prefix) / "torchvision"
REDUCED_STAGES = ((1, 14), (2, 6))


def pytest_configure() -> None:
    if not _is_worker():
        create_shared_folder()


def pytest_unconfigure() -> None:
    if not _is_worker():
        remove_shared_folder()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Let every test draw the same random numbers, whichever tests ran before it."""
    import torch

    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 -- some libraries still draw from it


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Shuffle the tests if TRIO_EDGE_TEST_ORDER, a number, asks for it; all processes in the same way."""
    if seed := os.environ.get("TRIO_EDGE_TEST_ORDER"):
        random.Random(seed).shuffle(items)


def _is_worker() -> bool:
    return "PYTEST_XDIST_WORKER" in os.environ


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """There are as many processes as cores; TRIO_EDGE_TEST_THREADS says otherwise."""
    import onnxruntime
    import torch

    num_threads = int(os.environ.get("TRIO_EDGE_TEST_THREADS", "1"))
    torch.set_num_threads(num_threads)
    create = onnxruntime.InferenceSession.__init__

    def with_one_thread(
        self: Any, graph: Any, sess_options: Any = None, *others: Any, **settings: Any
    ) -> None:
        options = sess_options or onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.intra_op_num_threads or num_threads
        create(self, graph, options, *others, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime.InferenceSession, "__init__", with_one_thread)
        yield


@pytest.fixture(autouse=True, scope="session")
def _faster_tracing() -> Iterator[None]:
    """Tracing takes half the time of all tests. This spares what it does again for each graph, and changes no graph."""
    gc.collect()
    gc.freeze()  # modules that stay: each full collection would visit them, and tracing causes many
    with pytest.MonkeyPatch.context() as patch:
        # torch lists ONNX functions and operators anew for each graph, 0.5 s. What is patched is private to torch and
        # onnxscript; where it is not there, tests take longer.
        with contextlib.suppress(ImportError, AttributeError):
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            read_once = functools.cache(ONNXRegistry.from_torchlib)
            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(read_once))
        with contextlib.suppress(ImportError, AttributeError):
            from torch._export import utils

            patch.setattr(utils, "_materialize_cpp_cia_ops", functools.cache(utils._materialize_cpp_cia_ops))
        for spare in (
            _compare_operators_before_patterns,
            _read_signatures_once,
            _promote_types_without_running,
            _leave_out_what_no_graph_holds,
        ):
            with contextlib.suppress(ImportError, AttributeError):
                spare(patch)
        yield
    gc.unfreeze()


def _compare_operators_before_patterns(patch: pytest.MonkeyPatch) -> None:
    """Let onnxscript leave a rule for another operator at once; it tries 80 rules on each node, most of them in vain."""
    from onnxscript.rewriter._matcher import SimplePatternMatcher
    from onnxscript.rewriter._rewrite_rule import RewriteRule

    rewrite, operators = RewriteRule.try_rewrite, dict[int, tuple[Any, Any]]()

    def operator_of(rule: Any) -> Any:
        """Return the operator that a rule is for; None for any."""
        if type(rule._matcher) is not SimplePatternMatcher:
            return None
        return rule._matcher.pattern.output_nodes[0].op_identifier()

    def rewrite_same_operator(self: Any, model: Any, graph: Any, node: Any, **settings: Any) -> Any:
        _, wanted = operators.get(id(self)) or operators.setdefault(id(self), (self, operator_of(self)))
        if wanted is not None and wanted != node.op_identifier():
            return None
        return rewrite(self, model, graph, node, **settings)

    patch.setattr(RewriteRule, "try_rewrite", rewrite_same_operator)


def _read_signatures_once(patch: pytest.MonkeyPatch) -> None:
    """Let onnx_ir make the signature of an operator once, and not for each node."""
    from onnx_ir.schemas import OpSignature

    make, made = OpSignature.from_op_schema, dict[tuple[str, str, int], OpSignature]()

    def made_once(schema: Any) -> OpSignature:
        key = schema.domain, schema.name, schema.since_version
        return made.get(key) or made.setdefault(key, make(schema))

    patch.setattr(OpSignature, "from_op_schema", staticmethod(made_once))


def _promote_types_without_running(patch: pytest.MonkeyPatch) -> None:
    """Let torch look at the types that a capture has noted, where it runs the whole graph once more to find them."""
    from torch.fx import Interpreter, Node
    from torch.onnx._internal.fx.passes import type_promotion

    rule_of = type_promotion.get_type_promotion_rule

    def promote(self: Any, node: Node) -> Any:
        with self._set_current_node(node):
            if rule := rule_of(node, self.type_promotion_table):
                self._maybe_promote_node(node, rule)
        known = node.op == "call_function" and "val" in node.meta
        return node.meta["val"] if known else Interpreter.run_node(self, node)

    patch.setattr(type_promotion._TypePromotionInterpreter, "run_node", promote)


def _leave_out_what_no_graph_holds(patch: pytest.MonkeyPatch) -> None:
    """Let torch write no code of graphs that only ONNX is made of, note no lines of source, and check no cache."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx import _lazy_graph_module, config

    patch.setattr(_lazy_graph_module, "_use_lazy_graph_module_flag", True)
    patch.setattr(config, "do_not_emit_stack_traces", True)
    describe = FakeTensorMode._get_output_info_for_cache_entry

    def describe_only(self: Any, state: Any, key: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        self._output_from_cache_entry = lambda *_: (
            output
        )  # torch makes a second tensor to compare with this one
        try:
            return describe(self, state, key, func, args, kwargs, output)
        finally:
            del self._output_from_cache_entry

    patch.setattr(FakeTensorMode, "_get_output_info_for_cache_entry", describe_only)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA-NeXT with 3 decoder layers and grouped-query attention."""
    from tests.checkpoints import save_checkpoint

    return save_checkpoint(
        tmp_path_factory.mktemp("shared") / "checkpoint", num_layers=3, num_kv_heads=2, seed=5
    )


@pytest.fixture(scope="session")
def keep_all_bundle(checkpoint: Path) -> Path:
    """The checkpoint without reduction. No test may change it."""
    from tests.bundles import export

    return export(checkpoint)


@pytest.fixture(scope="session")
def reduced_bundle(checkpoint: Path) -> Path:
    """The checkpoint with two stages. No test may change it."""
    from tests.bundles import export

    return export(checkpoint, schedule=_two_stages())


@pytest.fixture(scope="session")
def int8_cache_bundle(checkpoint: Path) -> Path:
    """The checkpoint with two stages and INT8 KV caches. No test may change it."""
    from tests.bundles import INT8_CACHES, export
    from trio_edge.export.quantize.plan import parse_plan

    plan = parse_plan("kv=int8")
    return export(checkpoint, schedule=_two_stages(), scales=INT8_CACHES, quantize=plan)


def _two_stages() -> Schedule:
    from trio_edge.runtime.bundle.schedule import Schedule, Stage

    return Schedule(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in REDUCED_STAGES))


@pytest.fixture(scope="session")
def torchvision_reference() -> TorchvisionReference:
    """Outputs of Hugging Face's default image processors, from a process that has torchvision."""
    if not TORCHVISION_FOLDER.is_dir():
        pytest.skip(f"needs torchvision in {TORCHVISION_FOLDER}, where `make test` puts it; runs in CI")
    command = [sys.executable, "-m", "tests.torchvision_reference", str(TORCHVISION_FOLDER)]
    path = made_once(
        "torchvision_reference.npz", lambda out: subprocess.run([*command, str(out)], check=True, cwd=ROOT)
    )
    return TorchvisionReference(path)
