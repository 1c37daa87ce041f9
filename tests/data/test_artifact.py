"""A data directory as an artifact: real files, the real SDK offline, and a stand-in for the server."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers.data import REFERENCE, fingerprint, write_data

from litgpt_moe.data.artifact import build_artifact, lineage, pull, resolve_artifact
from litgpt_moe.data.manifest import read_manifest
from wandb_dataset import main


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


def test_the_artifact_holds_manifest_texts_shards_and_tokenizer(data_dir):
    tokenizer = data_dir.parent / "tokenizer"
    artifact = build_artifact(data_dir, tokenizer, "stories", "immutable")
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
        build_artifact(folder, data_dir.parent / "tokenizer", "stories", "immutable").digest
        for folder in (data_dir, other)
    }
    assert len(digests) == 1


def test_pull_gives_a_whole_data_directory_with_its_tokenizer(served, data_dir, tmp_path):
    folder = pull(REFERENCE, tmp_path / "artifacts")
    assert fingerprint(folder) == fingerprint(data_dir)
    assert (folder / "tokenizer" / "tokenizer.json").is_file()
    assert [path.name for path in (tmp_path / "artifacts").glob("[!.]*")] == [folder.name]


def test_a_directory_is_its_artifact_until_its_data_change(served, tmp_path):
    folder = pull(REFERENCE, tmp_path / "artifacts")
    assert lineage(folder) == {"artifact": REFERENCE, "fingerprint": fingerprint(folder)}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    manifest["dtype"] = "uint32"
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert lineage(folder)["artifact"] is None


def test_pull_records_the_times_of_the_downloaded_texts(served, tmp_path):
    folder = pull(REFERENCE, tmp_path / "artifacts")
    (text,) = read_manifest(folder)["splits"]["train"]["text"]
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


def test_no_network_share_of_a_pulled_manifest_is_looked_at(
    served: FakeArtifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on Windows a look at it logs in there, with this user's name
    path = served.source / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    entry = manifest["splits"]["train"]["text"][0]
    shares = ["//host/share/a.txt", "\\\\host\\share\\a.txt"]
    manifest["splits"]["train"]["read"] = [{**entry, "path": share} for share in shares]
    path.write_text(json.dumps(manifest), encoding="utf-8")
    looked_at, stat = [], Path.stat

    def record(self: Path, **options: bool) -> os.stat_result:
        looked_at.append(str(self))
        return stat(self, **options)

    monkeypatch.setattr(Path, "stat", record)
    assert main(["pull", REFERENCE, "--data_dir", str(tmp_path / "pulled")]) == 0
    assert looked_at and not [name for name in looked_at if "host" in name]
