"""Humming's integer kernels beside our simulation of them, on one Nvidia GPU, without vLLM.

    python benchmarks/humming_check.py [--parts 1,2,3,4] [--json humming.json]

Needs humming-kernels 0.1.19 and cuda-bindings. Layers are loaded and called as vLLM 0.33 does it, from the folder
format of our target; each kernel is compiled for the number of tokens at hand only.

1. Humming's kernel for inputs (block Hadamard and rounding in one) against our rule: codes and scales, A8 and A4.
2. Its product with int8 codes against the simulation, and whether the group scales of weights arrive as they are.
3. The same with our int4 codes, which go through the int8 kernel as inputs that are rounded already.
4. The int4 and int8 kernels compile for GPUs that are not here, as Humming would choose them there: cubin sizes.

A whole folder in these kernels: ``humming_folder.py``.
"""

from __future__ import annotations

import json
import re
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from importlib import import_module
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from common import Row, Rows, arguments, parse, run
from torch import nn

from halfbyte.core.errors import HalfbyteError
from halfbyte.plan import LayerPlan
from halfbyte.quant.affine import divided
from halfbyte.quant.arithmetics.humming import LEAST_SCALE
from halfbyte.quant.hadamard import largest_block
from halfbyte.quant.int4 import (
    GroupedWeight,
    fitting_group_size,
    unpack_int4,
)
from halfbyte.quant.quant_linear import (
    InputScheme,
    QuantLinear,
    SharedInput,
)
from halfbyte.quant.quantisers.rtn import round_to_nearest
from halfbyte.report.tables import significant
from halfbyte.targets.vllm_files.integer import FUSED, LARGEST_HADAMARD, Integer

UNITS = (  # inputs, outputs of the layers that are one in the engine
    (576, (576, 192, 192)),
    (896, (896, 128, 128)),
    (1536, (576,)),
    (3584, (3584, 512, 512)),
    (3584, (18944, 18944)),
    (18944, (3584,)),
)
KINDS = {
    1: ("mlp.down_proj",),
    2: ("mlp.gate_proj", "mlp.up_proj"),
    3: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
}
BLOCK = "model.layers.0"
GROUP = 128
FACTORS = (1.0, 2.0, 0.3)  # sizes of the weights of a unit's layers
LOOSE = 3.0  # times the error of rounding results to bf16: long sums are added up from parts in bf16
TIES = 2e-3  # share of codes that may differ by one: halves, and last bits of the scale's reciprocal
COMPUTE = {"use_batch_invariant": False, "use_f16_accum": False, "gemm_type": "dense"}
TARGETS = {  # capability -> a GPU of it: multiprocessors, KiB of shared memory, threads of one, MiB of L2, GB/s, TFLOPS
    75: ("T4", 40, 64, 1024, 4, 320, 65),
    80: ("A100", 108, 163, 2048, 40, 1555, 312),
    86: ("RTX 3090", 82, 99, 1536, 6, 936, 142),
    89: ("RTX 4090", 128, 99, 1536, 72, 1008, 330),
}
COMPILED = ((576, 960), (3584, 4608))  # inputs, outputs
COMPILED_TOKENS = (16, 2048)


def humming(module: str) -> Any:
    """One of its modules."""
    try:
        return import_module(f"humming.{module}")
    except ImportError as error:
        raise HalfbyteError(
            f"humming_check: humming-kernels cannot be imported, got {error}",
            fix="pip install humming-kernels==0.1.19 cuda-bindings",
        ) from error


def relative(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Root mean square and largest difference, over those of ``expected``."""
    found, expected = found.float(), expected.float()
    difference = found - expected
    return (
        float(difference.norm() / expected.norm()),
        float(difference.abs().max() / expected.abs().max()),
    )


def inputs(width: int, tokens: int) -> torch.Tensor:
    """bf16 with channels of different size, some of them outliers; the first token is all zeros."""
    generator = torch.Generator().manual_seed(width)
    sizes = torch.randn(width, generator=generator).mul_(0.5).exp_()
    sizes[torch.randperm(width, generator=generator)[:4]] *= 30
    x = torch.randn(tokens, width, generator=generator) * sizes
    x[0] = 0
    return x.to(torch.bfloat16).cuda()


def scheme_for(width: int, *, rotated: bool = True) -> InputScheme:
    """As our target has it."""
    block = min(largest_block(width), LARGEST_HADAMARD) if rotated else 0
    group = fitting_group_size(width, GROUP)
    return InputScheme(rotated=rotated, block=block, arithmetic="humming", group=group)


def our_codes(x: torch.Tensor, scheme: InputScheme, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes and scales ``[tokens, groups]`` of the simulation."""
    turned = scheme.transform(x.float())
    grouped = turned.unflatten(-1, (-1, scheme.group))
    scale = divided(grouped.abs().amax(dim=-1, keepdim=True), 2 ** (bits - 1) - 1).clamp_min_(LEAST_SCALE)
    codes = scheme.rounded(turned, bits).unflatten(-1, (-1, scheme.group)) / scale
    return codes.round().to(torch.int8).flatten(-2), scale.squeeze(-1)


def their_codes(x: torch.Tensor, scheme: InputScheme, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of Humming's kernel: int4 codes come two to a byte, the first in the low nibble."""
    settings = {
        "quant_mode": "dynamic_group",
        "quant_dtype": f"int{bits}",
        "quant_group_size": scheme.group,
        "group_scale_dtype": "float32",
        "hadamard_block_size": scheme.block,
    }
    _only_for(x, settings)
    codes, scale, _ = humming("ops").process_input(x, **settings)
    return (unpack_int4(codes) if bits == 4 else codes), scale


def _only_for(x: torch.Tensor, settings: Mapping[str, Any]) -> None:
    """Compile the kernel for so many tokens only: others would be the same code in other launches."""
    kernel, tune = humming("kernel.process_input"), humming("tune.process_input")
    problem = humming("config").ProcessInputProblemConfig(
        input_dtype=humming("dtypes").DataType.from_torch_dtype(x.dtype), hidden_size=x.shape[1], **settings
    )
    chosen = tune._tuning_config_for_device(problem, x.shape[0], x.device.index)
    intervals = [(0, 1 << 30, chosen)]
    kernel.ProcessInputKernel.prepare_kernels(problem, intervals, x.device, (x.device.index, problem, False))


def folder_config(layers: Mapping[str, GroupedWeight], bits: int, block: int) -> dict[str, Any]:
    """``quantization_config`` of a folder with these layers, written by our target."""
    plan = {
        name: LayerPlan(
            4,
            bits,
            weight.group_size,
            rotated=block > 0,
            rotation_block=block,
            arithmetic="humming",
            a_group=weight.group_size,
        )
        for name, weight in layers.items()
    }
    source = SimpleNamespace(family=SimpleNamespace(head="lm_head"))
    return Integer(89).quantization_config(cast(Any, source), cast(Any, SimpleNamespace(layers=plan)))


def fused_name(layer: str) -> str:
    """vLLM's name of the module that a layer is part of."""
    prefix, _, kind = layer.rpartition(".")
    return f"{prefix}.{FUSED.get(kind, kind)}"


def config_of(config: Mapping[str, Any], module: str) -> dict[str, Any]:
    """What a folder says of one of vLLM's modules."""
    own = [value for key, value in config["dynamic"].items() if key[0] == "+" and re.match(key[2:], module)]
    if not own:
        raise HalfbyteError(f"{module}: the folder's config says nothing of it")
    return {**config, **own[0]}


class Kernel:
    """One of vLLM's modules in Humming's kernels.

    Args:
        config: what the folder says of it.
        tensors: ``weight``, ``weight_scale`` and maybe ``bias``, the layers' one below the other.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        schema = humming("schema")
        self.schema, taken = schema.BaseWeightSchema.from_config(config), schema.BaseInputSchema.from_config(config)
        words = tensors["weight"]
        if not taken.is_compatible_with(self.schema, torch.bfloat16):
            raise HalfbyteError(f"humming_check: Humming refuses {taken} with {self.schema}")
        self.config, self.tensors = humming("transform").prepare_and_transform_humming_tensors(
            tensors=dict(tensors),
            shape_n=words.shape[0],
            shape_k=8 * words.shape[1],
            weight_schema=self.schema,
            input_schema=taken,
            pad_n_to_multiple=256,
            pad_k_to_multiple=128,
            has_bias="bias" in tensors,
            torch_dtype=torch.bfloat16,
            device=words.device,
        )
        units = torch.cuda.get_device_properties(words.device).multi_processor_count
        self.locks = torch.zeros(8 * units, dtype=torch.int32, device=words.device)
        self._tuning: dict[tuple[int, bool], dict[str, Any]] = {}

    def tuning(self, tokens: int, *, in_order: bool = False) -> dict[str, Any]:
        """What Humming chooses for so many tokens."""
        key = (tokens, in_order)
        if key not in self._tuning:
            compute = {**COMPUTE, "use_batch_invariant": in_order}
            device = self.tensors["weight"].device.index
            self._tuning[key] = humming("tune").get_heuristics_config(self.config, tokens, **compute, device=device)
        return self._tuning[key]

    def __call__(self, x: torch.Tensor, scale: torch.Tensor | None = None, *, in_order: bool = False) -> torch.Tensor:
        """The product, ``[tokens, out]`` in bf16.

        Args:
            x: bf16 ``[tokens, in]``, or int8 codes with their ``scale`` ``[tokens, groups]``.
            in_order: every sum in one go (vLLM's VLLM_BATCH_INVARIANT); else parts of long sums may be added in bf16.
        """
        return humming("forward").humming_forward(
            self.config,
            inputs=x.contiguous(),
            weight=self.tensors["weight"],
            weight_scale=self.tensors.get("weight_scale"),
            bias=self.tensors.get("bias"),
            weight_scale_2=self.tensors.get("weight_scale_2"),
            input_scale=scale,
            hadamard_block_size=self.schema.hadamard_block_size,
            locks=self.locks,
            compute_config=json.dumps({**COMPUTE, "use_batch_invariant": in_order}),
            tuning_config=json.dumps(self.tuning(x.shape[0], in_order=in_order), default=int),
        )


class Case:
    """A unit of random layers with our codes, loaded once.

    Attributes:
        layers: name -> codes, with the target's rule for scales.
        bias: of the layers one after the other, or None.
    """

    def __init__(self, width: int, outputs: Sequence[int]) -> None:
        self.name = f"{sum(outputs)} x {width}"
        self.scheme = scheme_for(width)
        group = fitting_group_size(width, GROUP)
        generator = torch.Generator().manual_seed(sum(outputs))
        self.layers: dict[str, GroupedWeight] = {}
        for kind, rows, factor in zip(KINDS[len(outputs)], outputs, FACTORS, strict=False):
            sizes = torch.randn(rows, 1, generator=generator).mul_(0.5).exp_() * factor / width**0.5
            weight = (torch.randn(rows, width, generator=generator) * sizes).cuda()
            weight = self.scheme.stored_weight(weight)
            self.layers[f"{BLOCK}.{kind}"] = round_to_nearest(weight, group, rule=Integer.recipe.scale_rule)
        has_bias = len(outputs) == 3 and width != 576
        self.bias = torch.randn(sum(outputs), generator=generator).to(torch.bfloat16).cuda() if has_bias else None

    @cached_property
    def scales(self) -> torch.Tensor:
        """As the folder has them, bf16 ``[out, groups]``."""
        return self._stacked()["weight_scale"]

    def _stacked(self) -> dict[str, torch.Tensor]:
        found: dict[str, list[torch.Tensor]] = {}
        for name, weight in self.layers.items():
            for stored in Integer(89).weights(name, weight.pack()):
                found.setdefault(stored.name.removeprefix(f"{name}."), []).append(stored.make())
        return {name: torch.cat(parts) for name, parts in found.items()}

    def kernel(self) -> Kernel:
        """Loaded from the target's config and tensors, A8."""
        config = folder_config(self.layers, 8, self.scheme.block)
        tensors = self._stacked()
        if self.bias is not None:
            tensors["bias"] = self.bias
        return Kernel(config_of(config, fused_name(next(iter(self.layers)))), tensors)

    def simulated(self, x: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
        """The numbers of the simulation in ``dtype``."""
        shared, parts = SharedInput(), []
        x = x.to(dtype)
        for weight in self.layers.values():
            layer = QuantLinear(weight.decode().to(dtype), None, self.scheme, shared)
            layer.a_bits = bits
            parts.append(layer(x))
        result = torch.cat(parts, dim=-1)
        return result if self.bias is None else result + self.bias.to(dtype)

    def product(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """What given codes make, fp32."""
        x = codes.float() * scale.repeat_interleave(self.scheme.group, dim=1)
        result = torch.cat([x @ weight.decode().T for weight in self.layers.values()], dim=-1)
        return result if self.bias is None else result + self.bias.float()


@cache
def case(index: int) -> Case:
    """One of UNITS."""
    return Case(*UNITS[index])


def check_inputs(options: Any) -> Iterable[Row]:
    """Part 1."""
    for width in dict.fromkeys(width for width, _ in UNITS):
        x = inputs(width, options.tokens)
        for rotated in (False, True):
            scheme = scheme_for(width, rotated=rotated)
            for bits in (8, 4):
                codes, scale = their_codes(x, scheme, bits)
                ours, our_scale = our_codes(x, scheme, bits)
                difference = (codes.int() - ours.int()).abs()
                share, steps = float((difference > 0).float().mean()), int(difference.max())
                yield {
                    "part": 1,
                    "case": f"{width} channels, A{bits}, Hadamard {scheme.block}",
                    "codes_that_differ": share,
                    "largest_steps": steps,
                    "scale_difference": float(((scale - our_scale).abs() / our_scale).max()),
                    "ok": share <= TIES and steps <= 1,
                }


def _product_row(part: int, name: str, found: torch.Tensor, at: Case, x: torch.Tensor, bits: int) -> Row:
    exact = at.simulated(x, bits, torch.float32)
    rms, largest = relative(found, exact)
    rms_bf16, largest_bf16 = relative(found, at.simulated(x, bits, torch.bfloat16))
    floor, _ = relative(exact.to(torch.bfloat16), exact)
    return {
        "part": part,
        "case": name,
        "rms_to_fp32": rms,
        "largest_to_fp32": largest,
        "rms_to_bf16": rms_bf16,
        "largest_to_bf16": largest_bf16,
        "rms_of_rounding_to_bf16": floor,
        "ok": rms <= LOOSE * floor,
    }


def check_scales(at: Case, kernel: Kernel) -> Row:
    """Whether scales arrive as they are in the folder."""
    arrived, meant = kernel.tensors["weight_scale"].float(), at.scales.float()
    arrived, _ = arrived.flatten().sort(descending=True)  # the kernel has them in another order, and pads with zeros
    padded = nn.functional.pad(meant.flatten(), (0, arrived.numel() - meant.numel()))
    expected, _ = padded.sort(descending=True)
    return {
        "integer_scales": bool(kernel.config.use_int_weight_scale),
        "scales_that_arrive_changed": float((arrived != expected).float().sum() / meant.numel()),
    }


def check_products(options: Any) -> Iterable[Row]:
    """Part 2."""
    for index, (width, _) in enumerate(UNITS):
        at, x = case(index), inputs(width, options.tokens)
        kernel = at.kernel()
        found, own = kernel(x), at.product(*their_codes(x, at.scheme, 8))
        row = _product_row(2, f"{at.name}, A8", found, at, x, 8)
        row["rms_to_own_codes"], row["largest_to_own_codes"] = relative(found, own)
        row["in_parts"] = kernel.tuning(x.shape[0]).get("use_stream_k", True)
        row["rms_to_own_codes_in_order"], _ = relative(kernel(x, in_order=True), own)
        yield {**row, **check_scales(at, kernel)}


def check_int4_codes(options: Any) -> Iterable[Row]:
    """Part 3."""
    for index, (width, _) in enumerate(UNITS):
        at, x = case(index), inputs(width, options.tokens)
        found = at.kernel()(*our_codes(x, at.scheme, 4))
        yield _product_row(3, f"{at.name}, A4", found, at, x, 4)


def stand_in(capability: int) -> Any:
    """Lets Humming take the GPU that is here, or none, for another one; returns what sets it back."""
    name, units, shared, threads, cache_mib, bandwidth, tflops = TARGETS[capability]
    tops = {"float16": tflops, "bfloat16": tflops, "int8": 2 * tflops, "int4": 4 * tflops}
    described = SimpleNamespace(
        index=capability,
        name=name,
        is_ppu=False,
        sm_count=units,
        max_threads_per_block=1024,
        max_threads_per_sm=threads,
        max_registers_per_sm=65536,
        sm_major=capability // 10,
        sm_minor=capability % 10,
        sm_version=capability,
        l2_cache_size=cache_mib << 20,
        default_smem_size=48 << 10,
        max_smem_size=shared << 10,
        memory_bandwidth_gbps=float(bandwidth),
        tensorcore_tops={key: float(value) for key, value in tops.items()},
    )
    device = humming("device")
    other, before = device.DeviceInfo(-1), device.current_device._value
    other._index, other._value = capability, described
    device.DeviceInfo._instances[capability] = other
    device.current_device._value = described

    def back() -> None:
        device.current_device._value = before
        del device.DeviceInfo._instances[capability]

    return back


def _kernels_for(capability: int) -> Iterable[tuple[str, Callable[[], Any]]]:
    """Names, and what compiles each."""
    gemm, rounding = humming("kernel.humming"), humming("kernel.process_input")
    tune, config, dtypes = humming("tune"), humming("config"), humming("dtypes")
    output = dtypes.float16 if capability == 75 else dtypes.bfloat16  # Turing has no bf16

    class Product(gemm.HummingKernel):
        def register_kernel(self) -> None:
            """Nothing: it will not run here."""

    class Rounding(rounding.ProcessInputKernel):
        def register_kernel(self) -> None:
            """Nothing: it will not run here."""

    for (width, rows), bits, tokens in product(COMPILED, (4, 8), COMPILED_TOKENS):
        group = fitting_group_size(width, GROUP)
        layer = config.LayerConfig(
            sm_version=capability,
            shape_n=rows + -rows % 256,
            shape_k=width + -width % 128,
            pad_shape_n=-rows % 256,
            pad_shape_k=-width % 128,
            a_dtype=dtypes.DataType.from_str(f"int{bits}"),
            b_dtype=dtypes.DataType.from_str("uint4"),
            c_dtype=output,
            weight_scale_group_size=group,
            input_scale_group_size=group,
            input_quant_mode="dynamic_group",
        )
        tuning = dict(tune._get_heuristics_config(layer, tokens, device_index=capability))
        tuning.pop("num_sms", None)
        name = f"sm{capability} product A{bits}, {rows} x {width}, {tokens} tokens"
        yield name, partial(Product, **{**layer.to_dict(), "gemm_type": "dense", **tuning})
        problem = config.ProcessInputProblemConfig(
            input_dtype=output,
            hidden_size=width,
            quant_mode="dynamic_group",
            quant_dtype=f"int{bits}",
            quant_group_size=group,
            group_scale_dtype="float32",
            hadamard_block_size=min(largest_block(width), LARGEST_HADAMARD),
        )
        launch = humming("tune.process_input")._tuning_config_for_device(problem, tokens, capability)
        phases = config.ProcessInputQuantizationPhase
        for phase in (phases.CollectAbsmax, phases.Quantize) if launch.two_stage else (phases.Fused,):
            name = f"sm{capability} rounding A{bits}, {width} channels, {tokens} tokens, {phase.name}"
            values = {**problem.to_dict(), **launch.to_dict(), "quantization_phase": phase}
            yield name, partial(Rounding, **values)


def check_compiles(options: Any) -> Iterable[Row]:
    """Part 4."""

    def compiled(job: tuple[str, Callable[[], Any]]) -> Row:
        start = time.perf_counter()
        try:
            size, why = Path(job[1]().kernel_filename).stat().st_size, ""
        except Exception as error:  # noqa: BLE001 - whatever a compiler says
            size, why = 0, f"{type(error).__name__}: {str(error)[-300:]}"
        seconds = round(time.perf_counter() - start, 1)
        return {"part": 4, "case": job[0], "cubin_bytes": size, "seconds": seconds, "why": why, "ok": size > 0}

    for capability in options.hardware:
        back = stand_in(capability)
        try:
            jobs = list(_kernels_for(capability))
            with ThreadPoolExecutor(options.jobs) as pool:
                yield from pool.map(compiled, jobs)
        finally:
            back()


PARTS = {1: check_inputs, 2: check_products, 3: check_int4_codes, 4: check_compiles}


def line(row: Row) -> str:
    """One row for people."""
    values = {
        key: significant(value) if isinstance(value, float) else value
        for key, value in row.items()
        if key not in ("part", "case", "ok") and value != ""
    }
    told = ", ".join(f"{key} {value}" for key, value in values.items())
    return f"{row['part']}  {'ok ' if row['ok'] else 'BAD'} {row['case']}: {told}"


def checked(options: Any, parts: Mapping[int, Callable[[Any], Iterable[Row]]], more: Mapping[str, Any]) -> int:
    """Run parts and print their rows; 1 if one failed or something is bad.

    Args:
        more: of what the rows were made by.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    made_by = {"gpu": gpu, "torch": torch.__version__, "humming": humming("_version").version, **more}
    print(made_by)
    rows, failed = Rows(options, made_by), []
    for part, check in parts.items():
        start = time.perf_counter()
        try:
            with torch.no_grad():
                for row in check(options):
                    rows.add(row)
                    print(line(row), flush=True)
        except Exception:  # noqa: BLE001 - the other parts are still worth their time
            traceback.print_exc()
            failed.append(part)
        print(f"{part}  {time.perf_counter() - start:.0f} s", flush=True)
    bad = [row["case"] for row in rows if not row["ok"]]
    print(f"failed parts: {failed or 'none'}; bad cases: {'; '.join(bad) or 'none'}")
    return 1 if failed or bad else 0


def main() -> int:
    """The parts that were asked for; 1 if one failed or something is bad."""
    parser = arguments(__doc__, model=None, device=False, text=None)
    parser.add_argument("--parts", default="1,2,3,4", help="which, with commas between")
    parser.add_argument("--tokens", type=int, default=300, help="rows of the inputs in parts 1 to 3")
    parser.add_argument("--hardware", default="75,80,86,89", help="capabilities to compile for in part 4")
    parser.add_argument("--jobs", type=int, default=16, help="compilers at once in part 4")
    options = parse(parser)
    options.hardware = [int(value) for value in options.hardware.split(",")]
    chosen = {part: PARTS[part] for part in map(int, options.parts.split(","))}
    return checked(options, chosen, {"tokens": options.tokens})


if __name__ == "__main__":
    run(main)
