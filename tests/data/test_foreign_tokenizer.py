"""Tokenizers of other people's making: the ids are those of their own library, and the data carry them."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from helpers.data import error_of, make_text, stories_of, write_text
from litgpt import Tokenizer as LitTokenizer
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from litgpt_moe.data.batches import TokenStream
from litgpt_moe.data.prepare import prepare
from litgpt_moe.data.settings import DEFAULT_TOKENIZER_DIR, PrepareSettings
from litgpt_moe.data.tokenizer_folder import find_tokenizer
from litgpt_moe.files import read_json, write_json

TEXT = make_text(200)
# where tokenizers differ: numbers, spaces, breaks, contractions, scripts, accents apart from their letters
VARIED = [
    "I'll pay $1234567.89 on 2024-05-06, DON'T we?  Two  spaces,\ttabs\t\tand\n\n\nbreaks\n x",
    "caf\u00e9 cafe\u0301 na\u00efve \ufb01ne \u2460 \u00bd \uff21 \u4f60\u597d\uff0c "
    "\u0645\u0631\u062d\u0628\u0627 \u0928\u092e\u0938\u094d\u0924\u0947 \U0001f469\u200d\U0001f680",
    "def f(x):\r\n    return x**2  # <|im_start|>user </s> [SEP] <unk>\u00a0\u3000.",
    "x" * 3000 + " " + "=" * 500,
]
# of their tokenizer.json
LLAMA3_PARTS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN_PARTS = LLAMA3_PARTS.replace("{1,3}", "")


def byte_level(special: list[str], parts: str | None = None, **options: bool) -> Tokenizer:
    """A byte-level BPE as GPT-2's, or with the parts of text of Llama 3's or Qwen's."""
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if parts:
        split = pre_tokenizers.Split(Regex(parts), "isolated")
        of_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, of_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def gpt2(folder: Path) -> Tokenizer:
    """As on the hub: no BOS in tokenizer_config.json, the ids in generation_config.json."""
    tokenizer = byte_level(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"model_max_length": 1024})
    return tokenizer


def merges(folder: Path) -> Tokenizer:
    """vocab.json and merges.txt alone."""
    tokenizer = byte_level([])
    tokenizer.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    write_json(folder / "vocab.json", vocab | {"<|endoftext|>": len(vocab)})
    return tokenizer


def llama3(folder: Path) -> Tokenizer:
    """A template that adds BOS, and several ids that end a text."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tokenizer = byte_level(special, LLAMA3_PARTS, ignore_merges=True)
    first = tokenizer.token_to_id("<|begin_of_text|>")
    template = "<|begin_of_text|> $A"
    add_first = processors.TemplateProcessing(template, special_tokens=[(template[:17], first)])
    of_bytes = processors.ByteLevel(add_prefix_space=True, trim_offsets=False, use_regex=True)
    tokenizer.post_processor = processors.Sequence([of_bytes, add_first])
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "generation_config.json", {"bos_token_id": first, "eos_token_id": [first + 1, first + 2]}
    )
    return tokenizer


def qwen(folder: Path) -> Tokenizer:
    """BOS is null in tokenizer_config.json, and accents are put on their letters."""
    tokenizer = byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], QWEN_PARTS)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "tokenizer_class": "Qwen2Tokenizer"}
    write_json(folder / "tokenizer_config.json", config)
    return tokenizer


def word_piece(folder: Path) -> Tokenizer:
    """As BERT's: [CLS] and [SEP] around a text."""
    return bert(folder, lowercase=False)


def uncased(folder: Path) -> Tokenizer:
    """The same without capital letters and accents."""
    return bert(folder, lowercase=True)


def bert(folder: Path, lowercase: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def unigram(folder: Path) -> Tokenizer:
    """As T5's: EOS, but no BOS."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def sentence_pieces(folder: Path, **options: object) -> sentencepiece.SentencePieceProcessor:
    """A tokenizer.model alone."""
    prefix = folder / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_prefix=str(prefix), minloglevel=2, **options
    )
    (folder / "tokenizer.vocab").unlink()
    return sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")


@pytest.mark.parametrize("make", [gpt2, merges, llama3, qwen, word_piece, uncased, unigram])
def test_a_tokenizer_of_any_shape_gives_its_own_ids_and_goes_with_the_data(
    settings: PrepareSettings, tmp_path: Path, make: Callable[[Path], Tokenizer]
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    theirs = make(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_text(settings.data_dir / "val" / "b.txt", [*VARIED, *make_text(20, seed=1)])
    prepare(dataclasses.replace(settings, tokenizer_dir=folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before  # it is only read
    shutil.rmtree(folder)
    carried = find_tokenizer(settings.data_dir, None)
    assert carried == settings.data_dir / "tokenizer"
    tokenizer, stream = LitTokenizer(carried), TokenStream(settings.data_dir, "val")
    expected: list[int] = []
    for story in (story.replace("\r\n", "\n") for story in (*VARIED, *make_text(20, seed=1))):
        ids = theirs.encode(story, add_special_tokens=False).ids
        expected += [tokenizer.bos_id, *ids, tokenizer.eos_id]
        assert tokenizer.encode(story, bos=False, eos=False).tolist() in (ids, [tokenizer.bos_id, *ids])
    assert stream.read(0, len(stream)).tolist() == expected
    names = {llama3: "<|end_of_text|>", qwen: "<|im_end|>", unigram: "</s>"}
    names |= {word_piece: "[SEP]", uncased: "[SEP]"}
    assert read_json(carried / "tokenizer_config.json")["eos_token"] == names.get(make, "<|endoftext|>")
    if make is llama3:
        assert stories_of(settings.data_dir, carried, "val")[4:] == make_text(20, seed=1)


@pytest.mark.parametrize(
    "options",
    [
        {
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "vocab_size": 370,
            "remove_extra_whitespaces": False,
            "split_digits": True,
        },
        {"model_type": "bpe", "vocab_size": 120},
        {"model_type": "unigram", "vocab_size": 90, "hard_vocab_limit": False},
    ],
    ids=["llama", "bpe", "t5"],
)
def test_a_sentencepiece_model_is_converted_with_the_same_ids(
    settings: PrepareSettings, tmp_path: Path, options: dict[str, object]
) -> None:
    (tmp_path / "theirs").mkdir()
    theirs = sentence_pieces(tmp_path / "theirs", **options)
    stories = [*VARIED[:2], VARIED[3], *TEXT]
    write_text(settings.data_dir / "train" / "a.txt", stories)
    prepare(
        dataclasses.replace(
            settings,
            tokenizer_dir=DEFAULT_TOKENIZER_DIR,
            tokenizer=str(tmp_path / "theirs" / "tokenizer.model"),
        )
    )
    stream = TokenStream(settings.data_dir, "train")
    ids = [i for story in stories for i in (theirs.bos_id(), *theirs.encode(story), theirs.eos_id())]
    assert stream.read(0, len(stream)).tolist() == ids


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (
            {"README.md": ""},
            "no tokenizer there (needed is tokenizer.json, or tokenizer.model, or vocab.json with",
        ),
        ({"vocab.json": "{}"}, "vocab.json is there without merges.txt"),
        ({"tokenizer.model": "no model"}, "tokenizer.model: not a sentencepiece model"),
        ({"vocab.json": "[]", "merges.txt": ""}, "vocab.json: not a BPE vocabulary with its merges"),
        ({"vocab.json": '{"a": 0}', "merges.txt": ""}, "its files name no EOS token"),
        (
            {
                "vocab.json": "{}",
                "merges.txt": "",
                "tokenizer_config.json": '{"tokenizer_class": "Qwen2Tokenizer"}',
            },
            "Qwen2Tokenizer divides text in a way of its own",
        ),
    ],
)
def test_what_a_tokenizer_lacks_is_named_with_the_way_out(
    settings: PrepareSettings,
    tmp_path: Path,
    files: dict[str, str],
    sentence: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "theirs").mkdir()
    for name, content in files.items():
        (tmp_path / "theirs" / name).write_text(content, encoding="utf-8")
    status, line = error_of(capsys, "--data_dir", settings.data_dir, "--tokenizer", tmp_path / "theirs")
    assert status == 2 and sentence in line
    assert not list(settings.data_dir.rglob("*.json"))
    assert not list(settings.data_dir.glob(".tokenizer*"))


def test_a_tokenizer_of_one_s_own_in_the_data_directory_is_replaced_on_request_alone(
    settings: PrepareSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(settings.tokenizer_dir, settings.data_dir / "tokenizer")
    (tmp_path / "theirs").mkdir()
    gpt2(tmp_path / "theirs")
    flags = ("--data_dir", settings.data_dir, "--tokenizer", tmp_path / "theirs")
    status, line = error_of(capsys, *flags)
    assert status == 2 and "there is another tokenizer; --overwrite replaces it" in line
    wanted = dataclasses.replace(settings, tokenizer_dir=DEFAULT_TOKENIZER_DIR, tokenizer=str(flags[-1]))
    made = prepare(dataclasses.replace(wanted, overwrite=True))
    assert json.loads((settings.data_dir / "tokenizer/tokenizer.json").read_bytes())["model"]["type"] == "BPE"
    assert prepare(wanted) == made  # a copy is not another one
    status, line = error_of(capsys, *flags, "--train_tokenizer", 400)
    assert status == 2 and "train_tokenizer is given too; drop one" in line
    status, line = error_of(capsys, "--data_dir", settings.data_dir, "--tokenizer", "no where")
    assert status == 2 and "no where: no such folder or file, nor a hub id" in line
