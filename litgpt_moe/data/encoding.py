"""Stories -> token ids: those of LitGPT's tokenizer, many times as fast."""

import functools
import re
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from litgpt_moe.data.tokenizer import SPACE, TokenizerFacts

MAX_CACHED_PIECES = 100_000  # some 20 MB in each worker
MAX_CACHED_CHARS = 40  # a longer piece hardly comes twice


class PieceCache(dict[str, bytes]):
    """Maps a part of a text to the bytes of its ids; a part that is not there yet is encoded.

    A part is what `TokenizerFacts.piece` finds: mostly a word, and most words come again and again.
    """

    def __init__(self, facts: TokenizerFacts) -> None:
        # the bare BPE model takes half of the time of the whole tokenizer with its normalizer
        self.model = Tokenizer.from_file(str(facts.folder / "tokenizer.json")).model
        self.dtype = facts.dtype

    def __missing__(self, piece: str) -> bytes:
        ids = [token.id for token in self.model.tokenize(piece.replace(" ", SPACE))]
        packed = np.array(ids, self.dtype).tobytes()
        if len(piece) <= MAX_CACHED_CHARS:
            if len(self) >= MAX_CACHED_PIECES:
                self.clear()  # the frequent ones return after a moment
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
        self.pieces = PieceCache(facts) if facts.piece else None

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        # loaded when first used: a tokenizer with `pieces` needs it for special pieces only
        return Tokenizer.from_file(str(self.facts.folder / "tokenizer.json"))

    def encode(self, text: str) -> np.ndarray[Any, Any]:
        """Return the ids of one text, BOS first and EOS last."""
        return np.frombuffer(b"".join(self.pack([text])), self.facts.dtype).astype(np.int64)

    def pack(self, stories: list[str]) -> list[bytes]:
        """Return the ids of each story as the bytes of a shard."""
        if self.pieces is not None:
            return [self._pack_pieces(story, self.pieces) for story in stories]
        return [self._close(encoding.ids) for encoding in self._tokenizer.encode_batch_fast(stories)]

    def _pack_pieces(self, text: str, cache: PieceCache) -> bytes:
        # the library cuts special pieces out of a text before it normalizes the rest
        if not text or any(piece in text for piece in self.facts.special_pieces):
            return self._close(self._tokenizer.encode(text).ids)
        # as the normalizer does, prepend a space and take "\u2581" for one
        pieces = self._find_pieces(" " + (text.replace(SPACE, " ") if SPACE in text else text))
        return b"".join([self._bos, *map(cache.__getitem__, pieces), self._eos])

    def _close(self, ids: list[int]) -> bytes:
        bos, eos = self.facts.bos_id, self.facts.eos_id
        ids = ids if ids[:1] == [bos] else [bos, *ids]
        ids = ids if len(ids) > 1 and ids[-1] == eos else [*ids, eos]
        return np.array(ids, self.facts.dtype).tobytes()
