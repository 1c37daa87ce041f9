"""The tokenizer of a data directory: its facts, and where it comes from (trained, downloaded, or beside)."""

import contextlib
import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from litgpt_moe.cli import note
from litgpt_moe.data.download import download
from litgpt_moe.data.manifest import load_manifest
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.text import TextReader
from litgpt_moe.files import read_json, sha256_file, write_json, write_whole

SPACE = "\u2581"  # how Llama's tokenizer writes a space
LLAMA_NORMALIZER = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
SPLIT_AT_SPACES = pre_tokenizers.Split(SPACE, "merged_with_next")
BYTE_PIECES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}  # ids where LitGPT's decoder expects them
NOT_PLAIN_BPE = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
# what BPE can encode one by one: a word with the spaces before it, spaces at the end, a newline
PIECE = r" *[^ \n]+| +|\n"
PIECE_OF_SPLIT = r" ?[^ \n]+| |\n"  # after SPLIT_AT_SPACES: with one space at most
WORD = (
    rf"{SPACE}?\p{{L}}+(?:['\u2019]\p{{L}}+)?|{SPACE}?\p{{N}}|{SPACE}?[^{SPACE}\s\p{{L}}\p{{N}}]+|{SPACE}|\n"
)
TRAINED_BY_US = "trained_vocab_size"  # key in tokenizer_config.json: the size that was asked for
MAX_TRAINING_BYTES = 100 << 20  # of text for a tokenizer; more hardly changes it
TOKENIZER_REPO = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class TokenizerFacts:
    """What the shards and the processes that write them need to know of a tokenizer."""

    folder: Path
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    special_pieces: tuple[str, ...]
    piece: str | None
    """Regular expression of the pieces of text that can be encoded one by one, if there is one."""

    @property
    def dtype(self) -> np.dtype:
        """The smallest little-endian type that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


def tokenizer_sha256(tokenizer_dir: Path) -> str:
    """Return the SHA-256 of tokenizer.json."""
    path = tokenizer_dir / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not found; name a folder that has it with --tokenizer_dir")
    return sha256_file(path)


def read_tokenizer(tokenizer_dir: Path) -> TokenizerFacts:
    """Return the facts as litgpt.Tokenizer finds them; ValueError where LitGPT would trip."""
    paths = [tokenizer_dir / name for name in ("tokenizer_config.json", "generation_config.json")]
    others = (sha256_file(path) if path.is_file() else None for path in paths)
    return _read_tokenizer(tokenizer_dir, tokenizer_sha256(tokenizer_dir), *others)


@functools.cache  # a run asks four times, and 32,000 pieces are read in a tenth of a second
def _read_tokenizer(tokenizer_dir: Path, sha256: str, *_: str | None) -> TokenizerFacts:
    path, config_path = tokenizer_dir / "tokenizer.json", tokenizer_dir / "tokenizer_config.json"
    spec, config = read_json(path), read_json(config_path)
    generation = read_json(tokenizer_dir / "generation_config.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path}: not a tokenizer ({error}); replace the file") from None
    if config_path.is_file() and not isinstance(config.get("tokenizer_class"), str):
        raise ValueError(f"{config_path}: no tokenizer_class, which LitGPT needs; add it")
    ids = {}
    for key in ("bos", "eos"):
        token = config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        ids[key] = generation.get(f"{key}_token_id") if token is None else tokenizer.token_to_id(str(token))
        if type(ids[key]) is not int or not 0 <= ids[key] < tokenizer.get_vocab_size():
            way_out = f"{key}_token must name a piece of {path.name}"
            raise ValueError(f"{config_path}: no {key.upper()} id; {way_out}")
    for key in ("added_tokens", "pre_tokenizer", "normalizer"):
        if key not in spec:
            raise ValueError(f"{path}: no {key}; replace the file by a whole one")
    special_pieces = tuple(token["content"] for token in spec["added_tokens"])
    bare, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    piece = None
    if can_split_at_spaces(spec) and whole in (bare, [ids["bos"], *bare], [ids["bos"], *bare, ids["eos"]]):
        piece = PIECE_OF_SPLIT if spec["pre_tokenizer"] else PIECE
    size = tokenizer.get_vocab_size()
    return TokenizerFacts(tokenizer_dir, sha256, size, ids["bos"], ids["eos"], special_pieces, piece)


def can_split_at_spaces(spec: dict) -> bool:
    """Return whether BPE gives the same ids when the text is first split before spaces and around newlines.

    True for Llama's tokenizer: spaces become "\u2581", and no merge makes a piece with "\u2581" after another
    character or with a newline in it, so no merge ever joins the two sides of such a place.
    """
    model = spec["model"]
    return (
        model["type"] == "BPE"
        and not any(model.get(key) for key in NOT_PLAIN_BPE)
        and not (spec.get("truncation") or spec.get("padding"))
        and spec["normalizer"] == json.loads(LLAMA_NORMALIZER.__getstate__())
        and spec["pre_tokenizer"] in (None, json.loads(SPLIT_AT_SPACES.__getstate__()))
        # else unknown characters side by side would become one
        and bool(model.get("byte_fallback") and BYTE_PIECES.keys() <= model["vocab"].keys())
        and not any(SPACE in token["content"] or " " in token["content"] for token in spec["added_tokens"])
        and not any(SPACE in p.lstrip(SPACE) or ("\n" in p and p != "\n") for p in model["vocab"])
    )


def train_tokenizer(settings: PrepareSettings, paths: list[Path]) -> None:
    """Write a Llama-style BPE tokenizer of the text: byte fallback, so that any text encodes."""
    vocab_size = settings.train_tokenizer
    total = sum(path.stat().st_size for path in paths)
    every = 1 + total // MAX_TRAINING_BYTES  # every n-th story is enough to count pairs, and bounds memory
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = LLAMA_NORMALIZER
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD), behavior="isolated")
    steps = (decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse())
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<unk>", "<s>", "</s>", *BYTE_PIECES],
        limit_alphabet=max(64, (vocab_size - 259) // 4),
        show_progress=False,
    )
    with tqdm(total=total, unit="B", unit_scale=True, desc="tokenizer", disable=None) as progress:
        readers = (TextReader(path, settings.separator, "replace", quiet=True) for path in paths)
        stories = (story for reader in readers for some in reader.story_lists(progress) for story in some)
        tokenizer.train_from_iterator(itertools.islice(stories, 0, None, every), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = None  # as Llama's: the merges alone decide
    # a byte is a piece but no special token: text that spells "<0x41>" must stay text
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", TRAINED_BY_US: vocab_size}
    write_json(settings.tokenizer_dir / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(settings.tokenizer_dir / "tokenizer_config.json", config)
    write_whole(settings.tokenizer_dir / "tokenizer.json", json.dumps(spec, ensure_ascii=False))


def ensure_tokenizer(settings: PrepareSettings, paths: list[Path]) -> TokenizerFacts:
    """Return the facts of the tokenizer in tokenizer_dir, trained on the text or downloaded where asked."""
    folder, wanted = settings.tokenizer_dir, settings.train_tokenizer
    is_there = (folder / "tokenizer.json").is_file()
    if wanted is not None and (settings.overwrite or not is_there):
        note(f"training a tokenizer of {wanted:,} pieces into {folder}")
        train_tokenizer(settings, paths)
    elif wanted is not None and read_json(folder / "tokenizer_config.json").get(TRAINED_BY_US) != wanted:
        raise ValueError(
            f"{folder}: there is another tokenizer; --overwrite replaces it, --tokenizer_dir names "
            "another folder, and without --train_tokenizer it is used"
        )
    elif not is_there:
        note(f"{folder}: no tokenizer there")
        way_out = (
            "name a folder that has tokenizer.json with --tokenizer_dir, "
            "or train one on the text with prepare_data.py --train_tokenizer 4096"
        )
        for name in reversed(TOKENIZER_FILES):  # tokenizer.json last: with it the folder counts as whole
            download(TOKENIZER_REPO, "model", name, folder, way_out)
    return read_tokenizer(folder)


def find_tokenizer(data_dir: Path, tokenizer_dir: Path | None) -> Path:
    """Return the folder of the tokenizer that made the shards: the one named, else one inside or beside."""
    wanted = load_manifest(data_dir).get("tokenizer", {}).get("sha256")
    beside = sorted(path.parent for path in data_dir.parent.glob("*/tokenizer.json"))
    near = [data_dir / TOKENIZER, data_dir.parent / TOKENIZER, *beside]
    # what lies near and may not be read is another's; what is named has to be read
    passed_over = () if tokenizer_dir else PermissionError
    for folder in [tokenizer_dir] if tokenizer_dir else near:
        path = folder / "tokenizer.json"
        with contextlib.suppress(passed_over):
            if path.is_file() and sha256_file(path) == wanted:
                return folder
    if tokenizer_dir:
        what = "not the one" if path.is_file() else "not found, so not the one"
        raise ValueError(f"{path}: {what} that made {data_dir}; name that one's folder with --tokenizer_dir")
    raise ValueError(
        f"{data_dir}: the tokenizer that made it is not in {near[0]}, nor in a folder beside {data_dir}; "
        "name its folder with --tokenizer_dir"
    )
