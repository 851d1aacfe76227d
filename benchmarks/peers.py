"""halfbyte and llm-compressor on the same model, the same tokens, the same scheme and one ruler.

    python benchmarks/peers.py [--model demo] [--only both] [--json OUT]

llm-compressor runs in an environment of its own (``--env``), which the first run makes. Each row runs in a process of
its own, in fp32 on the CPU. Time is that of the quantisation alone, without loading and evaluation; peak memory is the
process's until the quantisation ends. The scheme is W4 symmetric, groups of 128 (the largest power of two that divides,
where 128 does not), activations symmetric per token. KL (nats per token), top-1 agreement and perplexity are taken as
everywhere here: the second half of each window is scored. How a weight scale is chosen is each tool's own;
llm-compressor's are the group's largest value / 7.5 in fp32, ours are fp16. In rows of the scheme NVFP4 weights and
activations are in that format on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common import Row, Rows, arguments, load_model, machine, parse, run
from peers_env import peer_python

from halfbyte.core.errors import HalfbyteError
from halfbyte.evaluate.quality import windows_for
from halfbyte.report.tables import Cell, format_bytes, format_seconds, markdown_table, significant

HERE = Path(__file__).resolve().parent
LINES_SHOWN = 30


@dataclass(frozen=True)
class Recipe:
    """What llm-compressor is asked to do."""

    label: str
    transform: str
    rounding: str
    a_bits: int
    form: str = "int"

    @property
    def scheme(self) -> str:
        """Of weights and activations, as the table says it."""
        return "NVFP4" if self.form == "nvfp4" else f"W4A{self.a_bits}"


RECIPES = {
    "smooth-gptq": Recipe("SmoothQuant, GPTQ", "smooth", "gptq", 8),
    "spin-rtn": Recipe("SpinQuant R1+R2+R4, plain rounding", "rotate", "rtn", 4),
    "spin-gptq": Recipe("SpinQuant R1+R2+R4, GPTQ", "rotate", "gptq", 4),
    "nvfp4-rtn": Recipe("plain rounding", "none", "rtn", 4, "nvfp4"),
    "nvfp4-gptq": Recipe("GPTQ", "none", "gptq", 4, "nvfp4"),
}

OURS = [  # label, name in peers_ours.py, activation bits, scheme
    ("folded scales, GPTQ", "smooth", 8, "W4A8"),
    ("scales, rotations at run time, GPTQ", "online", 8, "W4A8"),
    ("R1+R2+R4, GPTQ", "r1r2r4", 4, "W4A4"),
    ("scales, rotations at run time, GPTQ", "online", 4, "W4A4"),
    ("the same + learned", "learned", 4, "W4A4"),
    ("folded scales and R2, GPTQ", "nvfp4", 4, "NVFP4"),
]


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = arguments(__doc__, device=False, text="pydoc")
    parser.add_argument("--calib_windows", type=int, default=8, help="windows for calibration")
    parser.add_argument("--eval_windows", type=int, default=16, help="windows to score")
    parser.add_argument("--ctx", type=int, default=512, help="tokens per window")
    parser.add_argument("--only", choices=("peer", "ours", "both"), default="both")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="the peer's")
    parser.add_argument("--env", type=Path, default=Path(".venv-peers"), help="llm-compressor's environment")
    return parse(parser)


def write_original(options: argparse.Namespace, folder: Path) -> tuple[Row, Row]:
    """Save the model for both sides; what every request has in common, and what made the numbers."""
    loaded = load_model(options.model, options.text)
    source = loaded.source
    source.model.save_pretrained(folder)
    source.tokenizer.save_pretrained(folder)
    evaluation = windows_for(source, loaded.text.parts["eval"], options.ctx, options.eval_windows, where="eval text")
    calib = loaded.windows("calib", options.ctx, options.calib_windows).tolist()
    made_by = {
        "model": options.model,
        **loaded.made_by,
        "ctx": options.ctx,
        "calib_windows": len(calib),
        "eval_windows": len(evaluation),
        "machine": machine(),
    }
    return {"folder": str(folder), "calib": calib, "evaluation": evaluation}, made_by


def ask(python: Path, script: str, request: Row, folder: Path, log: Path) -> Row:
    """One request in a process of its own; what it prints goes to ``log``.

    Raises:
        HalfbyteError: the process failed.
    """
    request = {**request, "result": str(folder / "result.json")}
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    ours_first = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
    settings = {"PYTHONPATH": ours_first, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    command = [str(python), str(HERE / script), str(folder / "request.json")]
    with open(log, "w", encoding="utf-8") as noise:
        code = subprocess.call(command, env={**os.environ, **settings}, stdout=noise, stderr=subprocess.STDOUT)
    if code:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LINES_SHOWN:])
        raise HalfbyteError(f"{last}\n{script}: failed with exit code {code}")
    return json.loads(Path(request["result"]).read_text(encoding="utf-8"))


def peer_row(name: str, request: Row, folder: Path, python: Path, env: Path) -> Row:
    """One recipe of llm-compressor, and what its worker saw."""
    recipe = RECIPES[name]
    log = env / f"{name}.log"
    print(f"llm-compressor: {recipe.label}, {recipe.scheme} (log: {log}) …", flush=True)
    asked = {key: getattr(recipe, key) for key in ("transform", "rounding", "a_bits", "form")}
    result = ask(python, "peers_worker.py", {**request, **asked}, folder, log)
    seen = result["checks"]
    print(
        f"  checked: {seen['layers']} layers multiply at most {seen['activation_levels']} activation levels per scale "
        f"and {seen['weight_levels']} weight levels per group; R4 online in {seen['r4_layers']}; "
        f"first window's KL {significant(seen['kl'])}, activations left alone {significant(seen['kl_activations_off'])}"
        f", R4 taken out {significant(seen['kl_r4_off'])}, nothing quantised {significant(seen['kl_unquantised'])}"
    )
    tool = f"llm-compressor {result['versions']['llmcompressor']}"
    return {"tool": tool, "recipe": recipe.label, "scheme": recipe.scheme, **result}


def our_row(label: str, recipe: str, a_bits: int, scheme: str, request: Row, folder: Path) -> Row:
    """halfbyte, every layer at the same activation bits."""
    print(f"halfbyte: {label}, {scheme} …", flush=True)
    asked = {"recipe": recipe, "a_bits": a_bits}
    result = ask(Path(sys.executable), "peers_ours.py", {**request, **asked}, folder, folder / "log")
    tool = f"halfbyte {result['versions']['halfbyte']}"
    return {"tool": tool, "recipe": label, "scheme": scheme, **result}


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown, by scheme."""
    headers = ["tool", "recipe", "scheme", "time", "peak memory", "KL", "top-1", "ppl"]
    cells: list[list[Cell]] = [
        [
            row["tool"],
            row["recipe"],
            row["scheme"],
            format_seconds(row["seconds"]),
            format_bytes(row["peak_memory"]),
            f"{significant(row['kld_mean'])} ± {significant(row['kld_error'], 2)}",
            f"{100 * row['top1_agreement']:.1f}%",
            significant(row["ppl"], 4),
        ]
        for row in sorted(rows, key=lambda row: row["scheme"], reverse=True)
    ]
    return markdown_table(headers, cells)


def main() -> int:
    """Run every row, check that both sides used one ruler, print one table."""
    options = options_of()
    python = peer_python(options.env) if options.only != "ours" else None
    with tempfile.TemporaryDirectory(prefix="halfbyte-") as name:
        folder = Path(name)
        request, made_by = write_original(options, folder / "original")
        rows = Rows(options, made_by)
        there = {(row["tool"].split()[0], row["recipe"], row["scheme"]) for row in rows}
        if options.only != "peer":
            asked = {RECIPES[name].scheme for name in options.recipes}
            for label, recipe, a_bits, scheme in OURS:
                if scheme in asked and ("halfbyte", label, scheme) not in there:
                    rows.add(our_row(label, recipe, a_bits, scheme, request, folder))
        if python:
            for name, recipe in RECIPES.items():
                if name in options.recipes and ("llm-compressor", recipe.label, recipe.scheme) not in there:
                    rows.add(peer_row(name, request, folder, python, options.env))
    references = [row["ppl_reference"] for row in rows]
    if max(references) > 1.001 * min(references):
        raise HalfbyteError(f"the sides disagree about the original's perplexity: {references}")
    print(f"\n{table(rows.rows)}\n")
    print(
        f"{made_by['machine']}; {options.model}, original perplexity {significant(references[0], 4)}; text "
        f"{made_by['text']['name']}: {made_by['calib_windows']} windows for calibration, {made_by['eval_windows']} "
        f"scored, of {options.ctx} tokens"
    )
    return 0


if __name__ == "__main__":
    run(main)
