"""One pipeline in several threads, after it was closed, in a forked process; and several processes on one bundle."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.pictures import random_picture
from trio_edge.runtime.bundle.errors import BackendError, ShapeError
from trio_edge.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    from pathlib import Path

IMAGE = random_picture(48, 48)
_ASK = """
import sys
from PIL import Image
from trio_edge.runtime.pipeline import Pipeline
with Pipeline.from_bundle(sys.argv[1], backend="onnxruntime", threads=1) as pipeline:
    answer = pipeline.generate(Image.open(sys.argv[2]), "w1 w2 w3", max_new_tokens=8)
    assert isinstance(answer.text, str)
    print(answer.token_ids)
"""


def _tokens(pipeline: Pipeline, prompt: str) -> list[int]:
    answer = pipeline.generate(IMAGE, prompt, max_new_tokens=8)
    assert isinstance(answer.text, str)
    return answer.token_ids


def test_threads_get_the_right_answers_or_are_told_that_another_was_started(reduced_bundle: Path) -> None:
    prompts = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]
    with Pipeline.from_bundle(reduced_bundle, backend="onnxruntime", threads=1) as pipeline:
        expected = {prompt: _tokens(pipeline, prompt) for prompt in prompts}
        wrong: list[object] = []
        answered = []

        def ask(prompt: str) -> None:
            for _ in range(15):
                try:
                    tokens = _tokens(pipeline, prompt)
                except ShapeError as error:
                    if "one answer at a time" not in str(error):
                        wrong.append(error)
                except Exception as error:
                    wrong.append(error)
                else:
                    answered.append(prompt)
                    if tokens != expected[prompt]:
                        wrong.append((prompt, tokens))

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        assert answered


def test_a_closed_pipeline_says_so_to_every_thread(reduced_bundle: Path) -> None:
    pipeline = Pipeline.from_bundle(reduced_bundle, backend="onnxruntime", threads=1)
    started = iter(pipeline.generate(IMAGE, "w1 w2", max_new_tokens=8))
    next(started, None)
    closing = threading.Thread(target=pipeline.close)
    closing.start()
    closing.join()
    with pytest.raises(BackendError, match="expected an open one, got a closed one"):
        pipeline.generate(IMAGE, "w1")
    with pytest.raises(BackendError, match="expected an open one, got a closed one"):
        list(started)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork; runs on Linux")
def test_a_forked_process_is_told_to_load_the_bundle_itself(reduced_bundle: Path) -> None:
    # In a process of its own: forking one that runs tests would copy their threads' locks.
    code = (
        "import os, sys, warnings; warnings.simplefilter('ignore')\n"
        "from trio_edge.runtime.pipeline import Pipeline\n"
        "pipeline = Pipeline.from_bundle(sys.argv[1], backend='onnxruntime', threads=2)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    try: pipeline.generate(None, 'w1').text\n"
        "    except Exception as error: print(type(error).__name__, error, flush=True)\n"
        "    os._exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print('parent', pipeline.generate(None, 'w1', max_new_tokens=2).text is not None)\n"
    )
    command = [sys.executable, "-c", code, str(reduced_bundle)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    child, parent = result.stdout.strip().splitlines()
    assert child.startswith("BackendError pipeline: expected the process that loaded it, got a fork of it")
    assert parent == "parent True"


def test_four_processes_on_one_bundle_give_the_same_answer(reduced_bundle: Path, tmp_path: Path) -> None:
    IMAGE.save(tmp_path / "image.png")
    command = [sys.executable, "-c", _ASK, str(reduced_bundle), str(tmp_path / "image.png")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = {process.communicate(timeout=120)[0] for process in processes}
    with Pipeline.from_bundle(reduced_bundle, backend="onnxruntime", threads=1) as pipeline:
        assert answers == {f"{_tokens(pipeline, 'w1 w2 w3')}\n"}
