"""Time and memory of a search on the shape of Qwen2.5-7B-Instruct, with random weights.

    python benchmarks/seven_b_shape.py --folder /tmp/seven_b [--layers 28] [-- further flags of mixed_precision_ptq.py]

Writes the model once (15 GB in bf16), runs the real command on it and prints what it took. Random weights say nothing
about quality; time and memory are those of the real model.
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

ROOT = Path(__file__).resolve().parent.parent


def write_model(folder: Path, layers: int) -> None:
    """Save a random model of that shape and a small byte-level tokenizer."""
    config = Qwen2Config(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=layers, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768, rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )  # fmt: skip
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


def main() -> int:
    """Write the model if it is not there, search, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("seven_b"))
    parser.add_argument("--layers", type=int, default=28)
    options, further = parser.parse_known_args()
    if not (options.folder / "config.json").exists():
        started = time.monotonic()
        write_model(options.folder, options.layers)
        print(f"model written in {time.monotonic() - started:.0f} s", flush=True)
    output = options.folder / "plan.pt"
    further = [flag for flag in further if flag != "--"]
    command = [
        sys.executable, str(ROOT / "mixed_precision_ptq.py"), "--model_id", str(options.folder),
        "--output", str(output), "--calib", "pydoc", "--force", "--json", str(options.folder / "result.json"), *further,
    ]  # fmt: skip
    started = time.monotonic()
    code = subprocess.call(command)
    if code == 0:
        measured = json.loads((options.folder / "result.json").read_text(encoding="utf-8"))["measured"]
        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
        print(f"{options.layers} blocks on {where}: {time.monotonic() - started:.0f} s in all, of these")
        for stage, seconds in measured["seconds"].items():
            print(f"  {stage}: {seconds:.1f} s")
        print(f"peak device memory until the W4 codes stood: {measured['preparation_memory'] / 1e9:.1f} GB")
        print(f"peak memory: device {measured['peak_memory'] / 1e9:.1f} GB, host {measured['peak_host'] / 1e9:.1f} GB")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
