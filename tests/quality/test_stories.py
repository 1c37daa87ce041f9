"""Stories of evaluate.py --stories: the same for the same seed, compared with the training text, on file."""

import json

import pytest

from evaluate import main
from generate import main as generate
from litgpt_moe.data.batches import TokenStream
from litgpt_moe.quality.measures import words_of
from litgpt_moe.quality.stories import BEGINNINGS, read_words

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def told(chatterbox, tiny_data, tmp_path, monkeypatch, capsys):
    """A function that runs the command in a folder of its own and returns its JSON."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: object) -> dict:
        common = ["--no_loss", "--json", "--device", "cpu", "--ckpt_dir", chatterbox, "--data_dir", tiny_data]
        assert main([str(word) for word in (*common, "--story_tokens", 12, *flags)]) == 0
        return json.loads(capsys.readouterr().out)["stories"]

    return run


def test_beginnings_are_short_and_different():
    assert len(set(BEGINNINGS)) == len(BEGINNINGS) == 24
    assert max(map(len, BEGINNINGS)) <= 80


def test_stories_are_the_same_for_a_seed_and_any_can_be_written_alone(told, tmp_path, chatterbox, capsys):
    first = told("--stories", 26)
    text = (tmp_path / "stories.txt").read_text(encoding="utf-8")
    assert told("--stories", 26) == first and (tmp_path / "stories.txt").read_text(encoding="utf-8") == text
    assert told("--stories", 26, "--seed", 43)["copied"] != first["copied"]
    flags = ["--ckpt_dir", str(chatterbox), "--device", "cpu", "--max_tokens", "12", "--seed", "67"]
    assert generate([*flags, "--prompt", BEGINNINGS[25 % 24]]) == 0
    alone = capsys.readouterr().out.strip()
    shown = text.split("-" * 20)[26].partition("\n")[2].strip()
    assert text.count("-" * 20) == 26 and "26: seed 67, cut at the limit" in text
    assert shown.replace(" |", "") == alone


def test_a_story_that_was_learnt_by_heart_ends_and_is_a_copy(overfitted, told, tmp_path):
    # the model has one text, which begins as the first of the beginnings does
    text = f"{BEGINNINGS[0]} red ball. Tom had a red ball. Tom went to the park and saw a big dog."
    known = overfitted(text, block_size=128)
    figures = told("--ckpt_dir", known, "--stories", 1, "--story_tokens", 80, "--seed", 3)
    assert figures["ended"] == 1.0 and figures["known_words"] == 1.0
    assert figures["copied_text"] == "tom had a red ball tom went to the park and saw a big dog"
    assert figures["distinct_3"] < 1.0 and figures["repeated_4"] == 0.0


@pytest.mark.parametrize("at_once", [7, 64, 10**6])
def test_the_training_text_is_read_whole_however_it_is_cut(at_once, tiny_data, tiny_tokenizer_dir):
    from litgpt_moe.checkpoints.reader import load_tokenizer

    found = list(read_words(TokenStream(tiny_data, "train"), load_tokenizer(tiny_tokenizer_dir), 2, at_once))
    text = (tiny_data / "train" / "stories.txt").read_text(encoding="utf-8")
    stories = [words for story in text.split("<|endoftext|>") if (words := words_of(story))]
    assert sorted(words for words in found if words) == sorted(map(list, {tuple(words) for words in stories}))


def test_without_training_text_the_rest_is_said(told, tmp_path, capsys):
    figures = told("--stories", 2, "--data_dir", tmp_path / "none", "--stories_file", "none")
    assert figures["copied_longest"] is None and figures["n"] == 2 and figures["distinct_3"] is not None
    assert not (tmp_path / "stories.txt").exists()


def test_a_file_that_is_not_ours_stays_as_it_is(chatterbox, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("My own stories.\n", encoding="utf-8")
    flags = ["--no_loss", "--ckpt_dir", chatterbox, "--stories", "1", "--stories_file", tmp_path / "mine.txt"]
    assert main([*map(str, flags)]) == 2
    assert "exists and is no earlier result" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "My own stories.\n"


def test_a_context_too_short_for_the_beginnings_is_one_sentence(overfitted, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = overfitted("Tom.", block_size=16)
    assert main(["--no_loss", "--ckpt_dir", str(small), "--stories", "1", "--device", "cpu"]) == 2
    assert "error: --stories: a beginning has" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
