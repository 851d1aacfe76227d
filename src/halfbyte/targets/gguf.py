"""GGUF files for llama.cpp: activations have 8 bits there whatever the plan says, so its weights get types too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from halfbyte.models.layers import Layer
from halfbyte.options import ExportOptions, SearchOptions
from halfbyte.prepare.recipe import Recipe
from halfbyte.targets import Target, check_groups
from halfbyte.targets.gguf_files.export import ExportResult, export_gguf
from halfbyte.targets.gguf_files.writer import check_exportable

if TYPE_CHECKING:
    from halfbyte.models.loading import SourceModel


class GGUF(Target):
    """llama.cpp on CPU, CUDA, Metal."""

    name = "gguf"
    recipe: ClassVar = Recipe(scale_bits=8)
    menus = ("activations", "types")

    def check_model(
        self, source: SourceModel, layers: Sequence[Layer], options: SearchOptions, group_sizes: Mapping[str, int]
    ) -> None:
        check_exportable(source)
        check_groups(layers, options.group_size, group_sizes, who="Q4_0 blocks need")

    def export(self, options: ExportOptions) -> ExportResult:
        return export_gguf(options)


TARGET = GGUF()
