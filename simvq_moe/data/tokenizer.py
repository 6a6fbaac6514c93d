"""Byte-level BPE: trained on documents, or loaded from a file or the Hugging Face hub.

257 tokens are the bytes alone. Only byte-level tokenizers are taken (GPT-2's alphabet, also that of
GPT-NeoX, OLMo, Llama 3, Qwen), for their tokens stand for whole bytes: bits per byte are exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int64
from torch import Tensor

from simvq_moe.merging import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; token 0 of a tokenizer that was trained here."""
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>")
"""Names of the end of a document, the first that a tokenizer has."""
BYTES = 257
"""Tokens of the smallest vocabulary: every byte and the end of text."""
TOKENIZER_FILE = "tokenizer.json"


def train_tokenizer(texts: Iterable[list[str]], vocabulary: int) -> Tokenizer:
    """Byte-level BPE (GPT-2's alphabet and splitting), of exactly `vocabulary` tokens.

    Raises:
        ConfigError: the texts don't yield so many.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=2,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([] if vocabulary == BYTES else texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ConfigError(
            f"data.vocabulary {vocabulary} > {tokenizer.get_vocab_size()}, the most that the "
            "training documents yield: lower it or give more text"
        )
    return tokenizer


def load_tokenizer(name: str, vocabulary: int) -> Tokenizer:
    """A tokenizer.json, a folder with one, or a name on the Hugging Face hub.

    Raises:
        ConfigError: there is none, it isn't byte-level, has no end of text, or is too large.
    """
    from tokenizers import Tokenizer

    path = Path(name) / TOKENIZER_FILE if Path(name).is_dir() else Path(name)
    try:
        found = Tokenizer.from_file(str(path)) if path.exists() else Tokenizer.from_pretrained(name)
    except Exception as error:  # `tokenizers` raises plain Exception
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"data.tokenizer {name!r} can't be loaded ({reason}): give a tokenizer.json, a folder "
            "with one, or a name on the Hugging Face hub"
        ) from None
    problem = _problem(found, vocabulary)
    if problem:
        raise ConfigError(f"data.tokenizer {name!r} {problem}")
    return found


def _problem(tokenizer: Tokenizer, vocabulary: int) -> str | None:
    content = json.loads(tokenizer.to_str())
    if "ByteLevel" not in json.dumps(content["decoder"]):
        return "is not byte-level, so bits per byte would be wrong: use a byte-level one"
    if not any(tokenizer.token_to_id(end) is not None for end in ENDS):
        return f"has no end of text, one of {', '.join(ENDS)}: add one"
    size = 1 + max(tokenizer.get_vocab().values())
    if size > vocabulary:
        return f"has {size} tokens > data.vocabulary {vocabulary}: set data.vocabulary to {size}"
    return None


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that ends a document."""
    found = (tokenizer.token_to_id(end) for end in ENDS)
    return next(token for token in found if token is not None)


def bytes_of_token(tokenizer: Path, vocabulary: int) -> Int64[Tensor, " vocabulary"]:
    """UTF-8 bytes that each id stands for, 0 for special ones and those that don't occur.

    Read from the file: in the byte-level alphabet each character of a token is one byte.
    """
    content: dict[str, Any] = json.loads(tokenizer.read_text(encoding="utf-8"))
    lengths = torch.zeros(vocabulary, dtype=torch.int64)
    for token, token_id in content["model"]["vocab"].items():
        lengths[token_id] = len(token)
    for added in content["added_tokens"]:
        lengths[added["id"]] = 0 if added["special"] else len(added["content"].encode())
    return lengths
