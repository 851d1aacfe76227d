"""What calibration text does to other kinds of text: KL of each kind, for each choice of calibration text.

    python benchmarks/texts.py --calib pydoc pydoc,code,chinese.txt --score pydoc code chinese.txt [--json OUT]

The model is prepared as ``mixed_precision_ptq.py --target sim`` does it, with as many tokens of each calibration text,
and its mean KL to the unquantised model, nats per token, is measured on the evaluation part of every text to score.
Texts are what ``--calib`` takes: names, files, or lists of these, which are mixed.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from accuracy import RECIPES
from common import Row, Rows, arguments, load_model, parse, run

from halfbyte.calibration.text import scored_tokens
from halfbyte.core.environment import device_name, resolve_device
from halfbyte.evaluate.quality import LogitsFile, live, measure, model_logits, windows_for
from halfbyte.models.modules import vocabulary
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.report.tables import Cell, markdown_table, significant


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__, text=None)
    parser.add_argument("--calib", nargs="+", default=["pydoc", "pydoc,code"], metavar="TEXT")
    parser.add_argument("--score", nargs="+", default=["pydoc", "code"], metavar="TEXT")
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 4], help="activation bits, everywhere")
    parser.add_argument("--calib_tokens", type=int, default=8192)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8, help="of each text, to score")
    return parse(parser)


class Scored:
    """The evaluation part of one text, and what the unquantised model answers."""

    def __init__(self, name: str, options: argparse.Namespace, device: torch.device, scratch: Path) -> None:
        loaded = load_model(options.model, name)
        source, text = loaded.source, loaded.text.parts["eval"]
        self.windows = windows_for(source, text, options.ctx, options.windows, where=f"{name} (eval part)")
        self.kept = LogitsFile(scratch, vocabulary(source.model, source.family), scored_tokens(options.ctx))
        source.model.to(device)
        self.kept.write(self.windows, model_logits(source.model), f"reference on {name}")

    def kl(self, model: torch.nn.Module) -> float:
        """Of the quantised model to that."""
        found = measure(self.windows, live(self.windows, model_logits(model)), iter(self.kept)).kld_mean
        assert found is not None
        return found


def main() -> int:
    """Measure and print the table."""
    options = options_of()
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as scratch:
        texts = {name: Scored(name, options, device, Path(scratch) / str(at)) for at, name in enumerate(options.score)}
        rows = Rows(options, {"model": options.model, "device": device_name(device)})
        for name in options.calib:
            loaded = load_model(options.model, name)
            tokens = loaded.windows("calib", options.ctx, max(1, options.calib_tokens // options.ctx))
            layers = prepare_(loaded.source, tokens, RECIPES["sim"][1], device=device).layers
            model = loaded.source.model.to(device)
            for bits in options.bits:
                set_activation_bits_(model, dict.fromkeys(layers, bits))
                row: Row = {"calib": name, "bits": bits, **{text: scored.kl(model) for text, scored in texts.items()}}
                rows.add(row)
                print({key: significant(value) if isinstance(value, float) else value for key, value in row.items()})
    cells: list[list[Cell]] = [
        [row["calib"], f"A{row['bits']}", *(significant(row[name]) for name in options.score)] for row in rows
    ]
    print(markdown_table(["calibration text", "activations", *(f"KL on {name}" for name in options.score)], cells))
    return 0


if __name__ == "__main__":
    run(main)
