"""Which files are the text: those in the data directory, or those of the PATHs that a command names."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from litgpt_moe.data.forms import FORMS, NAMED_FORMS, NO_TEXT, OLD_FORMS, Source, form_of, stem_of, text_in
from litgpt_moe.data.settings import SPLITS
from litgpt_moe.data.text import NOT_UTF8
from litgpt_moe.files import is_network_share, is_outside, read_json

MAX_NAMES = 5  # of files that are not read
SMALL_BYTES = 1 << 16  # a file up to this size is looked into before anything is written
VAL_NAMES = ("val", "valid", "validation")
SPLIT_FILE = re.compile(rf"(train|{'|'.join(VAL_NAMES)})([-_.]\d.*)?")


@dataclass
class Inputs:
    """The files of each split, and why others are not read."""

    text: dict[str, list[Source]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    skipped: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> names of files."""
    links: dict[str, Path] = field(default_factory=dict)
    """Name -> target of each link that leads out of the folder that was named, as to text on another disk."""

    def skip(self, reason: str, name: str) -> None:
        """Count a file that is not read."""
        self.skipped.setdefault(reason, []).append(name)

    def sentences(self, place: object) -> list[str]:
        """Return a sentence for each reason for which files are not read."""
        lines = [
            f"{place}: {len(names)} not read: {some(names)}; {why}" for why, names in self.skipped.items()
        ]
        if links := [f"{name} (to {target})" for name, target in self.links.items()]:
            by = "a link that leads" if len(links) == 1 else "links that lead"
            lines.append(f"{place}: {len(links)} read through {by} out of it: {some(links)}")
        return lines

    def note_link(self, path: Path, folder: Path) -> None:
        """Keep in `links` a file that is read through a link out of `folder`."""
        if path.is_symlink() and is_outside(path, folder):
            self.links[path.relative_to(folder).as_posix()] = path.resolve()


def some(names: list[str]) -> str:
    """Return the first of some names."""
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return ", ".join(sorted(names)[:MAX_NAMES]) + more


def list_text(data_dir: Path, forms: tuple[str, ...] = FORMS) -> Inputs:
    """Return the text in a data directory; FileNotFoundError or ValueError if it cannot be used."""
    found, train = own_text(data_dir, forms), data_dir / "train"
    not_read(data_dir, found, forms)
    if not found.text["train"]:
        missing = f"{train}: no .txt file there" if data_dir.is_dir() else f"{data_dir}: no such folder"
        others = "".join(f" ({problem})" for problem in found.sentences(data_dir))
        fetch = "fetch some with prepare_data.py --dataset demo or --dataset tinystories"
        other = "name the files (prepare_data.py PATH), put text"
        raise FileNotFoundError(f"{missing}{others}; {other} into {train}/*.txt, or {fetch}")
    for source in [source for split in SPLITS for source in found.text[split]]:
        _check_name(source.path)
        if not source.path.is_file():
            raise ValueError(f"{source.path}: not a file; move it away, or put the text itself there")
        if _is_blank(source.path):
            raise ValueError(f"{source.path}: empty; put text into it or remove it")
        found.note_link(source.path, data_dir)
    if (train / "demo.json").is_file() and len(found.text["train"]) > 1:
        mixed = f"{train}: the demo corpus (demo.txt, demo.json) is beside other text"
        raise ValueError(f"{mixed}; remove those two files, or use another --data_dir")
    return found


def own_text(data_dir: Path, forms: tuple[str, ...]) -> Inputs:
    """Return the text in a data directory as it is."""
    folders = {split: text_in(data_dir / split, forms) for split in SPLITS}
    return Inputs({split: [source_of(path, data_dir) for path in paths] for split, paths in folders.items()})


def not_read(data_dir: Path, found: Inputs, forms: tuple[str, ...]) -> None:
    """Count what lies in a data directory, could hold text, but is not read."""
    for split in SPLITS:
        read = {source.path for source in found.text[split]}
        for path in (data_dir / split).glob("[!.]*"):
            if path not in read and path.name not in ("demo.json", split):  # train/train holds shards
                name = f"{split}/{path.name}{'/' if path.is_dir() else ''}"
                if forms == OLD_FORMS and form_of(path):
                    rule = "an earlier version, which read *.txt, made it; delete manifest.json to read all"
                else:
                    rule = f"read are {NAMED_FORMS}, in the folders train and val"
                found.skip(rule, name)
    for path in data_dir.glob("[!.]*"):
        holds_text = path.is_dir() and any(text_in(path))
        is_text = path.is_file() and form_of(path) and path.name not in NO_TEXT
        if path.name not in SPLITS and (is_text or holds_text):
            name = f"{path.name}{'/' if path.is_dir() else ''}"
            found.skip("only what is in the folders train and val is", name)


def list_paths(paths: list[Path], data_dir: Path) -> Inputs:
    """Return the text of the files and folders that a command names; ValueError if one cannot be used."""
    found, seen = Inputs(), set[Path]()
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder; check the path")
        if path.is_file():
            if form_of(path) is None:
                raise ValueError(f"{path}: its name says no form that is read; those are {NAMED_FORMS}")
            _add(found, "train", path, data_dir, seen, path.name)
        elif path.is_dir():
            for split, file in _files_in(path, data_dir, found):
                if _add(found, split, file, data_dir, seen, file.relative_to(path).as_posix()):
                    found.note_link(file, path)
        else:
            raise ValueError(f"{path}: not a file or folder; save what it sends in a file first")
    if not found.text["train"]:
        others = "".join(f"; {len(names)} {some(names)}: {why}" for why, names in found.skipped.items())
        raise ValueError(f"{' '.join(map(str, paths))}: no text there; read are {NAMED_FORMS}{others}")
    return found


def _files_in(path: Path, data_dir: Path, found: Inputs) -> Iterator[tuple[str, Path]]:
    """Yield split and path of what may be text in a folder; count the rest."""
    if split_files := _split_files(path):
        for file in sorted(path.glob("[!.]*")):
            if file in split_files:
                yield split_files[file], file
            else:
                found.skip("beside the files train and val", file.name + ("/" if file.is_dir() else ""))
        return
    for split, folder in _split_folders(path, found):
        for file in _walk(folder, data_dir, found):
            yield split, file


def _split_files(path: Path) -> dict[Path, str]:
    """Return the split of files called train.txt, val.parquet or train-00000.csv, {} without both splits."""
    splits = {}
    for file in path.glob("[!.]*"):
        if file.is_file() and form_of(file) and (match := SPLIT_FILE.fullmatch(stem_of(file))):
            splits[file] = "train" if match[1] == "train" else "val"
    return splits if len(set(splits.values())) == 2 and not (path / "train").is_dir() else {}


def _split_folders(path: Path, found: Inputs) -> list[tuple[str, Path]]:
    """Return the folders of each split, all of it for train if it has none of that name."""
    if not (path / "train").is_dir():
        return [("train", path)]
    folders = [("train", path / "train")]
    folders += [("val", path / name) for name in VAL_NAMES if (path / name).is_dir()][:1]
    for other in sorted(path.glob("[!.]*")):
        if other not in [folder for _, folder in folders] and (other.is_dir() or form_of(other)):
            found.skip("beside the folder train", other.name + ("/" if other.is_dir() else ""))
    return folders


def _walk(folder: Path, data_dir: Path, found: Inputs) -> Iterator[Path]:
    """Yield the files of a tree in order; without links to folders, hidden files and the data directory."""
    own = data_dir.resolve()
    for parent, folders, files in folder.walk():
        hidden = [name for name in [*folders, *files] if name.startswith(".")]
        for name in hidden:
            found.skip("hidden", name)
        # a link to a folder is in `files`, since walk() follows none: it may lead in a circle
        folders[:] = sorted(n for n in folders if n not in hidden and (parent / n).resolve() != own)
        yield from (parent / name for name in sorted(files) if name not in hidden)


def _add(found: Inputs, split: str, path: Path, data_dir: Path, seen: set[Path], name: str) -> bool:
    """Take a file up, or count it as skipped; return whether it is taken."""
    _check_name(path)
    if reason := _why_not(path, seen):
        found.skip(reason, name)
        return False
    seen.add(path.resolve())
    found.text[split].append(source_of(path, data_dir, is_own=False))
    return True


def _why_not(path: Path, seen: set[Path]) -> str:
    """Return why a file is not read, "" if it is."""
    if path.is_dir():
        return "a link to a folder"
    if not path.exists():
        return "a link to nothing"
    if path.name in NO_TEXT:
        return "a file of settings"
    if form_of(path) is None:
        return "not in a form that is read"
    if not path.is_file():
        return "not a file"
    if path.resolve() in seen:
        return "named twice"
    return "empty" if _is_blank(path) else ""


def source_of(path: Path, data_dir: Path, is_own: bool = True) -> Source:
    """Return the source of a path whose name tells a form."""
    form, packing = form_of(path) or ("", "")
    name = path.relative_to(data_dir).as_posix() if is_own else relative_name(path, data_dir)
    return Source(path, form, packing, name, is_own)


def relative_name(path: Path, data_dir: Path) -> str:
    """Return a path relative to the data directory; on another drive of Windows the path itself."""
    try:
        return Path(os.path.relpath(path.parent.resolve() / path.name, data_dir.resolve())).as_posix()
    except ValueError:
        return path.absolute().as_posix()


def recorded_paths(data_dir: Path, manifest: dict[str, Any], key: str = "paths") -> list[Path]:
    """Return the PATHs from which a data directory was prepared, [] if its text lies in it."""
    content = manifest.get("input")
    names = content.get(key) if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return []
    # the manifest may be a stranger's
    if any(is_network_share(name) or PurePosixPath(name).is_absolute() for name in names):
        return []
    return [Path(os.path.normpath(data_dir.resolve() / name)) for name in names]


def default_data_dir(path: Path) -> Path:
    """Return the data directory for a PATH: data/ and its stem, or the PATH itself if it is one."""
    stem = stem_of(path.resolve()) or "text"
    folder = Path("data") / stem
    if folder.resolve() != path.resolve():
        return folder
    return folder if text_in(path / "train") else Path("data") / f"{stem}_prepared"


def outside_paths(data_dir: Path, paths: tuple[Path, ...]) -> list[Path]:
    """Return the PATHs, [] if the only one is the data directory; ValueError if text would be mixed."""
    own = text_in(data_dir / "train")
    if paths and all(path.resolve() == data_dir.resolve() for path in paths):
        if own:
            return []
        way_out = "move its files into a folder train in it, or name another folder with --data_dir"
        raise ValueError(
            f"{data_dir}: a PATH is only read, and has no text in {data_dir / 'train'}; {way_out}"
        )
    if paths and own:
        what = f"text of its own is there, beside which {paths[0]} cannot be prepared"
        raise ValueError(f"{own[0]}: {what}; name another folder with --data_dir")
    return list(paths)


def check_free(data_dir: Path, paths: list[Path]) -> None:
    """Raise ValueError if a data directory that no flag named was prepared from other text."""
    manifest = data_dir / "manifest.json"
    before = recorded_paths(data_dir, read_json(manifest))
    if manifest.is_file() and {p.resolve() for p in before} != {p.resolve() for p in paths}:
        what = f"was prepared from {before[0]}" if before else "was prepared from text of its own"
        raise ValueError(f"{data_dir}: {what}; name another folder with --data_dir")


def _check_name(path: Path) -> None:
    if NOT_UTF8.search(str(path)):  # the manifest could not hold it
        raise ValueError(f"{path.parent}: the file name {path.name!a} is not UTF-8; rename it")


def _is_blank(path: Path) -> bool:
    return path.stat().st_size < SMALL_BYTES and not path.read_bytes().strip()


def refuse_other_text(data_dir: Path, dataset: str, own: dict[str, str]) -> None:
    """Raise ValueError if other text in the folders of a named data set would be mixed with it."""
    text = [path for split in SPLITS for path in text_in(data_dir / split)]
    if other := next((path for path in text if path.name != own.get(path.parent.name)), None):
        raise ValueError(
            f"{other}: other text is there already; give --dataset {dataset} a folder of its own "
            "with --data_dir, or leave --dataset out to use that text"
        )
