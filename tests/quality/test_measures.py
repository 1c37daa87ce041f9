"""Measures of stories: values worked out by hand, and runs of words against a search of every run."""

import random

import pytest

from litgpt_moe.quality.measures import SharedRuns, distinct_share, measure, repeated_share, words_of


def longest_by_search(words: list[str], others: list[list[str]]) -> int:
    """The longest run that a text shares with one of the others, by trying each."""
    known = {
        tuple(other[start:end])
        for other in others
        for start in range(len(other))
        for end in range(start + 1, len(other) + 1)
    }
    runs = (words[start:end] for start in range(len(words)) for end in range(start + 1, len(words) + 1))
    return max((len(run) for run in runs if tuple(run) in known), default=0)


@pytest.mark.parametrize("seed", range(40))
def test_the_longest_shared_run_is_that_of_a_search_of_every_run(seed: int) -> None:
    draw = random.Random(seed)

    def text() -> list[str]:
        return draw.choices("abcd"[: 1 + seed % 4], k=draw.randrange(15))

    texts, others = [text() for _ in range(4)], [text() for _ in range(6)]
    shared = SharedRuns(texts)
    for other in others:
        shared.read(other)
    runs = shared.longest()
    assert [len(run) for run in runs] == [longest_by_search(words, others) for words in texts]
    assert [longest_by_search(run, [words]) for run, words in zip(runs, texts, strict=True)] == [
        len(run) for run in runs
    ]
    assert shared.unseen == {w for words in texts for w in words} - {w for words in others for w in words}


def test_words_have_neither_case_nor_punctuation() -> None:
    text = 'The dog\u2019s bed \u2013 "No!" caf\u00e9_2, don\'t 10 x'
    assert words_of(text) == ["the", "dog's", "bed", "no", "caf\u00e9", "2", "don't", "10", "x"]


def test_repeated_and_distinct_runs_are_counted_as_by_hand() -> None:
    # of the seven runs of three letters one stands three times
    assert distinct_share([list("abcabcde"), list("abc")], 3) == pytest.approx(5 / 7)
    assert repeated_share(list("ababab"), 4) == pytest.approx(1 / 3)
    assert repeated_share(["a"], 4) is None and distinct_share([["a", "b"]], 3) is None


def test_what_stands_in_the_training_text_is_measured() -> None:
    stories = [words_of("The cat sat on a red mat."), words_of("Xyz the cat")]
    figures = measure(stories, iter([["the", "cat", "sat"], ["sat", "on", "a", "red", "hat"]]))
    assert figures["copied"] == [4, 2] and figures["copied_text"] == "sat on a red"
    assert figures["copied_longest"] == 4 and figures["copied_median"] == 2
    assert figures["known_words"] == pytest.approx(8 / 10) and figures["words"] == 5
    unread = measure(stories, None)
    assert unread["copied_longest"] is unread["known_words"] is None and unread["words"] == 5
