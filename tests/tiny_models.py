"""What the GGUF tests share: tiny random models of every family, tokenizers trained on the spot, comparisons."""

from __future__ import annotations

import random
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from halfbyte.engines import open_engine
from halfbyte.models.gguf_source import LLAMA3, QWEN2, TEKKEN
from halfbyte.models.loading import SourceModel

transformers.logging.set_verbosity_error()

UNICODE = "Größe, naïve café, Привет мир, 你好世界, こんにちは, 🦙 emoji 🚀🚀, ½ ³ Ⅳ, e\u0301, \u200d, ﷽, ไทย, ١٢٣"
TEXTS = [
    "Hello world",
    " leading space",
    "I'll say it's WE'RE they'VE don't",
    "3 33 333 3333 12345.678,90 x1y22z333",
    "a  1   22    333\n\n\n  4 \t\t5 \r\n 6",
    "def f(x: int) -> list[int]:\n    return [i**2 for i in range(x)]  # squares\n",
    "{'key': \"value\", '@dec': [1, 2, 3]}; x += y >>= z != w /* comment */ //path/to/file",
    "trailing spaces   ",
    "\n\n",
    "   ",
    UNICODE,
    "MixedCase camelCaseWords ALLCAPS snake_case kebab-case ÄÖÜ äöü Éa aÉ",
    "...!!!??? ---=== ``` ''' \"\"\"",
    *[text[:400] for text in list(topics.values())[:6]],
]
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
LETTERS = [
    "abcXYZ  \n\t'sS.,!?0123456789",
    "äöüßéñ中文字ひらがな한국어кирил\u0301\u0300 ",
    "🦙🚀👩‍👧½³Ⅳ١٢٣๑ ไทย\u00a0\u2003\u3000\u200b\r\n'reLL/",
    "\x01\x7f\u0085\u2028 ﷽ ﬁ Ǆ ǅ ʰ ª º 𝒳 𝟘 ॐ १२ /*-+\n/",
]
F16 = {"embedding_type": "F16", "output_type": "F16"}
SIZE = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}


def random_texts(count: int) -> list[str]:
    """Strings of characters that tokenizers like to treat differently, always the same ones."""
    chance = random.Random(0)
    lengths = [chance.randint(1, 40) for _ in range(count)]
    return ["".join(chance.choice(chance.choice(LETTERS)) for _ in range(length)) for length in lengths]


def _corpus() -> list[str]:
    return [*topics.values(), *[UNICODE] * 20]


def byte_level(style: str) -> Tokenizer:
    """A byte-level BPE whose text is split as the tokenizers of that family split it."""
    splits: dict[str, list[Any]] = {
        "qwen2": [pre_tokenizers.Split(Regex(QWEN2), "isolated")],
        "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
        "tekken": [pre_tokenizers.Split(Regex(TEKKEN), "isolated")],
        "smollm": [pre_tokenizers.Digits(individual_digits=True)],
        "gpt-2": [],
    }
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=style in ("smollm", "gpt-2"))
    tokenizer = Tokenizer(models.BPE(ignore_merges=style in ("llama-bpe", "tekken")))
    tokenizer.normalizer = normalizers.NFC() if style == "qwen2" else None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits[style], last]) if splits[style] else last
    tokenizer.decoder = decoders.ByteLevel()
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if style == "smollm" else []
    trainer = trainers.BpeTrainer(
        vocab_size=800, special_tokens=first, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    return tokenizer


def hf_byte_level(style: str) -> PreTrainedTokenizerFast:
    """The same with special tokens, as transformers wraps it."""
    tokenizer = byte_level(style)
    if style == "llama-bpe":
        names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        tokenizer.add_special_tokens([*names.values(), "<|eot_id|>"])
        bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    else:
        names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
        tokenizer.add_tokens(["<tool_call>", "<|fim_prefix|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def hf_sentencepiece() -> PreTrainedTokenizerFast:
    """A SentencePiece-like BPE with byte tokens, as Llama-2's and Mistral's tokenizer.json describe it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    specials = ["<unk>", "<s>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([text.replace("\n", " ") for text in topics.values()], trainer)
    model = tokenizer.model
    plain = Tokenizer(model)
    plain.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    plain.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    plain.add_special_tokens(["<unk>", "<s>", "</s>"])
    plain.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def randomise_(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights, norms and biases large enough that a wrong row order, bias or rope shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(noise * 0.08 if parameter.ndim == 2 else 0.3 * noise)
    for name, module in model.named_modules():
        if name.endswith("norm"):
            with torch.no_grad():
                module.weight.add_(1.0)


MODELS: dict[str, tuple[Any, Any, str, dict[str, Any]]] = {
    "qwen2-tied": (Qwen2Config, Qwen2ForCausalLM, "qwen2", {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, "qwen2", {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, "qwen2", {"tie_word_embeddings": False, "head_dim": 128}),
    "llama": (LlamaConfig, LlamaForCausalLM, "llama-bpe", {"tie_word_embeddings": False}),
    "llama-tied": (LlamaConfig, LlamaForCausalLM, "smollm", {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, MistralForCausalLM, "sentencepiece", {"sliding_window": None}),
}
FAMILIES = list(MODELS)


def some_ids(source: SourceModel, count: int = 200) -> torch.Tensor:
    return torch.randint(0, len(source.tokenizer), (count,), generator=torch.Generator().manual_seed(1))


def logits_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None]).logits[0].float()


def kl_of_llamacpp(path: Path, ids: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean KL(reference ‖ llama.cpp) in nats per token."""
    with open_engine().load(path, n_ctx=512) as model:
        theirs = torch.from_numpy(model.logits(ids.tolist())).log_softmax(-1)
    ours = reference.log_softmax(-1)
    return float((ours.exp() * (ours - theirs)).sum(-1).mean())


def keys(path: Path) -> dict[str, Any]:
    return {key: field.contents() for key, field in GGUFReader(path).fields.items()}
