"""The engine ``xllamacpp``: the llama.cpp C functions inside this prebuilt wheel, bound with ctypes.

The wheel is a Cython extension, but on Linux its shared object also exports the C API of ``include/llama.h``. The
structs below follow the header of the llama.cpp that xllamacpp 2026.10.11549 was built from; every field's default is
compared with what the library itself says when it is loaded, so another layout is an error and not a crash.
"""

from __future__ import annotations

import ctypes as c
import importlib.util
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from halfbyte.core.errors import HalfbyteError
from halfbyte.engines.llamacpp import Engine

PACKAGE, PINNED = "xllamacpp", "2026.10.11549"
INSTALL = f"pip install {PACKAGE}=={PINNED}"
OTHER_ENGINE = "pip install llama-cpp-python and choose the engine llama-cpp-python"
TAIL_BYTES = 64  # room after each params struct: the defaults of fields that a newer library appended travel back to it

log_callback = c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)  # (ggml_log_level, text, user data)

# Each params struct is a table of (field, type, default); the defaults are those of llama_*_default_params.
_MODEL_PARAMS: list[tuple[str, Any, Any]] = [
    ("devices", c.c_void_p, None),
    ("tensor_buft_overrides", c.c_void_p, None),
    ("n_gpu_layers", c.c_int32, -1),
    ("split_mode", c.c_int, 1),
    ("load_mode", c.c_int, -1),
    ("lazy_mode", c.c_int, 1),
    ("main_gpu", c.c_int32, 0),
    ("tensor_split", c.c_void_p, None),
    ("progress_callback", c.c_void_p, None),
    ("progress_callback_user_data", c.c_void_p, None),
    ("kv_overrides", c.c_void_p, None),
    ("vocab_only", c.c_bool, False),
    ("check_tensors", c.c_bool, False),
    ("use_extra_bufts", c.c_bool, True),
    ("no_host", c.c_bool, False),
    ("no_alloc", c.c_bool, False),
    ("load_mtp", c.c_bool, False),
]
_CONTEXT_PARAMS: list[tuple[str, Any, Any]] = [
    ("n_ctx", c.c_uint32, 512),
    ("n_batch", c.c_uint32, 2048),
    ("n_ubatch", c.c_uint32, 512),
    ("n_seq_max", c.c_uint32, 1),
    ("n_rs_seq", c.c_uint32, 0),
    ("n_outputs_max", c.c_uint32, 0),
    ("n_outputs_max_per_seq", c.c_uint32, 1),
    ("n_threads", c.c_int32, 4),
    ("n_threads_batch", c.c_int32, 4),
    ("ctx_type", c.c_int, 0),
    ("rope_scaling_type", c.c_int, -1),
    ("pooling_type", c.c_int, -1),
    ("attention_type", c.c_int, -1),
    ("flash_attn_type", c.c_int, -1),
    ("rope_freq_base", c.c_float, 0.0),
    ("rope_freq_scale", c.c_float, 0.0),
    ("yarn_ext_factor", c.c_float, -1.0),
    ("yarn_attn_factor", c.c_float, -1.0),
    ("yarn_beta_fast", c.c_float, -1.0),
    ("yarn_beta_slow", c.c_float, -1.0),
    ("yarn_orig_ctx", c.c_uint32, 0),
    ("defrag_thold", c.c_float, -1.0),
    ("cb_eval", c.c_void_p, None),
    ("cb_eval_user_data", c.c_void_p, None),
    ("type_k", c.c_int, 1),  # GGML_TYPE_F16
    ("type_v", c.c_int, 1),
    ("abort_callback", c.c_void_p, None),
    ("abort_callback_data", c.c_void_p, None),
    ("unused", c.c_void_p, None),  # eight bytes, zero by default, that this llama.cpp has and older headers have not
    ("embeddings", c.c_bool, False),
    ("offload_kqv", c.c_bool, True),
    ("no_perf", c.c_bool, True),
    ("op_offload", c.c_bool, True),
    ("swa_full", c.c_bool, True),
    ("kv_unified", c.c_bool, False),
    ("samplers", c.c_void_p, None),
    ("n_samplers", c.c_size_t, 0),
    ("ctx_other", c.c_void_p, None),
]


def _params_struct(name: str, table: list[tuple[str, Any, Any]]) -> type[c.Structure]:
    fields = [(field, kind) for field, kind, _ in table] + [("tail", c.c_ubyte * TAIL_BYTES)]
    return type(name, (c.Structure,), {"_fields_": fields})


llama_model_params = _params_struct("llama_model_params", _MODEL_PARAMS)
llama_context_params = _params_struct("llama_context_params", _CONTEXT_PARAMS)


class llama_batch(c.Structure):
    """Tokens for one ``llama_decode``; a null ``pos`` or ``seq_id`` means "go on in sequence 0"."""

    _fields_ = [
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.POINTER(c.c_float)),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),  # per token: is its row of logits wanted
    ]


_TOKENS = c.POINTER(c.c_int32)
# name -> (result, arguments); include/llama.h, and include/ggml.h for the last row
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [log_callback, c.c_void_p]),
    "llama_supports_gpu_offload": (c.c_bool, []),
    "llama_model_default_params": (llama_model_params, []),
    "llama_context_default_params": (llama_context_params, []),
    "llama_model_load_from_file": (c.c_void_p, [c.c_char_p, llama_model_params]),
    "llama_model_free": (None, [c.c_void_p]),
    "llama_init_from_model": (c.c_void_p, [c.c_void_p, llama_context_params]),
    "llama_free": (None, [c.c_void_p]),
    "llama_model_get_vocab": (c.c_void_p, [c.c_void_p]),
    "llama_model_chat_template": (c.c_char_p, [c.c_void_p, c.c_char_p]),
    "llama_vocab_n_tokens": (c.c_int32, [c.c_void_p]),
    "llama_vocab_bos": (c.c_int32, [c.c_void_p]),
    "llama_vocab_eos": (c.c_int32, [c.c_void_p]),
    "llama_vocab_get_text": (c.c_char_p, [c.c_void_p, c.c_int32]),
    "llama_vocab_get_add_bos": (c.c_bool, [c.c_void_p]),
    "llama_vocab_is_eog": (c.c_bool, [c.c_void_p, c.c_int32]),
    "llama_tokenize": (c.c_int32, [c.c_void_p, c.c_char_p, c.c_int32, _TOKENS, c.c_int32, c.c_bool, c.c_bool]),
    "llama_detokenize": (c.c_int32, [c.c_void_p, _TOKENS, c.c_int32, c.c_char_p, c.c_int32, c.c_bool, c.c_bool]),
    "llama_get_memory": (c.c_void_p, [c.c_void_p]),
    "llama_memory_clear": (None, [c.c_void_p, c.c_bool]),
    "llama_batch_get_one": (llama_batch, [_TOKENS, c.c_int32]),
    "llama_decode": (c.c_int32, [c.c_void_p, llama_batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [c.c_void_p]),
    "ggml_quantize_chunk": (
        c.c_size_t,
        [c.c_int, c.c_void_p, c.c_void_p, c.c_int64, c.c_int64, c.c_int64, c.c_void_p],
    ),
}


@cache
def load() -> SimpleNamespace:
    """Open the library once per process and return its functions, structs and ``version`` under their C names.

    Raises:
        HalfbyteError: the wheel is missing, does not export the C API on this system, or has another struct layout.
    """
    spec = importlib.util.find_spec(PACKAGE)  # finds the folder, imports nothing
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob(f"{PACKAGE}*") if file.suffix in (".so", ".pyd")]
    if not files:
        raise HalfbyteError(f"{PACKAGE}: llama.cpp engine is not installed", fix=INSTALL)
    try:
        found = version(PACKAGE)
    except PackageNotFoundError:
        found = "unknown"
    try:
        library = c.CDLL(str(files[0]))
    except OSError as error:
        raise HalfbyteError(f"{files[0]}: library cannot be loaded, got {error}", fix=INSTALL) from error
    api = bind(library, where=f"{PACKAGE} {found}")
    api.version = found
    return api


def bind(library: Any, *, where: str) -> SimpleNamespace:
    """Give the functions of ``library`` their types, and check every struct against the library's own defaults."""
    api = SimpleNamespace(
        llama_model_params=llama_model_params,
        llama_context_params=llama_context_params,
        llama_batch=llama_batch,
        llama_log_callback=log_callback,
    )
    for name, (result, arguments) in _FUNCTIONS.items():
        try:
            function = getattr(library, name)
        except AttributeError as error:
            raise HalfbyteError(
                f"{where}: the library does not export {name} on {sys.platform}", fix=f"{INSTALL}, or {OTHER_ENGINE}"
            ) from error
        function.restype, function.argtypes = result, arguments
        setattr(api, name, function)
    check_defaults(api.llama_model_default_params(), _MODEL_PARAMS, where=where)
    check_defaults(api.llama_context_default_params(), _CONTEXT_PARAMS, where=where)
    _check_batch(api, where=where)
    return api


def check_defaults(params: c.Structure, table: list[tuple[str, Any, Any]], *, where: str) -> None:
    """Raise HalfbyteError unless every field of ``params`` has the default that ``table`` lists."""
    for field, _, expected in table:
        got = getattr(params, field)
        if got != expected:
            name = f"{type(params).__name__}.{field}"
            raise HalfbyteError(
                f"{where}, {name}: another llama.cpp than this code was written for, expected {expected}, got {got}",
                fix=INSTALL,
            )


def _check_batch(api: SimpleNamespace, *, where: str) -> None:
    tokens = (c.c_int32 * 3)(7, 8, 9)
    batch = api.llama_batch_get_one(tokens, 3)
    if (
        batch.n_tokens != 3
        or [batch.token[i] for i in range(3)] != [7, 8, 9]
        or batch.embd
        or batch.pos
        or batch.logits
    ):
        raise HalfbyteError(f"{where}, llama_batch: another llama.cpp than this code was written for", fix=INSTALL)


def open_xllamacpp() -> Engine:
    """llama.cpp as this wheel brings it; raises what :func:`load` raises."""
    api = load()
    return Engine(PACKAGE, api.version, api)


ENGINE = open_xllamacpp
