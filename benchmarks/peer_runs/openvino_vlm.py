"""One answer by OpenVINO GenAI's VLMPipeline. Argument: a JSON object, see ``measure`` in ``benchmarks/peers.py``."""

import json
import sys

from clock import Clock

clock = Clock()

import numpy as np  # noqa: E402
import openvino_genai  # noqa: E402
from openvino import Tensor  # noqa: E402
from PIL import Image  # noqa: E402

request = json.loads(sys.argv[1])
pipeline = openvino_genai.VLMPipeline(request["model"], "CPU", INFERENCE_NUM_THREADS=request["threads"])
clock.mark()


class Marks(openvino_genai.StreamerBase):
    """Notes the time of every token."""

    def write(self, tokens: int | list[int]) -> openvino_genai.StreamingStatus:
        for _ in [tokens] if isinstance(tokens, int) else tokens:
            clock.mark()
        return openvino_genai.StreamingStatus.RUNNING

    def end(self) -> None:
        pass


config = openvino_genai.GenerationConfig(
    max_new_tokens=request["new_tokens"], ignore_eos=True, do_sample=False
)
if request["prune_percent"]:
    config.pruning_ratio = request["prune_percent"]
image = Tensor(np.asarray(Image.open(request["image"]).convert("RGB")))
result = pipeline.generate(request["question"], images=[image], generation_config=config, streamer=Marks())
clock.report("openvino", "openvino-genai", prompt_tokens=result.perf_metrics.get_num_input_tokens())
