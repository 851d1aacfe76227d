"""Put measured tables into the READMEs and the documents: ``python benchmarks/readme_tables.py [FOLDER]``.

A table stands between ``<!-- name -->`` and ``<!-- /name -->``. It is replaced where FOLDER (default: demo, which
``make demo`` fills) has its JSON file, together with the line that says what made it:

| file              | written by                              | tables                             |
| ----------------- | --------------------------------------- | ---------------------------------- |
| `comparison.json` | `compare_real_quant.py --json`          | `comparison`                       |
| `simulation.json` | `test_mixed_precision.py --json`        | `simulation`                       |
| `accuracy.json`   | `benchmarks/accuracy.py --json`         | `accuracy`, `accuracy-short`       |
| `front.json`      | `benchmarks/gguf_front.py --json`       | `front`, `front-short`, `headline` |
| `search.json`     | `benchmarks/search_quality.py --json`   | `search`, `search-short`           |
| `peers.json`      | `benchmarks/peers.py --json`            | `peers`                            |
| `speed.json`      | `benchmarks/search_speed.py --json`     | `speed`                            |

The table `memory` needs no file: it is computed by halfbyte's own estimate, from the models' shapes.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import accuracy
import gguf_front
import peers
import search_quality
import torch
from transformers import Qwen2Config

from halfbyte.models.estimate import estimate_search, estimate_types
from halfbyte.models.families.qwen2 import FAMILY
from halfbyte.report.tables import Cell, format_bytes, format_ratio, format_seconds, markdown_table, significant

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "README.zh-CN.md", "docs/results.md", "docs/hardware.md")

Rows = list[dict[str, Any]]
MadeBy = dict[str, Any]

SHORT_RECIPES = ("plain", "smooth", "online", "gptq", "clip", "sim", "gguf", "ada", "hopper", "blackwell")
SHORT_METHODS = ("rule", "Fisher knapsack", "KL knapsack", "KL + Fisher knapsack", "best start", "genetic", "search")
HEADLINE_TYPE = "Q4_K_M"
HEADLINE = {
    "en": "**SmolLM2-135M-Instruct as a file of the size of {type}: KL to the original {ours} with halfbyte, {theirs} "
    "with llama.cpp**\n({ratio}; KL says how far predictions are from the original's, in nats per token; unseen text).",
    "zh": "**SmolLM2-135M-Instruct，文件大小与 {type} 相同：与原始模型的 KL，halfbyte 为 {ours}，"
    "llama.cpp 为 {theirs}**\n（前者是后者的 {ratio}；KL 表示预测偏离原始模型多少，单位为每 token 的 nat，"
    "在未用于任何选择的文本上）。",
}

# hidden size, MLP, blocks, heads, key/value heads, vocabulary, whether the head is tied to the embedding
QWEN_SHAPES = {
    "Qwen2.5-0.5B": (896, 4864, 24, 14, 2, 151936, True),
    "Qwen2.5-1.5B": (1536, 8960, 28, 12, 2, 151936, True),
    "Qwen2.5-3B": (2048, 11008, 36, 16, 2, 151936, True),
    "Qwen2.5-7B": (3584, 18944, 28, 28, 4, 152064, False),
    "Qwen2.5-14B": (5120, 13824, 48, 40, 8, 152064, False),
    "Qwen2.5-32B": (5120, 27648, 64, 40, 8, 152064, False),
    "Qwen2.5-72B": (8192, 29568, 80, 64, 8, 152064, False),
}
CALIB_TOKENS = 32_768  # the defaults on an accelerator
SEARCH_TOKENS = 4_096
CTX = 512
MEAN_BITS = 4.9  # of llama.cpp's Q4_K_M


def percent(share: float | None) -> str | None:
    """0.884 -> 88.4%."""
    return None if share is None else f"{100 * share:.1f}%"


def comparison(rows: Rows) -> str:
    """What ``compare_real_quant.py --json`` wrote."""
    headers = ["model", "engine", "size", "load", "prompt tok/s", "gen tok/s", "speed-up", "peak memory", "ppl", "KL"]
    table = []
    for row in rows:
        measured, quality = row["measured"], row["quality"]
        table.append(
            [
                row["name"],
                row["engine"],
                format_bytes(measured["bytes"]),
                format_seconds(measured["load_seconds"]),
                significant(measured["prompt_tokens_per_second"]),
                significant(measured["generation_tokens_per_second"]),
                format_ratio(row["speed_up"]),
                format_bytes(measured["peak_memory"]),
                significant(quality["ppl"], 4),
                significant(quality["kld_mean"]),
                percent(quality["top1_agreement"]),
            ]
        )
    return markdown_table([*headers, "top-1"], table)


def simulation(rows: Rows) -> str:
    """What ``test_mixed_precision.py --json`` wrote."""
    table = []
    for row in rows:
        quality = row["quality"]
        numbers = [row["mean_bits"], quality["ppl"], quality["kld_mean"], quality["kld_p99"]]
        table.append([row["name"], *map(significant, numbers), percent(quality["top1_agreement"])])
    return markdown_table(["simulation", "mean A bits", "ppl", "KL", "KL 99%", "top-1"], table)


def _kl(quality: dict[str, Any] | None) -> str:
    return "—" if quality is None else significant(quality["kld_mean"])


def accuracy_short(rows: Rows) -> str:
    """KL alone, of the recipes that the README shows."""
    headers = ["recipe", *(f"{column}: KL" for column in accuracy.COLUMNS)]
    table = [
        [row["recipe"], *(_kl(row.get(column)) for column in accuracy.COLUMNS)]
        for row in rows
        if row["name"] in SHORT_RECIPES
    ]
    return markdown_table(headers, table, "l" + "r" * len(accuracy.COLUMNS))


def pairs(rows: Rows) -> Iterable[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(type, llama.cpp's row, our row) for every size that both have, the largest first."""
    ours = {row["label"].removeprefix("at "): row for row in rows if row["maker"] == "halfbyte"}
    for row in sorted(rows, key=lambda row: -row["bytes"]):
        if row["maker"] == "llama.cpp" and row["label"] in ours:
            yield row["label"], row, ours[row["label"]]


def front_short(rows: Rows) -> str:
    """One line per size: llama.cpp's file and ours."""
    headers = ["size of", "bytes", "KL, llama.cpp", "KL, halfbyte", "ratio", "top-1, llama.cpp", "top-1, halfbyte"]
    table: list[list[Cell]] = []
    for name, theirs, ours in pairs(rows):
        losses = [theirs["kld_mean"], ours["kld_mean"]]
        tops = [percent(row["top1_agreement"]) for row in (theirs, ours)]
        table.append([name, f"{theirs['bytes']:,}", *map(significant, losses), f"{losses[1] / losses[0]:.2f}", *tops])
    return markdown_table(headers, table, "lrrrrrr")


def headline(rows: Rows, language: str) -> str:
    """The result at the top of the README."""
    theirs, ours = next((theirs, ours) for name, theirs, ours in pairs(rows) if name == HEADLINE_TYPE)
    return HEADLINE[language].format(
        type=HEADLINE_TYPE,
        ratio=percent(ours["kld_mean"] / theirs["kld_mean"]),
        ours=significant(ours["kld_mean"]),
        theirs=significant(theirs["kld_mean"]),
    )


def search_short(rows: Rows) -> str:
    """The methods that the README shows."""
    return search_quality.table([row for row in rows if row["method"] in SHORT_METHODS])


def speed(rows: Rows) -> str:
    """What ``search_speed.py --json`` wrote."""
    headers = ["weights", "candidate tokens/s", "unit KL (s)", "search (s)", "candidates", "share of tokens"]
    table: list[list[Cell]] = [
        [
            row["mode"],
            f"{row['candidate_tokens_per_second']:.0f}",
            significant(row.get("sensitivity_seconds")),
            significant(row.get("search_seconds")),
            row.get("evaluations"),
            significant(row.get("share_of_tokens")),
            format_bytes(row["peak_memory"]),
        ]
        for row in rows
    ]
    return markdown_table([*headers, "peak memory"], table, "lrrrrrr")


def memory() -> str:
    """Estimated bytes by size of the model, for the defaults on a GPU with bf16."""
    kinds = ("A4/A8", "A4/A8, packed", "types", "types, packed")
    headers = ["model", *(f"{kind}: {where}" for kind in kinds for where in ("GPU", "main"))]
    cuda = torch.device("cuda")
    table: list[list[Cell]] = []
    for name, (hidden, mlp, blocks, heads, kv_heads, vocabulary, tied) in QWEN_SHAPES.items():
        config = Qwen2Config(
            hidden_size=hidden,
            intermediate_size=mlp,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
            dtype=torch.bfloat16,
        )
        tokens = (CALIB_TOKENS, 2 * SEARCH_TOKENS)
        found = [
            estimate_search(config, FAMILY, torch.bfloat16, CALIB_TOKENS, CTX, packed=packed)
            for packed in (False, True)
        ]
        size = int(MEAN_BITS / 8 * found[0].parameters)
        found += [
            estimate_types(config, FAMILY, torch.bfloat16, tokens, CTX, nbytes=size, packed=packed)
            for packed in (False, True)
        ]
        table.append([name, *(format_bytes(size) for one in found for size in (one.on(cuda), one.host))])
    return markdown_table(headers, table, "l" + "r" * (len(headers) - 1))


def made_by(found: MadeBy) -> str:
    """The line below a table: model, machine, text and version, in words that need no translation."""
    text = found.get("text")
    name = text["name"] if isinstance(text, dict) else text
    versions = found.get("versions") or {}
    parts = [
        found.get("model"),
        found.get("machine") or found.get("device"),
        found.get("dtype"),
        found.get("engine") if isinstance(found.get("engine"), str) else None,
        name and f"text {name}",
        "ppl" in found and f"ppl {significant(found['ppl'], 4)}",
        versions.get("halfbyte") and f"halfbyte {versions['halfbyte']}",
    ]
    return f"`{'; '.join(str(part) for part in parts if part)}`"


TABLES: dict[str, dict[str, Callable[[Rows], str]]] = {
    "comparison": {"comparison": comparison},
    "simulation": {"simulation": simulation},
    "accuracy": {"accuracy": accuracy.table, "accuracy-short": accuracy_short},
    "front": {"front": gguf_front.table, "front-short": front_short},
    "search": {"search": search_quality.table, "search-short": search_short},
    "peers": {"peers": peers.table},
    "speed": {"speed": speed},
}


def blocks(folder: Path, language: str) -> dict[str, str]:
    """What goes between the markers, by name, for every file that ``folder`` has."""
    found = {"memory": memory()}
    for name, makers in TABLES.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        line = made_by(content.get("made_by", content))
        found |= {marker: f"{make(content['rows'])}\n\n{line}" for marker, make in makers.items()}
        if name == "front":
            found["headline"] = headline(content["rows"], language)
    return found


def main(folder: Path) -> int:
    """Replace what stands between the markers."""
    for name in DOCUMENTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        for marker, block in blocks(folder, "zh" if ".zh" in name else "en").items():
            between = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
            text = re.sub(between, lambda match, block=block: f"{match[1]}{block}\n{match[2]}", text, flags=re.S)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo"))
