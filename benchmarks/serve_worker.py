"""Model folders in vLLM: log-probabilities of one prompt, a continuation, and the kernels that vLLM says it uses.

    ENV/bin/python benchmarks/serve_worker.py FOLDER … --ids 12,7,99 --json OUT
    ENV/bin/python benchmarks/serve_worker.py FOLDER … --prompt "A text" --json OUT

ENV is any environment with vLLM, on a CPU or a GPU. `serve_check.py` calls this for a folder and its twins.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

KERNEL = re.compile(r"Using \w+Kernel for \w[\w -]*")


def listen() -> list[str]:
    """A list that fills with what vLLM says about the kernels that it chose; it says so once per process.

    Records are seen as they are made: vLLM sets up its logging late, and takes away the handlers that it finds.
    """
    said: list[str] = []
    make = logging.getLogRecordFactory()

    def seen(*values: Any, **named: Any) -> logging.LogRecord:
        record = make(*values, **named)
        if (match := KERNEL.search(record.getMessage())) and match[0] not in said:
            said.append(match[0])
        return record

    logging.setLogRecordFactory(seen)
    return said


def ask(folder: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Log-probabilities of the prompt's tokens from the second on, and a greedy continuation."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        dtype=arguments.dtype,
        max_model_len=arguments.max_model_len,
        skip_tokenizer_init=arguments.ids is not None,
        enforce_eager=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=arguments.memory_share,
        linear_backend=arguments.linear_backend,
    )
    ids = [int(token) for token in arguments.ids.split(",")] if arguments.ids else None
    asked = SamplingParams(temperature=0, max_tokens=arguments.max_tokens, prompt_logprobs=0, detokenize=ids is None)
    answer = llm.generate([{"prompt_token_ids": ids} if ids else arguments.prompt], asked, use_tqdm=False)[0]
    rows = [row for row in answer.prompt_logprobs or [] if row is not None]
    logprobs = [row[token].logprob for token, row in zip(answer.prompt_token_ids[1:], rows, strict=True)]
    return {"logprobs": logprobs, "continuation": list(answer.outputs[0].token_ids)}


def main() -> None:
    """Load, ask, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--json", required=True)
    parser.add_argument("--ids", help="prompt as token ids, comma separated")
    parser.add_argument("--prompt", help="prompt as text")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--max_tokens", type=int, default=16)
    parser.add_argument("--max_model_len", type=int, default=512)
    parser.add_argument("--memory_share", type=float, default=0.5, help="of the device, for weights and cache")
    parser.add_argument("--linear_backend", default="auto")
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # its messages stay in this process
    import torch
    import vllm

    if hasattr(torch.cpu, "_init_amx"):
        torch.cpu._init_amx()  # in one process vLLM does not ask Linux for AMX itself; its bf16 kernel needs it
    kernels = listen()
    answers = {}
    for folder in arguments.folders:
        answers[folder] = ask(folder, arguments)
        gc.collect()
    text = json.dumps({"vllm": vllm.__version__, "kernels": kernels, "answers": answers})
    Path(arguments.json).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
