"""Text data sets of the Hugging Face hub: which Parquet files a subset and a split are."""

import fnmatch
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from litgpt_moe.cli import first_line, note
from litgpt_moe.data.download import download
from litgpt_moe.data.forms import HUB_RECORD, OnHub, Source, text_in
from litgpt_moe.data.hub_file import GO_ON, LOG_IN
from litgpt_moe.data.inputs import Inputs
from litgpt_moe.data.settings import SHORT_NAMES, SPLITS, PrepareSettings
from litgpt_moe.files import check_inside, fits, read_json, write_json
from litgpt_moe.locks import locked_folder

CONVERTED = "refs/convert/parquet"  # where the hub keeps each public data set as SUBSET/SPLIT/0000.parquet
NO_PARQUET = "no Parquet files on the hub, nor converted ones; download its files and name them as PATH"
VAL_SPLITS = ("validation", "valid", "val", "dev")
SPLIT_WORDS = ("train", "training", *VAL_SPLITS, "test", "testing", "eval", "evaluation")
SHARD_NUMBER = re.compile(r"([-_.]?\d+)?([-_]of[-_]\d+)?([-_][0-9a-f]{16})?$")
RECORD = {"repo": str, "subset": str, "split": str, "revision": str, "files": {}}
ON_HUB = {split: [{"path": str, "size": 0, "digest": str}] for split in SPLITS}
SUBSETS_RECORD = {"repo": str, "revision": str, "files": [str]}

Layout = dict[str, dict[str, list[str]]]  # subset -> split -> paths in the repository


def open_dataset(settings: PrepareSettings) -> Inputs | None:
    """Return the files of a hub data set, to be read there; None where an earlier version fetched them.

    What is to be read is recorded first, with its commit: an interrupted preparation goes on with the same.
    """
    record = read_json(settings.data_dir / HUB_RECORD)
    repo = SHORT_NAMES.get(settings.dataset, settings.dataset)
    asked = {"repo": repo, "asked_subset": settings.subset, "asked_split": settings.split}
    if record:
        is_whole = fits(record, RECORD) and ("on_hub" not in record or fits(record["on_hub"], ON_HUB))
        if not is_whole:
            raise ValueError(f"{settings.data_dir / HUB_RECORD}: damaged; delete it")
        if any(record.get(key) != value for key, value in asked.items()):
            was = " ".join(str(record.get(key)) for key in ("repo", "subset", "split"))
            raise ValueError(f"{settings.data_dir}: has {was}; name another folder with --data_dir")
    else:
        if other := [path for split in SPLITS for path in text_in(settings.data_dir / split)]:
            what = f"other text is there already; give --dataset {settings.dataset} a folder of its own"
            raise ValueError(f"{other[0]}: {what} with --data_dir, or leave --dataset out to use that text")
        record = asked | _choose(repo, settings.subset, settings.split)
        write_json(settings.data_dir / HUB_RECORD, record)
    if "on_hub" not in record:
        _fetch_rest(settings, record)
        return None
    inputs = Inputs(
        {split: [_source(record, entry) for entry in record["on_hub"][split]] for split in SPLITS}
    )
    sources = [source for split in SPLITS for source in inputs.text[split]]
    size = f"{len(sources):,} files, {sum(source.size for source in sources):,} bytes"
    note(f"{repo}, subset {record['subset']}, split {record['split']}: {size}; they are read where they are")
    return inputs


def as_before(settings: PrepareSettings) -> PrepareSettings:
    """Return the settings with the data set of the hub that the data directory was made from, if any."""
    record = read_json(settings.data_dir / HUB_RECORD)
    if not fits(record, RECORD) or "on_hub" not in record:
        return settings
    asked = {"subset": record.get("asked_subset"), "split": record.get("asked_split")}
    return replace(settings, dataset=record["repo"], **asked)


def _source(record: dict[str, Any], entry: dict[str, Any]) -> Source:
    name = f"{record['repo']}/{check_inside(entry['path'])}"
    return Source(Path(name), ".parquet", "", name, False, OnHub(record["repo"], record["revision"], **entry))


def _fetch_rest(settings: PrepareSettings, record: dict[str, Any]) -> None:
    """Fetch what an earlier version, which kept the files in the data directory, has not fetched yet."""
    wanted = {(split, path) for split in SPLITS for path in record["files"].get(split, ())}
    for number, (split, path) in enumerate(sorted(wanted), start=1):
        folder = settings.data_dir / split
        target = folder / _flat(path)
        if not target.is_file():
            note(f"file {number} of {len(wanted)}")
            download(record["repo"], "dataset", path, folder, GO_ON, record["revision"], target.name)


def fetch_subsets(repo: str, folder: Path) -> list[Path]:
    """Fetch the training files of every subset of a hub data set into `folder`; return where they lie.

    As with `open_dataset` the list of them is recorded first, and files that are there stay. A second
    command waits for the first one.
    """
    with locked_folder(folder, "download", "another command downloads", "wait for it", wait=True):
        record = read_json(folder / HUB_RECORD)
        if record and not (fits(record, SUBSETS_RECORD) and record["repo"] == repo):
            raise ValueError(f"{folder / HUB_RECORD}: not about {repo}; rename that folder")
        if not record:
            layout, info, _ = _look_up(repo)
            files = sorted(path for splits in layout.values() for path in splits.get("train", ()))
            record = {"repo": repo, "revision": info.sha or "main", "files": files}
            write_json(folder / HUB_RECORD, record)
        targets = {path: folder / _flat(path) for path in record["files"]}
        for path, target in targets.items():
            if not target.is_file():
                download(repo, "dataset", path, folder, GO_ON, record["revision"], target.name)
    return list(targets.values())


def _flat(path: str) -> str:
    """Return a file's name in the data directory: its path in the repository without folders."""
    return re.sub(r"[^\w.-]", "_", path.replace("/", "--"))


def _choose(repo: str, subset: str | None, split: str | None) -> dict[str, Any]:
    """Return subset, split, commit and files of what was asked for; ValueError if there is no such thing."""
    layout, info, defaults = _look_up(repo)
    usual = [name for name in (*defaults, "default") if name in layout]
    subset = _one_of("subset", repo, subset, list(layout), usual[:1])
    splits = layout[subset]
    split = _one_of("split", f"{repo}, subset {subset}", split, list(splits), ["train"])
    for name in splits:
        if name.startswith("partial-"):
            note(f"{repo}: {name} is the first part of a data set too large for the hub to convert")
    val = next((name for name in VAL_SPLITS if name in splits and name != split), None)
    files = {"train": splits[split], "val": splits[val] if val else []}
    siblings = {sibling.rfilename: sibling for sibling in info.siblings}
    on_hub = {split: [_facts(repo, siblings[path]) for path in paths] for split, paths in files.items()}
    chosen = {"subset": subset, "split": split, "revision": info.sha or "main"}
    return {**chosen, "files": files, "on_hub": on_hub}


def _facts(repo: str, sibling: Any) -> dict[str, Any]:
    """Return a file's path, size and digest: the SHA-256 of a large one, Git's hash of a small one."""
    if type(sibling.size) is not int:
        raise ConnectionError(
            f"{repo}: no size is told of {sibling.rfilename}; set HF_ENDPOINT to another hub"
        )
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return {"path": sibling.rfilename, "size": sibling.size, "digest": str(digest)}


def _one_of(kind: str, where: str, asked: str | None, names: list[str], usual: list[str]) -> str:
    """Return the name asked for, else the usual one, else the only one; ValueError that lists them."""
    if asked is None:
        found = [name for name in usual if name in names] or (names if len(names) == 1 else [])
        if found:
            return found[0]
    elif asked in names:
        return asked
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    what = "several" if asked is None else f"no {kind} {asked!r}"
    raise ValueError(f"{where}: {what}; choose one with --{kind}: {shown}")


def _look_up(repo: str) -> tuple[Layout, Any, list[str]]:
    """Return the layout of a data set, what the hub says of it, and the subsets marked as default."""
    info = _info(repo, "main")
    paths = _parquet_files(info)
    configs = (info.card_data.to_dict() if info.card_data else {}).get("configs")
    defaults = []
    layout: Layout = {}
    if paths and isinstance(configs, list):
        layout = _by_configs(configs, paths)
        defaults = [c["config_name"] for c in configs if isinstance(c, dict) and c.get("default")]
    if paths and not layout:
        layout = by_names(paths)
    if not layout:
        info = _info(repo, CONVERTED)
        layout = by_names(_parquet_files(info))
    if not layout:
        raise ValueError(f"{repo}: {NO_PARQUET}")
    return layout, info, defaults


def _info(repo: str, revision: str) -> Any:
    import httpx  # not at the top: it takes 15 MB in each worker process
    from huggingface_hub import HfApi, constants  # likewise

    try:
        return HfApi().dataset_info(repo, revision=revision, files_metadata=True)
    except (httpx.HTTPError, OSError, RuntimeError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404) and revision == CONVERTED:
            raise ValueError(f"{repo}: {NO_PARQUET}") from None
        if status in (401, 403, 404):
            raise ConnectionError(f"{repo}: no such data set on {constants.ENDPOINT}; {LOG_IN}") from None
        reason = first_line(error).split(". ")[0]
        where = f"the list of its files could not be read from {constants.ENDPOINT}"
        way_out = "try again, or set HF_ENDPOINT to a mirror"
        raise ConnectionError(f"{repo}: {where} ({reason}); {way_out}") from error


def _parquet_files(info: Any) -> list[str]:
    return sorted(f.rfilename for f in info.siblings or () if f.rfilename.lower().endswith(".parquet"))


def _by_configs(configs: list[Any], paths: list[str]) -> Layout:
    """Return the layout that a data set's card describes: patterns of file names by subset and split."""
    layout: Layout = {}
    for config in configs:
        if not isinstance(config, dict) or "data_files" not in config:
            continue
        entries = config["data_files"]
        entries = entries if isinstance(entries, list) else [entries]
        for entry in entries:
            entry = entry if isinstance(entry, dict) else {"split": "train", "path": entry}
            patterns = entry.get("path", [])
            patterns = [patterns] if isinstance(patterns, str) else patterns
            # "**" crosses folders, as fnmatch's "*" does anyway
            found = [p for p in paths if any(fnmatch.fnmatchcase(p, str(pattern)) for pattern in patterns)]
            if found:
                layout.setdefault(str(config.get("config_name", "default")), {})[str(entry["split"])] = found
    return layout


def by_names(paths: list[str]) -> Layout:
    """Return the layout that the names tell: [SUBSET/][SPLIT/]NAME, where NAME may begin with the split."""
    layout: Layout = {}
    for path in paths:
        *folders, name = path.split("/")
        stem = SHARD_NUMBER.sub("", name.rsplit(".", 1)[0])
        is_split = stem.removeprefix("partial-").split("-")[0].split("_")[0].lower() in SPLIT_WORDS
        if is_split:
            split = stem
        elif folders and folders[-1].removeprefix("partial-").lower() in SPLIT_WORDS:
            split = folders.pop()
        elif len(folders) > 1 and folders[0] != "data":
            split = folders.pop()  # the hub's own conversion: SUBSET/SPLIT/0000.parquet
        else:
            split = "train"
        subset = "/".join(folder for folder in folders if folder != "data") or "default"
        layout.setdefault(subset, {}).setdefault(split, []).append(path)
    return layout
