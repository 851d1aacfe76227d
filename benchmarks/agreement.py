"""Our perplexity and KLD beside those of llama.cpp's own tool, on the same files and text.

    python benchmarks/agreement.py --tool /path/to/llama-perplexity --reference F16.gguf FILE.gguf …

The tool is not part of any Python package; build the target llama-perplexity of llama.cpp.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from common import machine, run

from halfbyte.calibration.text import pydoc_text, scored_tokens
from halfbyte.core.environment import cores
from halfbyte.evaluate.quality import LogitsFile, measure
from halfbyte.evaluate.worker import run_worker
from halfbyte.report.tables import markdown_table, significant

PATTERNS = {
    "ppl": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "kld_mean": r"Mean\s+KLD:\s*(-?[\d.]+)",
    "kld_p99": r"99\.0%\s+KLD:\s*([\d.]+)",
    "top1_agreement": r"Same top p:\s*([\d.]+)",
}


def by_tool(tool: str, path: str, text: Path, base: Path, chunks: int, *, is_reference: bool) -> dict[str, float]:
    """Run llama-perplexity; the reference run writes ``base``."""
    more = [] if is_reference else ["--kl-divergence"]
    command = [tool, "-m", path, "-f", str(text), "-c", "512", "--chunks", str(chunks), "-t", str(cores())]
    done = subprocess.run([*command, "--kl-divergence-base", str(base), *more], capture_output=True, text=True)
    output = done.stdout + done.stderr
    if done.returncode:
        raise SystemExit(output[-2000:])
    if is_reference:
        return {}
    found = {}
    for name, pattern in PATTERNS.items():
        match = re.search(pattern, output)
        assert match, f"{name} is not in the tool's output"
        found[name] = float(match.group(1)) / (100 if name == "top1_agreement" else 1)
    return found


def by_us(path: str, text: Path, folder: Path, chunks: int) -> dict[str, Any]:
    """Logits of one file by our worker."""
    request = {
        "path": path,
        "engine": "xllamacpp",
        "threads": 0,
        "ctx": 512,
        "chunks": chunks,
        "texts": {"text": str(text)},
        "text_name": "text",
        "logits_file": str(folder / f"{Path(path).stem}.logits"),
        "prompt": "",
        "max_tokens": 0,
        "stage": "ours",
    }
    return {**run_worker("halfbyte.evaluate.measure_gguf", request), "logits_file": request["logits_file"]}


def main() -> int:
    """Measure and print one Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", required=True)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("files", nargs="+")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text, base = folder / "text.txt", folder / "base.kld"
        text.write_text(pydoc_text()[:60_000], encoding="utf-8")
        by_tool(options.tool, options.reference, text, base, options.chunks, is_reference=True)
        reference = by_us(options.reference, text, folder, options.chunks)
        size = scored_tokens(512)
        for path in options.files:
            theirs = by_tool(options.tool, path, text, base, options.chunks, is_reference=False)
            ours = by_us(path, text, folder, options.chunks)
            files = [LogitsFile(Path(run["logits_file"]), run["vocab"], size) for run in (ours, reference)]
            quality = measure(ours["windows"], iter(files[0]), iter(files[1]))
            for metric, value in theirs.items():
                mine = getattr(quality, metric)
                row = [Path(path).name, metric, significant(value, 5), significant(mine, 5)]
                rows.append([*row, f"{100 * (mine / value - 1):+.2f}%"])
    print(markdown_table(["file", "number", "llama-perplexity", "halfbyte", "difference"], rows))
    print(f"\n{machine()}, {options.chunks} windows of 512, text pydoc")
    return 0


if __name__ == "__main__":
    run(main)
