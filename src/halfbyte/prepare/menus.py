"""Which ggml types each matrix of a model may have, decided before anything is measured."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied, linear
from halfbyte.quant.ggml.types import bits_per_weight, fits, row_bytes

OUTSIDE = -1  # block of the embedding and the head

# Types with even grids, whose codes can be chosen with feedback, and which run fast everywhere. The first row is for
# rows of whole 256-blocks; where two types need the same bits, the one with less error at that size.
LARGE = ("Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
SMALL_BLOCKS = ("IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
# Below LOW_BITS also types that are slow to encode and on CPUs slow to run.
LOW = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S")
LOW_BITS = 4.0
NEAR = (0.6, 2.0)  # of the mean: smaller or larger types are left out


@dataclass(frozen=True)
class TensorMenu:
    """A matrix of the model and what it may become.

    Attributes:
        name: module path, e.g. ``model.layers.3.mlp.down_proj`` or ``model.embed_tokens``.
        block: index of its block, or ``OUTSIDE``.
        rows, columns: the weight is ``[rows, columns]``.
        types: ggml types by rising size.
    """

    name: str
    block: int
    rows: int
    columns: int
    types: tuple[str, ...]

    def nbytes(self, type_name: str) -> int:
        """Encoded size."""
        return self.rows * row_bytes(self.columns, type_name, where=self.name)


def menus_of(source: SourceModel, mean_bits: float, types: tuple[str, ...] = ()) -> list[TensorMenu]:
    """The matrices in the order of the model, embedding first and an untied head last.

    Args:
        mean_bits: bits per weight that the file has room for; types far from it are left out.
        types: offer these instead.

    Raises:
        HalfbyteError: a matrix cannot hold any of the types.
    """
    family, model = source.family, source.model
    places = [(family.embedding, OUTSIDE)]
    for block in range(source.config.num_hidden_layers):
        places += [(f"{family.blocks}.{block}.{part}", block) for part in family.linears]
    if not is_tied(model, family):
        places.append((family.head, OUTSIDE))
    found = []
    for name, block in places:
        rows, columns = linear(model, name).weight.shape
        found.append(TensorMenu(name, block, rows, columns, _types(columns, mean_bits, types, where=name)))
    return found


def _types(columns: int, mean_bits: float, asked: tuple[str, ...], *, where: str) -> tuple[str, ...]:
    offered = asked or LARGE + SMALL_BLOCKS + (LOW if mean_bits < LOW_BITS else ())
    legal = [name for name in offered if fits(columns, name)]
    if not asked and any(fits(columns, name) for name in LARGE[:-1]):
        legal = [name for name in legal if name not in SMALL_BLOCKS[:-1]]
    if not asked:
        low, high = (share * mean_bits for share in NEAR)
        near = [name for name in legal if low <= bits_per_weight(name) <= high]
        legal = near or legal or ["F16"]
    if not legal:
        raise HalfbyteError(
            f"{where}: no type fits, expected a row of whole blocks, got {columns} columns",
            fix="offer Q8_0, Q5_0, IQ4_NL or F16 too",
        )
    return tuple(sorted(dict.fromkeys(legal), key=bits_per_weight))
