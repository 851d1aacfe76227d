"""Speed and memory of model folders in vLLM: prompts, generation, load time, and the kernels that vLLM chose.

    python benchmarks/serving.py --dummy 7b [--formats bf16,w4a16,w4a8,mixed] [--json OUT]
    python benchmarks/serving.py --folders original=DIR ours=DIR --serve_python ENV/bin/python [--tensor_parallel 2]

Every folder runs in a process of its own. With ``--dummy`` the weights are random and need no disk: the folders hold a
``config.json`` alone, in the shape of a model and the formats that ``--target vllm --hardware hopper`` writes. Any
folder without weights is run like that. Random weights say nothing about quality; speed and memory are real.

Compare numbers of one run only: cards of one name differ. A folder takes about a minute on an H100, so four of them,
with what starting takes, stay below eight minutes. Prompts are as long as ``--prompt_tokens`` and read together;
generation starts from short prompts, whose own time does not count.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import Row, Rows, arguments, machine, parse, run

from halfbyte.core.errors import HalfbyteError
from halfbyte.engines.served.serve_worker import Job, Speed
from halfbyte.evaluate.measure_served import GRAPHS, check_folder, run_job, serve_python
from halfbyte.report.tables import Cell, format_bytes, format_ratio, format_seconds, markdown_table, significant

SHAPES = {  # hidden, intermediate, layers, heads, key and value heads, vocabulary
    "7b": (3584, 18944, 28, 28, 4, 152064),  # Qwen2.5-7B
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
}
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LAYERS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BASELINE = "bf16"
FORMATS = {BASELINE: None, "w4a16": 0.0, "w4a8": 1.0, "mixed": 0.5}  # share of the blocks that compute A8
STEP_TOKENS = 8192  # of prompts, in one step of the engine


def config_of(shape: str) -> dict[str, Any]:
    """``config.json`` of an unquantised model."""
    hidden, intermediate, layers, heads, key_heads, vocabulary = SHAPES[shape]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocabulary,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def quantised(layers: int, a8: range) -> dict[str, Any]:
    """``quantization_config`` of int4 weights in groups of 128, with fp8 activations in the blocks ``a8``."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    inputs = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}
    parts = {True: inputs, False: None}
    groups = {}
    for is_a8, activations in parts.items():
        names = [f"model.layers.{at}.{part}" for at in range(layers) if (at in a8) == is_a8 for part in LAYERS]
        if names:
            group = {"targets": names, "weights": weights, "format": "pack-quantized"}
            groups[f"group_{len(groups)}"] = {**group, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": groups,
    }


def dummy_config(shape: str, name: str) -> dict[str, Any]:
    """``config.json`` of one of ``FORMATS``."""
    config = config_of(shape)
    layers = config["num_hidden_layers"]
    if FORMATS[name] is not None:
        config["quantization_config"] = quantised(layers, range(int(layers * FORMATS[name])))
    return config


def settings_of(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Keyword arguments of ``vllm.LLM``: graphs for the numbers of sequences that are timed, nothing compiled."""
    random = not list(folder.glob("*.safetensors"))
    return {
        "max_model_len": options.prompt_tokens + options.new_tokens + 1,
        "max_num_batched_tokens": max(STEP_TOKENS, options.prompt_tokens),
        "max_num_seqs": max(*options.sequences, options.prompts),
        "kv_cache_memory_bytes": int(options.cache_gb * 1e9),
        "tensor_parallel_size": options.tensor_parallel,
        "compilation_config": {**GRAPHS, "cudagraph_capture_sizes": sorted(options.sequences)},
        **({"load_format": "dummy"} if random else {}),
    }


def measured(name: str, folder: Path, options: argparse.Namespace, python: str) -> Row:
    """One row; a folder that vLLM does not run says why."""
    speed = Speed(options.prompts, options.prompt_tokens, options.sequences, options.new_tokens, options.runs)
    job = Job(folder=str(folder), stage=name, settings=settings_of(options, folder), speed=speed)
    try:
        check_folder(str(folder))
        result, kernels = run_job(job, python)
    except HalfbyteError as error:
        return {"name": name, "missing": str(error)}
    return {"name": name, **result, "kernels": list(kernels)}


def table(rows: Sequence[Row], sequences: Sequence[int]) -> str:
    """All rows as Markdown; prompts and generation also as a multiple of the baseline's."""
    base = next((row for row in rows if row["name"] == BASELINE and "missing" not in row), None)
    headers = ["folder", "kernels", "prompt, tokens/s", "× bf16"]
    for count in sequences:
        headers += [f"generation of {count}, tokens/s", "× bf16"]
    headers += ["load", "weights", "peak memory"]
    cells: list[list[Cell]] = []
    for row in rows:
        if "missing" in row:
            cells.append([row["name"], row["missing"], *[None] * (len(headers) - 2)])
            continue
        line: list[Cell] = [row["name"], "; ".join(row["kernels"]).replace("Using ", "") or "unquantised"]
        for value in speeds(row, sequences):
            line.append(significant(value))
            line.append(None)
        if base is not None:
            ratios = zip(speeds(row, sequences), speeds(base, sequences), strict=True)
            line[3::2] = [format_ratio(ours / theirs) for ours, theirs in ratios]
        line += [format_seconds(row["load_seconds"]), format_bytes(row["weight_bytes"])]
        cells.append([*line, format_bytes(row["peak_memory"])])
    return markdown_table(headers, cells)


def speeds(row: Row, sequences: Sequence[int]) -> list[float]:
    """Tokens per second: prompts, then generation for each number of sequences."""
    generation = row["generation_tokens_per_second"]
    return [row["prompt_tokens_per_second"], *(generation[str(count)] for count in sequences)]


def named_folders(options: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """Name -> folder, those with random weights first.

    Raises:
        HalfbyteError: a name without a folder, an unknown format, or nothing to measure.
    """
    found: dict[str, Path] = {}
    for name in options.formats.split(",") if options.dummy else []:
        if name not in FORMATS:
            raise HalfbyteError(f"--formats: unknown format, expected {', '.join(FORMATS)}, got {name}")
        found[name] = scratch / name
        found[name].mkdir()
        config = dummy_config(options.dummy, name)
        (found[name] / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for entry in options.folders:
        name, equals, folder = entry.partition("=")
        if not equals or name in found:
            raise HalfbyteError(f"--folders: expected NAME=DIR, each name once, got {entry}")
        found[name] = Path(folder)
    if not found:
        raise HalfbyteError("nothing to measure", fix="name folders with --folders, or a shape with --dummy")
    return found


def main() -> int:
    """Measure one folder after the other."""
    parser = arguments(__doc__, model=None, device=False, text=None)
    parser.add_argument("--folders", nargs="+", default=[], metavar="NAME=DIR", help="what to measure")
    parser.add_argument("--dummy", choices=SHAPES, help="random weights in this shape")
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"of --dummy: {', '.join(FORMATS)}")
    parser.add_argument("--serve_python", help="the Python that has vLLM; default: this one")
    parser.add_argument("--tensor_parallel", type=int, default=1, help="GPUs that share every layer")
    parser.add_argument("--prompts", type=int, default=16, help="prompts that are read together")
    parser.add_argument("--prompt_tokens", type=int, default=2048)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 16, 64], help="generated together")
    parser.add_argument("--new_tokens", type=int, default=256, help="per sequence")
    parser.add_argument("--runs", type=int, default=3, help="the best of so many counts")
    parser.add_argument("--cache_gb", type=float, default=4.0, help="of keys and values, on each GPU")
    options = parse(parser)
    python = serve_python(options.serve_python)
    named = ("dummy", "tensor_parallel", "prompts", "prompt_tokens", "sequences", "new_tokens", "runs", "cache_gb")
    rows = Rows(options, {"machine": machine(), **{name: getattr(options, name) for name in named}})
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as scratch:
        for name, folder in named_folders(options, Path(scratch)).items():
            if name in {row["name"] for row in rows}:
                continue
            rows.add(measured(name, folder, options, python))
            print(json.dumps(rows.rows[-1]), flush=True)
    print(table(rows.rows, options.sequences))
    device = next((row["device"] for row in rows if "device" in row), "no device")
    gpus = f"{options.tensor_parallel} × " if options.tensor_parallel > 1 else ""
    version = next((row["version"] for row in rows if "version" in row), "none")
    print(f"\n`{gpus}{device}; vLLM {version}; {options.prompts} prompts of {options.prompt_tokens} tokens`")
    return 0


if __name__ == "__main__":
    run(main)
