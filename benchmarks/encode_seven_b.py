"""Time and memory to encode the shape of Qwen2.5-7B-Instruct and write it as one GGUF file.

    python benchmarks/encode_seven_b.py --folder seven_b [--layers 28] [--like Q4_K_M] [--json OUT]

The model (random weights, made once by ``seven_b_shape.py``'s code, 15 GB) is mapped; every matrix is encoded by
llama.cpp's own quantiser in the type that the file type gives it, with an importance, and written before the next one
is read. Main memory is what the process holds itself (anonymous pages) and its peak with mapped pages, which the system
takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
from seven_b_shape import write_model
from transformers.utils.logging import disable_progress_bar

from halfbyte.core.environment import cores, cpu_name
from halfbyte.core.errors import HalfbyteError
from halfbyte.core.files import write_text
from halfbyte.models.loading import find, load
from halfbyte.prepare.menus import menus_of
from halfbyte.report.terminal import Drawing
from halfbyte.targets.gguf_files.size import ftype_types
from halfbyte.targets.gguf_files.writer import write_gguf


class MemoryWatch:
    """Peaks of this process while a ``with`` block runs: ``own`` bytes, and ``mapped`` bytes of files on top."""

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
        process = psutil.Process()
        while not self._done.wait(0.2):
            now = process.memory_info()
            self.own, self.mapped = max(self.own, now.rss - now.shared), max(self.mapped, now.shared)


def main() -> int:
    """Write the model if it is not there, encode it, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("seven_b"))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--like", default="Q4_K_M", help="llama.cpp's file type whose types are used")
    parser.add_argument("--json", help="also write the numbers here")
    options = parser.parse_args()
    disable_progress_bar()
    if not (options.folder / "config.json").exists():
        write_model(options.folder, options.layers)
    draw, path = Drawing(), options.folder / "encoded.gguf"
    with MemoryWatch() as memory:
        started = time.monotonic()
        source = load(find(str(options.folder)), device=torch.device("cpu"), dtype=torch.bfloat16)
        menus = menus_of(source, mean_bits=4.5)
        types = ftype_types(source, menus, options.like)
        ends = {"embedding_type": types.pop(source.family.embedding), "output_type": types.pop(source.family.head)}
        generator = torch.Generator().manual_seed(0)
        importance = {menu.name: torch.rand(menu.columns, generator=generator) + 0.1 for menu in menus}
        rows = write_gguf(path, source, layer_types=types, importance=importance, **ends)
        seconds = time.monotonic() - started
    draw.finish()
    weights = sum(menu.rows * menu.columns for menu in menus)
    found = {
        "machine": f"{cpu_name()}, {cores()} cores",
        "blocks": source.config.num_hidden_layers,
        "weights": weights,
        "types": options.like,
        "bytes": sum(row.nbytes for row in rows),
        "seconds": seconds,
        "peak_own_memory": memory.own,
        "peak_mapped_memory": memory.mapped,
    }
    path.unlink()
    print(
        f"{found['machine']}: {weights / 1e9:.2f} billion weights in {found['blocks']} blocks as {options.like}, "
        f"{found['bytes'] / 1e9:.2f} GB, {seconds:.0f} s, "
        f"own memory {memory.own / 1e9:.2f} GB, mapped {memory.mapped / 1e9:.2f} GB"
    )
    if options.json:
        write_text(Path(options.json), json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HalfbyteError as error:
        sys.exit(str(error))
