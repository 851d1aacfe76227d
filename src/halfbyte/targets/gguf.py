"""GGUF files for llama.cpp: activations have 8 bits there whatever the plan says, so its weights get types too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from halfbyte.models.layers import Layer
from halfbyte.options import SearchOptions
from halfbyte.plan import Plan
from halfbyte.prepare.recipe import Recipe
from halfbyte.targets import Target, check_groups

if TYPE_CHECKING:
    from halfbyte.models.loading import SourceModel


class GGUF(Target):
    """llama.cpp on CPU, CUDA, Metal."""

    name = "gguf"
    about = "a GGUF file for llama.cpp"
    recipe: ClassVar = Recipe(scale_bits=8)
    menus = ("activations", "types")

    def check_model(
        self, source: SourceModel, layers: Sequence[Layer], options: SearchOptions, group_sizes: Mapping[str, int]
    ) -> None:
        from halfbyte.targets.gguf_files.writer import check_exportable

        check_exportable(source)
        check_groups(layers, options.group_size, group_sizes, who="Q4_0 blocks need")

    def write(self, plan: Plan, options: Any) -> Any:
        from halfbyte.targets.gguf_files.export import export_gguf

        return export_gguf(options)


TARGET = GGUF()
