"""Put measured tables into the READMEs: ``make demo``, then ``python benchmarks/readme_tables.py [FOLDER]``.

Used too, where FOLDER (default demo) has them: ``accuracy.json`` and ``peers.json`` of the benchmarks of that name,
``search.json`` (search_quality.py) and ``front.json`` (gguf_front.py).
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import accuracy
import gguf_front
import peers
import search_quality

from halfbyte.report.tables import format_bytes, format_ratio, format_seconds, markdown_table, significant

ROOT = Path(__file__).resolve().parent.parent


def percent(share: float | None) -> str | None:
    """0.884 -> 88.4%."""
    return None if share is None else f"{100 * share:.1f}%"


def comparison(rows: list[dict[str, Any]]) -> str:
    """What ``compare_real_quant.py --json`` wrote, as Markdown."""
    headers = ["model", "engine", "size", "load", "prompt tok/s", "gen tok/s", "speed-up", "peak memory", "ppl", "KLD"]
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
    return markdown_table([*headers, "same top"], table)


def simulation(rows: list[dict[str, Any]]) -> str:
    """What ``test_mixed_precision.py --json`` wrote, as Markdown."""
    table = []
    for row in rows:
        quality = row["quality"]
        numbers = [row["mean_bits"], quality["ppl"], quality["kld_mean"], quality["kld_p99"]]
        table.append([row["name"], *map(significant, numbers), percent(quality["top1_agreement"])])
    return markdown_table(["simulation", "mean A bits", "ppl", "KLD", "KLD 99%", "same top"], table)


def main(folder: Path) -> int:
    """Replace what stands between the markers."""
    kinds = {
        "comparison": comparison,
        "simulation": simulation,
        "accuracy": accuracy.table,
        "peers": peers.table,
        "search": search_quality.table,
        "front": gguf_front.table,
    }
    tables = {
        name: make(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["rows"])
        for name, make in kinds.items()
        if (folder / f"{name}.json").exists()
    }
    for readme in (ROOT / "README.md", ROOT / "README.zh-CN.md"):
        text = readme.read_text(encoding="utf-8")
        for name, table in tables.items():
            between = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
            text = re.sub(between, lambda match, table=table: f"{match[1]}\n{table}\n\n{match[2]}", text, flags=re.S)
        readme.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "demo"))
