"""A GGUF file as a source of weights: its tensors dequantised under Hugging Face names.

Source of the layout: the GGUF specification in the ggml repository (docs/gguf.md), read with the ``gguf`` package.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from tokenizers import Regex, pre_tokenizers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from halfbyte.core.errors import HalfbyteError, first_line
from halfbyte.core.files import cache_folder, sha256
from halfbyte.models.families import Family
from halfbyte.models.gguf_file import open_gguf
from halfbyte.models.gguf_pre import PRE_TOKENIZERS

CONVERSION = 2  # of cached folders: raised when their content changes


def config_and_tokenizer_folder(path: Path) -> Path:
    """A folder with ``config.json`` and the tokenizer of a GGUF file, converted once, cached by digest."""
    folder = cache_folder() / f"gguf-v{CONVERSION}" / sha256(path)[:16]
    if (folder / "config.json").exists():
        return folder
    keys = {name: field.contents() for name, field in open_gguf(path).fields.items()}
    arch = keys.get("general.architecture")
    scaling = keys.get(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise HalfbyteError(
            f"{path}: rope scaling of a GGUF source is not supported, got {scaling}",
            fix="start from the Hugging Face model",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if f"{arch}.attention.key_length" in keys:
            config.head_dim = int(keys[f"{arch}.attention.key_length"])
        if keys.get("tokenizer.ggml.model") == "gpt2":
            tokenizer.backend_tokenizer.pre_tokenizer = _pre_tokenizer(str(keys.get("tokenizer.ggml.pre")), path)
        tokenizer.save_pretrained(partial)
        config.save_pretrained(partial)
        partial.rename(folder)
    except (ValueError, KeyError, AttributeError, NotImplementedError) as error:  # its converters fail in many ways
        raise HalfbyteError(f"{path}: transformers cannot read this GGUF file, got {first_line(error)}") from error
    except OSError:
        if not (folder / "config.json").exists():  # another process may have been first
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _pre_tokenizer(name: str, path: Path) -> pre_tokenizers.PreTokenizer:
    """The splits that llama.cpp makes; transformers' own conversion leaves some of them out (smollm's digits)."""
    if name not in PRE_TOKENIZERS:
        raise HalfbyteError(
            f"{path}: pre-tokenizer is unknown, expected {', '.join(PRE_TOKENIZERS)}, got {name}",
            fix="start from the Hugging Face model",
        )
    splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in PRE_TOKENIZERS[name] if isinstance(step, str)]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def read_tensors(
    reader: GGUFReader, path: Path, family: Family, config: PretrainedConfig
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face parameter name, fp32 tensor) for every weight in the file, one at a time."""
    names = _hf_names(family, config.num_hidden_layers)
    for tensor in reader.tensors:
        if tensor.name not in names:
            if tensor.name == "rope_freqs.weight":
                raise HalfbyteError(
                    f"{path}, {tensor.name}: rope scaling of a GGUF source is not supported",
                    fix="start from the Hugging Face model",
                )
            raise HalfbyteError(f"{path}, {tensor.name}: tensor is unknown to this family")
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        name = names[tensor.name]
        if family.interleaved_rope and ".q_proj." in name:
            values = halves_from_pairs(values, config.num_attention_heads)
        elif family.interleaved_rope and ".k_proj." in name:
            values = halves_from_pairs(values, config.num_key_value_heads)
        yield name, values


def pairs_from_halves(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder the rows of q or k from rotary halves (Hugging Face) to neighbouring pairs (llama.cpp NORM rope).

    ``rows`` is ``[heads * head_dim, ...]``; only the first axis is permuted, so codes and scales can be passed too.
    """
    split = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape).contiguous()


def halves_from_pairs(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of :func:`pairs_from_halves`."""
    split = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return split.transpose(1, 2).reshape(rows.shape).contiguous()


def _hf_names(family: Family, blocks: int) -> dict[str, str]:
    modules = [f"{family.blocks}.{index}.{part}" for index in range(blocks) for part in family.gguf_block_names]
    modules += list(family.gguf_top_names)
    names = [f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")]
    return {family.gguf_name(name): name for name in names}
