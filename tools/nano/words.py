"""The words nano's tasks are made of: separate pools for training and for the held-out set, and words nobody has seen.

Half of the nouns, names and values are drawn from syllables, so that a model cannot learn them by heart: it has to copy
them from the conversation.
"""

from __future__ import annotations

# ruff: noqa: SIM905 (lists of words read best as text)
from dataclasses import dataclass, replace
from random import Random

_VERBS = (
    "get find book send add make check plan cancel order play open start list show set buy rent call read print scan "
    "mix load move copy clean pay save share sort stop test track update watch count create delete edit fetch fix give "
    "hide join keep lock look measure name paint pick post pull push query rate record remove reset run sell ship sign "
    "submit switch tell turn type use view wash write"
).split()
_NOUNS = (
    "weather flight hotel train ticket room table song movie email message note task event meeting alarm timer order "
    "invoice product price stock recipe word file folder photo map route taxi bus lamp door heater oven camera printer "
    "parcel package book course lesson exam student teacher doctor patient pill garden tree flower dog cat horse boat "
    "bike car truck engine battery light fan window wall roof bridge road park museum shop bank card account loan "
    "budget tax bill report chart poll vote game score team player coach match race prize gift cake pizza coffee tea "
    "soup salad bread cheese fruit farm field river lake island beach hill forest star planet moon satellite rocket "
    "robot sensor server database backup password user group channel forum blog page link image video podcast album "
    "concert festival wedding party dinner lunch menu chef kitchen plate glass bottle box bag shirt shoe coat hat ring"
).split()
_PLACES = (
    "Oslo Lima Paris Rome Cairo Berlin Madrid Tokyo Delhi Quito Accra Lagos Miami Boston Denver Dublin Vienna Prague "
    "Warsaw Athens Lisbon Geneva Zurich Munich Sydney Nairobi Toronto Havana Bogota Kyoto London Milan Turin Perth Bern"
).split()
_PEOPLE = (
    "Anna Ben Carla David Emma Felix Greta Hugo Iris Jonas Karin Liam Mona Nils Olga Peter Quinn Rosa Sven Tara Ulla "
    "Viktor Wanda Xenia Yusuf Zoe Adam Bella Clara Dora Erik Fiona Georg Hanna Ivan Julia Klaus Lena Maria Noah"
).split()
_THINGS = (
    "red blue green black white yellow small large fast slow warm cold happy quiet loud bright dark soft hard round "
    "paper stone metal glass wood cotton silver gold iron silk music history science sport travel food art nature "
    "morning evening night spring summer autumn winter north south east west"
).split()

FILLERS = (
    "for with to in on at by as of from about using called named is be please now then also here there this one some "
    "any our your their just really quickly today soon again next first last maybe via per into over near after before "
    "until it so what who how would could can may need want if when hey well okay ok right a the an and or but not me "
    "us them these those very only even still back up down out off all each most more than such own same too do does "
    "did let us go think am are was were has had have said exactly precisely equals means takes goes stands given "
    "under value asked wanted being having whose should must shall will that my like kindly you which while since "
    "because though both either he she they we his her its been might ought nothing something someone anyone yes no"
).split()
"""Words that may stand anywhere in a request and never name a tool, a parameter or a value."""


@dataclass(frozen=True)
class Pool:
    """What one split may draw from."""

    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    places: tuple[str, ...]
    people: tuple[str, ...]
    things: tuple[str, ...]
    endings: tuple[str, ...]
    """Last syllables of made-up words; no made-up word of one split can occur in the other."""
    wild: float = 0.0
    """Share of made-up words that are of no syllables: copying has to work whatever the word."""
    known: float = 0.65
    """Share of nouns that are English words."""


_WRITTEN = frozenset({"get", "list", "order", "flight", "small"})
"""Words in the texts that training has by hand (tools, talk): these are no words for the held-out set."""


def _every(words: list[str], held: bool, step: int = 6) -> tuple[str, ...]:
    unique = sorted(set(words))
    return tuple(
        word for index, word in enumerate(unique) if (index % step == step - 1 and word not in _WRITTEN) == held
    )


def _pool(held: bool) -> Pool:
    endings = (
        ("bu dal fen gor hin jat kel lum nar pok").split()
        if held
        else (
            "ba be bi bo ca co da de di do fa fi fo ga ge gi ka ki ko la le li lo lu ma me mi mo na ne ni no pa pe "
            "pi po "
            "ra re ri ro ru sa se si so ta te ti to tu va ve vi vo za ze zi zo bar bel ber bin cor den dor far fin gan "
            "hal ker lan lek lin lor man mer min nel nor pan per rak ran rem rik rin ros sal sen sin sol tal tan tek "
            "ter tin tor val van ver vik xon zak zen"
        ).split()
    )
    return Pool(
        _every(_VERBS, held, 8),
        _every(_NOUNS, held),
        _every(_PLACES, held),
        _every(_PEOPLE, held),
        _every(_THINGS, held),
        tuple(endings),
        *((0.0, 0.65) if held else (0.65, 0.4)),
    )


TRAIN = _pool(held=False)
HELD_OUT = _pool(held=True)
_ONSETS = tuple("b c d f g h j k l m n p r s t v w x z br cr dr fl gr kl pl pr sk sl sn sp st tr".split())
_VOWELS = tuple("a e i o u".split())
_LETTERS = "abcdefghijklmnopqrstuvwxyzaeiouaeiou"
_ENGLISH = tuple(
    sorted(
        {
            word.lower()
            for part in (TRAIN.verbs, TRAIN.nouns, TRAIN.places, TRAIN.people, TRAIN.things, FILLERS)
            for word in part
        }
    )
)
_TAKEN = frozenset(FILLERS) | {
    word.lower() for part in ("verbs", "nouns", "places", "people", "things") for word in getattr(HELD_OUT, part)
}


def made_up(rng: Random, pool: Pool, syllables: int = 2) -> str:
    """A lower-case word that no dictionary has."""
    if rng.random() < pool.wild:
        return _wild(rng)
    return "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables - 1)) + rng.choice(pool.endings)


def _wild(rng: Random) -> str:
    """Any letters, or pieces of English words; none that a word of the held-out set or a filler could be."""
    while True:
        if rng.random() < 0.3:
            word = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(1, 9)))
        else:
            word = "".join(_piece(rng) for _ in range(rng.choice((1, 2, 2, 2, 3))))
        if not word.endswith(HELD_OUT.endings) and word not in _TAKEN:
            return word


def _piece(rng: Random) -> str:
    """One to six letters that stand together in a word: much as a tokenizer cuts words it has not seen."""
    word = rng.choice(_ENGLISH)
    size = rng.randint(1, 6)
    start = rng.randrange(max(1, len(word) - size + 1))
    return word[start : start + size]


def narrowed(rng: Random, pool: Pool) -> Pool:
    """A pool of few words, so that the same ones come again within a conversation."""
    few = {name: tuple(rng.sample(getattr(pool, name), 4)) for name in ("verbs", "places", "people", "things")}
    return replace(pool, **few)


def verb(rng: Random, pool: Pool) -> str:
    return made_up(rng, pool) if rng.random() < pool.wild / 2 else rng.choice(pool.verbs)


def noun(rng: Random, pool: Pool) -> str:
    return rng.choice(pool.nouns) if rng.random() < pool.known else made_up(rng, pool, rng.choice((2, 2, 3)))


def place(rng: Random, pool: Pool) -> str:
    return rng.choice(pool.places) if rng.random() < 0.4 else made_up(rng, pool, rng.choice((2, 3))).capitalize()


def person(rng: Random, pool: Pool) -> str:
    first = rng.choice(pool.people) if rng.random() < 0.5 else made_up(rng, pool).capitalize()
    return first if rng.random() < 0.75 else f"{first} {made_up(rng, pool).capitalize()}"


def phrase(rng: Random, pool: Pool) -> str:
    """One or two words."""
    words = [
        rng.choice(pool.things) if rng.random() < 0.5 else made_up(rng, pool) for _ in range(rng.choice((1, 1, 2)))
    ]
    if pool.wild and rng.random() < 0.04:
        words = words[:1] * 2  # "wood wood": after a word comes the same word, which is the hardest thing to copy
    return " ".join(words)


def code(rng: Random, pool: Pool) -> str:
    """A reference such as KB-402."""
    letters = made_up(rng, pool)[:2].upper()
    return f"{letters}{rng.choice(('-', '', '-'))}{rng.randint(1, 9999)}"
