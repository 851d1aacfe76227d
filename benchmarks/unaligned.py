"""An unaligned copy of a model: the same function, and weights that lie on no quantiser's grid.

    python benchmarks/unaligned.py --model demo --output DIR [--spread 0.1] [--dtype fp32|bf16] [--seed 0]

A checkpoint whose weights were quantised once (the demo's were Q4_1) flatters every format with the same grid. Here
every input channel of every linear layer in the blocks gets a random factor, exp(N(0, spread²)), and what makes that
input is divided by it: the norm before q, k, v and before gate and up, the rows of v before o (one factor for the query
heads that share a value head), the rows of up before down. A head of its own is treated like q, k, v; a tied one, and
the embedding, stay as they are, for no factor there cancels. q and k keep their outputs: only one factor per rotary
pair would cancel. Computed in fp32; written as a Hugging Face folder with config and tokenizer. In fp32, which is the
default, nothing is rounded to bf16's grid either, and F16 holds the values.

A spread of 0.1 takes the demo off its grid: plain Q4_1 then makes 0.82 of Q4_0's weighted error, as with more, and 0
with none. More spread only makes the model harder to round (0.5: 4.5 times the error of Q4_0 and Q5_0), and gives
an advantage to whatever can fold scales back.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from halfbyte.calibration.text import cut, load_text
from halfbyte.core.environment import resolve_dtype
from halfbyte.core.errors import HalfbyteError
from halfbyte.models.loading import SourceModel, find, load
from halfbyte.models.modules import SPREAD, rescale_
from halfbyte.report.tables import significant

TOLERANCE = 1e-4  # relative difference of logits
TEXT, CHECK_WINDOWS, CHECK_LENGTH = "pydoc", 2, 256


def logits_on_text(source: SourceModel) -> torch.Tensor:
    """Logits on the start of the text, fp32 ``[windows, length, vocab]``."""
    ids = source.tokenizer(load_text(TEXT).parts["calib"], add_special_tokens=False).input_ids
    with torch.no_grad():
        windows = torch.tensor(cut(ids, CHECK_LENGTH, CHECK_WINDOWS, where=TEXT), device=source.device)
        return source.model(input_ids=windows, use_cache=False).logits.float()


def save(source: SourceModel, output: Path, dtype: torch.dtype) -> None:
    """Write weights, config and tokenizer to the new folder ``output``, whole or not at all."""
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        model: Any = source.model.to(dtype)
        model.save_pretrained(partial)
        source.tokenizer.save_pretrained(partial)
        partial.chmod(0o755)
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_copy(
    parser: argparse.ArgumentParser, change_: Callable[[SourceModel, argparse.Namespace], str], *, dtype: str
) -> int:
    """Load a model, change it, check that it says the same, save it.

    Args:
        parser: with ``--model``, ``--output`` and further flags; ``--dtype`` is added.
        change_: changes the model; what was done, for people.
        dtype: what weights are stored in, where nothing is asked.

    Raises:
        HalfbyteError: the output exists, or the copy says something else.
    """
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default=dtype, help="what weights are stored in")
    options = parser.parse_args()
    if options.output.exists():
        raise HalfbyteError(f"{options.output}: output already exists", fix="choose another name")
    disable_progress_bar()
    source = load(find(options.model), device=torch.device("cpu"), dtype=torch.float32)
    before = logits_on_text(source)
    done = change_(source, options)
    difference = float((logits_on_text(source) - before).norm() / before.norm())
    print(f"logits differ by {significant(difference, 2)} (relative, fp32)")
    if difference > TOLERANCE:
        raise HalfbyteError(f"logits: the copy says something else, expected < {TOLERANCE}, got {difference}")
    save(source, options.output, resolve_dtype(options.dtype, torch.device("cpu")))
    print(f"{options.output}: {options.model}, {done}, {options.dtype}")
    return 0


def rescaled_(source: SourceModel, options: argparse.Namespace) -> str:
    """Give the input channels random factors."""
    rescale_(source.model, source.family, torch.Generator().manual_seed(options.seed), options.spread)
    return f"spread {options.spread}, seed {options.seed}"


def main() -> int:
    """Make the copy, check that it says the same, save it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="Hugging Face id, local folder, .gguf file, or demo")
    parser.add_argument("--output", required=True, type=Path, help="folder to make")
    parser.add_argument("--spread", type=float, default=SPREAD, help="standard deviation of the factors' logarithm")
    parser.add_argument("--seed", type=int, default=0)
    return write_copy(parser, rescaled_, dtype="fp32")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HalfbyteError as error:
        sys.exit(str(error))
