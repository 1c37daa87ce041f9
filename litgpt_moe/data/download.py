"""Files of the Hugging Face hub: the TinyStories text, and single files of any repository."""

import contextlib
import errno
import shutil
from pathlib import Path

from litgpt_moe.cli import note
from litgpt_moe.data.hub_file import LOG_IN
from litgpt_moe.data.inputs import refuse_other_text
from litgpt_moe.files import check_no_links, patient_rename


class MissingOnHub(ConnectionError):
    """The repository is there, but has no such file."""


def download(
    repo: str,
    repo_type: str,
    name: str,
    folder: Path,
    way_out: str,
    revision: str | None = None,
    to: str = "",
) -> None:
    """Fetch a file of a hub repository into `folder`, named `to` there; an interrupted one is continued."""
    import httpx  # not at the top: each worker process, which downloads nothing, would need 15 MB more
    from huggingface_hub import constants, errors, hf_hub_download  # likewise

    note(f"downloading {name} of {repo} to {folder}")
    part = folder / ".litgpt_moe-download"  # kept for the next command to continue
    check_no_links(part, *part.rglob("*"))
    try:
        path = hf_hub_download(repo, name, repo_type=repo_type, local_dir=part, revision=revision)
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        is_missing = isinstance(error, errors.RemoteEntryNotFoundError)
        if isinstance(error, errors.RepositoryNotFoundError | errors.GatedRepoError):
            way_out = LOG_IN
        if is_missing or not any(part.rglob("*.incomplete")):  # the next call would continue from such a file
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.rmdir()  # fails unless it is empty
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES, errno.EROFS):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
        if isinstance(error, RuntimeError) and "closed" in reason:
            reason = "no connection to it"  # huggingface_hub 1.3 retries with a client that it has closed
        where = f"{name} of {repo} could not be downloaded from {constants.ENDPOINT}"
        kind = MissingOnHub if is_missing else ConnectionError
        raise kind(f"{where} ({reason}); {way_out}") from error
    patient_rename(Path(path), folder / (to or name), is_replacing=True)
    shutil.rmtree(part)


def download_tinystories(data_dir: Path) -> None:
    """Fetch the two text files of TinyStories that are not there yet."""
    names = {"train": "TinyStories-train.txt", "val": "TinyStories-valid.txt"}
    refuse_other_text(data_dir, "tinystories", names)
    own = f"put text of your own into {data_dir / 'train'} and leave out --dataset"
    way_out = f"run again to go on where it stopped, set HF_ENDPOINT to a mirror, or {own}"
    for split, name in names.items():
        if not (data_dir / split / name).is_file():
            download("roneneldan/TinyStories", "dataset", name, data_dir / split, way_out)
