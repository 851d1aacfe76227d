"""A loaded GGUF file: tokens, logits, greedy text and timings, through the C functions of llama.cpp.

The functions and structs (``include/llama.h``) come as a namespace under their C names, so the same class runs on any
binding that has them.
"""

from __future__ import annotations

import ctypes
import json
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from halfbyte.core.errors import HalfbyteError

MAX_BATCH = 512  # tokens per llama_decode; fixed, because another split of a text rounds differently


@dataclass(frozen=True)
class Generation:
    """A greedy continuation and what it took.

    Attributes:
        text: the continuation, without the end-of-generation token.
        prompt_tokens: tokens the prompt became, chat template and BOS included.
        generated_tokens: tokens chosen, an end-of-generation token included; the first comes out of the prompt's pass.
        prompt_seconds: time to the first token.
        generation_seconds: time of the other ``generated_tokens - 1``.
        chat_template: the file's chat template was used (False: asked for plain text, or the file has none that works).
    """

    text: str
    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float
    chat_template: bool = False

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens over the time to the first token."""
        return _rate(self.prompt_tokens, self.prompt_seconds)

    @property
    def generation_tokens_per_second(self) -> float:
        """Tokens after the first over their time; 0 when there was only one."""
        return _rate(self.generated_tokens - 1, self.generation_seconds)


@dataclass(frozen=True)
class Speed:
    """Times of fixed token counts, each from an empty cache: what llama-bench calls pp and tg."""

    prompt_tokens: int
    generated_tokens: int
    prompt_seconds: float
    generation_seconds: float

    @property
    def prompt_tokens_per_second(self) -> float:
        """Tokens per second when a whole prompt is read at once (llama-bench: pp)."""
        return _rate(self.prompt_tokens, self.prompt_seconds)

    @property
    def generation_tokens_per_second(self) -> float:
        """Tokens per second one at a time (llama-bench: tg)."""
        return _rate(self.generated_tokens, self.generation_seconds)


def _rate(tokens: int, seconds: float) -> float:
    return tokens / seconds if tokens > 0 and seconds > 0 else 0.0


class GGUFModel:
    """A loaded GGUF file with one context; not for several threads at once. Made by ``Engine.load``.

    Attributes:
        path: the file.
        load_seconds: time that loading took.
        n_ctx: most tokens of prompt and continuation together.
        n_vocab: tokens in the vocabulary.
        adds_bos: the model wants the BOS token before a text.
        bos: that token, -1 when the vocabulary has none.
    """

    def __init__(
        self,
        api: Any,
        take_error: Callable[[], str | None],
        path: Path,
        model: Any,
        context: Any,
        n_ctx: int,
        load_seconds: float,
    ) -> None:
        self.path, self.n_ctx, self.load_seconds = path, n_ctx, load_seconds
        self._api, self._take_error, self._model, self._context = api, take_error, model, context
        self._vocab = api.llama_model_get_vocab(model)
        self.n_vocab = int(api.llama_vocab_n_tokens(self._vocab))
        self.adds_bos = bool(api.llama_vocab_get_add_bos(self._vocab))
        self.bos = int(api.llama_vocab_bos(self._vocab))
        self._free = weakref.finalize(self, _free, api, model, context)

    def __enter__(self) -> GGUFModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back; closing twice is fine."""
        self._free()

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        """Tokens of ``text``, without BOS; ``special`` reads ``<|…|>`` markers as control tokens."""
        self._check_open()
        data = text.encode()
        room = len(data) + 8  # a token is at least one byte; some vocabularies add a space
        tokens = (ctypes.c_int32 * room)()
        count = self._api.llama_tokenize(self._vocab, data, len(data), tokens, room, False, special)
        if count < 0:
            raise HalfbyteError(f"{self.path}: text cannot be tokenised, got {self._take_error()}")
        return list(tokens[:count])

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Text of ``tokens``, without control tokens; bytes that are no UTF-8 become U+FFFD."""
        ids = self._check_tokens(tokens)
        size = 64 + 16 * len(ids)
        while True:
            array, buffer = (ctypes.c_int32 * len(ids))(*ids), ctypes.create_string_buffer(size)
            count = self._api.llama_detokenize(self._vocab, array, len(ids), buffer, size, False, False)
            if count >= 0:
                return buffer.raw[:count].decode("utf-8", "replace")
            size = -count

    def logits(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
        """Logits after each token from position ``first`` on, read from an empty cache.

        Returns:
            float32 [len(tokens) - first, n_vocab]; row i predicts the token that follows ``tokens[first + i]``.

        Raises:
            HalfbyteError: no tokens, more than ``n_ctx``, a token outside the vocabulary, or ``first`` out of range.
        """
        ids = self._check_tokens(tokens)
        if not 1 <= len(ids) <= self.n_ctx:
            expected, fix = f"1 to {self.n_ctx} tokens", "load with a larger n_ctx or cut the text"
            raise HalfbyteError(
                f"{self.path}: does not fit in the context, expected {expected}, got {len(ids)}", fix=fix
            )
        if not 0 <= first < len(ids):
            raise HalfbyteError(f"first: first row is out of range, expected 0 to {len(ids) - 1}, got {first}")
        rows = np.empty((len(ids) - first, self.n_vocab), np.float32)
        self._clear()
        for start in range(0, len(ids), MAX_BATCH):
            count = min(MAX_BATCH, len(ids) - start)
            skip = min(max(first - start, 0), count)
            filled = start + skip - first
            rows[filled : filled + count - skip] = self._decode(ids[start : start + count], skip)
        return rows

    def generate(self, prompt: str, max_tokens: int, *, chat: bool = True) -> Generation:
        """Continue ``prompt`` greedily, up to an end-of-generation token, ``max_tokens`` or the end of the context.

        Args:
            chat: wrap the prompt as a user's turn in the file's chat template.

        Raises:
            HalfbyteError: the prompt is empty or leaves no room in the context.
        """
        wrapped = self._apply_chat_template(prompt) if chat else None
        ids = self.tokenize(prompt if wrapped is None else wrapped, special=wrapped is not None)
        if self.adds_bos and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        if not ids or max_tokens < 1:
            raise HalfbyteError(f"{self.path}: nothing to generate, expected a prompt and max_tokens of at least 1")
        limit = min(max_tokens, self.n_ctx - len(ids))
        if limit < 1:
            most = f"at most {self.n_ctx - 1} prompt tokens"
            fix = "shorten the prompt or load with a larger n_ctx"
            raise HalfbyteError(
                f"{self.path}: prompt does not fit in the context, expected {most}, got {len(ids)}", fix=fix
            )
        chosen: list[int] = []
        self._clear()
        started = time.perf_counter()
        last = self._read(ids)
        chosen.append(int(last.argmax()))
        prompt_done = time.perf_counter()
        while len(chosen) < limit and not self._is_end(chosen[-1]):
            chosen.append(int(self._read(chosen[-1:]).argmax()))
        ended = time.perf_counter()
        text = self.detokenize(chosen[:-1] if self._is_end(chosen[-1]) else chosen)
        return Generation(text, len(ids), len(chosen), prompt_done - started, ended - prompt_done, wrapped is not None)

    def speed(self, prompt_tokens: int, generate_tokens: int) -> Speed:
        """Time ``prompt_tokens`` read at once, then ``generate_tokens`` one by one, after a warm-up.

        The tokens are arbitrary and nothing stops at an end-of-generation token. Either count may be 0.

        Raises:
            HalfbyteError: a count is negative or more than ``n_ctx``.
        """
        for name, count in (("prompt_tokens", prompt_tokens), ("generate_tokens", generate_tokens)):
            if not 0 <= count <= self.n_ctx:
                raise HalfbyteError(f"{name}: does not fit in the context, expected 0 to {self.n_ctx}, got {count}")
        ids = np.random.default_rng(0).integers(self.n_vocab, size=max(prompt_tokens, generate_tokens, 1)).tolist()
        self._clear()
        self._read(ids[:MAX_BATCH])
        seconds = []
        for steps in ([ids[:prompt_tokens]] if prompt_tokens else [], [[token] for token in ids[:generate_tokens]]):
            self._clear()
            started = time.perf_counter()
            for step in steps:
                self._read(step)
            seconds.append(time.perf_counter() - started)
        return Speed(prompt_tokens, generate_tokens, *seconds)

    def _apply_chat_template(self, prompt: str) -> str | None:
        self._check_open()
        template = self._api.llama_model_chat_template(self._model, None)
        if not template:
            return None
        bos, eos = (self._token_text(token) for token in (self.bos, int(self._api.llama_vocab_eos(self._vocab))))
        wrapped = render(template.decode("utf-8", "replace"), prompt, bos=bos, eos=eos)
        # BOS is put in front of the tokens where the vocabulary wants one; a template's own would be a second
        return wrapped.removeprefix(bos) if wrapped and self.adds_bos and bos else wrapped

    def _token_text(self, token: int) -> str:
        if token < 0:
            return ""
        return (self._api.llama_vocab_get_text(self._vocab, token) or b"").decode("utf-8", "replace")

    def _read(self, ids: Sequence[int]) -> np.ndarray:
        """Append tokens to the cache; the logits after the last one, [n_vocab], valid until the next call."""
        last = np.empty((0, self.n_vocab), np.float32)
        for start in range(0, len(ids), MAX_BATCH):
            part = ids[start : start + MAX_BATCH]
            last = self._decode(part, len(part) - 1)
        return last[0]

    def _decode(self, ids: Sequence[int], skip: int) -> np.ndarray:
        """Append up to MAX_BATCH tokens to the cache; logits [len(ids) - skip, n_vocab], valid until the next call."""
        tokens = (ctypes.c_int32 * len(ids))(*ids)
        wanted = (ctypes.c_int8 * len(ids))(*(index >= skip for index in range(len(ids))))
        batch = self._api.llama_batch_get_one(tokens, len(ids))
        batch.logits = ctypes.cast(wanted, ctypes.POINTER(ctypes.c_int8))
        status = self._api.llama_decode(self._context, batch)
        if status == 0 and skip == len(ids):
            return np.empty((0, self.n_vocab), np.float32)
        rows = self._api.llama_get_logits(self._context) if status == 0 else None  # waits for the computation
        if not rows:
            got = self._take_error() or f"status {status}"
            raise HalfbyteError(f"{self.path}: llama.cpp cannot run these tokens, got {got}")
        return np.ctypeslib.as_array(rows, (len(ids) - skip, self.n_vocab))

    def _check_tokens(self, tokens: Sequence[int]) -> list[int]:
        self._check_open()
        ids = [int(token) for token in tokens]
        strange = next((token for token in ids if not 0 <= token < self.n_vocab), None)
        if strange is not None:
            raise HalfbyteError(f"{self.path}: no such token, expected 0 to {self.n_vocab - 1}, got {strange}")
        return ids

    def _clear(self) -> None:
        self._check_open()
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def _is_end(self, token: int) -> bool:
        return bool(self._api.llama_vocab_is_eog(self._vocab, token))

    def _check_open(self) -> None:
        if not self._free.alive:
            raise HalfbyteError(f"{self.path}: model is closed")


def _free(api: Any, model: Any, context: Any) -> None:
    api.llama_free(context)
    api.llama_model_free(model)


def render(template: str, prompt: str, *, bos: str, eos: str) -> str | None:
    """``prompt`` as a user's turn, followed by the start of the assistant's; None if the template fails.

    As transformers does it: Jinja in a sandbox, trimmed blocks. llama.cpp's C function knows some templates by their
    looks and writes the turn itself, without the default system turn that a template may add; rendered here, every
    engine sees the same prompt.

    Args:
        template: Jinja source, from ``tokenizer.chat_template``.
        bos, eos: the text of these tokens, for templates that write them.
    """

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    values: dict[str, Any] = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": True, "tools": None}
    try:
        return environment.from_string(template).render(messages=[{"role": "user", "content": prompt}], **values)
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError):  # whatever a template's author got wrong
        return None
