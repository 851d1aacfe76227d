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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from accuracy import RECIPES, Bench
from common import Row, Rows, arguments, load_model, parse, run

from halfbyte.models.loading import SourceModel
from halfbyte.prepare import token_weights
from halfbyte.prepare.candidates import TensorMenu, encode_candidates_, menus_of
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.refine import refine_types_
from halfbyte.prepare.simulation import become_types_
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.ggml.encoded import Encoded
from halfbyte.quant.ggml.types import bits_per_weight
from halfbyte.quant.quantisers import gptq
from halfbyte.report.tables import Cell, markdown_table, significant

RECIPE = Recipe(("smooth",), "gptq", group_size=32, scale_bits=8)


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__)
    parser.add_argument("--shares", nargs="+", type=float, default=[0.0, 0.125, 0.25, 0.5], metavar="X", help="β")
    parser.add_argument("--bits", type=float, default=4.5, help="of the types, per weight")
    parser.add_argument("--power", type=float, default=token_weights.POWER, help="of token weights; 0: all alike")
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

    def activations(self) -> dict[str, float]:
        """KL of all A8 and of all A4, prepared once."""
        source = self.fresh()
        layers = prepare_(source, self.calib, RECIPES["sim"][1], device=self.device).layers
        source.model.to(self.device)
        return {f"all A{bits}": self.kl(source, dict.fromkeys(layers, bits)) for bits in (8, 4)}

    def kl(self, source: SourceModel, bits: dict[str, int | None]) -> float:
        """To the original; ``bits`` of the layers whose activations are rounded."""
        found = self._score(source, bits).kld_mean
        assert found is not None
        return found

    def menus(self) -> list[TensorMenu]:
        """One type for every matrix."""
        menus, bits = menus_of(self.fresh(), self.options.bits), self.options.bits
        nearest = {menu.name: min(menu.types, key=lambda kind: abs(bits_per_weight(kind) - bits)) for menu in menus}
        return [replace(menu, types=(nearest[menu.name],)) for menu in menus]

    def candidates(self, menus: Sequence[TensorMenu], weights: str, folder: Path) -> Encoded:
        """Encoded as those of a search are."""
        folder.mkdir()
        recipe = replace(RECIPE, weights=weights)
        return encode_candidates_(self.fresh(), self.calib, recipe, menus, folder, device=self.device).encoded

    def refined(self, types: Mapping[str, str], candidates: Encoded, path: Path) -> Encoded:
        """Encoded as the mixture that a search chose is."""
        refine_types_(self.fresh(), self.calib, RECIPE, types, candidates, path, device=self.device)
        made = Encoded()
        made.add(path)
        return made

    def kl_of_types(self, types: Mapping[str, str], encoded: Encoded) -> float:
        """Activations left alone."""
        source = self.fresh()
        become_types_(source, types, encoded)
        source.model.to(self.device)
        return self.kl(source, {})


def main() -> int:
    """Measure and print the table."""
    options = options_of()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bench = Drift(options, folder)
        rows, menus = Rows(options, bench.made_by), bench.menus()
        types = {menu.name: menu.types[0] for menu in menus}
        encoded = {weights: bench.candidates(menus, weights, folder / weights) for weights in ("rtn", "gptq")}
        rounded, candidates = (bench.kl_of_types(types, made) for made in encoded.values())
        for share in options.shares:
            gptq.CORRECTION = share * max(1.0, gptq.ENOUGH_TOKENS / bench.calib.numel())
            row: Row = {"share": share, "rounded": rounded, "candidates": candidates, **bench.activations()}
            refined = bench.refined(types, encoded["gptq"], folder / f"{share}.safetensors")
            row["refined"] = bench.kl_of_types(types, refined)
            rows.add(row)
            print({key: significant(value) for key, value in row.items()}, flush=True)
    names = ("all A8", "all A4", "rounded", "candidates", "refined")
    cells: list[list[Cell]] = [[row["share"], *(significant(row[name]) for name in names)] for row in rows]
    print(markdown_table(["β", *names], cells))
    return 0


if __name__ == "__main__":
    run(main)
