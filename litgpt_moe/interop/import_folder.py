"""Import a Transformers model, from a folder or the Hugging Face hub, as a LitGPT checkpoint."""

import errno
import re
import shutil
from pathlib import Path

import httpx
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from litgpt_moe.checkpoints.layout import TOKENIZER_FILES
from litgpt_moe.checkpoints.writer import write_checkpoint
from litgpt_moe.cli import first_line, no_bar
from litgpt_moe.config import model_facts
from litgpt_moe.files import check_no_links, is_link, is_outside, read_json
from litgpt_moe.interop.tokenizer_files import to_lit_tokenizer
from litgpt_moe.interop.transformers import Weights, to_lit_config, to_lit_weights

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
FILE_NAME = re.compile(r"[\w.-]{1,200}\.safetensors")  # an index may not point out of its folder
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def fetch(repository: str, folder: Path) -> None:
    """Download the needed files of a hub repository to `folder`; existing files are kept."""
    _download(repository, folder, ["config.json", SINGLE, INDEX, *TOKENIZER_FILES])
    weights = SINGLE if (folder / SINGLE).is_file() else INDEX
    _check_arrived(repository, folder, ["config.json", weights])
    if weights == INDEX:
        _download(repository, folder, shards := shard_names(folder))
        _check_arrived(repository, folder, shards)


def _download(repository: str, folder: Path, names: list[str]) -> None:
    """Download the files in `names`, as far as the repository has them."""
    try:
        snapshot_download(repository, local_dir=folder, allow_patterns=names)
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        missing = next((name for name in names if not (folder / name).is_file()), names[-1])
        raise ConnectionError(_not_downloaded(missing, repository, first_line(error))) from error


def _check_arrived(repository: str, folder: Path, names: list[str]) -> None:
    # without a connection snapshot_download returns an existing folder although files are missing
    if missing := [name for name in names if not (folder / name).is_file()]:
        reason = "it has no such file, or there is no connection to it"
        raise ConnectionError(_not_downloaded(missing[0], repository, reason))


def _not_downloaded(name: str, repository: str, reason: str) -> str:
    where = f"{name} of {repository} could not be downloaded from {constants.ENDPOINT}"
    return f"{where} ({reason.split('. ')[0]}); check the name and HF_ENDPOINT, or give a folder"


def shard_names(folder: Path) -> list[str]:
    """Return the names of the files that hold the weights."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        others = [path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in folder.glob(pattern)]
        found = f"; {others[0]} is of another format" if others else ""
        raise FileNotFoundError(f"{folder} holds neither {SINGLE} nor {INDEX}{found}")
    names = read_json(folder / INDEX).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{folder / INDEX} has no weight_map; get it again")
    if odd := [name for name in names.values() if not isinstance(name, str) or not FILE_NAME.fullmatch(name)]:
        raise ValueError(f"{folder / INDEX} names {odd[0]!r:.80}, which is no file of its folder")
    return sorted(set(names.values()))


def check_links(folder: Path, names: list[str]) -> None:
    """Raise ValueError if one of these files is a link out of `folder`, which may lead to any file."""
    place = folder.resolve()
    # a snapshot in the hub's cache holds links only, to its blobs
    allowed = [place, place.parent.parent / "blobs"] if place.parent.name == "snapshots" else [place]
    for path in (folder / name for name in names):
        if path.is_symlink() and all(is_link(of) or is_outside(path, of) for of in allowed):
            target = path.readlink()
            raise ValueError(f"{path} is a link out of its folder (to {target}); put the file itself there")


def read_weights(folder: Path) -> Weights:
    """Return all weights in a folder. ValueError, in one sentence, if a file is missing or damaged."""
    weights: Weights = {}
    check_links(folder, shard_names(folder))
    for name in tqdm(shard_names(folder), unit="file", desc="reading", disable=no_bar()):
        if not (folder / name).is_file():
            way_out = "get the whole folder again"
            raise FileNotFoundError(f"{folder / name} is missing, {INDEX} names it; {way_out}")
        try:
            weights |= load_file(folder / name)
        except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:100]
            raise ValueError(f"{folder / name} is damaged or no safetensors file ({reason})") from None
    kinds = {str(weight.dtype).removeprefix("torch.") for weight in weights.values()}
    if odd := sorted(kinds - {"float32", "bfloat16", "float16"}):
        trainable = "float32, bfloat16 or float16 can be trained on"
        raise ValueError(f"{folder}: the weights are in {odd[0]}; {trainable}")
    return weights


def import_folder(folder: Path, name: str, out: Path) -> tuple[str, bool]:
    """Write the checkpoint; return a line that describes it, and whether it has experts."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json; name a folder that Transformers saved")
    check_links(folder, ["config.json", SINGLE, INDEX, *TOKENIZER_FILES])
    try:
        files, n_pieces = to_lit_tokenizer(folder)
    except UnicodeEncodeError:
        raise ValueError(f"{folder}: a tokenizer file holds half a surrogate pair; get it again") from None
    saved_name = read_json(folder / "config.json").get("_name_or_path")
    if isinstance(saved_name, str) and saved_name.strip("./\\ "):
        name = Path(saved_name).name
    # for these names LitGPT uses another norm
    config = to_lit_config(folder / "config.json", re.sub("(?i)gemma|olmo", "model", name), n_pieces)
    weights = to_lit_weights(config, read_weights(folder))
    write_checkpoint(out, weights, config, files)
    facts = model_facts(config)
    kind = str(weights["lm_head.weight"].dtype).removeprefix("torch.")
    active = f", {facts.active_params:,} active per token" if config.n_expert else ""
    line = f"Wrote {out}: {config.name}, {facts.total_params:,} parameters{active}, in {kind}"
    return line, config.n_expert > 0


def import_model(source: str, out: Path) -> tuple[str, bool]:
    """Write the checkpoint of a folder, or of OWNER/NAME on the hub; return what `import_folder` does.

    An interrupted download is kept beside `out`, and the next call resumes it.
    """
    folder = Path(source)
    download = out.absolute().with_name(f".{out.absolute().name}.litgpt_moe-download")
    if not folder.is_dir():
        if not REPOSITORY.fullmatch(source):
            raise FileNotFoundError(f"{source}: no such folder, and no OWNER/NAME of the hub either")
        check_no_links(download, *download.rglob("*"))
        fetch(source, folder := download)
    result = import_folder(folder, Path(source).absolute().name, out)
    shutil.rmtree(download, ignore_errors=True)
    return result
