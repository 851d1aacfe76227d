"""Model families, one file each: adding a family is adding a file to this folder, named after its ``model_type``."""

from __future__ import annotations

from dataclasses import dataclass, field

from halfbyte.core.errors import HalfbyteError
from halfbyte.core.registry import Registry

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OUT = ("self_attn.o_proj",)
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
DOWN = ("mlp.down_proj",)


@dataclass(frozen=True)
class Family:
    """Module paths of a decoder-only transformer, as Hugging Face and as GGUF name them.

    Attributes:
        model_type: ``config.model_type`` in Hugging Face.
        gguf_arch: ``general.architecture`` in GGUF.
        blocks, embedding, final_norm, head: module paths in the causal language model.
        groups: linear layers of a block that share one input tensor, in order; together they are all its linears.
        norm_readers: norm in a block -> the linears that read its output (a scale can move between them).
        value, attention_out: v_proj and o_proj, whose channels match head by head.
        up, down: up_proj and down_proj, whose channels match one to one.
        gguf_block_names: part of a block -> name inside ``blk.N.``.
        gguf_top_names: module outside the blocks -> GGUF name.
        interleaved_rope: llama.cpp's graph rotates neighbouring pairs, so rows of q and k are reordered in the file
            (``LLAMA_ROPE_TYPE_NORM``); otherwise it rotates halves, as Hugging Face does.
    """

    model_type: str
    gguf_arch: str
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    groups: tuple[tuple[str, ...], ...] = (QKV, OUT, GATE_UP, DOWN)
    norm_readers: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("input_layernorm", QKV),
        ("post_attention_layernorm", GATE_UP),
    )
    value: str = "self_attn.v_proj"
    attention_out: str = "self_attn.o_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    gguf_block_names: dict[str, str] = field(
        default_factory=lambda: {
            "input_layernorm": "attn_norm",
            "self_attn.q_proj": "attn_q",
            "self_attn.k_proj": "attn_k",
            "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output",
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
            "post_attention_layernorm": "ffn_norm",
            "mlp.gate_proj": "ffn_gate",
            "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down",
        }
    )
    gguf_top_names: dict[str, str] = field(
        default_factory=lambda: {
            "model.embed_tokens": "token_embd",
            "model.norm": "output_norm",
            "lm_head": "output",
        }
    )
    interleaved_rope: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """All linear layers of a block, in order."""
        return tuple(name for group in self.groups for name in group)

    def gguf_name(self, name: str) -> str:
        """GGUF tensor name of a Hugging Face parameter such as ``model.layers.3.mlp.up_proj.weight``.

        Raises:
            KeyError: the family has no such parameter.
        """
        module, _, leaf = name.rpartition(".")
        prefix = self.blocks + "."
        if module.startswith(prefix):
            index, _, part = module[len(prefix) :].partition(".")
            return f"blk.{int(index)}.{self.gguf_block_names[part]}.{leaf}"
        return f"{self.gguf_top_names[module]}.{leaf}"


FAMILIES: Registry[Family] = Registry("model family", "halfbyte.models.families", "FAMILY")


def family_of(model_type: str, *, where: object = "model") -> Family:
    """The family of a Hugging Face ``model_type``.

    Raises:
        HalfbyteError: no file in this folder describes it.
    """
    if model_type not in FAMILIES:
        raise HalfbyteError(
            f"{where}: unknown model family, expected one of {', '.join(FAMILIES)}, got {model_type!r}",
            fix="a family is one file in src/halfbyte/models/families",
        )
    return FAMILIES[model_type]
