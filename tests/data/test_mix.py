"""Data mixed from prepared ones: shares, passes, what is refused, and what goes to W&B."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.data import error_of, make_text, stories_of, write_text

import prepare_data
from litgpt_moe.data import mix
from litgpt_moe.data.artifact import build_artifact
from litgpt_moe.data.batches import TokenStream
from litgpt_moe.data.manifest import read_manifest, verify
from litgpt_moe.data.prepare import prepare, refresh, stale_reasons
from litgpt_moe.data.settings import DEFAULT_TOKENIZER_DIR, PrepareSettings
from litgpt_moe.data.tokenizer_folder import find_tokenizer


@pytest.fixture
def sources(tmp_path: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """data/large and data/small, the latter with one story in train that the former has in val."""
    monkeypatch.chdir(tmp_path)
    for name, n_stories, seed in (("large", 400, 0), ("small", 40, 1)):
        folder = Path("data") / name
        write_text(folder / "train" / "a.txt", make_text(n_stories, seed=seed) + make_text(seed, seed=2))
        write_text(folder / "val" / "a.txt", make_text(3, seed=2 + seed))
        prepare(PrepareSettings(folder, tokenizer_dir=tiny_tokenizer_dir, workers=1))
    return tmp_path


def test_stories_are_drawn_by_weight_and_small_sources_repeated(
    sources: Path, tiny_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare_data.main(["--mix", "large=0.8", "data/small=0.2"]) == 0
    out = capsys.readouterr().out
    manifest = read_manifest(Path("data/mix"))
    large, small = manifest["mix"]
    total = large["n_drawn"] + small["n_drawn"]
    assert large["n_drawn"] / total == pytest.approx(0.8, abs=0.01)
    assert large["passes"] == pytest.approx(1, abs=0.01) and 2 < small["passes"] <= 4.1
    assert f"mix    ../small: weight 0.2, {small['n_drawn']:,} of {small['n_tokens']:,} tokens, " in out
    drawn = stories_of(Path("data/mix"), tiny_tokenizer_dir, "train")
    held_out = stories_of(Path("data/mix"), tiny_tokenizer_dir, "val")
    assert held_out == make_text(3, seed=2) + make_text(3, seed=3)
    assert not set(drawn) & set(held_out)  # though data/small has one of them in train
    assert {s for s in drawn if s.startswith("Story 1")} == set(make_text(40, seed=1))
    firsts = [story.startswith("Story 0") for story in drawn]
    assert 0.6 < np.mean(firsts[:50]) < 0.95  # from the beginning, not one source after the other
    assert len(TokenStream(Path("data/mix"), "train")) == total
    assert find_tokenizer(Path("data/mix"), None) == Path("data/mix/tokenizer")
    assert verify(Path("data/mix")) == [] == stale_reasons(Path("data/mix"), tiny_tokenizer_dir)
    assert prepare_data.main(["--mix", "large=8", "small=2"]) == 0
    assert "nothing to do" in capsys.readouterr().err
    sent = build_artifact(Path("data/mix"), tiny_tokenizer_dir, "mix", "mutable").manifest.entries
    content = Path(sent["manifest.json"].local_path or "").read_text(encoding="utf-8")
    assert '"small"' in content and "../small" not in content  # the place is this machine's


def test_a_source_that_was_prepared_anew_is_told(sources: Path, tiny_tokenizer_dir: Path) -> None:
    mix = PrepareSettings(Path("data/mix"), mix=("small=1", "large=1"))
    prepare(mix)
    write_text(Path("data/small/train/a.txt"), make_text(50, seed=7))
    prepare(PrepareSettings(Path("data/small"), tokenizer_dir=tiny_tokenizer_dir, workers=1))
    with pytest.raises(ValueError, match=r"small: prepared anew since it was mixed; mix again with"):
        refresh(Path("data/mix"), DEFAULT_TOKENIZER_DIR)
    prepare(mix)
    refresh(Path("data/mix"), DEFAULT_TOKENIZER_DIR)


def test_what_cannot_be_mixed_is_named(
    sources: Path, trained_tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words, sentence in (
        (("nowhere=1",), "mix: nowhere: no prepared data in nowhere or data/nowhere; prepare it first"),
        (("large=0", "small=1"), "mix: large=0; write each name once, with a weight above 0"),
        (("large",), "mix: =large; write each name once"),
        (("large=1", "--data_dir", "data/large"), "is the folder to be made"),
        (("large=1", "--data_dir", "data/small"), "data/small: has text of its own"),
        (("large=1", "--dataset", "demo"), "drop PATH and --dataset"),
    ):
        status, line = error_of(capsys, "--mix", *words)
        assert status == 2 and sentence in line
    other = PrepareSettings(Path("data/small"), tokenizer_dir=trained_tokenizer_dir, workers=1)
    prepare(dataclasses.replace(other, overwrite=True))
    status, line = error_of(capsys, "--mix", "large=1", "small=1")
    assert status == 2 and "data/small and data/large have other tokenizers; prepare data/small with" in line
    assert not Path("data/mix").exists()


def test_no_separator_between_stories_is_doubled_or_lost(sources: Path, tiny_tokenizer_dir: Path) -> None:
    prepare(PrepareSettings(Path("data/mix"), mix=("large=1",)))
    streams = [TokenStream(Path(folder), "train") for folder in ("data/mix", "data/large")]
    alone, source = (stream.read(0, len(stream)) for stream in streams)
    assert np.array_equal(alone, source)
    prepare(PrepareSettings(Path("data/both"), mix=("large=1", "small=1")))
    stream = TokenStream(Path("data/both"), "train")
    ids = stream.read(0, len(stream))
    (begins,), (ends,) = np.nonzero(ids == 1), np.nonzero(ids == 2)
    # <s> ... </s> <s> ... </s>, in turn, and a text between each pair
    assert np.array_equal(begins, np.r_[0, ends[:-1] + 1]) and ends[-1] == len(ids) - 1
    assert (ends - begins > 10).all()


def test_a_source_that_is_cut_while_it_is_mixed_is_told(
    sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_parts = mix.open_parts

    def cut_after_check(settings: PrepareSettings) -> list[mix.Part]:
        parts = open_parts(settings)
        os.truncate(shard, 100)
        return parts

    (entry,) = read_manifest(Path("data/large"))["splits"]["train"]["shards"]
    shard = Path("data/large", entry["path"])
    monkeypatch.setattr(mix, "open_parts", cut_after_check)
    with pytest.raises(OSError, match=r"cut short while it was read; run prepare_data.py on that folder"):
        prepare(PrepareSettings(Path("data/mix"), mix=("large=1", "small=1")))
    assert not Path("data/mix/manifest.json").exists()


def test_a_mix_is_read_from_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("stories: 3\nme/classics: 1.0\n", encoding="utf-8")
    assert mix.read_mix([str(tmp_path / "mix.yaml")]) == {"stories": 0.75, "me/classics": 0.25}


def test_a_data_set_of_the_hub_is_prepared_for_a_mix_with_the_tokenizer_of_the_others(
    sources: Path, tiny_tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(settings: PrepareSettings) -> None:
        write_text(settings.data_dir / "train" / "a.txt", make_text(30, seed=4))

    monkeypatch.setattr("litgpt_moe.data.prepare.open_dataset", fetch)
    manifest = prepare(PrepareSettings(Path("data/mix"), mix=("me/tales=1", "small=1"), workers=1))
    assert [entry["folder"] for entry in manifest["mix"]] == ["../tales", "../small"]
    assert manifest["tokenizer"]["sha256"] == read_manifest(Path("data/small"))["tokenizer"]["sha256"]


@pytest.mark.parametrize("damage", ["altered", "short", "gone", "manifest"])
def test_a_damaged_mix_is_made_anew(sources: Path, tiny_tokenizer_dir: Path, damage: str) -> None:
    settings = PrepareSettings(Path("data/mix"), mix=("small=1", "large=1"))
    whole = prepare(settings)
    shard = settings.data_dir / whole["splits"]["train"]["shards"][0]["path"]
    content = shard.read_bytes()
    if damage == "altered":
        shard.write_bytes(bytes(len(content)))
    elif damage == "short":
        shard.write_bytes(content[:-2])
    elif damage == "gone":
        shard.unlink()
    else:
        (settings.data_dir / "manifest.json").write_text("{")
    assert prepare(settings)["splits"] == whole["splits"]
    assert verify(settings.data_dir) == []
