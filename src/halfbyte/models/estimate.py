"""How much memory a model will need, said before the work starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from halfbyte.core.environment import available_memory
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.families import Family
from halfbyte.models.layers import Layer, Unit, layers_of, units_of
from halfbyte.models.modules import head_dim, is_tied
from halfbyte.options import SearchOptions

BATCH_TOKENS = 4096  # that go through a block at once on an accelerator; larger batches share out less evenly
HEAD_CHUNK_TOKENS = 512  # whose fp32 logits exist at once there
HEAD_CHUNK_ROWS = 8192  # of an output head that are decoded at once
TYPES = 6  # that a matrix may have, about
CANDIDATE_BITS = 36  # of a weight in all types of its menu together
VARIANTS = 8  # sets of transforms that are tried
SIDE_BY_SIDE = 16  # models with one quantised matrix that are measured together
# Calibration tokens, search tokens and generations where 0 is asked for: what two CPU cores do in ten minutes.
BY_DEVICE = {"cuda": (32768, 4096, 25), "mps": (32768, 4096, 25), "cpu": (4096, 256, 8)}
PACKED_BITS = 4.125  # per weight: a code, and its share of an fp16 scale per group of 128


def windows_at_once(device: torch.device, length: int) -> int:
    """How many windows of ``length`` tokens go through a block together."""
    return 1 if device.type == "cpu" else max(1, BATCH_TOKENS // length)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that the work needs. Weights that are mapped from files are not counted: the system drops their pages.

    Attributes:
        device: weights and what computing with them takes, where the model runs.
        running: that second part alone: activations, logits, a decoded layer.
        host: weights and codes in main memory beside an accelerator.
        parameters, linear_parameters: how many weights there are, and how many of them get 4 bits.
        preparation: one block at a time with its statistics, where it is quantised, before the model is there.
        copies: decoded weights on the device beside what ``host`` counts; matter where both are one memory.
    """

    device: int
    running: int
    host: int
    parameters: int
    linear_parameters: int
    preparation: int = 0
    copies: int = 0

    def on(self, device: torch.device) -> int:
        """Bytes on ``device``: on an accelerator one stage after the other, otherwise one memory for everything."""
        if device.type == "cuda":
            return max(self.device, self.preparation)
        return self.host + self.copies + self.running + self.preparation


def estimate_search(
    config: PretrainedConfig,
    family: Family,
    dtype: torch.dtype,
    tokens: int,
    ctx: int,
    *,
    gradients: bool = False,
    packed: bool = False,
    weighs_tokens: bool = True,
) -> MemoryEstimate:
    """Estimate from the configuration alone; no weights are read.

    Args:
        tokens: the larger of calibration and search tokens.
        ctx: tokens per window.
        gradients: the loss is differentiated (``--fitness fisher``), so every block's activations are kept.
        packed: codes stay packed, and calibration activations in main memory; so does an embedding that is not the
            head, unless there are gradients.
        weighs_tokens: all hidden states of the calibration text are kept first, to see what each token counts.
    """
    sizes = _sizes(config, family, dtype)
    on_host = 0 if gradients else sizes.embedding
    weights = sizes.codes + sizes.outside - on_host if packed else sizes.decoded
    if gradients:  # of one window: what every block keeps, and logits with their gradient
        per_token = config.num_hidden_layers * (10 * config.hidden_size + 5 * config.intermediate_size)
        running = ctx * (dtype.itemsize * per_token + 3 * 4 * config.vocab_size)
    else:
        running = _batch(config, dtype.itemsize, min(tokens, max(ctx, BATCH_TOKENS)))
    running += (dtype.itemsize + 4) * tokens * config.hidden_size  # first hidden states, what is known of the reference
    running += sizes.unit if packed else 0
    simulation = sizes.codes + sizes.outside if packed else sizes.codes + sizes.decoded
    states = dtype.itemsize * tokens * config.hidden_size * (config.num_hidden_layers + 1) if weighs_tokens else 0
    units = [unit for unit in units_of(sizes.layers, family, "fused") if unit.block == 0]
    preparation, kept = _preparation(config, units, tokens, packed=packed)
    return MemoryEstimate(
        device=weights + running,
        running=running,
        host=max(simulation, sizes.codes + sizes.converted + kept, sizes.converted + states),  # one after the other
        parameters=sizes.parameters,
        linear_parameters=sizes.linear,
        preparation=preparation,
    )


def estimate_types(
    config: PretrainedConfig,
    family: Family,
    dtype: torch.dtype,
    tokens: tuple[int, int],
    ctx: int,
    *,
    nbytes: int,
    packed: bool = False,
) -> MemoryEstimate:
    """What a search of ggml types takes, from the configuration alone.

    Args:
        tokens: of calibration text, and of search and validation text together.
        ctx: tokens per window.
        nbytes: of all matrices as they are encoded, in one mixture.
        packed: the device holds encoded rows, and calibration activations stay on the host.
    """
    calib, judged = tokens
    sizes, hidden = _sizes(config, family, dtype), config.hidden_size
    matrix = dtype.itemsize * config.vocab_size * hidden  # embedding or head
    block = dtype.itemsize * sum(layer.macs for layer in sizes.layers if layer.block == 0)
    # First hidden states, what the reference's head read, Wᵀp; and again for other types of the embedding and the head.
    known = judged * hidden * ((2 + (1 if packed else TYPES)) * dtype.itemsize + 4 * (1 + TYPES))
    running = known + _batch(config, dtype.itemsize, min(judged, max(ctx, BATCH_TOKENS)))
    running += (dtype.itemsize + 4) * HEAD_CHUNK_ROWS * hidden
    alone = dtype.itemsize * (judged // 2) * hidden * SIDE_BY_SIDE
    rows = nbytes * (1 - min(sizes.embedding, matrix) / sizes.decoded)  # an embedding of its own is only looked up
    weights = max(int(rows) + sizes.unit, block + alone) if packed else sizes.decoded + 2 * matrix + alone
    folded = dtype.itemsize * sizes.linear + 2 * sizes.embedding  # R1 changes the ends too
    # All types of one part, until written, while the next block is encoded.
    candidates = CANDIDATE_BITS * max(2 * block, matrix) // (8 * dtype.itemsize)
    widest = max(layer.in_features for layer in sizes.layers)
    kept = 4 * calib * (5 * hidden + widest)
    tried = judged * hidden * ((VARIANTS // 2 + 1) * dtype.itemsize + 4)  # and what is known of the reference
    return MemoryEstimate(
        device=weights + running,
        running=running,
        host=max(sizes.converted, folded) + candidates + (kept if packed else 0),
        parameters=sizes.parameters,
        linear_parameters=sizes.linear,
        preparation=_encoding(config, sizes.layers, widest) + block + tried + (0 if packed else kept),
        copies=0 if packed else sizes.decoded,
    )


def _encoding(config: PretrainedConfig, layers: list[Layer], widest: int) -> int:
    """Bytes for one block in fp32 and the larger of what running it takes and of its widest layer's statistics.

    The Hessian three times while it is put in order; then it, its factor and eight matrices like the layer's weight.
    """
    block = [layer for layer in layers if layer.block == 0]
    matrices = 8 * max(layer.macs for layer in block)
    statistics = 4 * max(3 * widest**2, 2 * widest**2 + matrices)
    return 4 * sum(layer.macs for layer in block) + max(_batch(config, 4, BATCH_TOKENS), statistics)


@dataclass(frozen=True)
class _Sizes:
    """What a model consists of, in weights and in bytes of the compute dtype.

    Attributes:
        parameters, linear: weights in all, and in the linear layers of the blocks.
        decoded: bytes of all parameters.
        codes: bytes of the W4 codes, two to a byte, with their scales.
        outside: bytes of what is not linear: embedding, an untied head, norms, biases.
        embedding: bytes of an embedding that is not the head too.
        unit: bytes of the largest layers that share an input, decoded at once.
        converted: bytes of parameters that cannot be mapped as they are stored.
    """

    layers: list[Layer]
    parameters: int
    linear: int
    decoded: int
    codes: int
    outside: int
    embedding: int
    unit: int
    converted: int


def _sizes(config: PretrainedConfig, family: Family, dtype: torch.dtype) -> _Sizes:
    width, stored = dtype.itemsize, config.dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters, layers = sum(parameter.numel() for parameter in model.parameters()), layers_of(model, family)
    linear = sum(layer.macs for layer in layers)
    return _Sizes(
        layers,
        parameters,
        linear,
        decoded=width * parameters,
        codes=int(PACKED_BITS / 8 * linear),
        outside=width * (parameters - linear),
        embedding=0 if is_tied(model, family) else width * config.vocab_size * config.hidden_size,
        unit=width * max(unit.macs for unit in units_of(layers, family, "fused")),
        converted=0 if stored == dtype else width * parameters,
    )


def _batch(config: PretrainedConfig, width: int, tokens: int) -> int:
    """Bytes of one batch of ``tokens`` on its way, the larger of a block's widest moments and the head's.

    In the attention: the residual stream, its norm and what is rounded of it, queries and output, keys and values; in
    the MLP: the same stream, gate, up and their product as it is, in fp32 and rounded. In the head: logits of a part
    in fp32, and as much again for their exponentials.
    """
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    attention = 3 * hidden + head_dim(config) * (3 * heads + 4 * config.num_key_value_heads)
    block = tokens * (width * max(attention, 3 * hidden + 4 * inner) + 4 * inner)
    head = 2 * 4 * min(tokens, HEAD_CHUNK_TOKENS) * config.vocab_size + width * tokens * hidden
    return max(block, head)


def _preparation(config: PretrainedConfig, units: Sequence[Unit], tokens: int, *, packed: bool) -> tuple[int, int]:
    """Bytes on the device to prepare a block of these units, and those kept in main memory instead, all in fp32.

    The largest of three moments. When transforms are folded: the block, hidden states, what was seen of all inputs, the
    widest of these once more, two of its second moments, two matrices like its weights. When a unit's Hessian is
    summed: the copy and what is left of the original, hidden states and inputs that are still needed, the Hessian,
    three matrices, a batch in eight forms. When its codes are chosen: the same blocks, states and inputs of the units
    that follow, the Hessian and its factor, eight matrices. Packed, only single batches of states and inputs are there.
    """
    here = 0 if packed else 1
    whole, states = sum(unit.macs for unit in units), 4 * tokens * config.hidden_size
    widths = [unit.layers[0].in_features for unit in units]
    widest = max(range(len(units)), key=widths.__getitem__)
    seen, batch = tokens * sum(widths), min(tokens, BATCH_TOKENS)
    square, once_more = widths[widest] ** 2, tokens * widths[widest]
    moments = [
        whole
        + here * (states + seen + once_more)
        + (1 - here) * 4 * batch * widths[widest]
        + 2 * (square + units[widest].macs)
    ]
    for at, unit in enumerate(units):
        blocks = whole + sum(other.macs for other in units[at:])
        needed = blocks + here * (states + tokens * sum(widths[at + 1 :]))
        moments.append(needed + here * tokens * widths[at] + widths[at] ** 2 + 3 * unit.macs + 8 * batch * widths[at])
        moments.append(needed + 2 * widths[at] ** 2 + 8 * unit.macs)
    return 4 * max(moments), 4 * (1 - here) * (states + seen + once_more)


def estimate_load(
    config: PretrainedConfig, family: Family, dtype: torch.dtype, *, with_codes: bool = False, packed: bool = False
) -> MemoryEstimate:
    """What it takes to load a model and run it.

    Args:
        with_codes: and to become the simulation of a plan.
        packed: only to become that simulation, on the host, with its codes packed; the model itself is never run.
    """
    sizes = _sizes(config, family, dtype)
    codes, linear = (sizes.codes, sizes.linear) if with_codes else (0, 0)
    if packed:
        running = 16 * sizes.unit // dtype.itemsize  # a few copies of a layer in fp32
        host = codes + max(sizes.outside, sizes.converted)
        return MemoryEstimate(host + running, running, host, sizes.parameters, linear)
    running = sizes.decoded // 10
    return MemoryEstimate(sizes.decoded + running, running, sizes.decoded + codes, sizes.parameters, linear)


def fits(estimate: MemoryEstimate, device: torch.device) -> bool:
    """Whether there is as much memory as the work needs; of a search that is not packed: whether it has to be."""
    return not _too_little(estimate, device)


def check_memory(estimate: MemoryEstimate, device: torch.device) -> None:
    """Refuse, before the work, what cannot fit.

    Raises:
        HalfbyteError: saying how much is needed and how much there is.
    """
    for where, need, there in _too_little(estimate, device):
        raise HalfbyteError(
            f"memory estimate: too little memory on {where.type}, expected {need / 1e9:.1f} GB, "
            f"got {there / 1e9:.1f} GB free",
            fix="close other programs, use --dtype bf16, fewer tokens, or a smaller model",
        )


def _too_little(estimate: MemoryEstimate, device: torch.device) -> list[tuple[torch.device, int, int]]:
    """Where memory is short: device, bytes needed, bytes there are."""
    needs = {device: estimate.on(device)}
    if device.type == "cuda":
        needs[torch.device("cpu")] = estimate.host
    found = [(where, need, available_memory(where)) for where, need in needs.items()]
    return [(where, need, there) for where, need, there in found if need > there]


def with_tokens(options: SearchOptions, device: torch.device) -> SearchOptions:
    """The options with as many tokens and generations as the device can do, where none are asked for."""
    calib, search, generations = BY_DEVICE[device.type]
    return replace(
        options,
        calib_tokens=options.calib_tokens or calib,
        search_tokens=options.search_tokens or search,
        ga_gen=options.ga_gen or generations,
    )
