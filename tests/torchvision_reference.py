"""Runs Hugging Face's default image and video processors, which need torchvision, and stores what they give.

    python -m tests.torchvision_reference FOLDER OUT.npz

A process of its own, because torchvision lies in a folder of its own (``make`` fills ``.venv/torchvision``): its
wheel on the package index is built for CUDA, and pip would replace the pinned CPU torch by the one it asks for.
To compare another processor, add an entry to ``PROCESSORS``; ``theirs(name, size)`` of the fixture
``torchvision_reference`` then returns every array of its output.
"""

from __future__ import annotations

import importlib
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from tests.pictures import PHOTOGRAPHS, noise_picture, photograph
from tests.video_reference import sampling_cases, video_arrays

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    from numpy.typing import NDArray

Size = tuple[int, int]

SIZES: tuple[Size, ...] = (
    (1, 1),
    (1, 7),
    (2, 3),
    (50, 3),
    (1, 400),
    (333, 77),
    (336, 336),
    (640, 480),
    (601, 673),
    (4000, 300),
)
LARGER_THAN_EXACT: Size = (2300, 1900)
"""More pixels than ``trio_edge.runtime.images.resizing.MAX_EXACT_PIXELS``."""
MODES = ("RGBA", "P", "LA", "I;16", "L", "CMYK")
MODES_SIZE: Size = (70, 90)


@dataclass(frozen=True, kw_only=True)
class Processor:
    """One configuration and the pictures it is run on."""

    config: dict[str, Any]
    """Contents of preprocessor_config.json; ``image_processor_type`` chooses the class."""
    sizes: tuple[Size, ...] = SIZES
    """(width, height) of the RGB pictures, in pixels."""
    modes: tuple[str, ...] = ()
    """Pillow modes of further pictures of ``MODES_SIZE``."""

    def pictures(self) -> Iterator[tuple[Size, str]]:
        """Yield size and mode of every picture."""
        yield from ((size, "RGB") for size in self.sizes)
        yield from ((MODES_SIZE, mode) for mode in self.modes)


_SQUARE = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
_CROP_56 = {"crop_size": {"height": 56, "width": 56}}
_INTERNVL = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "crop_to_patches": True,  # InternVLProcessor passes it whatever the file says
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


def _smolvlm(longest_edge: int, tile_size: int, **settings: Any) -> dict[str, Any]:
    sizes = {"size": {"longest_edge": longest_edge}, "max_image_size": {"longest_edge": tile_size}}
    return {
        "image_processor_type": "SmolVLMImageProcessor",
        **sizes,
        "return_row_col_info": True,
        **settings,
    }


def _pixtral(longest_edge: int, token_size: int, **settings: Any) -> dict[str, Any]:
    """Return a file with the sides of a token as the patch size, which PixtralProcessor passes whatever the file says."""
    sizes = {
        "size": {"longest_edge": longest_edge},
        "patch_size": {"height": token_size, "width": token_size},
    }
    return {"image_processor_type": "PixtralImageProcessor", **sizes, **settings}


def _lfm2(tile_size: int, patch_size: int, **settings: Any) -> dict[str, Any]:
    sizes = {"tile_size": tile_size, "encoder_patch_size": patch_size, "return_row_col_info": True}
    return {"image_processor_type": "Lfm2VlImageProcessor", **sizes, **settings}


def _minicpm(**settings: Any) -> dict[str, Any]:
    return {"image_processor_type": "MiniCPMV4_6ImageProcessor", **settings}


# where there is no AVX, torch repeats the first pixel of a column that is one pixel wide
_NO_COLUMN = tuple(size for size in SIZES if size != (1, 400))
_NAFLEX = tuple(size for size in _NO_COLUMN if max(size) < 12 * min(size))
"""Not the longest: the processor gives them more tokens than a tile has room for."""
PROCESSORS = {
    "LLaVA-NeXT": Processor(
        config={
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
            **_SQUARE,
        },
        sizes=(*SIZES, LARGER_THAN_EXACT),
    ),
    "LLaVA-1.5": Processor(config={"image_processor_type": "CLIPImageProcessor", **_SQUARE}, modes=MODES),
    "LLaVA-1.5 padded": Processor(
        config={"image_processor_type": "LlavaImageProcessor", "do_pad": True, **_SQUARE}
    ),
    "resized more than cropped": Processor(
        config={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 64},
            "resample": 2,
            **_CROP_56,
        }
    ),
    "tiles resized again": Processor(
        config={
            "image_processor_type": "LlavaNextImageProcessor",
            "image_grid_pinpoints": [[56, 112], [112, 112]],
            "size": {"shortest_edge": 64},
            **_CROP_56,
        }
    ),
    "cropped from smaller": Processor(
        config={"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 51}, **_CROP_56},
        sizes=tuple(
            size for size in SIZES if max(size) <= 20 * min(size)
        ),  # of others it builds a huge picture
    ),
    "not resized": Processor(
        config={"image_processor_type": "CLIPImageProcessor", "do_resize": False, **_CROP_56}
    ),
    "stretched, not cropped": Processor(
        config={
            "image_processor_type": "CLIPImageProcessor",
            "size": {"height": 56, "width": 56},
            "do_center_crop": False,
            **_CROP_56,
        }
    ),
    "not normalized": Processor(
        config={"image_processor_type": "CLIPImageProcessor", "do_normalize": False, **_SQUARE}
    ),
    "LLaVA-OneVision": Processor(
        config={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        },
        sizes=((601, 673), (50, 3)),
    ),
    "LLaVA-OneVision small": Processor(
        config={
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": [[58, 58], [58, 116], [116, 58], [116, 116], [174, 174]],
            "size": {"height": 58, "width": 58},
            "resample": 2,
        },
        sizes=_NO_COLUMN,
    ),
    "InternVL3": Processor(config={**_INTERNVL, "size": {"height": 448, "width": 448}}, sizes=((601, 673),)),
    "InternVL3 small": Processor(config={**_INTERNVL, "size": {"height": 56, "width": 56}}),
    "InternVL3 bilinear": Processor(
        config={
            **_INTERNVL,
            "size": {"height": 40, "width": 40},
            "min_patches": 2,
            "max_patches": 5,
            "resample": 2,
        }
    ),
    "Pixtral": Processor(config=_pixtral(1540, 28), sizes=((601, 673), (1700, 300))),
    "Pixtral small": Processor(config=_pixtral(52, 8), sizes=_NO_COLUMN[:2] + _NO_COLUMN[4:]),
    "Pixtral bilinear": Processor(
        config=_pixtral(45, 6, resample=2, image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.2, 0.1]),
        sizes=((601, 673), (333, 77)),
    ),
    "LFM2-VL": Processor(config=_lfm2(512, 16, use_thumbnail=False), sizes=((601, 673), (901, 700))),
    "LFM2-VL small": Processor(
        config=_lfm2(24, 4, min_image_tokens=4, max_image_tokens=12, max_tiles=7), sizes=_NAFLEX
    ),
    "LFM2-VL without tiles": Processor(
        config=_lfm2(24, 4, min_image_tokens=5, max_image_tokens=20, do_image_splitting=False, resample=3),
        sizes=_NAFLEX,
    ),
    "MiniCPM-V": Processor(config=_minicpm(), sizes=((601, 673), (1700, 300))),
    "MiniCPM-V small": Processor(config=_minicpm(scale_resolution=36, patch_size=3), sizes=_NAFLEX),
    "MiniCPM-V merged once": Processor(
        config=_minicpm(
            scale_resolution=40, patch_size=5, max_slice_nums=3, downsample_mode="4x", resample=2
        ),
        sizes=_NAFLEX,
    ),
    "MiniCPM-V without slices": Processor(
        config=_minicpm(scale_resolution=36, patch_size=3, slice_mode=False), sizes=_NAFLEX
    ),
    "SmolVLM2": Processor(config=_smolvlm(1536, 384), sizes=((601, 673),)),
    "SmolVLM2 small": Processor(config=_smolvlm(100, 20), sizes=_NO_COLUMN),
    "SmolVLM2 with a smaller last tile": Processor(config=_smolvlm(101, 34), sizes=_NO_COLUMN),
    "SmolVLM2 rounded up": Processor(config=_smolvlm(27, 27), sizes=_NO_COLUMN),
    "SmolVLM2 without tiles": Processor(config=_smolvlm(60, 27, do_image_splitting=False), sizes=_NO_COLUMN),
    "SmolVLM2 bicubic": Processor(
        config=_smolvlm(80, 30, resample=3, image_mean=[0.1, 0.2, 0.3], image_std=[0.3, 0.2, 0.1]),
        sizes=_NO_COLUMN,
    ),
}


PHOTOGRAPHED = (
    "LLaVA-NeXT",
    "LLaVA-1.5",
    "LLaVA-1.5 padded",
    "LLaVA-OneVision small",
    "InternVL3 small",
    "SmolVLM2 small",
)
"""Processors that run on ``PHOTOGRAPHS``, too."""


class TorchvisionReference:
    """Outputs of Hugging Face's default image processors, read from the file that this module writes."""

    def __init__(self, path: Path) -> None:
        self._arrays = np.load(path)

    def theirs(self, name: str, size: Size, *, mode: str = "RGB") -> dict[str, NDArray[Any]]:
        """Return the outputs of processor ``name`` for ``noise_picture(*size, mode=mode)``, by their names."""
        return self._below(_key(name, size, mode, ""))

    def of_photograph(self, name: str, photo: str) -> dict[str, NDArray[Any]]:
        """Return the outputs of one of ``PHOTOGRAPHED`` for a photograph, by their names."""
        return self._below(f"{name}/{photo}/")

    def constants(self, name: str) -> dict[str, Any]:
        """Return the loaded processor's ``to_dict()``."""
        constants: dict[str, Any] = json.loads(str(self._arrays[f"{name}/constants"]))
        return constants

    def video(self, name: str) -> dict[str, NDArray[Any]]:
        """Return what the processor gave for a case of ``VIDEO_CASES``, by name."""
        return self._below(f"videos/{name}/")

    def several(self, family: str, conversation: str) -> dict[str, NDArray[Any]]:
        """Return what a family's processor gave for a conversation of ``tests.several_images``, by name."""
        if (key := f"several/{family}/error") in self._arrays:
            raise AssertionError(str(self._arrays[key]))
        return self._below(f"several/{family}/{conversation}/")

    def _below(self, start: str) -> dict[str, NDArray[Any]]:
        return {
            key.removeprefix(start): self._arrays[key] for key in self._arrays.files if key.startswith(start)
        }

    def video_constants(self, config: str) -> dict[str, Any]:
        """Return the ``to_dict()`` of a video processor."""
        constants: dict[str, Any] = json.loads(str(self._arrays[f"videos/{config}/constants"]))
        return constants

    def samplings(self, config: str) -> list[tuple[tuple[int, float, dict[str, float]], list[int] | None]]:
        """Return each of ``sampling_cases`` with the frames that a video processor takes; None if it fails."""
        return list(zip(sampling_cases(), json.loads(str(self._arrays[f"videos/{config}/sampling"]))))


def load_processor(config: dict[str, Any]) -> Any:
    """Return the image processor that transformers chooses for this preprocessor_config.json."""
    from transformers import AutoImageProcessor

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(config))
        return AutoImageProcessor.from_pretrained(folder)


def import_torchvision(folder: Path) -> ModuleType:
    """Import torchvision from a folder that is on no path.

    A torchvision built for another torch cannot load its compiled operators, and then fails to describe two of
    them. Resizing, padding and normalizing use none, so it is enough to declare these two.
    """
    import torch

    sys.path.append(str(folder))
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::nms does not exist" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision = importlib.import_module("torchvision")
    torchvision.trio_edge_operators = library  # torch forgets the operators together with this object
    return torchvision


def _resize_alike_on_every_processor() -> None:
    """Let torchvision resize bilinearly in whole numbers, as it does wherever torch finds AVX2.

    Elsewhere it resizes in floating point, and rounds some values to a neighbouring level.
    """
    from torchvision.transforms.v2.functional import _geometry

    assert callable(_geometry._do_native_uint8_resize_on_cpu)
    _geometry._do_native_uint8_resize_on_cpu = lambda _: True


def main(folder: Path, out: Path) -> None:
    """Write the outputs of all ``PROCESSORS`` to ``out``."""
    import_torchvision(folder)
    _resize_alike_on_every_processor()
    arrays: dict[str, Any] = {}
    for name, processor in PROCESSORS.items():
        loaded = load_processor(processor.config)
        assert loaded.backend == "torchvision", f"{name}: {type(loaded)}"
        arrays[f"{name}/constants"] = json.dumps(loaded.to_dict())
        for size, mode in processor.pictures():
            outputs = loaded(noise_picture(*size, mode=mode), return_tensors="np")
            arrays |= {_key(name, size, mode, output): values for output, values in outputs.items()}
        for photo in PHOTOGRAPHS if name in PHOTOGRAPHED else ():
            with Image.open(photograph(photo)) as image:
                outputs = loaded(image, return_tensors="np")
            arrays |= {f"{name}/{photo}/{output}": values for output, values in outputs.items()}
    # It imports transformers, which looks for torchvision once.
    from tests.several_images import several_arrays

    np.savez(out, **arrays, **video_arrays(), **several_arrays())


def _key(name: str, size: Size, mode: str, output: str) -> str:
    return f"{name}/{size[0]}x{size[1]}/{mode}/{output}"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
