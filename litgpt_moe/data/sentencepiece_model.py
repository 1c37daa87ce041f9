"""A sentencepiece `tokenizer.model` -> `tokenizer.json`, checked to give the same ids.

After the converters of the transformers library (convert_slow_tokenizer.py), which want a model's own class.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from litgpt_moe.cli import first_line
from litgpt_moe.data.tokenizer import SPACE

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType of sentencepiece_model.proto
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type
CHECKED_CHARS = 20_000  # of each story
EXAMPLES = [
    "Once upon a time,  there was a caf\u00e9.\n\nTom\u2019s \u732b 123",
    " a\tb ",
    "\u200b\U0001f600",
]


def convert(path: Path, stories: list[str]) -> tuple[str, dict[str, str]]:
    """Return the content of tokenizer.json and the special tokens by their names in tokenizer_config.json.

    ValueError if it is no such model, or if the tokenizers library gives other ids to one of the stories.
    """
    import sentencepiece  # not at the top: few need it, and a worker process would load it too
    from sentencepiece import sentencepiece_model_pb2  # likewise

    content, model = path.read_bytes(), sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(content)
        original = sentencepiece.SentencePieceProcessor(model_proto=content)
    except Exception as error:  # noqa: BLE001 (protobuf's DecodeError and sentencepiece's RuntimeError)
        raise ValueError(
            f"{path}: not a sentencepiece model ({first_line(error)}); replace the file"
        ) from None
    if model.trainer_spec.model_type not in (UNIGRAM, BPE) or not model.pieces:
        raise ValueError(f"{path}: a sentencepiece model of words or characters; use BPE or Unigram")
    tokenizer = _tokenizer_of(model)
    for text in [*EXAMPLES, *stories]:
        text = text[:CHECKED_CHARS]
        ids = original.encode(text)
        if (found := tokenizer.encode(text, add_special_tokens=False).ids) != ids:
            at = next((i for i, (a, b) in enumerate(zip(ids, found, strict=False)) if a != b), len(ids))
            pieces = original.decode(ids[max(0, at - 2) : at + 3])
            what = f"the tokenizers library gives other ids near {pieces!r}"
            raise ValueError(f"{path}: {what}; get this tokenizer's tokenizer.json instead")
    names = {"unk": model.trainer_spec.unk_id, "bos": original.bos_id(), "eos": original.eos_id()}
    tokens = {f"{key}_token": model.pieces[i].piece for key, i in names.items() if i >= 0}
    return tokenizer.to_str(), tokens


def _tokenizer_of(model: Any) -> Tokenizer:
    """Return the same tokenizer of the tokenizers library."""
    is_bpe, spec = model.trainer_spec.model_type == BPE, model.normalizer_spec
    options = {"byte_fallback": bool(model.trainer_spec.byte_fallback)}
    if is_bpe:
        vocab = {piece.piece: i for i, piece in enumerate(model.pieces)}
        unk = model.pieces[model.trainer_spec.unk_id].piece
        tokenizer = Tokenizer(models.BPE(vocab, _merges(model), unk_token=unk, fuse_unk=True, **options))
    else:
        scores = [(piece.piece, piece.score) for piece in model.pieces]
        tokenizer = Tokenizer(models.Unigram(scores, model.trainer_spec.unk_id, **options))
    kept = [AddedToken(p.piece, normalized=False) for p in model.pieces if p.type == USER_DEFINED]
    tokenizer.add_tokens(kept)
    special = [p.piece for p in model.pieces if p.type in (UNKNOWN, CONTROL)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    _set_spaces(tokenizer, spec)
    return tokenizer


def _set_spaces(tokenizer: Tokenizer, spec: Any) -> None:
    """Set the normalizer and the decoder: how spaces are written, and what else is changed."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    decoding: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
        decoding.append(decoders.Strip(" ", 1, 0))
    steps.append(normalizers.Replace(" ", SPACE))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(decoding)
    if isinstance(tokenizer.model, models.Unigram):
        # no piece crosses a space in Unigram models, as they are usually trained
        tokenizer.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")


def _merges(model: Any) -> list[tuple[str, str]]:
    """Return the merges of a BPE model, best first: the pair is joined whose joined piece scores best."""
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    ranks = {piece.piece: i for i, piece in enumerate(model.pieces)}
    merges = []
    for piece, score in scores.items():
        pairs = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += [
            (score, *pair) for pair in sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        ]
    return [(left, right) for _, left, right in sorted(merges, key=lambda merge: -merge[0])]
