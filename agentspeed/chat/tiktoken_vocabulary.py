"""A `tiktoken.model` vocabulary (Kimi, Moonlight) as the tokenizer.json that everything else here reads.

The file has each token's bytes and its rank. Both algorithms merge the neighbours whose union has the least rank; ours
is told all unions by their halves. Ids, and the text of control tokens, come from tokenizer_config.json.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path
from typing import Any, Final

from agentspeed.chat.environment import read_json
from agentspeed.errors import ModelBroken

FILE: Final = "tiktoken.model"
_CONTROLS: Final = 256
"""Ids after the vocabulary's own that are control tokens, named or reserved."""
_LETTERS: Final = r"\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]"
_SHORTENED: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERN: Final = "|".join(
    (
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}]*[\p{{Ll}}{_LETTERS}]+{_SHORTENED}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[\p{{Lu}}\p{{Lt}}{_LETTERS}]+[\p{{Ll}}{_LETTERS}]*{_SHORTENED}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
"""Where these vocabularies cut a text into pieces, before they merge bytes within a piece."""


def tokenizer_json(folder: Path) -> str:
    """The tokenizer of a folder with a `tiktoken.model`. Raises `ModelBroken` for a file that is none."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    ranks = _ranks(folder / FILE)
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    letters = _letters()
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    model = models.BPE(vocab=vocabulary, merges=_merges(ranks, letters), ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for number, text in sorted(_controls(settings, len(ranks)).items()):
        _ = tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        if tokenizer.token_to_id(text) != number:
            raise ModelBroken(
                f"{folder / 'tokenizer_config.json'} gives {text} the id {number}, which it cannot have.",
                remedy="Control tokens follow the vocabulary without a gap; download both files again.",
            )
    return str(tokenizer.to_str())


def _ranks(path: Path) -> dict[bytes, int]:
    """Each token's bytes and rank; ranks are ids, from 0 without a gap."""
    ranks: dict[bytes, int] = {}
    try:
        for line in path.read_bytes().splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except (OSError, ValueError, binascii.Error) as error:
        raise ModelBroken(f"{path} is no tiktoken vocabulary: {error}.", remedy="Download it again.") from error
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise ModelBroken(
            f"{path} is no whole tiktoken vocabulary: ranks are missing, or bytes.", remedy="Download it again."
        )
    return ranks


def _merges(ranks: dict[bytes, int], letters: list[str]) -> list[tuple[str, str]]:
    """Every way to make a token of two others, by the rank of what is made."""
    merges: list[tuple[str, str]] = []
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        halves = [
            (token[:cut], token[cut:]) for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks
        ]
        halves.sort(key=lambda half: (ranks[half[0]], ranks[half[1]]))
        merges += [("".join(letters[b] for b in one), "".join(letters[b] for b in other)) for one, other in halves]
    return merges


def _controls(settings: dict[str, Any], first: int) -> dict[int, str]:
    """Control tokens by id: those that the configuration names, and names for the rest."""
    named: dict[int, str] = {}
    given = settings.get("added_tokens_decoder", {})
    for number, token in given.items() if isinstance(given, dict) else ():
        match token:
            case {"content": str(content)} if str(number).isdecimal():
                named[int(number)] = content
            case _:
                raise ModelBroken(
                    f"tokenizer_config.json names the control token {number!r} wrongly: {json.dumps(token)[:80]}.",
                    remedy='Each is {"content": ...} under its id.',
                )
    last = max([first + _CONTROLS - 1, *named])
    return {number: named.get(number, f"<|reserved_token_{number}|>") for number in range(first, last + 1)}


def _letters() -> list[str]:
    """Byte to character of the byte-level alphabet (Radford et al. 2019)."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]
