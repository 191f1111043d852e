"""Tokenizers of every kind give a text back as it was, whatever ids come; tiktoken vocabularies as tiktoken does."""

from __future__ import annotations

import base64
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from agentspeed import errors
from agentspeed.chat.tiktoken_vocabulary import PATTERN
from agentspeed.chat.tokenizer import TextTokenizer

CORPUS = [
    "the quick brown fox, and the lazy dog's 1234 days",
    "naïve café 日本語 日本",
    "x = {'a': [1, 2]}\n\n  return x\n",
] * 20
HOSTILE = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\n\r\t  ▁Ġ<|>\ufffd\u200d\u0301aA'1日"),
    ),
    max_size=40,
)


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


@pytest.fixture(scope="module", params=["byte fallback", "metaspace", "byte level"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "byte level":
        return byte_level(folder)
    return fallback(folder, metaspace=request.param == "metaspace")


@settings(max_examples=400, deadline=None)
@given(text=HOSTILE)
def test_text_comes_back_as_it_was_id_by_id(tokenizer: TextTokenizer, text: str) -> None:
    text = text.replace("▁", "_")  # means a space in vocabularies with byte fallback
    decoder = tokenizer.decoder()
    pieces = [decoder.feed([number]) for number in tokenizer.content_ids(text)]
    assert "".join(pieces) + decoder.finish() == text
    assert tokenizer.text(tokenizer.content_ids(text)) == text


@settings(max_examples=400, deadline=None)
@given(ids=st.lists(st.integers(0, 500), max_size=30))
def test_no_ids_can_break_a_decoder_and_the_split_never_changes_the_text(
    tokenizer: TextTokenizer, ids: list[int]
) -> None:
    one, all_at_once = tokenizer.decoder(), tokenizer.decoder()
    text = "".join(one.feed([number]) for number in ids) + one.finish()
    assert text == all_at_once.feed(ids) + all_at_once.finish()
    _ = text.encode()


def test_bytes_that_are_no_character_become_one_each_and_nothing_else_is_lost(tmp_path: Path) -> None:
    tokenizer = fallback(tmp_path)
    ids = [tokenizer.token_id(token) for token in ("<0xC5>", "<0xA2>", "<0xFB>", "a")]
    decoder = tokenizer.decoder()
    assert [decoder.feed([number or 0]) for number in ids] == ["", "Ţ", "\ufffd", "a"]


def test_a_character_that_was_not_finished_is_shown_at_the_end(tmp_path: Path) -> None:
    decoder = byte_level(tmp_path).decoder()
    number = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).token_to_id("Ã")
    assert decoder.feed([number]) == "" and decoder.finish() == "\ufffd"


@pytest.mark.parametrize("text", ["\ud800", "a\udcff"])
def test_half_a_character_is_refused_by_what_it_is(tokenizer: TextTokenizer, text: str) -> None:
    with pytest.raises(errors.InvalidRequest, match="cannot read"):
        _ = tokenizer.content_ids(text)


# ---- tiktoken -------------------------------------------------------------------------------------------------------
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


@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(tiktoken_folder(tmp_path_factory.mktemp("tiktoken")))


@settings(max_examples=1000, deadline=None)
@given(text=HOSTILE | st.lists(st.sampled_from([*CORPUS, "日本", "'S", "aB", " \n "]), max_size=4).map("".join))
def test_a_tiktoken_vocabulary_gives_the_ids_that_tiktoken_gives(kimi: TextTokenizer, text: str) -> None:
    ids = _reference().encode_ordinary(text)
    assert kimi.content_ids(text) == ids
    assert kimi.text(ids) == text


@lru_cache(maxsize=1)
def _reference() -> tiktoken.Encoding:
    return tiktoken.Encoding("kimi", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens={})


def test_control_tokens_of_a_tiktoken_vocabulary_have_the_ids_of_its_configuration(kimi: TextTokenizer) -> None:
    first = len(ranks())
    assert kimi.token_id("[BOS]") == first and kimi.token_id("<|im_end|>") == first + 3
    assert kimi.token_id(f"<|reserved_token_{first + 1}|>") == first + 1
    assert kimi.template_ids("a<|im_end|>")[-1] == first + 3
    assert first + 3 not in kimi.content_ids("a<|im_end|>")


@pytest.mark.parametrize("damage", ["YQ==", "!!! 0", "YQ== x"])
def test_a_damaged_tiktoken_vocabulary_is_refused_by_file(tmp_path: Path, damage: str) -> None:
    with (tiktoken_folder(tmp_path) / "tiktoken.model").open("a") as file:
        _ = file.write(damage + "\n")
    with pytest.raises(errors.ModelBroken, match=r"tiktoken\.model"):
        _ = TextTokenizer(tmp_path)
