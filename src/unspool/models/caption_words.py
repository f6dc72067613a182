"""Captions as known words: normalising, plurals, typos and what is left over. Pure functions of text, no torch.

Nothing that a user can type is an error: what cannot be read is dropped and reported.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

APOSTROPHES = "'\u2019\u02bc\uff07"
CACHED_LENGTH = 2000
"""Longest caption, in characters, that is remembered: the memory of the cache stays bounded."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a caption says: `words` as indexes into the vocabulary, `unknown` words that were dropped, `cut` known and
    unknown words past the last row, `corrected` (as written, as read) pairs; all in order, the last three once each."""

    words: tuple[int, ...]
    unknown: tuple[str, ...]
    cut: tuple[str, ...]
    corrected: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Vocabulary:
    """Known words, the most frequent first where it matters for correcting typos.

    Raises ValueError for a word that `split` would not give back, or that comes twice.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        odd = [word for word in self.words if list(split(word)) != [word]]
        if odd:
            raise ValueError(
                f"vocabulary words {odd[:4]}: expected single words as captions are read, in lower case, without "
                "accents, spaces or punctuation"
            )
        if len(set(self.words)) < len(self.words):
            twice = sorted({word for word in self.words if self.words.count(word) > 1})
            raise ValueError(f"vocabulary words {twice[:4]} come twice; expected each once")

    @cached_property
    def index(self) -> dict[str, int]:
        """Word -> its place."""
        return {word: place for place, word in enumerate(self.words)}

    @cached_property
    def letters(self) -> tuple[int, ...]:
        """Per word the set of its letters as bits: two words at distance d differ in at most 2 d of them."""
        return tuple(_letters(word) for word in self.words)

    def read(self, caption: str, rows: int) -> Reading:
        """`caption` as at most `rows` known words. Remembered for the most recent captions."""
        return (_read if len(caption) > CACHED_LENGTH else _remembered)(self, caption, rows)

    def find(self, word: str) -> int | None:
        """Place of a normalised word, of the word with or without an ending, or of the nearest; None without one."""
        for form in _forms(word):
            if form in self.index:
                return self.index[form]
        return self._nearest(_stem(word))

    def missing(self, captions: Iterable[str]) -> tuple[str, ...]:
        """Words of captions that are not known as they stand or with another ending, once each, in order: what is
        to be added for these captions to be told apart."""
        words = dict.fromkeys(word for caption in captions for word in split(caption))
        return tuple(_stem(w) for w in words if not any(form in self.index for form in _forms(w)))

    def _nearest(self, word: str) -> int | None:
        """The known word at the least distance within `allowance`, of several the most frequent."""
        best, least = None, allowance(len(word)) + 1
        letters = _letters(word)
        for place, known in enumerate(self.words):
            limit = min(least - 1, allowance(len(known) + 1))
            if limit < 1 or len(known) < 4 or abs(len(known) - len(word)) > limit:
                continue
            if (letters ^ self.letters[place]).bit_count() > 2 * limit:
                continue
            apart = distance(word, known)
            if apart <= limit:
                best, least = place, apart
        return best


def allowance(length: int) -> int:
    """Typos that are forgiven in a word of `length` letters: none below 4, one below 7, else two."""
    return 0 if length < 4 else 1 if length < 7 else 2


def distance(a: str, b: str) -> int:
    """Damerau-Levenshtein distance (optimal string alignment): insert, delete, replace, swap two neighbours."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        row = [i]
        for j, y in enumerate(b, start=1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]


def split(caption: str) -> Iterator[str]:
    """The words of a caption in lower case, without accents and punctuation; a symbol (emoji) is a word of its own."""
    text = unicodedata.normalize("NFKD", caption).casefold()
    text = unicodedata.normalize("NFC", "".join(c for c in text if not "\u0300" <= c <= "\u036f"))
    word = ""
    for character in text:
        category = unicodedata.category(character)
        if category[0] in "LMN" or (character in APOSTROPHES and word):
            word += "'" if character in APOSTROPHES else character
            continue
        yield from _finished(word)
        word = ""
        if category == "So":
            yield character
    yield from _finished(word)


def _finished(word: str) -> Iterator[str]:
    word = word.rstrip("'")
    if any(unicodedata.category(c)[0] in "LN" for c in word):  # a lone variation selector is no word
        yield word


def _stem(word: str) -> str:
    return word[:-2] if word.endswith("'s") else word


def _forms(word: str) -> Iterator[str]:
    """The word itself, then without possessive and plural endings, then with an s (hop, hops)."""
    yield word
    stem = _stem(word)
    yield stem
    if len(stem) > 3 and stem.endswith("s"):
        yield stem[:-1]
    if len(stem) > 4 and stem.endswith("es"):
        yield stem[:-2]
    if len(stem) > 2:
        yield stem + "s"


def _letters(word: str) -> int:
    bits = 0
    for character in word:
        bits |= 1 << (ord(character) % 64)
    return bits


def _read(vocabulary: Vocabulary, caption: str, rows: int) -> Reading:
    words: list[int] = []
    unknown, cut, corrected = dict[str, None](), dict[str, None](), dict[str, str]()
    for word in split(caption):
        if len(words) == rows:
            cut[word] = None
            continue
        place = None if word in unknown else vocabulary.find(word)
        if place is None:
            unknown[word] = None
            continue
        words.append(place)
        if vocabulary.words[place] not in _forms(word):
            corrected[word] = vocabulary.words[place]
    return Reading(words=tuple(words), unknown=tuple(unknown), cut=tuple(cut), corrected=tuple(corrected.items()))


_remembered = lru_cache(maxsize=8192)(_read)
