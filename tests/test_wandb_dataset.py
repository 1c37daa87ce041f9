"""Tests of wandb_dataset: real files, the real SDK offline, and a stand-in for the server."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import wandb_dataset
from litgpt_moe.cli import normalize_flags
from litgpt_moe.files import sha256_file
from wandb_dataset import fingerprint, main, pull, resolve_artifact, verify

REFERENCE = "team/moe/stories:v3"


def write_data(folder: Path, story: bytes = b"Once upon a time.", mtime_ns: int = 5) -> Path:
    """A small data directory with a whole manifest, and its tokenizer beside it."""
    files = {"train/a.txt": story, "train/train/00000.bin": b"\1\0\2\0", "val/val/00000.bin": b"\1\0"}
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    tokenizer = folder.parent / "tokenizer"
    tokenizer.mkdir(exist_ok=True)
    (tokenizer / "tokenizer.json").write_text("{}", encoding="utf-8")

    def entry(name: str) -> dict:
        return {"path": name, "sha256": sha256_file(folder / name), "mtime_ns": mtime_ns}

    counts = {"n_stories": 1, "n_tokens": 2, "n_bytes": 17}
    splits = {
        "train": {**counts, "text": [entry("train/a.txt")], "shards": [entry("train/train/00000.bin")]},
        "val": {**counts, "text": [], "shards": [entry("val/val/00000.bin")]},
    }
    tokenizer_facts = {"sha256": sha256_file(tokenizer / "tokenizer.json"), "vocab_size": 3}
    manifest = {"format_version": 1, "dtype": "uint16", "tokenizer": tokenizer_facts, "splits": splits}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data" / "stories")


class FakeArtifact:
    """What `wandb.Api().artifact()` returns, filled from a folder; counts its downloads."""

    def __init__(self, source: Path) -> None:
        self.source, self.digest, self.downloads, self.extra = source, "0123abcd" * 4, 0, {}
        self.fail_after_download, self.source_qualified_name = False, REFERENCE

    @property
    def manifest(self) -> SimpleNamespace:
        names = [p.relative_to(self.source).as_posix() for p in self.source.rglob("*") if p.is_file()]
        return SimpleNamespace(entries={**{n: SimpleNamespace(ref=None) for n in names}, **self.extra})

    def download(self, root: str) -> str:
        self.downloads += 1
        shutil.copytree(self.source, root, dirs_exist_ok=True, symlinks=True)
        if self.fail_after_download:
            raise OSError("the connection broke")
        return root


@pytest.fixture
def served(data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeArtifact:
    """A stand-in server that holds the data directory as push lays it out."""
    import wandb

    source = tmp_path / "server"
    shutil.copytree(data_dir, source)
    shutil.copytree(data_dir.parent / "tokenizer", source / "tokenizer")
    artifact = FakeArtifact(source)
    asked: list[str] = []
    artifact.asked = asked
    api = SimpleNamespace(artifact=lambda reference: asked.append(reference) or artifact)
    monkeypatch.setattr(wandb, "Api", lambda: api)
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    return artifact


def test_hyphens_become_underscores_in_flag_names_only():
    given = ["--data-dir", "my-data", "--train.max-tokens=1-2", "-x", "--", "--once upon-a time"]
    wanted = ["--data_dir", "my-data", "--train.max_tokens=1-2", "-x", "--", "--once upon-a time"]
    assert normalize_flags(given) == wanted


def test_fingerprint_ignores_place_and_time_stamps(data_dir, tmp_path):
    other = write_data(tmp_path / "elsewhere" / "copy", mtime_ns=99)
    os.utime(other / "train" / "a.txt", ns=(1, 1))
    assert fingerprint(other) == fingerprint(data_dir)


def test_fingerprint_ignores_the_order_of_the_manifest(data_dir):
    before = fingerprint(data_dir)
    manifest = json.loads((data_dir / "manifest.json").read_text(encoding="utf-8"))
    manifest["splits"] = dict(reversed(manifest["splits"].items()))
    (data_dir / "manifest.json").write_text(json.dumps(manifest, indent=3), encoding="utf-8")
    assert fingerprint(data_dir) == before


def test_fingerprint_changes_with_one_byte_of_text(data_dir, tmp_path):
    other = write_data(tmp_path / "elsewhere" / "copy", story=b"Once upon a time!")
    assert fingerprint(other) != fingerprint(data_dir)


def test_fingerprint_refuses_a_file_that_is_not_as_recorded(data_dir):
    (data_dir / "train" / "a.txt").write_bytes(b"Other words.")
    with pytest.raises(ValueError, match=r"a\.txt: its content is not what manifest\.json recorded"):
        fingerprint(data_dir)


def test_verify_names_a_missing_and_a_changed_file(data_dir):
    (data_dir / "train" / "a.txt").unlink()
    (data_dir / "val" / "val" / "00000.bin").write_bytes(b"\1")
    missing, changed = verify(data_dir)
    assert "a.txt: listed in manifest.json but not there" in missing
    assert "its content is not" in changed


def test_verify_names_a_text_that_came_after_the_manifest(data_dir):
    (data_dir / "val" / "new.txt").write_bytes(b"A new one.")
    (new,) = verify(data_dir)
    assert "new.txt: there but not listed in manifest.json" in new


def test_verify_command_prints_count_and_fingerprint(data_dir, capsys):
    assert main(["verify", "--data-dir", str(data_dir)]) == 0
    out = capsys.readouterr().out
    assert f"3 files match manifest.json; fingerprint {fingerprint(data_dir)}" in out
    assert out.endswith(f"uv run python wandb_dataset.py push --data_dir {data_dir}\n")


def test_verify_command_ends_with_status_1_on_damage(data_dir, capsys):
    (data_dir / "train" / "a.txt").write_bytes(b"")
    assert main(["verify", "--data_dir", str(data_dir)]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "not found; run prepare_data.py"), ("{", "damaged"), ('{"splits": {"train": {}}}', "damaged")],
)
def test_a_manifest_that_is_missing_or_damaged_is_one_sentence(data_dir, capsys, content, words):
    path = data_dir / "manifest.json"
    path.unlink() if content is None else path.write_text(content, encoding="utf-8")
    assert main(["verify", "--data_dir", str(data_dir)]) == 2
    err = capsys.readouterr().err
    assert str(path) in err and words in err and err.count("\n") == 1


def test_a_reference_without_entity_takes_the_given_one():
    assert resolve_artifact("moe/stories:latest", "team") == "team/moe/stories:latest"


def test_a_whole_reference_keeps_its_own_entity():
    assert resolve_artifact(REFERENCE, "other") == REFERENCE


@pytest.mark.parametrize("reference", ["", "stories:v1", "a/b/c", "../../etc:v1", "a/b/c:d:e", "a/b/..:v1"])
def test_anything_else_is_not_a_reference(reference):
    with pytest.raises(ValueError, match="entity/project/name:alias"):
        resolve_artifact(reference, "team")


def test_a_short_reference_without_entity_is_refused():
    with pytest.raises(ValueError, match="WANDB_ENTITY"):
        resolve_artifact("moe/stories:latest", None)


def test_offline_push_records_a_run_with_the_real_sdk(data_dir, tmp_path, monkeypatch, capsys):
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
        (tmp_path / name).mkdir()
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main(["--data-dir", str(data_dir), "--wandb-alias", "first", "--wandb-tag", "small"]) == 0
    sync_dir = Path(capsys.readouterr().out.strip().partition("wandb sync ")[2])
    (record,) = sync_dir.glob("*.wandb")
    assert record.stat().st_size > 0 and sync_dir.is_relative_to(tmp_path / "WANDB_DIR")


def test_the_artifact_holds_manifest_texts_shards_and_tokenizer(data_dir):
    tokenizer = data_dir.parent / "tokenizer"
    artifact = wandb_dataset.build_artifact(data_dir, tokenizer, "stories", "immutable")
    files = {
        "manifest.json",
        "train/a.txt",
        "train/train/00000.bin",
        "val/val/00000.bin",
        "tokenizer/tokenizer.json",
    }
    assert set(artifact.manifest.entries) == files
    assert artifact.metadata["fingerprint"] == fingerprint(data_dir)


def test_equal_data_with_other_time_stamps_makes_an_equal_artifact(data_dir, tmp_path):
    other = write_data(tmp_path / "elsewhere" / "copy", mtime_ns=99)
    digests = {
        wandb_dataset.build_artifact(folder, data_dir.parent / "tokenizer", "stories", "immutable").digest
        for folder in (data_dir, other)
    }
    assert len(digests) == 1


def test_push_takes_variables_and_flags_win_over_them(data_dir, monkeypatch):
    seen = {}
    monkeypatch.setattr(wandb_dataset, "push", lambda *args: seen.update(enumerate(args)) or "pushed")
    settings = {"PROJECT": "p", "ENTITY": "e", "DATA_ARTIFACT": "a", "DATA_ALIASES": "x, y", "TAGS": "t"}
    for name, value in settings.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert main(["push", "--data_dir", str(data_dir), "--wandb-entity", "mine", "--wandb-tag", "u"]) == 0
    assert list(seen.values())[1:6] == ["p", "mine", "a", ["x", "y"], ["u"]]


def test_the_tokenizer_is_found_by_its_hash_in_any_folder_beside(data_dir, tmp_path):
    made_it, data = data_dir.parent / "tokenizer", data_dir.parent
    made_it.rename(data / "tinyllama")  # as in the README: another than the demo's
    for folder in (made_it, data / "another"):
        folder.mkdir()
        (folder / "tokenizer.json").write_text('{"other": 1}', encoding="utf-8")
    assert wandb_dataset.find_tokenizer(data_dir, None) == data / "tinyllama"
    assert wandb_dataset.find_tokenizer(data_dir, data / "tinyllama") == data / "tinyllama"


def test_a_folder_beside_that_may_not_be_read_is_passed_over(data_dir, monkeypatch):
    locked = data_dir.parent / "another"
    locked.mkdir()
    (locked / "tokenizer.json").write_text("{}", encoding="utf-8")

    def read(path):  # as root, whom no permission stops, a test cannot lock a file
        if path.parent == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return sha256_file(path)

    monkeypatch.setattr(wandb_dataset, "sha256_file", read)
    (data_dir.parent / "tokenizer").rename(data_dir.parent / "tinyllama")  # after the locked one by name
    assert wandb_dataset.find_tokenizer(data_dir, None) == data_dir.parent / "tinyllama"
    with pytest.raises(PermissionError):
        wandb_dataset.find_tokenizer(data_dir, locked)


def test_a_variable_of_spaces_is_an_empty_one(monkeypatch):
    monkeypatch.setenv("WANDB_ARTIFACTS_DIR", " ")
    monkeypatch.setenv("WANDB_PROJECT", " mine ")
    args = wandb_dataset.build_parser().parse_args([])
    assert (args.wandb_artifacts_dir, args.wandb_project) == (Path("artifacts"), "mine")


def test_push_refuses_a_tokenizer_that_did_not_make_the_shards(data_dir, tmp_path, capsys):
    (data_dir.parent / "tokenizer" / "tokenizer.json").write_text('{"other": 1}', encoding="utf-8")
    told = []
    for flags in ([], ["--tokenizer_dir", str(data_dir.parent / "tokenizer")], ["--tokenizer_dir", "none"]):
        assert main(["push", "--data_dir", str(data_dir), *flags]) == 2
        told.append(capsys.readouterr().err)
    assert f"the tokenizer that made it is not in {data_dir / 'tokenizer'}, nor in a folder beside" in told[0]
    assert "tokenizer.json: not the one that made" in told[1] and "tokenizer.json: not found" in told[2]
    assert all(text.count("\n") == 1 and "with --tokenizer_dir" in text for text in told)


def test_push_without_login_is_one_sentence_and_status_1(data_dir, tmp_path, monkeypatch, capsys):
    import wandb

    def refuse(**_):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "init", refuse)
    assert main(["push", "--data_dir", str(data_dir)]) == 1
    err = capsys.readouterr().err
    assert "wandb login" in err and err.count("\n") == 1


def test_pull_gives_a_whole_data_directory_with_its_tokenizer(served, data_dir, tmp_path):
    folder = pull(REFERENCE, tmp_path / "artifacts")
    assert fingerprint(folder) == fingerprint(data_dir)
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    assert [path.name for path in (tmp_path / "artifacts").glob("[!.]*")] == [folder.name]


def test_a_directory_is_its_artifact_until_its_data_change(served, tmp_path):
    folder = pull(REFERENCE, tmp_path / "artifacts")
    assert wandb_dataset.lineage(folder) == {"artifact": REFERENCE, "fingerprint": fingerprint(folder)}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["dtype"] = "uint32"
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert wandb_dataset.lineage(folder)["artifact"] is None


def test_pull_records_the_times_of_the_downloaded_texts(served, tmp_path):
    folder = pull(REFERENCE, tmp_path / "artifacts")
    (text,) = wandb_dataset.load_manifest(folder)["splits"]["train"]["text"]
    assert text["mtime_ns"] == (folder / text["path"]).stat().st_mtime_ns


def test_a_second_pull_downloads_nothing(served, tmp_path):
    first = pull(REFERENCE, tmp_path / "artifacts")
    assert pull(REFERENCE, tmp_path / "artifacts") == first and served.downloads == 1


def test_pull_takes_the_entity_from_the_variable(served, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_ENTITY", "team")
    pull("moe/stories:v3", tmp_path / "artifacts")
    assert served.asked == [REFERENCE]


def test_a_download_that_breaks_off_leaves_nothing(served, tmp_path, capsys):
    served.fail_after_download = True
    artifacts = tmp_path / "artifacts"
    assert main(["pull", "--wandb-artifacts-dir", str(artifacts), REFERENCE]) == 1
    assert "the connection broke" in capsys.readouterr().err and not list(artifacts.glob("*/"))


def test_a_download_with_other_content_is_not_used(served, tmp_path):
    (served.source / "train" / "a.txt").write_bytes(b"other")
    with pytest.raises(OSError, match=r"a\.txt: its content is not what .* is not used"):
        pull(REFERENCE, tmp_path / "artifacts")
    assert not list((tmp_path / "artifacts").glob("*/"))


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/evil", "a/../../evil", "C:\\evil", "\\evil", "a\\..\\..\\evil"]
)
def test_an_entry_that_would_land_outside_is_refused_before_the_download(served, tmp_path, name):
    served.extra = {name: SimpleNamespace(ref=None)}
    with pytest.raises(OSError, match="would lie outside its folder"):
        pull(REFERENCE, tmp_path / "artifacts")
    assert served.downloads == 0


def test_an_entry_that_refers_elsewhere_is_refused(served, tmp_path):
    served.extra = {"notes.txt": SimpleNamespace(ref="file:///etc/passwd")}
    with pytest.raises(OSError, match="is a link to"):
        pull(REFERENCE, tmp_path / "artifacts")


@pytest.mark.skipif(os.name == "nt", reason="making a symbolic link needs a privilege on Windows")
def test_a_symbolic_link_in_a_download_is_refused(served, tmp_path):
    (served.source / "train" / "link.txt").symlink_to("/etc/hostname")
    with pytest.raises(OSError, match="is a link; refusing it"):
        pull(REFERENCE, tmp_path / "artifacts")


def test_a_manifest_that_points_outside_is_refused(served, tmp_path):
    path = served.source / "manifest.json"
    path.write_text(path.read_text(encoding="utf-8").replace("train/a.txt", "../../a.txt"), encoding="utf-8")
    with pytest.raises(OSError, match=r"'\.\./\.\./a\.txt' would lie outside"):
        pull(REFERENCE, tmp_path / "artifacts")


def test_pull_without_login_is_one_sentence_and_status_1(tmp_path, monkeypatch, capsys):
    import wandb

    def refuse():
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "Api", refuse)
    assert main(["pull", REFERENCE, "--wandb_artifacts_dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert REFERENCE in err and "wandb login" in err and err.count("\n") == 1


def test_pull_without_a_reference_says_how_to_write_one(monkeypatch, capsys):
    monkeypatch.delenv("WANDB_DATASET_ARTIFACT", raising=False)
    assert main(["pull"]) == 2
    assert "entity/project/name:alias" in capsys.readouterr().err
