"""The data directory: text to shards, what is refused, the demo stories, and the script."""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare_data
from prepare_data import PrepareSettings, TokenStream, prepare, read_tokenizer

SEPARATOR = "<|endoftext|>"


def make_text(n_stories: int, seed: int = 0) -> list[str]:
    """Return distinct stories of a few sentences."""
    rng = random.Random(seed)
    words = [
        "the",
        "a",
        "dog",
        "cat",
        "Tom",
        "Lily",
        "ran",
        "saw",
        "red",
        "ball",
        "and",
        "was",
        "happy",
        "home",
    ]
    return [
        f"Story {seed} {i}. " + " ".join(rng.choices(words, k=rng.randint(20, 60))) + "."
        for i in range(n_stories)
    ]


def write_text(path: Path, stories: list[str]) -> Path:
    """Write stories as TinyStories does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{story}\n{SEPARATOR}\n" for story in stories), encoding="utf-8", newline="")
    return path


@pytest.fixture
def settings(tmp_path: Path, tiny_tokenizer_dir: Path) -> PrepareSettings:
    """Settings with 200 train and 20 val stories."""
    data_dir = tmp_path / "text"
    write_text(data_dir / "train" / "a.txt", make_text(200))
    write_text(data_dir / "val" / "b.txt", make_text(20, seed=1))
    return PrepareSettings(data_dir=data_dir, tokenizer_dir=tiny_tokenizer_dir, workers=1)


@pytest.fixture(scope="module")
def trained_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained by prepare_data on the demo corpus."""
    folder = tmp_path_factory.mktemp("demo")
    prepare(
        PrepareSettings(
            folder / "data", "demo", folder / "tokenizer", train_tokenizer=700, workers=1, demo_stories=300
        )
    )
    return folder / "tokenizer"


def stories_of(data_dir: Path, tokenizer_dir: Path, split: str) -> list[str]:
    """Return the stories of a split, decoded by LitGPT's tokenizer from the shards' bytes."""
    from litgpt import Tokenizer

    tokenizer = Tokenizer(tokenizer_dir)
    stream = TokenStream(data_dir, split)
    ids = stream.read(0, len(stream))
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id
    ends = np.flatnonzero(ids == tokenizer.eos_id) + 1
    return [tokenizer.decode(torch.from_numpy(part)) for part in np.split(ids, ends[:-1])]


def error_of(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str]:
    """Return the status and the one error line of a run of the script."""
    status = prepare_data.main([str(arg) for arg in args])
    stderr = capsys.readouterr().err
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error: ")]
    return status, line


def change_tokenizer(source: Path, target: Path, **changes: object) -> Path:
    """Copy a tokenizer folder with some keys of tokenizer.json replaced."""
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    spec = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    spec["model"] |= changes.pop("model", {})
    (target / "tokenizer.json").write_text(json.dumps(spec | changes), encoding="utf-8")
    return target


def snapshot(data_dir: Path) -> dict[str, tuple[int, bytes]]:
    """Return time stamp and content of everything under a folder."""
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in data_dir.rglob("*") if p.is_file()}


# --- shards ------------------------------------------------------------------------------------------------


def test_shards_hold_every_story_once_between_bos_and_eos(settings: PrepareSettings) -> None:
    manifest = prepare(settings)
    for split, expected in (("train", make_text(200)), ("val", make_text(20, seed=1))):
        assert stories_of(settings.data_dir, settings.tokenizer_dir, split) == expected
        entry = manifest["splits"][split]
        assert entry["n_stories"] == len(expected) == sum(s["n_stories"] for s in entry["shards"])
        assert entry["n_bytes"] == sum(len(story.encode()) for story in expected)
        assert entry["n_tokens"] == len(TokenStream(settings.data_dir, split))
    assert prepare_data.read_manifest(settings.data_dir) == manifest


def test_duplicates_are_dropped_within_and_across_splits(settings: PrepareSettings) -> None:
    stories = make_text(200)
    val = make_text(20, seed=1)
    write_text(settings.data_dir / "train" / "a.txt", [*stories, *stories[:7], *val[:3], "", "  "])
    splits = prepare(settings)["splits"]
    assert splits["train"]["n_stories"] == 200 and splits["train"]["n_duplicates"] == 10
    assert splits["val"]["n_stories"] == 20 and splits["val"]["n_duplicates"] == 0


def test_seen_stories_agree_with_a_set() -> None:
    rng = np.random.default_rng(0)
    seen, expected = prepare_data.SeenStories(), set()
    for _ in range(50):
        hashes = rng.integers(0, 3000, size=rng.integers(0, 200)).astype("<u8")
        new = [h not in expected and not expected.add(h) for h in hashes.tolist()]
        assert seen.add(hashes).tolist() == new
    assert len(seen._runs) < 12


def test_val_is_cut_by_story_where_there_is_no_val_text(settings: PrepareSettings) -> None:
    (settings.data_dir / "val" / "b.txt").unlink()
    prepare(dataclasses.replace(settings, val_fraction=0.05))
    train, val = (stories_of(settings.data_dir, settings.tokenizer_dir, split) for split in ("train", "val"))
    assert len(val) == 10 and sorted(train + val) == sorted(make_text(200))


def test_many_workers_and_one_make_the_same_shards(
    settings: PrepareSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare_data, "SHARD_BYTES", 4000)
    monkeypatch.setattr(prepare_data, "BLOCK_BYTES", 1000)
    one = prepare(settings)
    for path in settings.data_dir.glob("*/*/*.bin"):
        path.unlink()
    assert prepare(dataclasses.replace(settings, workers=2)) == one
    assert len(one["splits"]["train"]["shards"]) > 5


def test_a_large_vocabulary_takes_four_bytes(settings: PrepareSettings, tmp_path: Path) -> None:
    spec = json.loads((settings.tokenizer_dir / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = spec["model"]["vocab"]
    vocab |= {f"filler{i}": i for i in range(len(vocab), 70_000)}
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "large", model={"vocab": vocab})
    manifest = prepare(dataclasses.replace(settings, tokenizer_dir=folder))
    assert manifest["dtype"] == "uint32"
    assert stories_of(settings.data_dir, folder, "val") == make_text(20, seed=1)


# --- bad input ---------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = error_of(capsys, "--data_dir", tmp_path / "none")
    assert status == 2 and f"{tmp_path / 'none'}: no such folder" in line and "--dataset demo" in line
    assert not (tmp_path / "none").exists()


def test_an_empty_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = error_of(capsys, "--data-dir", tmp_path)
    assert status == 2 and f"{tmp_path / 'train'}: no .txt file" in line


def test_an_empty_text_file_is_named(settings: PrepareSettings, capsys: pytest.CaptureFixture[str]) -> None:
    path = settings.data_dir / "train" / "empty.txt"
    path.write_text(" \n", encoding="utf-8")
    status, line = error_of(capsys, "--data_dir", settings.data_dir)
    assert status == 2 and f"{path}: empty" in line


def test_one_story_cannot_be_two_splits(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    write_text(tmp_path / "train" / "a.txt", make_text(1))
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(PrepareSettings(tmp_path, tokenizer_dir=tiny_tokenizer_dir))


def test_a_train_text_that_val_has_too_is_told_apart_from_one_too_short(settings: PrepareSettings) -> None:
    text = write_text(settings.data_dir / "train" / "a.txt", make_text(20, seed=3))
    for path in (settings.data_dir / "val").glob("*.txt"):
        path.write_bytes(text.read_bytes())
    for path in (settings.data_dir / "train").glob("*.txt"):
        path.write_bytes(text.read_bytes())
    with pytest.raises(ValueError, match="no story for the train split that val does not have too"):
        prepare(settings)


def test_a_corpus_that_is_too_short_leaves_nothing_behind(tmp_path: Path, tiny_tokenizer_dir: Path) -> None:
    text = write_text(tmp_path / "train" / "a.txt", make_text(1))
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(PrepareSettings(tmp_path, tokenizer_dir=tiny_tokenizer_dir))
    assert {p for p in tmp_path.rglob("[!.]*") if p.is_file()} == {text}


def test_a_corpus_that_became_too_short_leaves_the_shards_before(settings: PrepareSettings) -> None:
    manifest = prepare(settings)
    before = {path for path in settings.data_dir.rglob("[!.]*") if path.suffix != ".txt"}
    write_text(settings.data_dir / "train" / "a.txt", make_text(1, seed=9))
    (settings.data_dir / "val" / "b.txt").unlink()
    with pytest.raises(ValueError, match="no story for the train split"):
        prepare(settings)
    assert {path for path in settings.data_dir.rglob("[!.]*") if path.suffix != ".txt"} == before
    assert prepare_data.read_manifest(settings.data_dir) == manifest


def test_a_second_prepare_in_one_folder_is_refused(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--data_dir", settings.data_dir, "--tokenizer_dir", settings.tokenizer_dir)
    with prepare_data.lock_data(settings.data_dir):
        status, line = error_of(capsys, *flags)
    me = f"text: prepare_data.py is at work there (process {os.getpid()} on "
    assert status == 2 and me in line and "wait for it" in line
    assert not (settings.data_dir / "manifest.json").exists()
    prepare(settings)
    assert not (settings.data_dir / ".prepare.json").exists()


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_prepared_data_on_a_disk_for_reading_alone_is_fresh(settings: PrepareSettings) -> None:
    prepare(settings)
    settings.data_dir.chmod(0o500)
    try:
        assert prepare(settings)["format_version"] == 1
    finally:
        settings.data_dir.chmod(0o700)


def test_a_folder_named_as_a_text_is_refused(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    path = settings.data_dir / "train" / "d.txt"
    path.mkdir()
    status, line = error_of(capsys, "--data_dir", settings.data_dir)
    assert status == 2 and f"{path}: not a file" in line


def test_a_tokenizer_dir_that_is_a_file_is_refused(
    settings: PrepareSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (settings.tokenizer_dir / "tokenizer.json", tmp_path / "file"):
        place.touch()
        status, line = error_of(capsys, "--data_dir", settings.data_dir, "--tokenizer_dir", place)
        assert status == 2 and f"{place}: a file" in line and "folder" in line


def test_utf16_is_named(settings: PrepareSettings) -> None:
    (settings.data_dir / "train" / "w.txt").write_text("words", encoding="utf-16")
    with pytest.raises(ValueError, match=r"w\.txt: UTF-16 text; save it as UTF-8"):
        prepare(settings)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{", r"tokenizer\.json: not JSON"),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer"),
        ("tokenizer_config.json", '{"tokenizer_class": "LlamaTokenizer"}', None),
        ("tokenizer_config.json", '{"bos_token": "<s>", "eos_token": "</s>"}', "no tokenizer_class"),
        ("tokenizer_config.json", '{"tokenizer_class": "X", "bos_token": "<bos>"}', "no BOS id"),
        ("generation_config.json", "[", r"generation_config\.json: not JSON"),
    ],
)
def test_a_tokenizer_that_litgpt_would_trip_over_is_named(
    tiny_tokenizer_dir: Path, tmp_path: Path, name: str, content: str, message: str | None
) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    assert read_tokenizer(folder).bos_id == 1  # and is kept, but not beyond the change of a file
    (folder / name).write_text(content, encoding="utf-8")
    if message is None:
        assert read_tokenizer(folder).bos_id == 1  # from generation_config.json, as LitGPT does
        return
    with pytest.raises(ValueError, match=message):
        read_tokenizer(folder)


def test_a_tokenizer_folder_without_bos_is_named(tiny_tokenizer_dir: Path, tmp_path: Path) -> None:
    folder = change_tokenizer(tiny_tokenizer_dir, tmp_path / "tokenizer")
    for name in ("tokenizer_config.json", "generation_config.json"):
        (folder / name).unlink()
    with pytest.raises(ValueError, match="no BOS id"):
        read_tokenizer(folder)


def test_all_wrong_settings_are_named_at_once(tmp_path: Path) -> None:
    wrong = PrepareSettings(
        tmp_path, "wiki", val_fraction=0.0, train_tokenizer=10, workers=-1, separator="a\nb"
    )
    with pytest.raises(ValueError) as caught:
        prepare(wrong)
    for name in ("dataset", "val_fraction", "train_tokenizer", "workers", "separator"):
        assert f"{name} is " in str(caught.value)


def test_another_tokenizer_is_only_replaced_on_request(
    settings: PrepareSettings, trained_tokenizer_dir: Path, tmp_path: Path
) -> None:
    folder = change_tokenizer(settings.tokenizer_dir, tmp_path / "tokenizer")
    wanted = dataclasses.replace(settings, tokenizer_dir=folder, train_tokenizer=340)
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        prepare(wanted)
    assert prepare(dataclasses.replace(wanted, overwrite=True))["tokenizer"]["vocab_size"] == 340
    before = snapshot(folder)
    prepare(wanted)
    assert snapshot(folder) == before


# --- demo --------------------------------------------------------------------------------------------------


def test_the_demo_corpus_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two, other = (
        prepare_data.write_demo_corpus(tmp_path / name, 50, seed).read_bytes()
        for name, seed in (("one", 1), ("two", 1), ("other", 2))
    )
    assert one == two != other
    assert one.count(b"<|endoftext|>") == 50


def test_the_demo_corpus_is_varied_and_well_formed() -> None:
    teller = prepare_data.StoryTeller(prepare_data.GRAMMAR, 0)
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
    path = prepare_data.write_demo_corpus(tmp_path, 20, 1)
    assert prepare_data.write_demo_corpus(tmp_path, 30, 1).read_text(encoding="utf-8").count("<|end") == 30
    path.write_text("my own story", encoding="utf-8")
    with pytest.raises(ValueError, match=r"demo\.txt: edited since it was written"):
        prepare_data.write_demo_corpus(tmp_path, 20, 1)
    prepare_data.write_demo_corpus(tmp_path, 20, 1, overwrite=True)
    assert path.read_text(encoding="utf-8").count("<|end") == 20


def test_own_text_is_not_mixed_with_the_demo_corpus(tmp_path: Path) -> None:
    prepare_data.write_demo_corpus(tmp_path, 20, 1)
    write_text(tmp_path / "train" / "own.txt", make_text(5))
    with pytest.raises(ValueError, match=r"demo corpus .* is beside other text"):
        prepare_data.list_text(tmp_path)


# --- the script --------------------------------------------------------------------------------------------


def test_importing_the_script_imports_no_torch() -> None:
    code = "import sys, prepare_data; print({'torch', 'litgpt', 'lightning', 'wandb'} & set(sys.modules))"
    root = Path(prepare_data.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_the_script_says_what_it_made_and_what_is_next(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data-dir", str(settings.data_dir), "--tokenizer-dir", str(settings.tokenizer_dir)]
    assert prepare_data.main(arguments) == 0
    stdout = capsys.readouterr().out
    assert "train  200 stories" in stdout and "0 duplicates" in stdout and "tokens/s" in stdout
    flags = f"--dataset_dir {settings.data_dir} --tokenizer_dir {settings.tokenizer_dir}"
    assert f"uv run python run_train.py {flags}" in stdout
    assert prepare_data.main(arguments) == 0
    captured = capsys.readouterr()
    assert "nothing to do" in captured.err and "tokens/s" not in captured.out


def test_the_data_directory_goes_to_weights_and_biases_on_request(
    settings: PrepareSettings, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = []

    def push(args: object, *folders: Path) -> str:
        pushed.append((args.wandb_project, args.wandb_alias, *folders))
        return "pushed"

    monkeypatch.setattr(prepare_data, "push_from_flags", push)
    arguments = ["--data-dir", str(settings.data_dir), "--tokenizer-dir", str(settings.tokenizer_dir)]
    assert prepare_data.main(arguments) == 0 and pushed == []
    wandb_flags = ["--log-to-wandb", "--wandb-project", "stories", "--wandb-alias", "new"]
    assert prepare_data.main([*arguments, *wandb_flags]) == 0
    assert pushed == [("stories", ["new"], settings.data_dir, settings.tokenizer_dir)]
    assert "pushed" in capsys.readouterr().out


def test_data_arguments_that_could_not_be_honoured_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose FOLDER/train and FOLDER/val"):
        prepare_data.TextShards(tmp_path / "train", tmp_path / "other" / "val")
    with pytest.raises(ValueError, match="num_workers is -1; choose 0 or more"):
        prepare_data.TextShards(tmp_path / "train", num_workers=-1)


def test_a_killed_run_is_not_taken_for_an_edited_demo_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_data.write_demo_corpus(tmp_path, 20, 1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "write_whole", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare_data.write_demo_corpus(tmp_path, 30, 1)
    monkeypatch.undo()
    path = prepare_data.write_demo_corpus(tmp_path, 30, 1)
    assert path.read_text(encoding="utf-8").count("<|end") == 30


@pytest.mark.parametrize(("vocab_size", "fits"), [(2048, True), (2049, False)])
def test_the_next_command_names_a_model_with_room_for_the_tokenizer(vocab_size: int, fits: bool) -> None:
    manifest = {"splits": {}, "tokenizer": {"vocab_size": vocab_size}}
    last = prepare_data.summary(manifest, PrepareSettings(), None).splitlines()[-1]
    named = " --model_config model_config.yaml --config train_config.yaml"
    assert last == "next   uv run python run_train.py" + ("" if fits else named)
