"""The format "trio" of ``transformers.exporters``, known once this module is imported. It writes what ``trio-export`` writes.

    from transformers.exporters import AutoHfExporter
    from trio_edge.export.transformers_exporter import TrioConfig

    config = TrioConfig(options=["--keep", "11.1%"])
    exported = AutoHfExporter.from_config(config).export_for_generation(model, {}, config)
    exported.save_pretrained("exported")  # a new folder; the bundle is exported/model

A bundle has tokenizer and processor besides the weights, so the model must come from a folder or the hub. It is read again
from there.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.exporters.auto import register_backend
from transformers.exporters.base import ExportedModel, HfExporter
from transformers.exporters.configs import ExportConfigMixin
from transformers.exporters.metadata import ExportMetadata

from trio_edge.export.bundle import export_bundle
from trio_edge.export.cli import options_from
from trio_edge.runtime.bundle.errors import CheckpointError
from trio_edge.runtime.bundle.reader import open_bundle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel

FORMAT = "trio"


@dataclass
class TrioConfig(ExportConfigMixin):  # type: ignore[misc]  # of a package without types
    """The options of ``trio-export``, as on its command line, without MODEL and ``--out``."""

    export_format: str = FORMAT
    options: list[str] = field(default_factory=list)


class ExportedBundle:
    """The folder of a bundle; a new one is deleted together with this object."""

    def __init__(self, path: Path, *, temporary: Path | None = None) -> None:
        self.path = path
        if temporary is not None:
            weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)


class TrioExporter(HfExporter):  # type: ignore[misc]
    """Exports a whole vision-language model into one bundle, a folder."""

    export_format = FORMAT
    config_class = TrioConfig
    program_suffix = ".trio"

    def export_program(
        self, model: PreTrainedModel, sample_inputs: Mapping[str, Any], config: TrioConfig
    ) -> tuple[ExportedBundle, ExportMetadata]:
        """Return a new bundle, and what was exported.

        The options say all shapes, so ``sample_inputs`` are not read.

        Raises:
            CheckpointError: If the model's files are unknown, or have other weights than ``model``.
            TrioEdgeError: As ``trio-export``.
        """
        options = options_from(_source_of(model), config.options)
        folder = Path(tempfile.mkdtemp(prefix="trio-export-"))
        bundle = ExportedBundle(folder / "model", temporary=folder)
        export_bundle(dataclasses.replace(options, out=bundle.path))
        dtype = str(model.dtype).removeprefix("torch.")
        return bundle, ExportMetadata(architecture=type(model).__name__, export_dtype=dtype)

    def export_for_generation(
        self, model: PreTrainedModel, sample_inputs: Any, config: Any, **_unused: Any
    ) -> ExportedModel:
        """Return the bundle as the only component: its graphs are more than the stages of a generation."""
        return cast("ExportedModel", self.export(model, sample_inputs, config))

    @classmethod
    def save_program(cls, program: ExportedBundle, path: str | Path) -> None:
        """Copy a bundle to the folder with the name of ``path``, which becomes a file, as transformers looks for one."""
        folder = Path(path).with_suffix("")
        shutil.copytree(program.path, folder)
        Path(path).write_text(f"{folder.name}\n", encoding="utf-8")

    @classmethod
    def load_program(cls, path: str | Path) -> ExportedBundle:
        """Return a bundle after a look at its manifest; raise BundleError if it is broken."""
        return ExportedBundle(open_bundle(Path(path).with_suffix("")).folder)


def _source_of(model: PreTrainedModel) -> str:
    """Return the folder or the Hub id that a model was loaded from; raise CheckpointError if it is another model now."""
    source, way_out = str(model.name_or_path), "save it with its processor, and load it from there"
    if not source:
        raise CheckpointError(
            f"{type(model).__name__}: expected a model from a folder or the hub, got one made in memory; {way_out}"
        )
    stored = type(model).from_pretrained(source, dtype=model.dtype, local_files_only=True).state_dict()
    for name, tensor in model.state_dict().items():
        if name not in stored or not torch.equal(tensor.cpu(), stored[name]):
            raise CheckpointError(f"{source}: expected the model's weights, got others in {name}; {way_out}")
    return source


register_backend(TrioExporter)
