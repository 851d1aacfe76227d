"""How long llama.cpp takes for a weight of each ggml type when it generates: the table in runtime/type_speed.py.

    python benchmarks/type_speed.py [--rounds 40] [--threads 2] [--json OUT]

Two random Llama models that differ only in their number of blocks are written once per type, all matrices of the blocks
in that type, and generate one token at a time. The difference of their times, over the difference of their weights, is
the time per weight; embedding, head and what a file costs at all cancel. All files stay open and take turns in short
rounds, and a type's median over the rounds counts: a machine that others share changes its speed from second to second,
and the fastest moment of one type says little beside that of another. A block's bytes are encoded once and used for all
blocks; values do not matter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from seven_b_shape import small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from halfbyte.core.environment import cores, cpu_name
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import write_text
from halfbyte.engines.llamacpp import open_engine
from halfbyte.models.loading import SourceModel, find, load
from halfbyte.models.modules import linear
from halfbyte.quant.ggml.types import QUANTISED, encode
from halfbyte.report.tables import markdown_table, significant
from halfbyte.targets.gguf_files.tensors import EncodedRows
from halfbyte.targets.gguf_files.writer import write_gguf

DEPTHS = (4, 16)  # blocks of the two models
HIDDEN, MLP, HEADS, KV_HEADS, VOCABULARY = 768, 2048, 12, 4, 512  # rows of whole 256-blocks, for every type
GENERATED = 16  # tokens that are timed at once
KINDS = ("F16", *QUANTISED)


def make_source(folder: Path, depth: int) -> SourceModel:
    """A random Llama of so many blocks."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=depth,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    small_tokenizer(VOCABULARY).save_pretrained(folder)
    return load(find(str(folder)), device=torch.device("cpu"), dtype=torch.float32)


def encode_block(source: SourceModel, kind: str) -> dict[str, EncodedRows]:
    """Path of each linear in a block -> its rows in ``kind``."""
    found = {}
    for part in source.family.linears:
        weight = linear(source.model, f"{source.family.blocks}.0.{part}").weight.detach()
        rows = encode(weight, kind, importance=torch.ones(weight.shape[1]))
        found[part] = EncodedRows(kind, torch.from_numpy(rows).view(len(weight), -1))
    return found


def write_files(folder: Path) -> dict[str, list[Path]]:
    """Type -> its file of each depth."""
    sources = {depth: make_source(folder / str(depth), depth) for depth in DEPTHS}
    files: dict[str, list[Path]] = {}
    for kind in KINDS:
        block = {} if kind == "F16" else encode_block(sources[DEPTHS[0]], kind)
        for depth, source in sources.items():
            family, path = source.family, folder / f"{kind}-{depth}.gguf"
            encoded = {
                f"{family.blocks}.{index}.{part}": rows for index in range(depth) for part, rows in block.items()
            }
            write_gguf(path, source, encoded=encoded)
            files.setdefault(kind, []).append(path)
        print(f"{kind} written", flush=True)
    return files


def measure(files: dict[str, list[Path]], rounds: int, threads: int) -> dict[str, list[float]]:
    """Type -> seconds per token by which the deeper model takes longer, in each round."""
    found: dict[str, list[float]] = {kind: [] for kind in files}
    with ExitStack() as stack:
        models = {
            kind: [stack.enter_context(open_engine().load(path, n_ctx=GENERATED, n_threads=threads)) for path in paths]
            for kind, paths in files.items()
        }
        for done in range(rounds):
            for kind, pair in models.items():
                less, more = (1 / model.speed(0, GENERATED).generation_tokens_per_second for model in pair)
                found[kind].append(more - less)
            if (done + 1) % 10 == 0:
                print(f"round {done + 1} of {rounds}", flush=True)
    return found


def main() -> int:
    """Write the files, time them in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0, help="0 is one per core")
    parser.add_argument("--json", help="also write the table here")
    options = parser.parse_args()
    disable_progress_bar()
    threads = options.threads or cores()
    with tempfile.TemporaryDirectory() as name:
        files = write_files(Path(name))
        seconds = measure(files, options.rounds, threads)
    block = HIDDEN * (2 * HIDDEN + 2 * HIDDEN * KV_HEADS // HEADS + 3 * MLP)  # weights
    found = {kind: 1e12 * statistics.median(each) / (DEPTHS[1] - DEPTHS[0]) / block for kind, each in seconds.items()}
    ranked = sorted(found.items(), key=lambda item: item[1])
    rows = [[kind, significant(time), significant(time / found["Q8_0"])] for kind, time in ranked]
    print(markdown_table(["type", "ps per weight", "of Q8_0"], rows))
    machine = f"{cpu_name()}, {threads} threads, {open_engine().version}"
    print(f"\n{machine}, median of {options.rounds} rounds")
    if options.json:
        write_text(Path(options.json), json.dumps({"machine": machine, "picoseconds_per_weight": found}, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HalfbyteError as error:
        sys.exit(str(error))
