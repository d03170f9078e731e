"""Visual token reduction inside the decoder, as ONNX and TensorRT graphs. contributing/architecture.md has the tree."""

from importlib.metadata import version
from pathlib import Path

__version__ = version("trio-edge")

# In a checkout the packages stand next to this folder. setuptools' editable install cannot map trio/, which has no
# __init__.py (setuptools 83); a wheel has all of them in this folder.
if (Path(__file__).parents[1] / "pyproject.toml").is_file():
    __path__.append(str(Path(__file__).parents[1]))
