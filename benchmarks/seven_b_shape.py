"""Time and memory of a search on the shape of Qwen2.5-7B-Instruct, with random weights.

    python benchmarks/seven_b_shape.py --folder /tmp/seven_b [--layers 28] [-- further flags of mixed_precision_ptq.py]
    python benchmarks/seven_b_shape.py --folder /tmp/seven_b --device-memory 8 -- --spaces ggml --codes packed

Writes the model once (15 GB in bf16), runs the real command on it and prints what it took. Random weights say nothing
about quality; time and memory are those of the real model. The candidates of a search of types take about 30 GB of disk
beside it. With ``--device-memory`` PyTorch may allocate no more than that on the GPU, as if it were a smaller one.
``--decode`` only measures how quickly rows of each type are decoded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from halfbyte.quant.ggml.types import QUANTISED, decode_tensor, row_bytes

ROOT = Path(__file__).resolve().parent.parent


def write_model(folder: Path, layers: int) -> None:
    """Save a random model of that shape and a small byte-level tokenizer."""
    config = Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=layers,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    small_tokenizer(8000).save_pretrained(folder)


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


def run_search(arguments: list[str], device_memory: float) -> int:
    """The real command in a process of its own, with at most ``device_memory`` GB on the GPU (0: all of it)."""
    command = [sys.executable, str(ROOT / "mixed_precision_ptq.py")]
    if device_memory:
        share = device_memory * 1e9 / torch.cuda.get_device_properties(0).total_memory
        start = "import sys, runpy; from halfbyte.cli import use_growing_segments; use_growing_segments(); import torch"
        limit = f"{start}; torch.cuda.set_per_process_memory_fraction({share})"
        command = [sys.executable, "-c", f"{limit}; runpy.run_path(sys.argv.pop(1), run_name='__main__')", command[1]]
    return subprocess.call([*command, *arguments])


def main() -> int:
    """Write the model if it is not there, search, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("seven_b"))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--device-memory", type=float, default=0.0, help="GB of the GPU to use; 0 is all")
    parser.add_argument("--decode", action="store_true", help="measure decoding only")
    options, further = parser.parse_known_args()
    if options.decode:
        time_decoding()
        return 0
    if not (options.folder / "config.json").exists():
        started = time.monotonic()
        write_model(options.folder, options.layers)
        print(f"model written in {time.monotonic() - started:.0f} s", flush=True)
    output = options.folder / "plan.pt"
    further = [flag for flag in further if flag != "--"]
    arguments = [
        "--model_id",
        str(options.folder),
        "--output",
        str(output),
        "--calib",
        "pydoc",
        "--force",
        "--json",
        str(options.folder / "result.json"),
        *further,
    ]
    started = time.monotonic()
    code = run_search(arguments, options.device_memory)
    if code == 0:
        measured = json.loads((options.folder / "result.json").read_text(encoding="utf-8"))["measured"]
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{options.layers} blocks on {where}: {time.monotonic() - started:.0f} s in all, of these")
        for stage, seconds in measured["seconds"].items():
            print(f"  {stage}: {seconds:.1f} s")
        if measured["preparation_memory"] is not None:
            print(f"peak device memory until the W4 codes stood: {measured['preparation_memory'] / 1e9:.1f} GB")
        print(f"peak memory: device {measured['peak_memory'] / 1e9:.1f} GB, host {measured['peak_host'] / 1e9:.1f} GB")
        print("(host: pages of mapped files count while they are there; the system drops them where others need room)")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
