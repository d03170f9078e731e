"""One answer by trio-edge's runtime. Argument: a JSON object, see ``measure`` in ``benchmarks/peers.py``."""

import json
import sys

from clock import Clock

clock = Clock()

from trio_edge.runtime.pipeline import Pipeline  # noqa: E402

request = json.loads(sys.argv[1])
with Pipeline.from_bundle(request["model"], backend="onnxruntime", threads=request["threads"]) as pipeline:
    clock.mark()
    answer = pipeline.generate(request["image"], request["question"], max_new_tokens=request["new_tokens"])
    for _ in answer:
        clock.mark()
statistics = answer.statistics
clock.report("onnxruntime", "numpy", prompt_tokens=statistics.visual_tokens + statistics.text_tokens)
