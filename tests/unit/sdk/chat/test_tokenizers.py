"""Tokenizers of every kind give a text back as it was, whatever ids come; tiktoken vocabularies as tiktoken does."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from agentspeed import errors
from agentspeed.chat.tokenizer import TextTokenizer
from tests.support.tokenizer_folders import CORPUS, byte_level, fallback, ranks, tiktoken_folder, tiktoken_reference

HOSTILE = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("\n\r\t  ▁Ġ<|>\ufffd\u200d\u0301aA'1日"),
    ),
    max_size=40,
)


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
@pytest.fixture(scope="module")
def kimi(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(tiktoken_folder(tmp_path_factory.mktemp("tiktoken")))


@settings(max_examples=1000, deadline=None)
@given(text=HOSTILE | st.lists(st.sampled_from([*CORPUS, "日本", "'S", "aB", " \n "]), max_size=4).map("".join))
def test_a_tiktoken_vocabulary_gives_the_ids_that_tiktoken_gives(kimi: TextTokenizer, text: str) -> None:
    ids = tiktoken_reference().encode_ordinary(text)
    assert kimi.content_ids(text) == ids
    assert kimi.text(ids) == text


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
