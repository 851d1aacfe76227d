"""Every option of every command, its default and its help: flags, ``--help`` and the README table derive from here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DEFAULT_MODEL = "Qwen/Qwen2.5-7B-Instruct"
DEFAULT_PLAN = "mixed_precision_config.pt"
TOP_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


def option(default: Any, text: str, *, choices: tuple[str, ...] | None = None, metavar: str | None = None) -> Any:
    """A dataclass field that is also a command-line flag."""
    return field(default=default, metadata={"help": text, "choices": choices, "metavar": metavar})


@dataclass(frozen=True)
class ModelOptions:
    """What every command that loads a model asks for."""

    device: str = option(
        "auto", "where to compute: auto is cuda, then mps, then cpu", choices=("auto", "cuda", "mps", "cpu")
    )
    dtype: str = option(
        "auto",
        "compute in bf16 or fp32; auto is bf16 on an accelerator, fp32 on a CPU",
        choices=("auto", "bf16", "fp32"),
    )
    trust_remote_code: bool = option(False, "run code that a model repository brings along")


@dataclass(frozen=True)
class SearchOptions(ModelOptions):
    """``mixed_precision_ptq.py`` and ``halfbyte search``."""

    model_id: str = option(DEFAULT_MODEL, "Hugging Face id, local folder, .gguf file, or demo", metavar="M")
    output: str = option(
        DEFAULT_PLAN, "plan to write (.pt or .json); its codes and reports go beside it", metavar="FILE"
    )
    target_compression: float = option(0.75, "budget: mean activation bits / 8; 0.5 is all A4, 1.0 all A8", metavar="X")
    ga_pop: int = option(30, "genomes per generation", metavar="N")
    ga_gen: int = option(25, "generations", metavar="N")
    fitness: str = option("kl", "what the search minimises", choices=("kl", "fisher", "mse"))
    granularity: str = option("fused", "one choice per input tensor, or per layer", choices=("fused", "layer"))
    target: str = option(
        "gguf",
        "where the plan will run: the PyTorch simulation, a GGUF file, or a folder for vLLM",
        choices=("sim", "gguf", "vllm"),
    )
    transforms: str = option(
        "auto",
        "function-preserving rewrites before quantisation: smooth, rotate, r1, r2, r4, online, learned, or none; "
        "auto is the best that the target can run",
        metavar="LIST",
    )
    online_transforms: bool = option(
        False,
        "for vllm also rotate in front of down_proj at run time (R4): no tensor parallelism, more code in transformers",
    )
    alpha: str = option(
        "auto", "SmoothQuant strength, 0 to 1; auto chooses each unit's scales by output error", metavar="X"
    )
    weights: str = option("gptq", "how weight codes are chosen", choices=("rtn", "gptq", "awq"))
    weights_from: str | None = option(
        None,
        "take the int4 codes, norms and biases of this quantised checkpoint of the model instead (a folder; "
        "compressed-tensors pack-quantized or GPTQ, symmetric, in groups), and search activation bits only",
        metavar="DIR",
    )
    group_size: int = option(128, "weights that share one scale, along the input", metavar="N")
    symmetric: bool = option(False, "symmetric activation codes, as serving engines need them")
    calib: str = option("auto", "text: auto (wikitext2, else pydoc), wikitext2, pydoc, self, or a file", metavar="TEXT")
    ctx: int = option(512, "tokens per window of calibration and search text", metavar="N")
    calib_tokens: int = option(32768, "tokens for calibration, at most; shorter texts are used whole", metavar="N")
    search_tokens: int = option(
        4096, "tokens to compare candidates on; as many of other text decide between the best", metavar="N"
    )
    spaces: str = option(
        "auto",
        "what to search: a4a8 (activation bits), ggml (a type for every matrix of a GGUF file), or a4a8,ggml; auto is "
        "both for --target gguf, else a4a8",
        choices=("auto", "a4a8", "ggml", "a4a8,ggml"),
    )
    size: str = option("", "size of the GGUF file, such as 4.36GiB or 700MB", metavar="SIZE")
    bpw: float = option(0.0, "or its mean bits per weight", metavar="X")
    like: str = option("", "or the size of llama.cpp's file of this type; Q4_K_M where nothing is said", metavar="TYPE")
    speed: float = option(
        1.0,
        "least generation speed of that file, of llama.cpp's own of its size, as predicted for CPUs; 0 is any",
        metavar="X",
    )
    imatrix: str | None = option(
        None,
        "importance matrix to choose scales of types by, ours or llama.cpp's; by default it is measured",
        metavar="FILE",
    )
    pareto: bool = option(
        False, "also search the fronts: the best bits of each budget from 0.5 to 1, the best file of each common size"
    )
    codes: str = option(
        "auto",
        "weights on the device: packed, decoded layer by layer, or decoded once; auto decodes where that fits",
        choices=("auto", "packed", "decoded"),
    )
    seed: int = option(0, "seed of everything random", metavar="N")
    resume: bool = option(False, "go on where an interrupted search stopped")
    force: bool = option(False, "overwrite an existing output")
    json: str | None = option(None, "also write the summary as JSON", metavar="FILE")


@dataclass(frozen=True)
class ExportOptions:
    """``export_gguf_official.py`` and ``halfbyte export``."""

    config: str = option(DEFAULT_PLAN, "the plan to export", metavar="FILE")
    output: str | None = option(None, "GGUF file to write; default models/<model>-mixed.gguf", metavar="FILE")
    model_id: str | None = option(None, "the plan's model, if it has moved", metavar="M")
    policy: str = option(
        "auto",
        "budget: the types that were searched; exact: every layer Q4_0; tiered: A8 layers in Q8_0; auto is budget "
        "where the plan has types, else exact",
        choices=("auto", "budget", "exact", "tiered"),
    )
    embedding_type: str = option(
        "Q8_0", "type of the token embedding (exact, tiered)", choices=("F32", "F16", "BF16", "Q8_0", "Q4_0")
    )
    output_type: str = option(
        "Q8_0", "type of an untied output head (exact, tiered)", choices=("F32", "F16", "BF16", "Q8_0", "Q4_0")
    )
    engine: str = option("xllamacpp", "llama.cpp binding for the check", choices=("xllamacpp", "llama-cpp-python"))
    check: bool = option(True, "reopen the file, load it in llama.cpp and compare logits with the simulation")
    trust_remote_code: bool = option(False, "run code that a model repository brings along")
    force: bool = option(False, "overwrite an existing output")
    json: str | None = option(None, "also write the summary as JSON", metavar="FILE")


@dataclass(frozen=True)
class VllmExportOptions:
    """``halfbyte export vllm``."""

    config: str = option(DEFAULT_PLAN, "the plan to export, made with --target vllm", metavar="FILE")
    output: str | None = option(None, "folder to write; default models/<model>-mixed-vllm", metavar="DIR")
    model_id: str | None = option(None, "the plan's model, if it has moved", metavar="M")
    shard_size: str = option("5GB", "size of one safetensors file, at most", metavar="SIZE")
    check: bool = option(
        True, "reopen the folder, compare every tensor, and where memory allows logits in transformers"
    )
    trust_remote_code: bool = option(False, "run code that a model repository brings along")
    force: bool = option(False, "overwrite an existing output")
    json: str | None = option(None, "also write the summary as JSON", metavar="FILE")


@dataclass(frozen=True)
class CompareOptions(ModelOptions):
    """``compare_real_quant.py`` and ``halfbyte compare``."""

    config: str = option(DEFAULT_PLAN, "the plan, for the model and the text it has not seen", metavar="FILE")
    model_id: str | None = option(None, f"the original; default: the plan's model, else {DEFAULT_MODEL}", metavar="M")
    max_tokens: int = option(200, "tokens to generate", metavar="N")
    prompt: str = option(
        "Explain in a few sentences what a binary search does.", "prompt of the sample text", metavar="TEXT"
    )
    skip_original: bool = option(False, "leave the original out: no download, no KLD, no speed-up")
    q4km_path: str | None = option(None, "Q4_K_M file; default models/<Model>-Q4_K_M.gguf", metavar="P")
    mixed_path: str | None = option(None, "our file; default models/<model>-mixed.gguf", metavar="P")
    text: str = option("auto", "evaluation text: auto, wikitext2, pydoc, or a file", metavar="TEXT")
    ctx: int = option(512, "tokens per window; the second half is scored", metavar="N")
    chunks: int = option(16, "windows to score", metavar="N")
    engine: str = option("xllamacpp", "llama.cpp binding", choices=("xllamacpp", "llama-cpp-python"))
    threads: int = option(0, "CPU threads; 0 is one per core", metavar="N")
    force: bool = option(False, "overwrite an existing --json file")
    json: str | None = option(None, "also write the table as JSON", metavar="FILE")


@dataclass(frozen=True)
class SimulateOptions(ModelOptions):
    """``test_mixed_precision.py`` and ``halfbyte simulate``."""

    config: str = option(DEFAULT_PLAN, "the plan to simulate", metavar="FILE")
    model_id: str | None = option(None, "the plan's model, if it has moved", metavar="M")
    text: str = option("auto", "evaluation text: auto, wikitext2, pydoc, or a file", metavar="TEXT")
    ctx: int = option(512, "tokens per window; the second half is scored", metavar="N")
    chunks: int = option(16, "windows to score", metavar="N")
    max_tokens: int = option(60, "tokens of sample text", metavar="N")
    prompt: str = option(
        "Explain in a few sentences what a binary search does.", "prompt of the sample text", metavar="TEXT"
    )
    force: bool = option(False, "overwrite an existing --json file")
    json: str | None = option(None, "also write the table as JSON", metavar="FILE")


@dataclass(frozen=True)
class EvalOptions(ModelOptions):
    """``halfbyte eval``."""

    model_id: str = option(
        DEFAULT_MODEL, "the reference: Hugging Face id, local folder, .gguf file, or demo", metavar="M"
    )
    config: str | None = option(None, "evaluate this plan (simulation)", metavar="C")
    gguf: str | None = option(None, "evaluate this file in llama.cpp", metavar="G")
    text: str = option("auto", "auto, wikitext2, pydoc, or a file", metavar="FILE")
    ctx: int = option(512, "tokens per window; the second half is scored", metavar="N")
    chunks: int = option(16, "windows to score", metavar="N")
    engine: str = option("xllamacpp", "llama.cpp binding", choices=("xllamacpp", "llama-cpp-python"))
    threads: int = option(0, "CPU threads for llama.cpp; 0 is one per core", metavar="N")
    force: bool = option(False, "overwrite an existing --json file")
    json: str | None = option(None, "write the result here", metavar="OUT")


@dataclass(frozen=True)
class ImatrixOptions(ModelOptions):
    """``halfbyte imatrix``."""

    model_id: str = option(DEFAULT_MODEL, "Hugging Face id, local folder, .gguf file, or demo", metavar="M")
    output: str = option("imatrix.gguf", "file to write", metavar="FILE")
    calib: str = option("auto", "text: auto (wikitext2, else pydoc), wikitext2, pydoc, or a file", metavar="TEXT")
    ctx: int = option(512, "tokens per window", metavar="N")
    calib_tokens: int = option(32768, "tokens, at most; shorter texts are used whole", metavar="N")
    force: bool = option(False, "overwrite an existing output")
    json: str | None = option(None, "also write the summary as JSON", metavar="FILE")


@dataclass(frozen=True)
class DoctorOptions:
    """``halfbyte doctor``."""

    model_id: str = option(DEFAULT_MODEL, "the model to estimate memory for", metavar="M")
    device: str = option("auto", "the device to report on", choices=("auto", "cuda", "mps", "cpu"))
    served: str | None = option(
        None,
        "a compressed-tensors folder: say what each of its layers is computed as where it is served",
        metavar="DIR",
    )
    engine: str = option("auto", "of --served: the engine", choices=("auto", "vllm", "transformers"))
    hardware: str = option(
        "auto", "of --served: another machine than this one, e.g. sm80, sm89, sm90, sm120, rocm, cpu-amx", metavar="KEY"
    )
    twins: str | None = option(
        None,
        "of --served: write copies of the folder with all activations at 16, 8 and 4 bits here, to compare with; the "
        "weights are hard links",
        metavar="DIR",
    )
    force: bool = option(False, "overwrite an existing --json file")
    json: str | None = option(None, "also write the report as JSON", metavar="FILE")
