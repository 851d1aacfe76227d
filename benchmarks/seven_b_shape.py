"""Time and memory of a search, and of encoding, on the shape of Qwen2.5-7B-Instruct, with random weights.

    python benchmarks/seven_b_shape.py --folder seven_b [--layers 28] [-- further flags of mixed_precision_ptq.py]
    python benchmarks/seven_b_shape.py --folder seven_b -- --target sim --device_memory 8GB
    python benchmarks/seven_b_shape.py --folder seven_b --encode Q4_K_M [--json OUT]
    python benchmarks/seven_b_shape.py --folder seven_b --export [--json OUT]

Writes the model once (15 GB in bf16), runs the real command on it and prints what each stage took. Random weights say
nothing about quality; time and memory are those of the real model. Beside stages of ``--target sim`` that consist of
products stands what these would take alone, at the rate that this machine multiplies at (``stage_limits.py``).

``--encode`` writes one GGUF file instead: every matrix is encoded by llama.cpp's own quantiser in the type that the
file type gives it, and written before the next one is read. Its main memory is what the process
holds itself (anonymous pages), and apart from that mapped pages, which the system takes back when it needs them.
``--export`` writes a plan with random codes, all A8 for Hopper, and measures ``halfbyte export vllm --no-check``.
``--decode`` measures how quickly rows of each type are decoded, ``--tune`` a step of tuning on random codes and text.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace

import psutil
import torch
from common import Row, Rows, arguments, machine, parse, run
from stage_limits import limits, rates, work_of_stages
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from halfbyte.core.environment import peak_memory
from halfbyte.core.files import sha256
from halfbyte.models.families import family_of
from halfbyte.models.layers import layers_of, units_of
from halfbyte.models.loading import find, load
from halfbyte.plan import Codes, LayerPlan, Plan, codes_path, save_codes, save_plan
from halfbyte.prepare.candidates import menus_of
from halfbyte.prepare.tune import BATCH_TOKENS, Judged, tuned_codes
from halfbyte.quant.ggml.types import QUANTISED, decode_tensor, row_bytes
from halfbyte.quant.int4 import ANY_FP16, PackedWeight
from halfbyte.quant.quant_linear import InputScheme, SharedInput, replace_linear_
from halfbyte.search.reference import Reference
from halfbyte.targets import TARGETS
from halfbyte.targets.gguf_files.size import ftype_types
from halfbyte.targets.gguf_files.writer import write_gguf

ROOT = Path(__file__).resolve().parent.parent
SHAPE = {"layers": 28, "hidden": 3584, "intermediate": 18944, "vocab": 152064}  # of Qwen2.5-7B


def shape_of(layers: int, hidden: int, intermediate: int, vocab: int) -> Qwen2Config:
    """The config of a model of that shape: heads of 128 channels, seven of which share a key and value head."""
    heads = hidden // 128
    return Qwen2Config(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 7),
        vocab_size=vocab,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )


def write_model(folder: Path, shape: dict[str, int]) -> None:
    """Save a random model of that shape and a small byte-level tokenizer."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(shape_of(**shape), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    small_tokenizer(min(8000, shape["vocab"])).save_pretrained(folder)


def small_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of about so many tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def time_decoding() -> None:
    """Print how long the widest matrix of the model takes from encoded rows to bf16, per type."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    columns = 18944
    for kind in QUANTISED:
        rows = torch.randint(0, 256, (3584, row_bytes(columns, kind)), dtype=torch.uint8, device=device)
        spent = []
        for _ in range(4):  # the first one warms up
            _wait(device)
            started = time.perf_counter()
            decode_tensor(rows, kind, torch.bfloat16)
            _wait(device)
            spent.append(time.perf_counter() - started)
        print(f"{kind}: {1e3 * min(spent):.2f} ms, {3584 * columns / min(spent) / 1e9:.1f} billion weights/s")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


class MemoryWatch:
    """Peaks of a process while a ``with`` block runs: ``own`` bytes, and ``mapped`` bytes of files on top.

    Args:
        pid: of the process, by default this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._process = psutil.Process(pid)

    def __enter__(self) -> MemoryWatch:
        self.own = self.mapped = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            with suppress(psutil.NoSuchProcess):
                now = self._process.memory_info()
                self.own, self.mapped = max(self.own, now.rss - now.shared), max(self.mapped, now.shared)


def encode(folder: Path, ftype: str) -> Row:
    """Write the model as one GGUF file of llama.cpp's ``ftype``, and delete it; time, size and memory."""
    path = folder / "encoded.gguf"
    with MemoryWatch() as memory:
        started = time.monotonic()
        source = load(find(str(folder)), device=torch.device("cpu"), dtype=torch.bfloat16)
        menus = menus_of(source, mean_bits=4.5)
        types = ftype_types(source, menus, ftype)
        embedding, head = types.pop(source.family.embedding), types.pop(source.family.head)
        rows = write_gguf(path, source, layer_types=types, embedding_type=embedding, output_type=head)
        seconds = time.monotonic() - started
    path.unlink()
    return {
        "types": ftype,
        "blocks": source.config.num_hidden_layers,
        "weights": sum(menu.rows * menu.columns for menu in menus),
        "bytes": sum(row.nbytes for row in rows),
        "seconds": seconds,
        "peak_own_memory": memory.own,
        "peak_mapped_memory": memory.mapped,
    }


def export(folder: Path) -> Row:
    """Write a plan with random codes, export it in a process of its own, and delete the result."""
    config, output = folder / "random.pt", folder / "exported"
    random_plan(folder, config)
    arguments = ["--config", str(config), "--output", str(output), "--no-check", "--force"]
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "halfbyte", "export", "vllm", *arguments])
    with MemoryWatch(process.pid) as memory:
        code = process.wait()
    seconds = time.monotonic() - started
    if code:
        raise SystemExit(code)
    shards = [path.stat().st_size for path in output.glob("*.safetensors")]
    shutil.rmtree(output)
    return {
        "codes": codes_path(config).stat().st_size,
        "bytes": sum(shards),
        "largest_shard": max(shards),
        "seconds": seconds,
        "peak_own_memory": memory.own,
        "peak_mapped_memory": memory.mapped,
    }


def random_plan(folder: Path, path: Path) -> None:
    """A plan of all A8 for Hopper, whose codes are random and whose scales are all the same."""
    source = load(find(str(folder)), device=torch.device("cpu"), dtype=torch.bfloat16)
    layers, recipe = layers_of(source.model, source.family), TARGETS["vllm"].on("hopper").recipe
    generator, codes = torch.Generator().manual_seed(0), Codes({}, {}, {})
    for layer in layers:
        rows, columns = layer.out_features, layer.in_features
        packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, generator=generator)
        scales = torch.full((rows, columns // recipe.group_size), 2.0**-7, dtype=torch.float16)
        codes.weights[layer.name] = PackedWeight(packed, scales)
    entry = LayerPlan(4, 8, recipe.group_size, a_symmetric=recipe.symmetric, arithmetic=recipe.arithmetic)
    save_codes(codes_path(path), codes)
    plan = Plan(
        model_id=str(folder),
        fingerprint=source.fingerprint,
        target="vllm",
        hardware="sm90",
        granularity="fused",
        layers={layer.name: entry for layer in layers},
        budget_asked=1.0,
        budget_reached=1.0,
        text={"name": "none"},
        search={"scores": {"plan": 0.0}, "validation": {"plan": 0.0}},
        codes_sha256=sha256(codes_path(path)),
    )
    save_plan(path, plan)


def search(options: argparse.Namespace, further: list[str]) -> Row:
    """Run the command; what it says it took.

    Raises:
        SystemExit: it failed.
    """
    folder, result = options.folder, options.folder / "result.json"
    arguments = ["--model_id", str(folder), "--output", str(folder / "plan.pt"), "--calib", "pydoc", "--force"]
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "mixed_precision_ptq.py"), *arguments, "--json", str(result), *further]
    if code := subprocess.call(command):
        raise SystemExit(code)
    wall, record = time.monotonic() - started, json.loads(result.read_text(encoding="utf-8"))
    return {"flags": further, "wall": wall, "limits": limits_of(options.folder, record["plan"]), **record["measured"]}


def limits_of(folder: Path, plan: Row) -> dict[str, float]:
    """Stage -> the least seconds that its products take here; of a plan for ``sim``, whose transforms are counted."""
    tokens = {name: plan["search"].get(f"{name}_tokens") for name in ("calib", "search")}
    if plan["target"] != "sim" or None in tokens.values():
        return {}
    origin = find(str(folder))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(origin.config)
    units = units_of(layers_of(model, origin.family), origin.family, "fused")
    work = work_of_stages(
        units,
        vocabulary=origin.config.vocab_size,
        calib_tokens=tokens["calib"],
        search_tokens=tokens["search"],
    )
    return limits(work, rates(torch.device("cuda" if torch.cuda.is_available() else "cpu")))


def describe(row: Row) -> str:
    """One measurement for people."""
    if "types" in row:
        return (
            f"{row['weights'] / 1e9:.2f} billion weights in {row['blocks']} blocks as {row['types']}, "
            f"{row['bytes'] / 1e9:.2f} GB, {row['seconds']:.0f} s, own memory {row['peak_own_memory'] / 1e9:.2f} GB, "
            f"mapped {row['peak_mapped_memory'] / 1e9:.2f} GB"
        )
    if "codes" in row:
        return (
            f"codes of {row['codes'] / 1e9:.2f} GB exported as {row['bytes'] / 1e9:.2f} GB in {row['seconds']:.0f} s, "
            f"largest shard {row['largest_shard'] / 1e9:.2f} GB, own memory {row['peak_own_memory'] / 1e9:.2f} GB, "
            f"mapped {row['peak_mapped_memory'] / 1e9:.2f} GB"
        )
    lines = [f"{row['wall']:.0f} s in all, of these"]
    for name, stage in row["stages"].items():
        device = "" if stage["device"] is None else f", device {stage['device'] / 1e9:.1f} GB"
        limit = f", its products alone {row['limits'][name]:.1f} s" if name in row["limits"] else ""
        lines.append(f"  {name}: {stage['seconds']:.1f} s, main memory {stage['host'] / 1e9:.1f} GB{device}{limit}")
    lines.append(f"peak memory: device {row['peak_memory'] / 1e9:.1f} GB, host {row['peak_host'] / 1e9:.1f} GB")
    return "\n".join([*lines, "(host: with pages of mapped files, which the system drops where others need room)"])


def time_tuning(shape: dict[str, int]) -> None:
    """Seconds of a step and peak memory on the device, for random codes behind rotations, A4 and A8 in turn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = shape_of(**shape)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    family, weights, shared, scheme = family_of(config.model_type), {}, SharedInput(), InputScheme(rotated=True)
    for layer in layers_of(model, family):
        packed = torch.randint(256, (layer.out_features, layer.in_features // 2), dtype=torch.uint8, device=device)
        scales = torch.full((layer.out_features, layer.in_features // 128), 2e-3, dtype=torch.float16, device=device)
        weights[layer.name] = PackedWeight(packed, scales)
        replace_linear_(model, layer.name, weights[layer.name], shared, scheme, packed=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    tokens = torch.randint(config.vocab_size, (2 * BATCH_TOKENS // 512, 512))
    answers = Reference(torch.randn(*tokens.shape, config.hidden_size), torch.zeros(tokens.shape))
    text, other = Judged(tokens, answers), Judged(tokens[:2], answers.split(2)[0])
    bits = {name: (4, 8)[at % 2] for at, name in enumerate(weights)}
    source, layers = SimpleNamespace(model=model, family=family), {name: model.get_submodule(name) for name in weights}
    took = {}
    for steps in (2, 10):
        started = time.monotonic()
        tuned_codes(source, Codes(weights, {}, {}), bits, ANY_FP16, text, other, steps=steps, seed=0)  # pyright: ignore
        took[steps] = time.monotonic() - started
        for name, layer in layers.items():  # others have taken their places
            model.set_submodule(name, layer)
    name = torch.cuda.get_device_name() if device.type == "cuda" else machine()
    step = (took[10] - took[2]) / 8
    print(f"{shape['layers']} blocks on {name}: {step:.2f} s a step, peak {peak_memory(device) / 1e9:.1f} GB")


def main() -> int:
    """Write the model if it is not there, search or encode, report."""
    parser = arguments(__doc__, model=None, device=False, text=None)
    parser.add_argument("--folder", type=Path, default=Path("seven_b"))
    parser.add_argument("--layers", type=int, default=SHAPE["layers"])
    parser.add_argument("--hidden", type=int, default=SHAPE["hidden"])
    parser.add_argument("--intermediate", type=int, default=SHAPE["intermediate"])
    parser.add_argument("--vocab", type=int, default=SHAPE["vocab"])
    parser.add_argument("--encode", metavar="FTYPE", help="write a file of this type of llama.cpp's, search nothing")
    parser.add_argument("--export", action="store_true", help="export a plan with random codes, search nothing")
    parser.add_argument("--decode", action="store_true", help="measure decoding only")
    parser.add_argument("--tune", action="store_true", help="measure a step of tuning only")
    parser.add_argument("further", nargs="*", help="after --: flags of mixed_precision_ptq.py")
    options = parse(parser)
    shape = {name: getattr(options, name) for name in SHAPE}
    if options.decode or options.tune:
        time_tuning(shape) if options.tune else time_decoding()
        return 0
    if not (options.folder / "config.json").exists():
        started = time.monotonic()
        write_model(options.folder, shape)
        print(f"model written in {time.monotonic() - started:.0f} s", flush=True)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    rows = Rows(options, {"machine": machine(), "gpu": gpu, **shape})
    if options.export:
        rows.add(export(options.folder))
    else:
        rows.add(encode(options.folder, options.encode) if options.encode else search(options, options.further))
    print(f"{options.layers} blocks on {gpu or machine()}: {describe(rows.rows[-1])}")
    return 0


if __name__ == "__main__":
    run(main)
