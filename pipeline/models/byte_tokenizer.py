"""The tokenizer of models trained on bytes: 256 tokens, each token's id is its byte's value, UTF-8 in and out.

It is a byte-level BPE (Radford et al., 2019) without a single merge, so that transformers and whatever reads its
`tokenizer.json` need no code of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE writes for each byte, at the byte's index.

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on (GPT-2's table).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with exactly 256 tokens and no special ones; `decode` restores any text that UTF-8 can hold."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(byte_alphabet())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrap: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return wrap(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def is_byte_tokenizer(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True where encoding is nothing but UTF-8, so that text can be read as bytes without calling the tokenizer."""
    if len(tokenizer) != 256:
        return False
    every_byte = "".join(map(chr, range(128))) + "\u00e9\u2603\U0001f600"
    expected = {character: byte for byte, character in enumerate(byte_alphabet())}
    ids = tokenizer(every_byte, add_special_tokens=False)["input_ids"]
    return tokenizer.get_vocab() == expected and ids == list(every_byte.encode())
