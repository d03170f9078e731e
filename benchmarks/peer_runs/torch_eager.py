"""One answer by transformers' own model in torch, float32. Argument: a JSON object, see ``measure`` in ``benchmarks/peers.py``."""

import json
import sys

from clock import Clock

clock = Clock()

import torch  # noqa: E402
import transformers as hf  # noqa: E402
from PIL import Image  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402

request = json.loads(sys.argv[1])
torch.set_num_threads(request["threads"])
model = hf.Qwen2_5_VLForConditionalGeneration.from_pretrained(request["model"], dtype=torch.float32)
tokenizer = hf.AutoTokenizer.from_pretrained(request["model"])
images = hf.AutoImageProcessor.from_pretrained(request["model"], backend="pil")
clock.mark()


class Marks(BaseStreamer):
    """Notes the time of every token. The first call brings the prompt."""

    def __init__(self) -> None:
        self.has_prompt = False

    def put(self, _: torch.Tensor) -> None:
        if self.has_prompt:
            clock.mark()
        self.has_prompt = True

    def end(self) -> None:
        pass


patches = images(images=[Image.open(request["image"]).convert("RGB")], return_tensors="pt")
num_visual = int(patches["image_grid_thw"].prod()) // 4
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": request["question"]}]}]
text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
text = text.replace("<|image_pad|>", num_visual * "<|image_pad|>")
ids = tokenizer(text, return_tensors="pt").input_ids
with torch.inference_mode():
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == 151655).int(),
        max_new_tokens=request["new_tokens"], min_new_tokens=request["new_tokens"], do_sample=False,
        streamer=Marks(), **patches,
    )  # fmt: skip
clock.report("torch", "transformers", prompt_tokens=ids.shape[1])
