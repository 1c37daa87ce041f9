"""Other people's tokenizers, from a folder, a file or the hub, copied as LitGPT reads them."""

import contextlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from litgpt_moe.checkpoints.layout import TOKENIZER_FILES
from litgpt_moe.checkpoints.tokenizer_files import tokenizer_sha256
from litgpt_moe.cli import note
from litgpt_moe.data.download import MissingOnHub, download
from litgpt_moe.data.sentencepiece_model import convert
from litgpt_moe.data.settings import HUB_ID
from litgpt_moe.data.tokenizer import as_value_error, load_for_encoding
from litgpt_moe.files import is_link, read_json, remove, write_json, write_whole
from litgpt_moe.folders import make_staging
from litgpt_moe.locks import remove_left_over

MARK = ".copied_from.json"  # beside a copy: the name of what was copied, and the digest of its tokenizer.json
# what holds the vocabulary, in the order in which it is looked for
VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "config.json")
# names of special tokens in the order of preference; BERT's begin and end a text as well
USUAL = {
    "bos": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "[CLS]"),
    "eos": ("</s>", "<|end_of_text|>", "<|endoftext|>", "<eos>", "[EOS]", "[SEP]"),
}
INSTEAD = {"bos": "cls", "eos": "sep"}
# the classes whose tokenizer.json is made from vocab.json and merges.txt alone, as GPT-2's
GPT2_LIKE = re.compile(r"(GPT2|Roberta|PreTrained|Tokenizers).*")


def is_foreign(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer that LitGPT could not use as it is."""
    if not (folder / "tokenizer.json").is_file():
        return any(all((folder / name).is_file() for name in names) for names in VOCABULARIES)
    try:
        tokenizer = load_for_encoding((path := folder / "tokenizer.json").read_bytes(), path)
        config, generation = (read_json(folder / name) for name in TOKENIZER_FILES[1:])
        chosen = {key: _name(config.get(f"{key}_token")) for key in USUAL}
        return any(
            tokenizer.token_to_id(name) is None
            if name is not None
            else type(generation.get(f"{key}_token_id")) is not int
            for key, name in chosen.items()
        )
    except ValueError:
        return False  # a damaged file, which the reader of its facts names


def bring_tokenizer(name: str, target: Path, read: Callable[[], list[str]], overwrite: bool) -> None:
    """Write the tokenizer that `name` (folder, file or hub id) means to `target`, unless it is there.

    `read` returns some stories, on which it is tried.
    ValueError if it cannot be used or another one is there, ConnectionError without the hub.
    """
    there, before = target / "tokenizer.json", _copied_from(target)
    if before == name and not Path(name).exists():
        return  # from the hub, once
    stories = read()
    staging = make_staging(target)
    try:
        files = _standard(_collect(name, staging), name, stories)
    finally:
        remove(staging)
    if there.is_file() and tokenizer_sha256(there.read_bytes()) != tokenizer_sha256(
        files[TOKENIZER_FILES[0]]
    ):
        if not (overwrite or before):
            raise ValueError(f"{target}: there is another tokenizer; --overwrite replaces it")
        note(f"{target}: replacing the tokenizer there by {name}")
    write_files(files, target, name)


def _copied_from(target: Path) -> str | None:
    """Return what the tokenizer in a folder was copied from; None if it is none of our copies."""
    with contextlib.suppress(OSError, ValueError):
        mark, copy = read_json(target / MARK), target / "tokenizer.json"
        if copy.is_file() and mark.get("sha256") == tokenizer_sha256(copy.read_bytes()):
            return str(mark.get("name"))
    return None


def write_files(files: dict[str, bytes], target: Path, name: str) -> None:
    """Write a tokenizer's files, tokenizer.json last: a folder that has it counts as complete."""
    remove_left_over(*(target / file for file in (*files, MARK)))
    for file in TOKENIZER_FILES[:0:-1]:
        if file not in files:  # of the copy before
            remove(target / file)
    for file in sorted(files, key=lambda file: file == "tokenizer.json"):
        if not (target / file).is_file() or (target / file).read_bytes() != files[file]:
            write_whole(target / file, files[file].decode("utf-8"))
    write_json(target / MARK, {"name": name, "sha256": tokenizer_sha256(files["tokenizer.json"])})


def _collect(name: str, staging: Path) -> Path:
    """Return a folder with the files of a tokenizer, of which one set in VOCABULARIES is there."""
    path = Path(name)
    if path.is_file():
        usual = "tokenizer.model" if path.suffix == ".model" else "tokenizer.json"
        for source, to in ((path, usual), *((path.parent / config, config) for config in CONFIGS)):
            if source.is_file():
                (staging / to).write_bytes(source.read_bytes())
        return staging
    if path.is_dir():
        if not any(all((path / file).is_file() for file in files) for files in VOCABULARIES):
            raise FileNotFoundError(f"{path}: {_lacks([p.name for p in path.iterdir()])}")
        return path
    if not HUB_ID.fullmatch(name):
        raise FileNotFoundError(
            f"{name}: no such folder or file, nor a hub id as OWNER/NAME; check --tokenizer"
        )
    return _fetch(name, staging)


def _lacks(names: list[str]) -> str:
    """Return what a folder lacks to hold a tokenizer."""
    wanted = ", or ".join(" with ".join(files) for files in VOCABULARIES)
    half = [
        f"{there} is there without {other}"
        for there, other in (("vocab.json", "merges.txt"), ("merges.txt", "vocab.json"))
        if there in names and other not in names
    ]
    return f"no tokenizer there ({'; '.join([*half, f'needed is {wanted}'])}); name another with --tokenizer"


def _fetch(repo: str, folder: Path) -> Path:
    way_out = "check --tokenizer, or name a folder on this machine"
    for files in VOCABULARIES:
        with contextlib.suppress(MissingOnHub):
            for file in files:
                download(repo, "model", file, folder, way_out)
            break
    else:
        raise FileNotFoundError(f"{repo} on the hub: {_lacks([])}")
    for file in CONFIGS:
        with contextlib.suppress(MissingOnHub):
            download(repo, "model", file, folder, way_out)
    return folder


def _standard(folder: Path, name: str, stories: list[str]) -> dict[str, bytes]:
    """Return the files of a tokenizer as LitGPT and this project read them."""
    configs = {file: read_json(folder / file) for file in CONFIGS}
    spec, known = folder / "tokenizer.json", {}
    if spec.is_file():
        content = spec.read_bytes()
    elif (model := folder / "tokenizer.model").is_file():
        text, known = convert(model, stories)
        content = text.encode("utf-8")
    else:
        content = _from_merges(folder, configs["tokenizer_config.json"]).encode("utf-8")
    tokenizer = load_for_encoding(content, folder / "tokenizer.json")
    chosen = {key: _special(key, tokenizer, configs, known) for key in USUAL}
    if chosen["eos"] is None:
        way_out = "say which piece ends a text: eos_token in its tokenizer_config.json"
        raise ValueError(f"{name}: its files name no EOS token; {way_out}")
    if chosen["bos"] is None:
        note(f"{name}: no BOS token; {chosen['eos']!r}, which ends a story, begins it too")
        chosen["bos"] = chosen["eos"]
    tokens = {f"{key}_token": token for key, token in chosen.items()}
    ids = {f"{key}_token_id": tokenizer.token_to_id(str(token)) for key, token in chosen.items()}
    config = configs["tokenizer_config.json"] | tokens
    if not isinstance(config.get("tokenizer_class"), str):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    return {
        "tokenizer_config.json": json.dumps(config, indent=1, ensure_ascii=False).encode("utf-8"),
        "generation_config.json": json.dumps(ids, indent=1).encode("utf-8"),
        "tokenizer.json": content,
    }


def _special(
    key: str, tokenizer: Tokenizer, configs: dict[str, dict[str, Any]], known: dict[str, str]
) -> str | None:
    """Return the BOS or EOS token that a tokenizer's files name, else one of the usual names it has."""
    named = [_name(configs[file].get(f"{key}_token")) for file in CONFIGS[:2]]
    for file in CONFIGS[2:]:
        found = configs[file].get(f"{key}_token_id")
        found = found[0] if isinstance(found, list) and found else found  # Llama 3 has several
        named.append(tokenizer.id_to_token(found) if type(found) is int and found >= 0 else None)
    named.append(known.get(f"{key}_token"))
    named += [_name(configs[file].get(f"{INSTEAD[key]}_token")) for file in CONFIGS[:2]]
    usable = (name for name in [*named, *USUAL[key]] if name and tokenizer.token_to_id(name) is not None)
    return next(usable, None)


def _name(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _from_merges(folder: Path, config: dict[str, Any]) -> str:
    """Return the tokenizer.json of a byte-level BPE as GPT-2's, from its vocabulary and its merges."""
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    kind = config.get("tokenizer_class")
    if isinstance(kind, str) and not GPT2_LIKE.fullmatch(kind):
        what = f"{kind} divides text in a way of its own, which vocab.json and merges.txt do not tell"
        raise ValueError(f"{folder}: {what}; get its tokenizer.json")
    with as_value_error(vocab, "not a BPE vocabulary with its merges", "replace the files"):
        tokenizer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    has_prefix = config.get("add_prefix_space") is True
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=has_prefix)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    # vocab.json may hold special tokens, which no merge makes
    special = [
        token
        for token in ("<|endoftext|>", "<s>", "</s>", "<pad>", "<unk>", "<mask>")
        if tokenizer.token_to_id(token) is not None
    ]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer.to_str()


def carry_tokenizer(folder: Path, target: Path) -> None:
    """Copy the tokenizer that made the shards to `target`, unless a tokenizer of the user's own is there."""
    is_there = (target / "tokenizer.json").is_file()
    if folder.resolve() == target.resolve() or (is_there and _copied_from(target) is None):
        return
    if is_link(target):
        note(f"{target} is a link, which is not written through: the tokenizer is not copied there")
        return
    files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
    write_files(files, target, folder.name)
