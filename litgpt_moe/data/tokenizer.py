"""A tokenizer: the facts of it that shards depend on, and the ids it gives to stories."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from litgpt_moe.checkpoints.layout import TOKENIZER_FILES
from litgpt_moe.checkpoints.tokenizer_files import tokenizer_sha256
from litgpt_moe.cli import first_line
from litgpt_moe.files import read_json, sha256_file

MAX_CACHED_PIECES = 100_000  # about 20 MB in each worker
MAX_CACHED_CHARS = 40  # a longer piece hardly occurs twice
MAX_TRIED_CHARS = 2_000
MAX_GROWTH = 64  # times as long as a text a normalizer may make it; NFKC makes one character 18

SPACE = "\u2581"  # how Llama's tokenizer writes a space
LLAMA_NORMALIZER = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
SPLIT_AT_SPACES = pre_tokenizers.Split(SPACE, "merged_with_next")
BYTE_PIECES = {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}  # LitGPT's decoder expects these ids
UNKNOWN = ("<unk>", "[UNK]")  # the usual names of what stands for characters that a vocabulary lacks
NOT_PLAIN_BPE = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
# the parts of a text ("pre-tokens") that Llama's BPE encodes independently of each other:
# a word with the spaces before it, spaces that no word follows, or a newline
PIECE = r" *[^ \n]+| +|\n"
# the same for a tokenizer with SPLIT_AT_SPACES, which separates all but the last of several spaces
PIECE_OF_SPLIT = r" ?[^ \n]+| |\n"


@dataclass(frozen=True)
class TokenizerFacts:
    """The facts of a tokenizer on which shards depend, and those that an encoder needs."""

    folder: Path
    sha256: str
    """Digest of tokenizer.json without truncation and padding."""
    file_sha256: str
    """Digest of tokenizer.json as it is, which earlier versions recorded."""
    vocab_size: int
    """The highest id and one."""
    bos_id: int
    eos_id: int
    special_pieces: tuple[str, ...]
    piece: str | None
    """Regular expression of a text's parts that can be encoded independently (pre-tokens); None if unsafe."""

    def made(self, recorded: dict[str, Any]) -> bool:
        """Return whether this tokenizer is the one of a manifest's entry."""
        ids = ("vocab_size", "bos_id", "eos_id")
        is_same = recorded["sha256"] in (self.sha256, self.file_sha256)
        return is_same and all(recorded[key] == getattr(self, key) for key in ids)

    def record(self, data_dir: Path) -> dict[str, Any]:
        """Return the manifest's entry of this tokenizer; its folder is relative to the data directory."""
        entry = {key: getattr(self, key) for key in ("sha256", "vocab_size", "bos_id", "eos_id")}
        with contextlib.suppress(ValueError):  # on another drive of Windows, or a name that is not UTF-8
            folder = Path(os.path.relpath(self.folder.resolve(), data_dir.resolve())).as_posix()
            folder.encode("utf-8")
            entry["folder"] = folder
        return entry

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smaller of two little-endian types that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")


@contextlib.contextmanager
def as_value_error(path: Path, what: str, way_out: str) -> Iterator[None]:
    """Raise ValueError with a sentence on the tokenizer in `path` if the tokenizers library fails."""
    try:
        yield
    except BaseException as error:
        # the library raises bare Exception, and a panic of its Rust code is no Exception at all
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{path}: {what} ({first_line(error)}); {way_out}") from None
        raise


def load_for_encoding(content: bytes, path: Path) -> Tokenizer:
    """Return the tokenizer of a tokenizer.json, which cuts and pads no text; ValueError if it is damaged."""
    with as_value_error(path, "not a tokenizer", "replace the file"):
        # not from_file, which takes no path with bytes that are not UTF-8
        tokenizer = Tokenizer.from_str(content.decode("utf-8"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def read_tokenizer_facts(tokenizer_dir: Path) -> TokenizerFacts:
    """Return the facts of the tokenizer in a folder; ValueError if LitGPT could not use it."""
    paths = [tokenizer_dir / name for name in TOKENIZER_FILES]
    if not paths[0].is_file():
        raise FileNotFoundError(f"{paths[0]}: not found; name a folder that has it with --tokenizer_dir")
    return _read_facts(tokenizer_dir, *(sha256_file(path) if path.is_file() else "" for path in paths))


# cached by the files' digests: a run calls it four times, and reading 32,000 pieces takes 0.1 s
@functools.cache
def _read_facts(tokenizer_dir: Path, *_: str) -> TokenizerFacts:
    path, config_path, generation_path = (tokenizer_dir / name for name in TOKENIZER_FILES)
    spec, config, generation = read_json(path), read_json(config_path), read_json(generation_path)
    tokenizer = load_for_encoding(content := path.read_bytes(), path)
    ids = {}
    size = 1 + max(tokenizer.get_vocab().values(), default=-1)  # more than there are if ids are left out
    for key in ("bos", "eos"):  # as litgpt.Tokenizer chooses them
        token = config.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        ids[key] = generation.get(f"{key}_token_id") if token is None else tokenizer.token_to_id(str(token))
        if type(ids[key]) is not int or not 0 <= ids[key] < size:
            way_out = f"{key}_token must name a piece of {path.name}"
            raise ValueError(f"{config_path}: no {key.upper()} id; {way_out}")
    check_normalizer(spec, path)
    special_pieces = tuple(token["content"] for token in spec.get("added_tokens", ()))
    with as_value_error(path, "it fails on the text 'a'", "replace the file"):
        bare, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    piece = None
    if can_split_at_spaces(spec) and whole in (bare, [ids["bos"], *bare], [ids["bos"], *bare, ids["eos"]]):
        piece = PIECE_OF_SPLIT if spec.get("pre_tokenizer") else PIECE
    digests = (tokenizer_sha256(content), hashlib.sha256(content).hexdigest())
    return TokenizerFacts(tokenizer_dir, *digests, size, ids["bos"], ids["eos"], special_pieces, piece)


def check_normalizer(spec: dict[str, Any], path: Path) -> None:
    """Raise ValueError if the normalizer makes a text many times as long: a story would fill the memory."""
    parts, text = [spec.get("normalizer")], "".join(map(chr, range(32, 127)))
    limit = MAX_GROWTH * len(text)
    while parts:
        part = parts.pop(0) or {}
        parts[:0] = part.get("normalizers", [])
        added = part.get("content") or part.get("prepend") or ""
        if part and "normalizers" not in part and len(added) <= MAX_GROWTH:
            # one step alone, so that what it adds to the text is limited
            step = {"normalizer": part, "model": {"type": "BPE", "vocab": {}, "merges": []}}
            normalizer = load_for_encoding(json.dumps(step).encode(), path).normalizer
            with as_value_error(path, "its normalizer fails", "replace the file"):
                text = normalizer.normalize_str(text + (part.get("pattern") or {}).get("String", ""))
        if len(text) > limit or len(added) > MAX_GROWTH:
            makes = f"its normalizer makes a text over {MAX_GROWTH} times as long"
            raise ValueError(f"{path}: {makes}; use another tokenizer")


def can_split_at_spaces(spec: dict[str, Any]) -> bool:
    """Return whether a text's parts, as PIECE finds them, can be encoded one by one with the same result.

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
        self._path = facts.folder / "tokenizer.json"
        if tokenizer_sha256(content := self._path.read_bytes()) != facts.sha256:
            raise ValueError(f"{self._path}: replaced while it was in use; run again when it stays as it is")
        self._tokenizer = load_for_encoding(content, self._path)
        self.pieces = PieceCache(facts, self._tokenizer) if facts.piece else None
        added = self._tokenizer.get_added_tokens_decoder().items()
        unknown = (getattr(self._tokenizer.model, "unk_token", None), *UNKNOWN)  # stands for other characters
        self._special = {i: t.content for i, t in added if t.special and t.content not in unknown}
        # those that every story gets at its ends
        self._own_special = Counter(i for i in self.encode("a").tolist() if i in self._special)

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        """Return the ids of one text, BOS first and EOS last."""
        return np.frombuffer(b"".join(self.pack([text])), self.facts.dtype).astype(np.int64)

    def pack(self, stories: list[str]) -> list[bytes]:
        """Return the ids of each story as the bytes of a shard."""
        if self.pieces is not None:
            return [self._pack_pieces(story, self.pieces) for story in stories]
        with as_value_error(self._path, "it fails on a story", "use another tokenizer"):
            return [self._close(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(stories)]

    def special_in(self, packed: bytes, n_stories: int) -> Counter[str]:
        """Return how often each special token stands in the text of stories that `pack` has packed."""
        ids = np.frombuffer(packed, self.facts.dtype)
        found, counts = np.unique(ids[np.isin(ids, list(self._special))], return_counts=True)
        extra = Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))
        extra.subtract({i: n * n_stories for i, n in self._own_special.items()})
        return Counter({self._special[i]: n for i, n in extra.items() if n > 0})

    def changed(self, stories: list[str]) -> str | None:
        """Return an example of text that does not come back as it was when decoded, None without one."""
        for story in stories:
            story, back = story[:MAX_TRIED_CHARS].strip(), ""
            with as_value_error(self._path, "it fails on a story", "use another tokenizer"):
                back = self._tokenizer.decode(self.encode(story).tolist()).strip()
            if back != story and not any(piece in story for piece in self.facts.special_pieces):
                pairs = enumerate(zip(story, back, strict=False))
                at = max(0, next((i for i, (a, b) in pairs if a != b), min(len(story), len(back))) - 10)
                was, now = story[at : at + 30], back[at : at + 30]
                return f"changes texts ({was!r} comes back as {now!r}); bytes are counted as they were"
        return None

    def _pack_pieces(self, text: str, cache: PieceCache) -> bytes:
        # the library separates special pieces from a text before it normalizes the other parts
        if not text or any(piece in text for piece in self.facts.special_pieces):
            with as_value_error(self._path, "it fails on a story", "use another tokenizer"):
                return self._close(self._tokenizer.encode(text).ids)
        # as the normalizer does: a space is prepended, and "\u2581" counts as a space
        pieces = self._find_pieces(" " + (text.replace(SPACE, " ") if SPACE in text else text))
        return b"".join([self._bos, *map(cache.__getitem__, pieces), self._eos])

    def _close(self, ids: list[int]) -> bytes:
        bos, eos = self.facts.bos_id, self.facts.eos_id
        ids = ids if ids[:1] == [bos] else [bos, *ids]
        ids = ids if len(ids) > 1 and ids[-1] == eos else [*ids, eos]
        return np.array(ids, self.facts.dtype).tobytes()
