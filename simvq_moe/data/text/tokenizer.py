"""Byte-level BPE: trained on documents, or loaded from a file or the Hugging Face hub.

257 tokens are the bytes alone. Only byte-level tokenizers are taken (GPT-2's alphabet, also that of
GPT-NeoX, OLMo, Llama 3, Qwen), for their tokens stand for whole bytes: bits per byte are exact.
What would cut, pad or change a text (truncation, padding, normalizers, dropout, a prefixed space,
tokens that a post-processor adds) is left out of a tokenizer that is given, so that every document
and every prompt is encoded whole and to the byte.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from jaxtyping import Int64
from pydantic import Field
from torch import Tensor
from typing_extensions import NotRequired, TypedDict

from simvq_moe.errors import ConfigError
from simvq_moe.files.regular import (
    BrokenFileError,
    parse_json,
    read_bytes,
    read_json,
    read_text,
    validate_json,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"
"""Ends every document; token 0 of a tokenizer that was trained here."""
ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<|im_end|>", "<eos>")
"""Names of the end of a document, the first that a tokenizer has."""
BYTES = 257
"""Tokens of the smallest vocabulary: every byte and the end of text."""
TOKENIZER_FILE = "tokenizer.json"
LARGEST_ID = 2**31 - 1
LOSSLESS_SPLITS = frozenset(
    ["ByteLevel", "Digits", "FixedLength", "Punctuation", "Split", "UnicodeScripts"]
)
"""Pre-tokenizers that only say where a text is cut."""
SAMPLE = "".join(
    [
        *map(chr, range(0x180)),
        *map(chr, [*range(0x180, 0x800, 0x40), 0x800, *range(0x1000, 0x10000, 0x1000)]),
        *map(chr, range(0x10000, 0x110000, 0x10000)),
        *(
            " a  b\t\r\n\n c ",
            "e\u0301\u1100\u1161 ﬁ Å № ",
            "漢字 🙂👩\u200d🔬 ",
            "DON'T I'll 1234567890 ",
        ),
    ]
)
"""Text by which a tokenizer has to show that it keeps every byte: all bytes of UTF-8, white space
of many kinds, and what the usual normalizers change."""

TokenId = Annotated[int, Field(ge=0, le=LARGEST_ID)]

log = logging.getLogger(__name__)


class AddedToken(TypedDict):
    """A token beside those of the model."""

    id: TokenId
    content: str
    special: bool


class Model(TypedDict):
    """A BPE; tokens by their name in the byte-level alphabet."""

    type: NotRequired[str]
    vocab: dict[str, TokenId]
    continuing_subword_prefix: NotRequired[str | None]
    end_of_word_suffix: NotRequired[str | None]


class TokenizerContent(TypedDict):
    """What is read of a tokenizer.json; `tokenizers` checks the rest of it."""

    added_tokens: list[AddedToken]
    decoder: dict[str, Any] | None
    pre_tokenizer: dict[str, Any] | None
    model: Model


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
    """A tokenizer.json, a folder with one, or a name on the Hugging Face hub, without what would
    cut, pad or change a text.

    Raises:
        ConfigError: there is none, it isn't byte-level, loses bytes, has no end of text, or is too
            large.
    """
    shown = f"data.tokenizer {name!r}"
    try:
        text = read_bytes(_file_of(name))
        content = validate_json(text, TokenizerContent, "tokenizer.json")
        whole = parse_json(text, "tokenizer.json")
        end = _end_of(_byte_level(content, shown), shown)
        left_out = _leave_out(whole, end)
        found = _parsed(json.dumps(whole), "tokenizer.json")
    except BrokenFileError as error:
        raise ConfigError(
            f"{shown} can't be loaded ({error}): give a tokenizer.json, a folder with one, or a "
            "name on the Hugging Face hub"
        ) from None
    size = 1 + max(found.get_vocab().values())
    if size > vocabulary:
        raise ConfigError(
            f"{shown} has {size} tokens > data.vocabulary {vocabulary}: set data.vocabulary to "
            f"{size}"
        )
    if not _keeps_bytes(found):
        raise ConfigError(
            f"{shown} does not keep every byte of a text, so bits per byte would be wrong: use "
            "another byte-level one"
        )
    if left_out:
        log.warning("%s: documents are encoded without its %s", shown, ", ".join(left_out))
    return found


def open_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json as it is, such as that of a run or of a cache.

    Raises:
        BrokenFileError: it is none.
    """
    return _parsed(read_text(path), path)


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text; see `encode_texts`."""
    return encode_texts(tokenizer, [text])[0]


def encode_texts(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts, each whole and with nothing added: documents and prompts alike.

    The name of a special token in a text is text.

    Raises:
        ConfigError: a text has half of a surrogate pair, so it is no UTF-8.
    """
    # each only where it changes something: another thread may be encoding
    if not tokenizer.encode_special_tokens:
        tokenizer.encode_special_tokens = True
    if tokenizer.truncation is not None:
        tokenizer.no_truncation()
    if tokenizer.padding is not None:
        tokenizer.no_padding()
    try:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    except (TypeError, UnicodeEncodeError):
        raise ConfigError("a text is not UTF-8: write it in another encoding") from None
    return [encoding.ids for encoding in encodings]


def end_of_text(tokenizer: Tokenizer) -> int:
    """The token that ends a document."""
    found = (tokenizer.token_to_id(end) for end in ENDS)
    return next(token for token in found if token is not None)


def bytes_of_token(tokenizer: Path, vocabulary: int) -> Int64[Tensor, " vocabulary"]:
    """UTF-8 bytes that each id stands for, 0 for special ones and those that don't occur.

    Read from the file: in the byte-level alphabet each character of a token is one byte.

    Raises:
        BrokenFileError: the file is no byte-level tokenizer, or has ids beyond the vocabulary.
    """
    content = _byte_level(read_json(tokenizer, TokenizerContent), str(tokenizer))
    lengths = [(i, len(token)) for token, i in content["model"]["vocab"].items()]
    for added in content["added_tokens"]:
        lengths.append((added["id"], 0 if added["special"] else len(added["content"].encode())))
    largest = max((i for i, _ in lengths), default=0)
    if largest >= vocabulary:
        raise BrokenFileError(
            tokenizer, f"has token {largest}, beyond the vocabulary of {vocabulary}"
        )
    found = torch.zeros(vocabulary, dtype=torch.int64)
    for i, length in lengths:
        found[i] = length
    return found


def _file_of(name: str) -> Path:
    """The tokenizer.json that a name stands for."""
    try:
        path = Path(name) / TOKENIZER_FILE if Path(name).is_dir() else Path(name)
        if path.exists():
            return path
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(name, TOKENIZER_FILE))
    except Exception as error:  # of paths, network or hub, which have no common class
        raise BrokenFileError(name, " ".join(str(error).split())) from None


def _parsed(text: str, where: Path | str) -> Tokenizer:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises plain Exception
        raise BrokenFileError(where, f"is no tokenizer that can be loaded: {error}") from None


def _byte_level(content: TokenizerContent, shown: str) -> TokenizerContent:
    """The content, if each of its tokens stands for whole bytes.

    Raises:
        ConfigError: it doesn't.
    """
    kinds = [kind["type"] for kind in _flat(content["pre_tokenizer"])]
    model = content["model"]
    marks = (model.get("continuing_subword_prefix"), model.get("end_of_word_suffix"))
    if (
        not any(kind["type"] == "ByteLevel" for kind in _flat(content["decoder"]))
        or kinds.count("ByteLevel") != 1
        or not LOSSLESS_SPLITS.issuperset(kinds)
        or model.get("type", "BPE") != "BPE"
        or any(marks)
    ):
        raise ConfigError(
            f"{shown} is not byte-level, so bits per byte would be wrong: use a byte-level one"
        )
    return content


def _flat(part: Any) -> Iterator[dict[str, Any]]:
    """The pre-tokenizers or decoders of a sequence, or the only one; they aren't nested deeper."""
    parts = part.get("pretokenizers", part.get("decoders", [part])) if part else []
    for one in parts if isinstance(parts, list) else []:
        if isinstance(one, dict) and isinstance(one.get("type"), str):
            yield one


def _end_of(content: TokenizerContent, shown: str) -> str:
    names = {*content["model"]["vocab"], *(added["content"] for added in content["added_tokens"])}
    for end in ENDS:
        if end in names:
            return end
    raise ConfigError(f"{shown} has no end of text, one of {', '.join(ENDS)}: add one")


def _leave_out(content: dict[str, Any], end: str) -> list[str]:
    """Take out of a tokenizer.json what cuts, pads or changes a text; names what was there.

    Args:
        end: the token that ends documents; it is special from here on, as text that quotes it
            doesn't end there.
    """
    found = [name for name in ("truncation", "padding", "normalizer") if content.get(name)]
    if (content.get("post_processor") or {}).get("type", "ByteLevel") != "ByteLevel":
        found.append("post_processor")  # that of type ByteLevel adds nothing
    for name in found:
        content[name] = None
    if content["model"].get("dropout"):
        content["model"]["dropout"] = None
        found.append("model.dropout")
    for one in _flat(content["pre_tokenizer"]):
        if one.get("add_prefix_space"):
            one["add_prefix_space"] = False
            found.append("add_prefix_space")
        if one.get("behavior") == "Removed":
            one["behavior"] = "Isolated"
            found.append("removal of what lies between its pieces")
    if len([*_flat(content["decoder"])]) > 1 or content["decoder"]["type"] != "ByteLevel":
        byte_level = (one for one in _flat(content["decoder"]) if one["type"] == "ByteLevel")
        content["decoder"] = next(byte_level)
    for added in content["added_tokens"]:
        if (added.get("lstrip") or added.get("rstrip")) and not added["special"]:
            added["lstrip"] = added["rstrip"] = False
            found.append(f"spaces around {added['content']!r}")
    _make_special(content, end)
    return found


def _make_special(content: dict[str, Any], end: str) -> None:
    for added in content["added_tokens"]:
        if added["content"] == end:
            added["special"] = True
            return
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    known = {"id": content["model"]["vocab"][end], "content": end, **options, "special": True}
    content["added_tokens"].append(known)


def _keeps_bytes(tokenizer: Tokenizer) -> bool:
    """Whether a text of all bytes, and the names of its own added tokens, come back to the byte."""
    content = json.loads(tokenizer.to_str())
    alphabet = _byte_of_character()
    pieces = {
        i: bytes(alphabet[character] for character in token)
        for token, i in content["model"]["vocab"].items()
        if alphabet.keys() >= set(token)
    }
    if len(set(content["model"]["vocab"].values())) != len(content["model"]["vocab"]):
        return False
    for added in content["added_tokens"]:
        pieces[added["id"]] = b"" if added["special"] else added["content"].encode()
    names = (f" {added['content']}  {added['content']}" for added in content["added_tokens"])
    text = SAMPLE + "".join(names)
    ids = encode_text(tokenizer, text)
    return b"".join(pieces.get(i, b"") for i in ids) == text.encode()


def _byte_of_character() -> dict[str, int]:
    """The alphabet of GPT-2: printable characters of Latin-1 stand for themselves, the other bytes
    for the characters from 256 on."""
    themselves = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in themselves]
    return {chr(b): b for b in themselves} | {chr(256 + i): b for i, b in enumerate(others)}
