"""Folders with small tokenizers of every kind in use, trained or made up on the spot."""

from __future__ import annotations

import base64
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import tiktoken
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from agentspeed.chat.tiktoken_vocabulary import PATTERN
from agentspeed.chat.tokenizer import TextTokenizer

CORPUS = [
    "the quick brown fox, and the lazy dog's 1234 days",
    "naïve café 日本語 日本",
    "x = {'a': [1, 2]}\n\n  return x\n",
] * 20


def fallback(folder: Path, *, metaspace: bool = False) -> TextTokenizer:
    """A vocabulary of some letters; other characters are bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for letter in "▁abcdefg%é":
        _ = vocab.setdefault(letter, len(vocab))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
        steps: list[Any] = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never"), decoders.Fuse()]
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


def byte_level(folder: Path) -> TextTokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return TextTokenizer(folder)


@lru_cache(maxsize=1)
def ranks(size: int = 600) -> dict[bytes, int]:
    """A vocabulary as it is trained: each token joins two others, in order of rank."""
    chance = random.Random(5)
    made = [bytes([byte]) for byte in range(256)]
    words = " ".join(CORPUS[:3]).encode().split(b" ")
    while len(made) < size:
        word = b" " * chance.randint(0, 1) + chance.choice(words)
        known = [n for n in range(2, len(word) + 1) for at in range(len(word) - n + 1) if word[at : at + n] not in made]
        if not known:
            made.append(chance.choice(made[256:] or made) + chance.choice(made))
        else:
            at = chance.randrange(len(word) - 1)
            piece = next(
                (word[at : at + n] for n in range(2, len(word) - at + 1) if word[at : at + n] not in made), b""
            )
            if not piece or not any(piece[:cut] in made and piece[cut:] in made for cut in range(1, len(piece))):
                continue
            made.append(piece)
        made = list(dict.fromkeys(made))
    return {token: rank for rank, token in enumerate(made)}


def tiktoken_folder(folder: Path) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks().items()]
    _ = (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    first = len(ranks())
    named = {str(first): {"content": "[BOS]"}, str(first + 3): {"content": "<|im_end|>"}}
    _ = (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": named}))
    return folder


@lru_cache(maxsize=1)
def tiktoken_reference() -> tiktoken.Encoding:
    """The package's own encoding of `tiktoken_folder`."""
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={})
