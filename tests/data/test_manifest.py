"""The manifest: fingerprint and verification of a data directory."""

import json
import os

import pytest
from helpers.data import fingerprint, write_data

from litgpt_moe.data.artifact import push
from litgpt_moe.data.manifest import verify
from litgpt_moe.data.settings import WandbSettings


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


def test_a_damaged_data_directory_is_never_pushed(data_dir):
    (data_dir / "train" / "a.txt").write_bytes(b"Other words.")
    with pytest.raises(ValueError, match=r"a\.txt: its content is not what manifest\.json recorded"):
        push(data_dir, WandbSettings())


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
