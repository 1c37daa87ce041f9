"""Measures of texts that need no judge: their diversity, and what they share with the training text.

Words are compared in lower case, without punctuation. The training text is read once, in order; what is kept
in memory belongs to the stories, however long the training text is.
"""

import re
from collections.abc import Iterable, Sequence
from statistics import median_low
from typing import Any

WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*|\d+")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case: letters with apostrophes inside, or digits."""
    return WORD.findall(text.replace("\u2019", "'").lower())


def n_grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all runs of `n` words."""
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def distinct_share(texts: list[list[str]], n: int) -> float | None:
    """Return the different runs of `n` words over all of them, in all texts together; None without any.

    Distinct-n (Li et al. 2016, arxiv.org/abs/1510.03055). It falls with the number of words: compare equal
    numbers of stories of equal length.
    """
    found = [run for words in texts for run in n_grams(words, n)]
    return len(set(found)) / len(found) if found else None


def repeated_share(words: list[str], n: int) -> float | None:
    """Return the share of the runs of `n` words that stood earlier in the same text; None without any."""
    found = n_grams(words, n)
    return 1 - len(set(found)) / len(found) if found else None


class SharedRuns:
    """The longest run of words that each of some texts has in common with a text that is read word by word.

    A suffix automaton of the texts (Blumer et al. 1985): each state is a set of runs that end at the same
    places, the longest of them of `_length` words, and `_link` leads to the longest shorter run that also
    ends elsewhere. Reading takes constant time per word on average, whatever the texts repeat.
    """

    def __init__(self, texts: list[list[str]]) -> None:
        self.texts = texts
        vocabulary = dict.fromkeys(word for words in texts for word in words)
        self._number = {word: number for number, word in enumerate(vocabulary)}
        self.unseen = set(vocabulary)
        """Words of the texts that have not been read yet."""
        self._next: list[dict[int, int]] = [{}]
        self._length, self._link, self._last = [0], [-1], 0
        for place, words in enumerate(texts):
            # a mark after each text, which no word equals, so that no run goes from one into the next
            for number in (*map(self._number.__getitem__, words), -1 - place):
                self._append(number)
        self._matched = [0] * len(self._length)  # words of each state's longest run that was read

    def _append(self, number: int) -> None:
        new, state = len(self._length), self._last
        self._next.append({})
        self._length.append(self._length[state] + 1)
        self._link.append(0)
        while state != -1 and number not in self._next[state]:
            self._next[state][number] = new
            state = self._link[state]
        if state != -1:
            self._link[new] = self._split(state, number)
        self._last = new

    def _split(self, state: int, number: int) -> int:
        """Return the state of the run of `state` and `number`; a longer run's state is split for it."""
        after = self._next[state][number]
        if self._length[after] == self._length[state] + 1:
            return after
        clone = len(self._length)
        self._next.append(dict(self._next[after]))
        self._length.append(self._length[state] + 1)
        self._link.append(self._link[after])
        self._link[after] = clone
        while state != -1 and self._next[state].get(number) == after:
            self._next[state][number] = clone
            state = self._link[state]
        return clone

    def read(self, words: Iterable[str]) -> None:
        """Read a text of its own; a run does not go on in the next one."""
        words = list(words)
        self.unseen.difference_update(words)
        following, link, length, matched = self._next, self._link, self._length, self._matched
        state = n_words = 0
        for number in map(self._number.get, words):
            if number is None:
                state = n_words = 0
                continue
            while state and number not in following[state]:
                state = link[state]
                n_words = length[state]
            if number in following[state]:
                state = following[state][number]
                n_words += 1
            if n_words > matched[state]:
                matched[state] = n_words

    def longest(self) -> list[list[str]]:
        """Return the longest run of each text that has been read, [] for one of which no word has."""
        matched = list(self._matched)
        order = sorted(range(1, len(self._length)), key=self._length.__getitem__)
        for state in reversed(order):
            # what ends in a longer run that was read was read too
            if matched[state] and (shorter := self._link[state]) > 0:
                matched[shorter] = self._length[shorter]
        for state in order:
            matched[state] = matched[state] or matched[max(0, self._link[state])]
        runs = []
        for words in self.texts:
            state, best, end = 0, 0, 0
            for place, word in enumerate(words, start=1):
                state = self._next[state][self._number[word]]
                if matched[state] > best:
                    best, end = matched[state], place
            runs.append(words[end - best : end])
        return runs


def measure(texts: list[list[str]], training: Iterable[list[str]] | None) -> dict[str, Any]:
    """Return the measures of the stories' words, those about the training text None without one."""
    repeated = [share for words in texts if (share := repeated_share(words, 4)) is not None]
    figures: dict[str, Any] = {
        "words": sum(map(len, texts)) / len(texts),
        "distinct_3": distinct_share(texts, 3),
        "repeated_4": sum(repeated) / len(repeated) if repeated else None,
        **dict.fromkeys(("copied_median", "copied_longest", "copied_text", "known_words")),
    }
    if training is None:
        return figures
    shared = SharedRuns(texts)
    for words in training:
        shared.read(words)
    runs = shared.longest()
    longest = max(runs, key=len)
    n_known = sum(word not in shared.unseen for words in texts for word in words)
    return figures | {
        "copied": [len(run) for run in runs],
        "copied_median": median_low(map(len, runs)),
        "copied_longest": len(longest),
        "copied_text": " ".join(longest)[:1000],
        "known_words": n_known / max(1, sum(map(len, texts))),
    }
