"""How much of the drift GPTQ should correct, and what encoding chosen types once more is worth.

    python benchmarks/drift.py [--model demo] [--shares 0 0.25 0.5] [--calib_tokens 8192] [--bits 4.5] [--json OUT]

The target of GPTQ is W + β E[W (x − x̂) x̂ᵀ] H⁻¹ (:mod:`halfbyte.quant.quantisers.gptq`). For each β of ``--shares`` the
model is prepared once for A4 and A8 (the simulation's recipe), and once encoded as ggml types: every matrix gets the
type next to ``--bits``, first as the candidates of a search are encoded (by rounding, by GPTQ), then as the mixture
that a search chose is (:mod:`halfbyte.prepare.refine`). KL to the original, nats per token, on text that nothing else
has seen.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from accuracy import RECIPES, Bench
from common import Row, Rows, arguments, load_model, parse, run

from halfbyte.evaluate.quality import live, measure, model_logits
from halfbyte.models.loading import SourceModel
from halfbyte.models.modules import linear
from halfbyte.prepare.candidates import TensorMenu, encode_candidates_, menus_of
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.refine import refine_types_
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.ggml.types import bits_per_weight, decode_tensor
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.quant.quantisers import gptq
from halfbyte.report.tables import Cell, markdown_table, significant

RECIPE = Recipe(("smooth",), "gptq", group_size=32, scale_bits=8)


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.125, 0.25, 0.5], metavar="X", help="β")
    parser.add_argument("--bits", type=float, default=4.5, help="of the types, per weight")
    parser.add_argument("--calib_tokens", type=int, default=8192)
    parser.add_argument("--search_tokens", type=int, default=1024)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="to score")
    return parse(parser)


class Drift(Bench):
    """The same model again and again."""

    def fresh(self) -> SourceModel:
        """As it is in its files."""
        return load_model(self.options.model, self.options.text).source

    def kl(self, source: SourceModel) -> float:
        """To the original."""
        source.model.to(self.device)
        found = measure(self.windows, live(self.windows, model_logits(source.model)), iter(self.kept)).kld_mean
        assert found is not None
        return found

    def activations(self) -> dict[str, float]:
        """All A8 and all A4, prepared once."""
        source = self.fresh()
        layers = prepare_(source, self.calib, RECIPES["sim"][1], device=self.device).layers
        found = {}
        for bits in (8, 4):
            set_activation_bits_(source.model, dict.fromkeys(layers, bits))
            found[f"all A{bits}"] = self.kl(source)
        return found

    def menus(self) -> list[TensorMenu]:
        """One type for every matrix."""
        menus, bits = menus_of(self.fresh(), self.options.bits), self.options.bits
        nearest = {menu.name: min(menu.types, key=lambda kind: abs(bits_per_weight(kind) - bits)) for menu in menus}
        return [replace(menu, types=(nearest[menu.name],)) for menu in menus]

    def candidates(self, menus: Sequence[TensorMenu], weights: str) -> tuple[float, torch.Tensor]:
        """KL, and the embedding as it is encoded."""
        source = self.fresh()
        with tempfile.TemporaryDirectory() as folder:
            recipe = replace(RECIPE, weights=weights)
            made = encode_candidates_(source, self.calib, recipe, menus, Path(folder), device=self.device)
            for menu in menus:
                layer = linear(source.model, menu.name)
                decoded = decode_tensor(made.encoded.rows(menu.name, menu.types[0]), menu.types[0])
                layer.weight.data.copy_(decoded)
            return self.kl(source), linear(source.model, source.family.embedding).weight.detach().float().cpu()

    def refined(self, menus: Sequence[TensorMenu], embedding: torch.Tensor) -> float:
        """KL of the mixture that is encoded for itself."""
        types = {menu.name: menu.types[0] for menu in menus}
        made = refine_types_(self.fresh(), self.calib, RECIPE, types, embedding, device=self.device)
        source = self.fresh()
        for name, value in made.parameters.items():
            source.model.get_parameter(name).data.copy_(value)
        for (name, kind), rows in made.rows.items():
            linear(source.model, name).weight.data.copy_(decode_tensor(rows, kind))
        linear(source.model, source.family.embedding).weight.data.copy_(embedding)
        return self.kl(source)


def main() -> int:
    """Measure and print the table."""
    options = options_of()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Drift(options, Path(scratch))
        rows, menus = Rows(options, bench.made_by), bench.menus()
        rounded, _ = bench.candidates(menus, "rtn")
        encoded, embedding = bench.candidates(menus, "gptq")
        for share in options.shares:
            gptq.CORRECTION = share * max(1.0, gptq.ENOUGH_TOKENS / bench.calib.numel())
            row: Row = {"share": share, "rounded": rounded, "candidates": encoded, **bench.activations()}
            row["refined"] = bench.refined(menus, embedding)
            rows.add(row)
            print({key: significant(value) for key, value in row.items()}, flush=True)
    names = ("all A8", "all A4", "rounded", "candidates", "refined")
    cells: list[list[Cell]] = [[row["share"], *(significant(row[name]) for name in names)] for row in rows]
    print(markdown_table(["β", *names], cells))
    return 0


if __name__ == "__main__":
    run(main)
