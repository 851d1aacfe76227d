"""Our side of ``peers.py``: quantise with halfbyte and measure, in a process of its own.

    python benchmarks/peers_ours.py REQUEST.json

The request names ``folder``, ``recipe`` (one of ``RECIPES``), ``a_bits``, the token windows ``calib`` and
``evaluation``, and ``result``, the JSON file to write. All in fp32 on the CPU, as on the other side.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from halfbyte.core.environment import peak_process_memory
from halfbyte.evaluate.quality import live, measure, model_logits
from halfbyte.models.loading import find, load, made_with
from halfbyte.prepare.recipe import Recipe
from halfbyte.prepare.walk import prepare_
from halfbyte.quant.quant_linear import set_activation_bits_
from halfbyte.targets import TARGETS

# Symmetric activations over a token's whole range, as serving engines compute them.
SERVED = Recipe(weights="gptq", symmetric=True, clip=False)
BLACKWELL = TARGETS["vllm"].on("blackwell")
RECIPES = {
    "smooth": replace(SERVED, transforms=("smooth",)),
    "r1r2r4": replace(SERVED, transforms=("smooth", "r1", "r2", "r4")),
    "online": replace(SERVED, transforms=("smooth", "online")),
    "learned": replace(SERVED, transforms=("smooth", "online", "learned")),
    "nvfp4": replace(BLACKWELL.recipe, transforms=("smooth", "r2"), weights="gptq", group_size=16),
}


def ours(folder: str, recipe: str, a_bits: int, calib: list[list[int]], evaluation: list[list[int]]) -> dict[str, Any]:
    """Quantise every layer to W4 with ``a_bits`` activation bits, symmetric per token, and measure.

    Returns:
        ``seconds`` and ``peak_memory`` (resident bytes) of the quantisation, without evaluation; the fields of
        :class:`halfbyte.evaluate.quality.Quality`; ``versions``.
    """
    where = torch.device("cpu")
    source = load(find(folder), device=where, dtype=torch.float32)
    started = time.perf_counter()
    made = prepare_(source, torch.tensor(calib), RECIPES[recipe], device=where)
    set_activation_bits_(source.model, dict.fromkeys(made.layers, a_bits))
    seconds, peak_memory = time.perf_counter() - started, peak_process_memory()
    original = load(find(folder), device=where, dtype=torch.float32)
    pairs = [live(evaluation, model_logits(model)) for model in (source.model, original.model)]
    quality = measure(evaluation, *pairs)
    return {"seconds": seconds, "peak_memory": peak_memory, **asdict(quality), "versions": made_with(source)}


def main(path: str) -> None:
    """Answer one request."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    asked = {key: request[key] for key in ("folder", "recipe", "a_bits", "calib", "evaluation")}
    Path(request["result"]).write_text(json.dumps(ours(**asked)), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("request", metavar="REQUEST.json")
    main(parser.parse_args().request)
