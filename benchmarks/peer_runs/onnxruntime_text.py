"""One answer by onnxruntime-genai's text decoder, to a prompt as long as the other runtimes' with their image."""

import json
import sys

from clock import Clock

clock = Clock()

import numpy as np  # noqa: E402
import onnxruntime_genai  # noqa: E402

request = json.loads(sys.argv[1])
config = onnxruntime_genai.Config(request["model"])
config.overlay(
    json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": request["threads"]}}}})
)
model = onnxruntime_genai.Model(config)
clock.mark()
tokens = np.arange(1000, 1000 + request["prompt_tokens"], dtype=np.int32)  # times do not depend on them
length = len(tokens) + request["new_tokens"]
parameters = onnxruntime_genai.GeneratorParams(model)
parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
generator = onnxruntime_genai.Generator(model, parameters)
generator.append_tokens(tokens)
for _ in range(request["new_tokens"]):
    generator.generate_next_token()
    clock.mark()
clock.report("onnxruntime-genai", "onnxruntime", prompt_tokens=len(tokens))
