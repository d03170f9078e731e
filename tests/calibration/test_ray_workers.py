"""A Ray cluster of two local nodes answers as one process does. Needs the extra ``ray``, which CI does not install."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.calibration.question_files import questions_about, write_questions
from trio_edge.calibration.evaluate import cli as cli_eval

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

ray = pytest.importorskip("ray", reason='needs pip install "trio-edge[ray]"')
TIMES = ("ttft_ms", "decode_ms")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.mark.filterwarnings("ignore")  # ray's own, of subprocesses and sockets left to it
def test_two_nodes_give_what_one_process_gives(
    cluster: Any, reduced_bundle: Path, keep_all_bundle: Path, tmp_path: Path
) -> None:
    questions, out = write_questions(tmp_path, questions_about(24)), tmp_path / "report.json"
    arguments = [
        str(reduced_bundle),
        "--reference",
        str(keep_all_bundle),
        "--data",
        str(questions),
        "--quiet",
    ]

    def outcomes(*more: str) -> list[Any]:
        assert cli_eval.main([*arguments, "--json", str(out), *more]) == 0
        runs = json.loads(out.read_text())["runs"]
        return [[{k: v for k, v in o.items() if k not in TIMES} for o in run["outcomes"]] for run in runs]

    assert outcomes("--ray", cluster.address, "--workers", "2") == outcomes()


@pytest.mark.filterwarnings("ignore")
def test_no_cluster_is_one_line(reduced_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli_eval.main([str(reduced_bundle), "--count", "2", "--ray", "127.0.0.1:1", "--quiet"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "expected a running Ray cluster" in error
