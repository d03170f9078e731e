"""The original model: Hugging Face's own generate, on the CPU in float32."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers.image_transforms import convert_to_rgb

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from PIL import Image

lays_over_white = pytest.mark.skipif(
    "return_numpy" not in inspect.signature(convert_to_rgb).parameters,
    reason="needs transformers 5.23, whose processors lay transparent images over white as the runtime does;"
    " Python 3.10 has no such release; runs on 3.11 and later",
)
"""For tests that compare with those processors."""
merges_smolvlm = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="needs transformers 5.23: before, SmolVLM took a tile to have a multiple of patch_size tokens; Python 3.10 has no"
    " such release; runs on 3.11 and later",
)
"""For tests that run that model on any number of tiles."""


@dataclass
class Original:
    """A checkpoint loaded by transformers."""

    model: Any
    processor: Any

    @classmethod
    def load(cls, folder: Path) -> Original:
        """Load model and processor as a user would."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        return cls(model, AutoProcessor.from_pretrained(folder))

    def render(self, prompt: str, *, has_image: bool = True) -> str:
        """Return the prompt text of one question, by the processor's own chat template."""
        content: list[dict[str, str]] = [{"type": "image"}] if has_image else []
        content.append({"type": "text", "text": prompt})
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        return text

    def generate(
        self,
        picture: Image.Image | None,
        text: str,
        *,
        num_tokens: int,
        pixel_values: NDArray[np.float32] | None = None,
    ) -> tuple[list[int], NDArray[np.float32]]:
        """Return the greedy tokens and the logits [steps, V] that gave them.

        Args:
            picture: The picture, or None.
            text: The rendered prompt.
            num_tokens: Steps.
            pixel_values: [B, 3, T, T] to use instead of the processor's own: torchvision and Pillow round
                differently by up to one grey level, which has tests of its own.
        """
        images: dict[str, Any] = {} if picture is None else {"images": picture}
        inputs = self.processor(text=text, return_tensors="pt", **images)
        if pixel_values is not None:
            inputs["pixel_values"] = torch.from_numpy(pixel_values).reshape(inputs["pixel_values"].shape)
        with torch.no_grad():
            output = self.model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=num_tokens,
                return_dict_in_generate=True,
                output_logits=True,
                use_cache=True,
            )
        tokens = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        return tokens, torch.stack(output.logits)[:, 0].numpy()
