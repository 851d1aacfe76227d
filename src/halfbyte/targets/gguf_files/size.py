"""How large a GGUF file may be, and what that leaves for its matrices."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from halfbyte.arguments import parse_size
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import is_tied
from halfbyte.prepare.candidates import TensorMenu
from halfbyte.quant.ggml.ftypes import FILE_TYPES, Shape, tensor_type
from halfbyte.targets.gguf_files.writer import header_bytes

ALIGNMENT = 32  # of a tensor's data in the file
FLOATS = ("F16", "BF16")  # file types that quantise nothing
METADATA = 2048  # for what the export says about itself


def around(source: SourceModel, menus: Sequence[TensorMenu]) -> int:
    """Bytes of the file that are not in one of the matrices: header, tokenizer, norms, biases, padding at most."""
    matrices = {f"{menu.name}.weight" for menu in menus}
    others = [value for name, value in source.model.named_parameters() if name not in matrices]
    count = len(menus) + len(others)
    return header_bytes(source) + METADATA + sum(4 * prod(value.shape) for value in others) + ALIGNMENT * (count + 1)


def ftype_types(source: SourceModel, menus: Sequence[TensorMenu], ftype: str) -> dict[str, str]:
    """Matrix -> the type it has in llama.cpp's ``ftype`` with an importance matrix."""
    config, family = source.config, source.family
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    tied = is_tied(source.model, family)
    shape = Shape(family.gguf_arch, config.num_hidden_layers, heads, kv_heads, tied, has_imatrix=True)
    names = {menu.name: family.gguf_name(f"{menu.name}.weight") for menu in menus}
    return {menu.name: tensor_type(ftype, names[menu.name], menu.columns, shape)[1].name for menu in menus}


def ftype_within(source: SourceModel, menus: Sequence[TensorMenu], budget_bytes: int) -> str:
    """llama.cpp's largest quantised file type that fits, else its smallest.

    Args:
        budget_bytes: bytes that the matrices may take, with what the export says about itself on top.
    """
    sizes = {
        name: sum(menu.nbytes(kinds[menu.name]) for menu in menus)
        for name, kinds in ((name, ftype_types(source, menus, name)) for name in FILE_TYPES if name not in FLOATS)
    }
    fitting = {name: size for name, size in sizes.items() if size <= budget_bytes + METADATA}
    return max(fitting, key=fitting.__getitem__) if fitting else min(sizes, key=sizes.__getitem__)


def budget_bytes_of(source: SourceModel, menus: Sequence[TensorMenu], *, size: str, bpw: float, ftype: str) -> int:
    """Bytes that the matrices may take together.

    Args:
        size: of the whole file, such as ``4.36GiB``; empty: not said.
        bpw: mean bits per weight of the matrices; 0: not said.
        ftype: otherwise the size of llama.cpp's file of this type, with what the export says about itself.

    Raises:
        HalfbyteError: something that is none.
    """
    if size:
        left = parse_size(size, "--size") - around(source, menus)
        if left <= 0:
            raise HalfbyteError(f"--size: no room for weights, expected over {around(source, menus)} bytes")
        return left
    if bpw:
        if not 1 <= bpw <= 16:
            raise HalfbyteError(f"--bpw: out of range, expected 1 to 16 bits per weight, got {bpw}")
        return int(bpw * sum(menu.rows * menu.columns for menu in menus) / 8)
    if ftype not in FILE_TYPES:
        raise HalfbyteError(f"--ftype: unknown file type, expected {', '.join(FILE_TYPES)}, got {ftype}")
    types = ftype_types(source, menus, ftype)
    return sum(menu.nbytes(types[menu.name]) for menu in menus) - METADATA
