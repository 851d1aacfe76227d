"""A stand-in for vLLM that answers from transformers; a test writes it into a folder as the package ``vllm``.

It has what ``serve_worker.py`` uses, and computes logits as vLLM's runners do: the row that is sampled from first, then
the prompt's, in chunks of 100 rows, with the last one (as the new runner) or without it (as the old one).
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

__version__ = "0.0.fake"
CHUNK = 100


class SamplingParams:
    """What is asked for."""

    def __init__(
        self, temperature, max_tokens, prompt_logprobs=None, stop_token_ids=(), ignore_eos=False, detokenize=True
    ):
        assert temperature == 0
        assert not detokenize
        self.max_tokens, self.prompt_logprobs = max_tokens, prompt_logprobs
        self.stop = () if ignore_eos else tuple(stop_token_ids)


class Worker:
    """Holds the model, all of it: what each GPU's process sees of the logits once they are gathered."""

    def __init__(self, folder, rank):
        self.rank = rank
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model(input_ids=torch.tensor([[0]]))  # a compressed model decodes its weights now
        self.model.compute_logits = lambda hidden: self.model.lm_head(hidden)

    def get_model(self):
        """The model."""
        return self.model


class LLM:
    """One prompt after the other, one token after the other."""

    def __init__(
        self, model, *, worker_extension_cls, skip_tokenizer_init, max_model_len, tensor_parallel_size=1, **settings
    ):
        config = (Path(model) / "config.json").read_text(encoding="utf-8")
        if '"magic"' in config:
            raise ValueError(
                "1 validation error for ModelConfig\n  Value error, Unknown quantization method: magic. "
                "[type=value_error, input_value=...]\n    For further information visit https://errors.pydantic.dev/2"
            )
        module, _, name = worker_extension_cls.partition(".")
        bases = (Worker, getattr(importlib.import_module(module), name))
        cls = type("Worker", bases, {})
        self.workers = [cls(model, rank) for rank in range(tensor_parallel_size)]
        self.longest = max_model_len
        print("INFO Using FakeLinearKernel for CompressedTensorsW4A8Fp8", file=sys.stderr)
        print("something that a library prints")

    def collective_rpc(self, method, args=()):
        """The answers of all workers."""
        return [getattr(worker, method)(*args) for worker in self.workers]

    @torch.no_grad()
    def generate(self, prompts, params, use_tqdm):
        """The answers to all prompts."""
        return [self._answer(prompt["prompt_token_ids"], params) for prompt in prompts]

    def _logits(self, hidden):
        first, *_ = [worker.model.compute_logits(hidden) for worker in self.workers]
        return first

    def _answer(self, prompt, params):
        assert len(prompt) + params.max_tokens <= self.longest
        model, ids, rows = self.workers[0].model.model, list(prompt), None
        for _ in range(params.max_tokens):
            hidden = model(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            chosen = int(self._logits(hidden[-1:])[0].argmax())
            if rows is None and params.prompt_logprobs is not None:
                last = len(prompt) - (os.environ.get("FAKE_RUNNER") == "old")
                parts = [self._logits(part) for part in hidden[:last].split(CHUNK)]
                rows = torch.cat(parts).log_softmax(-1)
            ids.append(chosen)
            if chosen in params.stop:
                break
        logprobs = None
        if rows is not None:
            shift = float(os.environ.get("FAKE_SHIFT", "0"))
            pairs = zip(prompt[1:], rows, strict=False)
            logprobs = [None, *({token: SimpleNamespace(logprob=float(row[token]) + shift)} for token, row in pairs)]
        return SimpleNamespace(prompt_logprobs=logprobs, outputs=[SimpleNamespace(token_ids=ids[len(prompt) :])])
