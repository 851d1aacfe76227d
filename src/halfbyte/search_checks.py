"""What a search refuses before any work: options, models that a target cannot hold, too little memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.models.estimate import MemoryEstimate, check_memory, estimate_search, estimate_types, fits
from halfbyte.models.loading import Origin, SourceModel
from halfbyte.models.modules import linear
from halfbyte.options import SearchOptions
from halfbyte.plan import Layer, check_suffix
from halfbyte.prepare.recipe import recipe_of
from halfbyte.quant.int4 import fitting_group_size
from halfbyte.targets.gguf_files.writer import check_exportable


def spaces_of(options: SearchOptions) -> tuple[str, ...]:
    """What is searched: ``a4a8``, ``ggml``, or both.

    Raises:
        HalfbyteError: types for a target that has none.
    """
    spaces = options.spaces
    if spaces == "auto":
        spaces = "a4a8,ggml" if options.target == "gguf" and options.weights_from is None else "a4a8"
    if "ggml" in spaces and options.target != "gguf":
        raise HalfbyteError("only a GGUF file has types", where="--spaces", got=spaces, fix="use --target gguf")
    return tuple(spaces.split(","))


def check_search_options(options: SearchOptions) -> None:
    """Refuse, before any work, values that cannot be right."""
    if not 0.5 <= options.target_compression <= 1.0:
        raise HalfbyteError(
            "budget is out of range",
            where="--target_compression",
            expected="0.5 (all A4) to 1.0 (all A8)",
            got=options.target_compression,
        )
    for flag in ("ga_pop", "ga_gen", "group_size", "ctx", "calib_tokens", "search_tokens"):
        if getattr(options, flag) < 1:
            raise HalfbyteError("must be positive", where=f"--{flag}", got=getattr(options, flag))
    check_suffix(Path(options.output))
    if options.pareto and options.fitness != "kl":
        raise HalfbyteError("a front needs the whole model's KL", where="--pareto", fix="leave --fitness at kl")
    if not 0 <= options.speed <= 2:
        raise HalfbyteError("out of range", where="--speed", expected="0 (any) to 2", got=options.speed)
    if options.target == "vllm" and options.granularity != "fused":
        raise HalfbyteError(
            "vLLM wants one choice for q, k and v and one for gate and up",
            where="--granularity",
            expected="fused",
            got=options.granularity,
        )
    if options.online_transforms and options.target != "vllm":
        raise HalfbyteError("only for --target vllm", where="--online_transforms", fix="name r4 in --transforms")
    recipe_of(options, tied=False)
    if options.weights_from is not None:
        _check_weights_from(options)
    for flag in ("size", "bpw", "like", "imatrix"):
        if getattr(options, flag) and "ggml" not in spaces_of(options):
            raise HalfbyteError(
                "only for types of a GGUF file", where=f"--{flag}", fix="search with --target gguf --spaces ggml"
            )


def _check_weights_from(options: SearchOptions) -> None:
    """Refuse what would change codes that are taken over."""
    usual = SearchOptions()
    if options.online_transforms:
        raise HalfbyteError("does not go with --weights_from", where="--online_transforms", fix="leave it out")
    for flag, allowed in (
        ("transforms", ("auto", "none")),
        ("weights", (usual.weights,)),
        ("alpha", (usual.alpha,)),
        ("spaces", ("auto", "a4a8")),
    ):
        if getattr(options, flag) not in allowed:
            raise HalfbyteError(
                "does not go with --weights_from, whose codes stay as they are",
                where=f"--{flag}",
                expected=" or ".join(allowed),
                got=getattr(options, flag),
                fix="leave it out",
            )


def memory_modes(options: SearchOptions, origin: Origin, device: torch.device, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether codes stay packed while the model runs, and whether the loss is differentiated.

    ``fisher`` needs gradients; ``kl`` starts from them too, where they fit.

    Raises:
        HalfbyteError: there is too little memory.
    """
    tokens = max(options.calib_tokens, 2 * options.search_tokens)

    def need(*, gradients: bool, packed: bool) -> MemoryEstimate:
        return estimate_search(
            origin.config, origin.family, dtype, tokens, options.ctx, gradients=gradients, packed=packed
        )

    fisher = options.fitness == "fisher"
    packed = options.codes == "packed" or (
        options.codes == "auto" and not fits(need(gradients=fisher, packed=False), device)
    )
    check_memory(need(gradients=fisher, packed=packed), device)
    wanted = fisher or (options.fitness == "kl" and fits(need(gradients=True, packed=packed), device))
    return packed, wanted


def types_packed(options: SearchOptions, origin: Origin, device: torch.device, dtype: torch.dtype, room: int) -> bool:
    """Whether candidates stay encoded on the device.

    Raises:
        HalfbyteError: there is too little memory.
    """
    tokens = options.calib_tokens, 2 * options.search_tokens

    def need(*, packed: bool) -> MemoryEstimate:
        return estimate_types(origin.config, origin.family, dtype, tokens, options.ctx, nbytes=room, packed=packed)

    packed = options.codes == "packed" or (options.codes == "auto" and not fits(need(packed=False), device))
    check_memory(need(packed=packed), device)
    return packed


def _check_gguf_target(
    source: SourceModel, layers: list[Layer], options: SearchOptions, given: Mapping[str, int]
) -> None:
    """Say before the search what the export could not write; ``given`` are group sizes that are not to be chosen."""
    check_exportable(source)
    _check_groups(layers, options.group_size, given, "Q4_0 blocks need")


def _check_vllm_target(
    source: SourceModel, layers: list[Layer], options: SearchOptions, given: Mapping[str, int]
) -> None:
    """Say before the search what vLLM could not run."""
    _check_groups(layers, options.group_size, given, "vLLM's kernels need")
    down = [layer.name for layer in layers if layer.name.endswith(source.family.down)]
    if options.online_transforms and linear(source.model, down[0]).bias is not None:
        raise HalfbyteError(
            "vLLM cannot rotate the input of a layer with a bias", where=down[0], fix="leave out --online_transforms"
        )


def _check_groups(layers: list[Layer], group_size: int, given: Mapping[str, int], who: str) -> None:
    for layer in layers:
        group = given.get(layer.name) or fitting_group_size(layer.in_features, group_size)
        if group % 32:
            raise HalfbyteError(
                f"{who} groups of 32 or a multiple",
                where=layer.name,
                got=group,
                fix="use --target sim" if given else "use --group_size 128, or --target sim for this model",
            )


TARGET_CHECKS = {"gguf": _check_gguf_target, "vllm": _check_vllm_target}
