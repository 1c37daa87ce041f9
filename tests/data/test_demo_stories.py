"""The demo corpus: the same for the same seed, varied, and apart from other text."""

import dataclasses
import re
from pathlib import Path

import pytest
from helpers.data import make_text, snapshot, write_text

from litgpt_moe.data.demo_stories import GRAMMAR, StoryTeller, write_demo_corpus
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.text import list_text


def write_corpus(data_dir: Path, n_stories: int, seed: int, overwrite: bool = False) -> Path:
    """Write the demo corpus and return its path."""
    return write_demo_corpus(
        PrepareSettings(data_dir, demo_stories=n_stories, seed=seed, overwrite=overwrite)
    )


def test_the_demo_corpus_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two, other = (
        write_corpus(tmp_path / name, 50, seed).read_bytes()
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert one == two != other
    assert one.count(b"<|endoftext|>") == 50


def test_the_demo_corpus_is_varied_and_well_formed() -> None:
    teller = StoryTeller(GRAMMAR, 0)
    stories = [teller.story() for _ in range(3000)]
    text = "\n".join(stories)
    assert len(set(stories)) == len(stories)
    assert not re.search(r"[{}]|  |\ba [aeiou]|\ban [^aeiou]|\bthe the\b|\ba a\b| [.,]|//|\n-", text)
    sentences = set(re.findall(r"[A-Z][^.!?]*[.!?]", text))
    words = set(re.findall(r"[a-z]+", text.lower()))
    assert len(sentences) > 5000 and 800 < len(words) < 2000
    assert all(story[-1] in '.!?"' and story[0].isupper() for story in stories)


def test_the_demo_corpus_keeps_off_other_text(settings: PrepareSettings) -> None:
    before = snapshot(settings.data_dir)
    with pytest.raises(ValueError, match=r"a\.txt: other text is there already"):
        prepare(dataclasses.replace(settings, dataset="demo"))
    assert snapshot(settings.data_dir) == before


def test_an_edited_demo_corpus_is_only_replaced_on_request(tmp_path: Path) -> None:
    path = write_corpus(tmp_path, 20, 1)
    assert write_corpus(tmp_path, 30, 1).read_text(encoding="utf-8").count("<|end") == 30
    path.write_text("my own story", encoding="utf-8")
    with pytest.raises(ValueError, match=r"demo\.txt: edited since it was written"):
        write_corpus(tmp_path, 20, 1)
    write_corpus(tmp_path, 20, 1, overwrite=True)
    (path.parent / "demo.json").rename(tmp_path / "record")
    with pytest.raises(ValueError, match=r"demo\.txt: not written by --dataset demo; move it"):
        write_corpus(tmp_path, 20, 1, overwrite=True)
    (tmp_path / "record").rename(path.parent / "demo.json")
    assert path.read_text(encoding="utf-8").count("<|end") == 20


def test_own_text_is_not_mixed_with_the_demo_corpus(tmp_path: Path) -> None:
    write_corpus(tmp_path, 20, 1)
    write_text(tmp_path / "train" / "own.txt", make_text(5))
    with pytest.raises(ValueError, match=r"demo corpus .* is beside other text"):
        list_text(tmp_path)


def test_a_killed_run_is_not_taken_for_an_edited_demo_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path, 20, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("litgpt_moe.data.demo_stories.write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        write_corpus(tmp_path, 30, 1)
    monkeypatch.undo()
    path = write_corpus(tmp_path, 30, 1)
    assert path.read_text(encoding="utf-8").count("<|end") == 30
