"""Every option of every command, its default and its help: flags, ``--help`` and the option tables derive from here.

The same dataclasses are the keyword arguments of the library's functions.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.arguments import ENGINE, MODEL, OUTPUT, SEARCH, TEXT, WEIGHTS, Options, option
from halfbyte.core.registry import known_names

DEFAULT_MODEL = "Qwen/Qwen2.5-7B-Instruct"
DEFAULT_PLAN = "mixed_precision_config.pt"
DEFAULT_PROMPT = "Explain in a few sentences what a binary search does."
SERVE_PYTHON = "the Python that has vLLM; default: this one, else $HALFBYTE_SERVE_PYTHON"
LONGEST_CTX, MANY_TOKENS = 131_072, 100_000_000  # tokens
MANY, MANY_THREADS, MANY_GPUS, LARGEST_SEED = 100_000, 1024, 64, 2**31 - 1
TOP_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def _targets() -> tuple[str, ...]:
    return known_names("halfbyte.targets")  # the package itself imports torch, which --help should not wait for


def _menus() -> tuple[str, ...]:
    return known_names("halfbyte.menus")


def _transforms() -> tuple[str, ...]:
    from halfbyte.transforms import TRANSFORMS

    return tuple(TRANSFORMS)


def _quantisers() -> tuple[str, ...]:
    return known_names("halfbyte.quant.quantisers")


def _languages() -> tuple[str, ...]:
    from halfbyte.core.language import languages

    return ("auto", *languages())


def _engines() -> tuple[str, ...]:
    return known_names("halfbyte.engines")


@dataclass(frozen=True)
class CommandOptions(Options):
    """What every command has."""

    force: bool = option(False, "overwrite existing files", OUTPUT)
    json: str | None = option(None, "also write the result as JSON", OUTPUT, metavar="FILE", path=True)
    verbose: bool = option(False, "say more: every stage while it works, tables and texts at the end", OUTPUT)
    lang: str = option(
        "auto",
        "language of the page and of what commands say at the end; auto is the locale's, else en",
        OUTPUT,
        choices=_languages,
    )


@dataclass(frozen=True)
class ModelOptions(CommandOptions):
    """What every command that loads a model asks for."""

    device: str = option("auto", "cuda, cuda:1, mps, cpu, or auto, the first that is there", metavar="D")
    dtype: str = option(
        "auto",
        "compute in bf16 or fp32; auto is bf16 on an accelerator, fp32 on a CPU",
        MODEL,
        choices=("auto", "bf16", "fp32"),
    )
    trust_remote_code: bool = option(False, "run code that a model repository brings along", MODEL)


@dataclass(frozen=True)
class ScoreOptions(ModelOptions):
    """What every command that scores text asks for."""

    text: str = option("auto", "text to score: auto, wikitext2, pydoc, code, a file, or a list", TEXT, metavar="TEXT")
    ctx: int = option(
        512, "tokens per window; the second half is scored", TEXT, metavar="N", at_least=4, at_most=LONGEST_CTX
    )
    chunks: int = option(16, "windows to score", TEXT, metavar="N", at_least=1, at_most=MANY)


@dataclass(frozen=True)
class SearchOptions(ModelOptions):
    """``mixed_precision_ptq.py`` and ``halfbyte search``."""

    model_id: str = option(DEFAULT_MODEL, "Hugging Face id, local folder, .gguf file, or demo", metavar="M", path=True)
    target: str = option(
        "gguf",
        "where the plan will run: the PyTorch simulation, a GGUF file, or a folder for vLLM",
        choices=_targets,
    )
    output: str = option(
        DEFAULT_PLAN, "plan to write (.pt or .json); its codes and reports go beside it", metavar="FILE", path=True
    )
    hardware: str = option(
        "auto",
        "for vllm: the GPU that the plan will run on: turing, ampere, ada, hopper, blackwell, or sm75 to sm121; auto is"
        " this machine's",
        metavar="GPU",
    )
    target_compression: float = option(
        0.0,
        "budget: mean activation bits / 8; 0.5 is all A4, 1.0 all A8, 2.0 all A16; 0 is the target's own, 0.75 where "
        "there is A4, 1.25 where there is not",
        metavar="X",
        at_least=0,
        at_most=2,
    )
    max_kl: float = option(
        0.0,
        "instead of a budget: the cheapest plan whose KL on the validation text is at most this, in nats per token; "
        "for gguf the smallest file",
        metavar="X",
        at_least=0,
        excludes=("target_compression", "size", "ftype", "bpw", "pareto"),
    )
    size: str = option(
        "", "size of the GGUF file, such as 4.36GiB or 700MB", metavar="SIZE", excludes=("ftype", "bpw"), size=True
    )
    ftype: str = option(
        "",
        "or the size of llama.cpp's file of this type; Q4_K_M where nothing is said",
        alias="like",
        metavar="FTYPE",
        excludes=("size", "bpw"),
    )
    ga_pop: int = option(30, "genomes per generation", metavar="N", at_least=2, at_most=MANY)
    ga_gen: int = option(
        0, "generations, at most; 0 is 25 on an accelerator, 8 on a CPU", metavar="N", at_least=0, at_most=MANY
    )
    resume: bool = option(False, "go on where an interrupted search stopped")

    codes: str = option(
        "auto",
        "weights on the device: packed, decoded layer by layer, or decoded once; auto decodes where that fits",
        MODEL,
        choices=("auto", "packed", "decoded"),
    )
    device_memory: str = option(
        "",
        "what PyTorch may allocate on the GPU, such as 8GB; by default all that is free",
        MODEL,
        metavar="SIZE",
        size=True,
    )

    transforms: str = option(
        "auto",
        "function-preserving rewrites before quantisation: a list, rotate (the rotations that suit the target), or "
        "none; auto is the best that the target can run",
        WEIGHTS,
        names=_transforms,
        metavar="LIST",
    )
    alpha: str = option(
        "auto",
        "SmoothQuant strength, 0 to 1; auto chooses each unit's scales by output error",
        WEIGHTS,
        metavar="X",
    )
    weights: str = option("gptq", "how weight codes are chosen", WEIGHTS, choices=_quantisers)
    weights_from: str | None = option(
        None,
        "take the int4 codes, norms and biases of this quantised checkpoint of the model instead (a folder; "
        "compressed-tensors pack-quantized or GPTQ, symmetric, in groups), and search activation bits only",
        WEIGHTS,
        metavar="DIR",
        path=True,
    )
    group_size: int = option(
        128, "weights that share one scale, along the input", WEIGHTS, metavar="N", at_least=1, at_most=MANY
    )
    symmetric: bool = option(False, "symmetric activation codes, as serving engines need them", WEIGHTS)
    tensor_parallel: int = option(
        1,
        "for vllm: GPUs that will share every layer; rotations then stay within one GPU's part",
        WEIGHTS,
        metavar="N",
        at_least=1,
        at_most=MANY_GPUS,
    )
    imatrix: str | None = option(
        None,
        "importance matrix to choose scales of types by, ours or llama.cpp's; by default it is measured",
        WEIGHTS,
        metavar="FILE",
        path=True,
    )

    spaces: str = option(
        "auto",
        "what to search: activations (their bits), types (of every matrix of a GGUF file), or a list of both; auto is "
        "all that the target has",
        SEARCH,
        names=_menus,
        metavar="LIST",
    )
    refine: int = option(
        1,
        "1: refine the chosen types, that is, encode them once more for the inputs that they make themselves, and keep "
        "that if it loses less; 0: do not",
        SEARCH,
        metavar="N",
        at_least=0,
        at_most=1,
    )
    tune: int = option(
        0,
        "fit scales and norms of a plan for vllm or sim to the whole model's KL, by so many steps of descent (96 are "
        "enough; minutes on a GPU), and keep that if it loses less; 0: do not",
        SEARCH,
        metavar="N",
        at_least=0,
        at_most=MANY,
    )
    bpw: float = option(
        0.0,
        "mean bits per weight of the GGUF file, instead of --size",
        SEARCH,
        metavar="X",
        at_least=0,
        at_most=16,
        excludes=("size", "ftype"),
    )
    fitness: str = option("kl", "what the search minimises", SEARCH, choices=("kl", "fisher", "mse"))
    granularity: str = option("fused", "one choice per input tensor, or per layer", SEARCH, choices=("fused", "layer"))
    pareto: bool = option(
        False,
        "also search the fronts: the best bits of each budget from 0.5 to 1, the best file of each common size",
        SEARCH,
    )
    seed: int = option(0, "seed of everything random", SEARCH, metavar="N", at_least=0, at_most=LARGEST_SEED)

    calib: str = option(
        "auto",
        "auto (wikitext2, else pydoc, mixed with code), wikitext2, pydoc, code, self, a file, or a list, mixed",
        TEXT,
        metavar="TEXT",
    )
    ctx: int = option(
        512, "tokens per window of calibration and search text", TEXT, metavar="N", at_least=1, at_most=LONGEST_CTX
    )
    calib_tokens: int = option(
        0,
        "tokens for calibration, at most; shorter texts are used whole; 0 is 32768 on an accelerator, 4096 on a CPU",
        TEXT,
        metavar="N",
        at_least=0,
        at_most=MANY_TOKENS,
    )
    search_tokens: int = option(
        0,
        "tokens to compare candidates on; as many of other text decide between the best; 0 is 4096 on an accelerator, "
        "256 on a CPU",
        TEXT,
        metavar="N",
        at_least=0,
        at_most=MANY_TOKENS,
    )


@dataclass(frozen=True)
class ExportOptions(CommandOptions):
    """``export_gguf_official.py`` and ``halfbyte export``."""

    config: str = option(DEFAULT_PLAN, "the plan to export", metavar="FILE", path=True)
    output: str | None = option(
        None, "GGUF file to write; default models/<model>-mixed.gguf", metavar="FILE", path=True
    )
    policy: str = option(
        "auto",
        "budget: the types that were searched; tiered: A8 layers in Q8_0 from the original weights, A4 layers in Q4_0; "
        "exact: every layer Q4_0, as simulated; auto is budget where the plan has types, exact "
        "with --weights_from or without A8 layers, else tiered",
        choices=("auto", "budget", "tiered", "exact"),
    )
    embedding_type: str = option("Q8_0", "type of the token embedding (exact, tiered)", choices=TOP_TYPES)
    output_type: str = option("Q8_0", "type of an untied output head (exact, tiered)", choices=TOP_TYPES)
    model_id: str | None = option(None, "the plan's model, if it has moved", MODEL, metavar="M", path=True)
    trust_remote_code: bool = option(False, "run code that a model repository brings along", MODEL)
    check: bool = option(True, "reopen the file, load it in llama.cpp and compare logits with the simulation", ENGINE)
    engine: str = option("xllamacpp", "llama.cpp binding for the check", ENGINE, choices=_engines)


@dataclass(frozen=True)
class VllmExportOptions(CommandOptions):
    """``halfbyte export vllm``."""

    config: str = option(DEFAULT_PLAN, "the plan to export, made with --target vllm", metavar="FILE", path=True)
    output: str | None = option(None, "folder to write; default models/<model>-mixed-vllm", metavar="DIR", path=True)
    shard_size: str = option("5GB", "size of one safetensors file, at most", metavar="SIZE", size=True)
    model_id: str | None = option(None, "the plan's model, if it has moved", MODEL, metavar="M", path=True)
    trust_remote_code: bool = option(False, "run code that a model repository brings along", MODEL)
    check: bool = option(
        True, "reopen the folder, compare every tensor, and where memory allows logits in transformers", ENGINE
    )


@dataclass(frozen=True)
class CompareOptions(ScoreOptions):
    """``compare_real_quant.py`` and ``halfbyte compare``."""

    config: str = option(
        DEFAULT_PLAN, "the plan, for the model and the text it has not seen", metavar="FILE", path=True
    )
    max_tokens: int = option(200, "tokens to generate", metavar="N", at_least=1, at_most=LONGEST_CTX)
    skip_original: bool = option(False, "leave the original out: no download, no KL, no speed-up")
    q4km_path: str | None = option(None, "Q4_K_M file; default models/<Model>-Q4_K_M.gguf", metavar="P", path=True)
    mixed_path: str | None = option(None, "our file; default models/<model>-mixed.gguf", metavar="P", path=True)
    served: str | None = option(
        None,
        "folders to measure in vLLM, comma separated: ours, and beside it for instance the original and a W4A16 folder",
        metavar="DIR",
    )
    model_id: str | None = option(
        None, f"the original; default: the plan's model, else {DEFAULT_MODEL}", MODEL, metavar="M", path=True
    )
    prompt: str = option(DEFAULT_PROMPT, "prompt of the sample text", TEXT, metavar="TEXT")
    engine: str = option("xllamacpp", "llama.cpp binding", ENGINE, choices=_engines)
    threads: int = option(0, "CPU threads; 0 is one per core", ENGINE, metavar="N", at_least=0, at_most=MANY_THREADS)
    serve_python: str | None = option(None, SERVE_PYTHON, ENGINE, metavar="PYTHON", path=True)
    tensor_parallel: int = option(
        1, "GPUs that share every layer in vLLM", ENGINE, metavar="N", at_least=1, at_most=MANY_GPUS
    )


@dataclass(frozen=True)
class SimulateOptions(ScoreOptions):
    """``test_mixed_precision.py`` and ``halfbyte simulate``."""

    config: str = option(DEFAULT_PLAN, "the plan to simulate", metavar="FILE", path=True)
    max_tokens: int = option(60, "tokens of sample text", metavar="N", at_least=1, at_most=LONGEST_CTX)
    model_id: str | None = option(None, "the plan's model, if it has moved", MODEL, metavar="M", path=True)
    prompt: str = option(DEFAULT_PROMPT, "prompt of the sample text", TEXT, metavar="TEXT")


@dataclass(frozen=True)
class EvalOptions(ScoreOptions):
    """``halfbyte eval``."""

    model_id: str | None = option(
        None,
        "the reference: Hugging Face id, local folder, .gguf file, or demo; "
        f"default: the plan's model, else {DEFAULT_MODEL}",
        metavar="M",
        path=True,
    )
    config: str | None = option(
        None, "evaluate this plan (simulation)", metavar="C", path=True, excludes=("gguf", "served")
    )
    gguf: str | None = option(
        None, "evaluate this file in llama.cpp", metavar="G", path=True, excludes=("config", "served")
    )
    served: str | None = option(
        None, "evaluate this folder in vLLM", metavar="DIR", path=True, excludes=("config", "gguf")
    )
    engine: str = option("xllamacpp", "llama.cpp binding", ENGINE, choices=_engines)
    threads: int = option(
        0, "CPU threads for llama.cpp; 0 is one per core", ENGINE, metavar="N", at_least=0, at_most=MANY_THREADS
    )
    serve_python: str | None = option(None, SERVE_PYTHON, ENGINE, metavar="PYTHON", path=True)
    tensor_parallel: int = option(
        1, "GPUs that share every layer in vLLM", ENGINE, metavar="N", at_least=1, at_most=MANY_GPUS
    )


@dataclass(frozen=True)
class ImatrixOptions(ModelOptions):
    """``halfbyte imatrix``."""

    model_id: str = option(DEFAULT_MODEL, "Hugging Face id, local folder, .gguf file, or demo", metavar="M", path=True)
    output: str = option("imatrix.gguf", "file to write", metavar="FILE", path=True)
    calib: str = option(
        "auto",
        "auto (wikitext2, else pydoc, mixed with code), wikitext2, pydoc, code, a file, or a list, mixed",
        TEXT,
        metavar="TEXT",
    )
    ctx: int = option(512, "tokens per window", TEXT, metavar="N", at_least=1, at_most=LONGEST_CTX)
    calib_tokens: int = option(
        32768, "tokens, at most; shorter texts are used whole", TEXT, metavar="N", at_least=1, at_most=MANY_TOKENS
    )


@dataclass(frozen=True)
class ReportOptions(CommandOptions):
    """``halfbyte report``."""

    config: str = option(DEFAULT_PLAN, "the plan; several, comma separated, go side by side", metavar="C")
    comparison: str | None = option(None, "what compare --json wrote; several, comma separated", metavar="J")
    output: str | None = option(
        None, "page to write; default: NAME.report.html beside the plan", metavar="FILE", path=True
    )


@dataclass(frozen=True)
class DoctorOptions(CommandOptions):
    """``halfbyte doctor``."""

    model_id: str = option(DEFAULT_MODEL, "the model to estimate memory for", metavar="M", path=True)
    device: str = option("auto", "the device to report on: cuda, mps, cpu, or auto", metavar="D")
