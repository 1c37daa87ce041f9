"""The tokenizer of a data directory: training, downloading or finding it, its facts, and ids of stories."""

import contextlib
import functools
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tqdm import tqdm

from litgpt_moe.checkpoints.layout import TOKENIZER_FILES
from litgpt_moe.cli import note
from litgpt_moe.data.download import download
from litgpt_moe.data.manifest import read_manifest
from litgpt_moe.data.settings import PrepareSettings
from litgpt_moe.data.text import TextReader
from litgpt_moe.files import read_json, sha256_file, write_json, write_whole

TOKENIZER_REPO = "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"
TOKENIZER_FOLDER = "tokenizer"  # its name in an artifact, and the usual one in or beside a data directory
TRAINED_BY_US = "trained_vocab_size"  # key in tokenizer_config.json: the requested size
MAX_TRAINING_BYTES = 100 << 20  # of text; more hardly changes the merges
MAX_CACHED_PIECES = 100_000  # about 20 MB in each worker
MAX_CACHED_CHARS = 40  # a longer piece hardly occurs twice

SPACE = "\u2581"  # how Llama's tokenizer writes a space
LLAMA_NORMALIZER = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
SPLIT_AT_SPACES = pre_tokenizers.Split(SPACE, "merged_with_next")
BYTE_PIECES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}  # LitGPT's decoder expects these ids
NOT_PLAIN_BPE = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
# the parts of a text that Llama's BPE encodes independently of each other:
# a word with the spaces before it, spaces that no word follows, or a newline
PIECE = r" *[^ \n]+| +|\n"
# the same for a tokenizer with SPLIT_AT_SPACES, which separates all but the last of several spaces
PIECE_OF_SPLIT = r" ?[^ \n]+| |\n"
# the pre-tokenizer for training: no merge crosses a word, a digit, a run of punctuation or a newline
WORD = (
    rf"{SPACE}?\p{{L}}+(?:['\u2019]\p{{L}}+)?|{SPACE}?\p{{N}}|{SPACE}?[^{SPACE}\s\p{{L}}\p{{N}}]+|{SPACE}|\n"
)


@dataclass(frozen=True)
class TokenizerFacts:
    """The facts of a tokenizer on which shards depend, and those that an encoder needs."""

    folder: Path
    sha256: str
    vocab_size: int
    bos_id: int
    eos_id: int
    special_pieces: tuple[str, ...]
    piece: str | None
    """Regular expression of the parts of a text that can be encoded independently, if it has any."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smaller of two little-endian types that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


def read_tokenizer_facts(tokenizer_dir: Path) -> TokenizerFacts:
    """Return the facts of the tokenizer in a folder; ValueError if LitGPT could not use it."""
    paths = [tokenizer_dir / name for name in TOKENIZER_FILES]
    if not paths[0].is_file():
        raise FileNotFoundError(f"{paths[0]}: not found; name a folder that has it with --tokenizer_dir")
    return _read_facts(tokenizer_dir, *(sha256_file(path) if path.is_file() else "" for path in paths))


# cached by the files' digests: a run calls it four times, and reading 32,000 pieces takes 0.1 s
@functools.cache
def _read_facts(tokenizer_dir: Path, sha256: str, *_: str) -> TokenizerFacts:
    path, config_path, generation_path = (tokenizer_dir / name for name in TOKENIZER_FILES)
    spec, config, generation = read_json(path), read_json(config_path), read_json(generation_path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises bare Exception)
        raise ValueError(f"{path}: not a tokenizer ({error}); replace the file") from None
    if config_path.is_file() and not isinstance(config.get("tokenizer_class"), str):
        raise ValueError(f"{config_path}: no tokenizer_class, which LitGPT needs; add it")
    ids, size = {}, tokenizer.get_vocab_size()
    for key in ("bos", "eos"):  # as litgpt.Tokenizer chooses them
        token = config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        ids[key] = generation.get(f"{key}_token_id") if token is None else tokenizer.token_to_id(str(token))
        if type(ids[key]) is not int or not 0 <= ids[key] < size:
            way_out = f"{key}_token must name a piece of {path.name}"
            raise ValueError(f"{config_path}: no {key.upper()} id; {way_out}")
    special_pieces = tuple(token["content"] for token in spec.get("added_tokens", ()))
    bare, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    piece = None
    if can_split_at_spaces(spec) and whole in (bare, [ids["bos"], *bare], [ids["bos"], *bare, ids["eos"]]):
        piece = PIECE_OF_SPLIT if spec.get("pre_tokenizer") else PIECE
    return TokenizerFacts(tokenizer_dir, sha256, size, ids["bos"], ids["eos"], special_pieces, piece)


def can_split_at_spaces(spec: dict[str, Any]) -> bool:
    """Return whether encoding the parts of a text that PIECE finds one by one gives the same ids.

    True for Llama's tokenizer: spaces become "\u2581", and no merge makes a piece with "\u2581" after another
    character or with a newline in it, so no merge joins the two sides of such a place.
    """
    model = spec["model"]
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in NOT_PLAIN_BPE)
        and not (spec.get("truncation") or spec.get("padding"))
        and spec.get("normalizer") == json.loads(LLAMA_NORMALIZER.__getstate__())
        and spec.get("pre_tokenizer") in (None, json.loads(SPLIT_AT_SPACES.__getstate__()))
        # without byte pieces, adjacent unknown characters would become a single <unk>
        and bool(model.get("byte_fallback") and BYTE_PIECES.keys() <= model["vocab"].keys())
        and not any(SPACE in t["content"] or " " in t["content"] for t in spec.get("added_tokens", ()))
        and not any(SPACE in p.lstrip(SPACE) or ("\n" in p and p != "\n") for p in model["vocab"])
    )


class PieceCache(dict[str, bytes]):
    """Maps a part of a text that `TokenizerFacts.piece` finds to the bytes of its ids; most occur often."""

    def __init__(self, facts: TokenizerFacts, tokenizer: Tokenizer) -> None:
        # the bare BPE model takes half of the time of the whole tokenizer with its normalizer
        self.model, self.dtype = tokenizer.model, facts.dtype

    def __missing__(self, piece: str) -> bytes:
        ids = [token.id for token in self.model.tokenize(piece.replace(" ", SPACE))]
        packed = np.array(ids, self.dtype).tobytes()
        if len(piece) <= MAX_CACHED_CHARS:
            if len(self) >= MAX_CACHED_PIECES:
                self.clear()  # the frequent pieces are soon cached again
            self[piece] = packed
        return packed


class StoryEncoder:
    """Text -> ids exactly as litgpt.Tokenizer.encode(text, bos=True, eos=True), many times as fast.

    One difference: a text that itself ends with EOS keeps it, where LitGPT drops it.
    """

    def __init__(self, facts: TokenizerFacts) -> None:
        self.facts = facts
        self._bos, self._eos = (np.array([i], facts.dtype).tobytes() for i in (facts.bos_id, facts.eos_id))
        self._find_pieces = re.compile(facts.piece or "").findall
        self._tokenizer = Tokenizer.from_file(str(facts.folder / "tokenizer.json"))
        self.pieces = PieceCache(facts, self._tokenizer) if facts.piece else None

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        """Return the ids of one text, BOS first and EOS last."""
        return np.frombuffer(b"".join(self.pack([text])), self.facts.dtype).astype(np.int64)

    def pack(self, stories: list[str]) -> list[bytes]:
        """Return the ids of each story as the bytes of a shard."""
        if self.pieces is not None:
            return [self._pack_pieces(story, self.pieces) for story in stories]
        return [self._close(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(stories)]

    def _pack_pieces(self, text: str, cache: PieceCache) -> bytes:
        # the library separates special pieces from a text before it normalizes the other parts
        if not text or any(piece in text for piece in self.facts.special_pieces):
            return self._close(self._tokenizer.encode(text).ids)
        # as the normalizer does: a space is prepended, and "\u2581" counts as a space
        pieces = self._find_pieces(" " + (text.replace(SPACE, " ") if SPACE in text else text))
        return b"".join([self._bos, *map(cache.__getitem__, pieces), self._eos])

    def _close(self, ids: list[int]) -> bytes:
        bos, eos = self.facts.bos_id, self.facts.eos_id
        ids = ids if ids[:1] == [bos] else [bos, *ids]
        ids = ids if len(ids) > 1 and ids[-1] == eos else [*ids, eos]
        return np.array(ids, self.facts.dtype).tobytes()


def train_tokenizer(folder: Path, vocab_size: int, paths: list[Path], separator: str) -> None:
    """Train a Llama-style BPE on text files into `folder`; by byte fallback it encodes any text."""
    total = sum(path.stat().st_size for path in paths)
    every = 1 + total // MAX_TRAINING_BYTES  # every n-th story suffices to count pairs, and bounds memory
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
        # problems of the text are reported when it is tokenized
        readers = (TextReader(path, separator, "replace", is_quiet=True) for path in paths)
        stories = (story for reader in readers for some in reader.story_lists(progress) for story in some)
        tokenizer.train_from_iterator(itertools.islice(stories, 0, None, every), trainer)
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = None  # as in Llama's tokenizer, where only the merges decide
    # byte pieces are not special tokens: a text that spells "<0x41>" has these six characters
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 3]
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    config |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", TRAINED_BY_US: vocab_size}
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    write_json(folder / "tokenizer_config.json", config)
    write_whole(folder / "tokenizer.json", json.dumps(spec, ensure_ascii=False))


def ensure_tokenizer(settings: PrepareSettings, paths: list[Path]) -> TokenizerFacts:
    """Return the facts of the tokenizer in tokenizer_dir, trained or downloaded unless it is there."""
    folder, wanted = settings.tokenizer_dir, settings.train_tokenizer
    is_there = (folder / "tokenizer.json").is_file()
    if wanted is not None and (settings.overwrite or not is_there):
        note(f"training a tokenizer of {wanted:,} pieces into {folder}")
        train_tokenizer(folder, wanted, paths, settings.separator)
    elif wanted is not None and read_json(folder / "tokenizer_config.json").get(TRAINED_BY_US) != wanted:
        raise ValueError(
            f"{folder}: there is another tokenizer; --overwrite replaces it, --tokenizer_dir names another "
            "folder, and without --train_tokenizer it is used"
        )
    elif not is_there:
        note(f"{folder}: no tokenizer there")
        train = "train one on the text with prepare_data.py --train_tokenizer 4096"
        way_out = f"name a folder that has tokenizer.json with --tokenizer_dir, or {train}"
        for name in reversed(TOKENIZER_FILES):  # tokenizer.json last: a folder that has it counts as complete
            download(TOKENIZER_REPO, "model", name, folder, way_out)
    return read_tokenizer_facts(folder)


def find_tokenizer(data_dir: Path, tokenizer_dir: Path | None) -> Path:
    """Return the folder of the tokenizer that made the shards: `tokenizer_dir`, or one near `data_dir`."""
    wanted = read_manifest(data_dir, check_shards=False)["tokenizer"]["sha256"]
    if tokenizer_dir:
        path = tokenizer_dir / "tokenizer.json"
        if path.is_file() and sha256_file(path) == wanted:
            return tokenizer_dir
        what = "not the one" if path.is_file() else "not found, so not the one"
        raise ValueError(f"{path}: {what} that made {data_dir}; name that one's folder with --tokenizer_dir")
    beside = sorted(data_dir.parent.glob("*/tokenizer.json"))
    near = [folder / TOKENIZER_FOLDER / "tokenizer.json" for folder in (data_dir, data_dir.parent)]
    for path in [*near, *beside]:
        with contextlib.suppress(PermissionError):  # another user's folder
            if path.is_file() and sha256_file(path) == wanted:
                return path.parent
    missing = f"the tokenizer that made it is not in {near[0].parent}, nor in a folder beside {data_dir}"
    raise ValueError(f"{data_dir}: {missing}; name its folder with --tokenizer_dir")
