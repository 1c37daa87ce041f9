"""Text as it comes: pieces decoded by real tokenizers, written while the model goes on."""

import io
from pathlib import Path

import pytest
import torch
from conftest import ASSETS, SENTENCE, TINY_CONFIG
from lightning import Fabric
from litgpt.model import GPT
from litgpt.tokenizer import Tokenizer
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.config import MoEConfig
from litgpt_moe.generation.settings import Sampling
from litgpt_moe.generation.text import AsyncTokenStreamer, TextDecoder, tell_story

EMOJI = [0xF0, 0x9F, 0x98, 0x80]


@pytest.fixture(scope="module")
def byte_level() -> HFTokenizer:
    """A GPT-2-style tokenizer, whose pieces are parts of characters without saying so."""
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([SENTENCE] * 3, trainer)
    return tokenizer


def streamed(tokenizer: HFTokenizer, ids: list[int]) -> list[str]:
    decoder = TextDecoder(tokenizer)
    return [*(decoder.put(token_id) for token_id in ids), decoder.end()]


def byte_ids(*values: int) -> list[int]:
    return [3 + value for value in values]  # the tiny tokenizer's pieces <0x00> to <0xFF>


NASTY = {
    "emoji over four bytes": byte_ids(*EMOJI),
    "text after an emoji": [*byte_ids(*EMOJI), 300, 301],
    "an invalid byte after an emoji": [*byte_ids(*EMOJI, 0xFF), 300, 301],
    "half an emoji at the end": [300, *byte_ids(*EMOJI[:2])],
    "half an emoji before text": [*byte_ids(*EMOJI[:2]), 300],
    "special tokens inside an emoji": [*byte_ids(*EMOJI[:2]), 2, 1, *byte_ids(*EMOJI[2:])],
    "special tokens first": [1, 1, 2, 300],
    "ids beyond the vocabulary": [300, 5000, 301, 5000],
    "many invalid bytes": [*byte_ids(*[0xFF] * 40), 300],
    "nothing": [],
}


@pytest.mark.parametrize("name", NASTY)
def test_the_pieces_joined_are_the_decoding_of_the_whole(name: str, llama_style: HFTokenizer) -> None:
    assert "".join(streamed(llama_style, NASTY[name])) == llama_style.decode(NASTY[name])


@pytest.mark.parametrize(
    "text", ["  two  spaces ", " lead", "a\n\n b\n", "naïve 😀😀 日本", "\u2581x", "a \ufffd b", " "]
)
@pytest.mark.parametrize("style", ["llama_style", "byte_level"])
def test_any_text_comes_out_as_it_was_encoded(text: str, style: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(style)
    ids = tokenizer.encode(text).ids
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("style", ["llama_style", "byte_level"])
def test_random_tokens_decode_like_the_whole(style: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(style)
    draw = torch.Generator().manual_seed(0)
    for _ in range(300):
        ids = torch.randint(tokenizer.get_vocab_size() + 2, (40,), generator=draw).tolist()
        assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_real_stories_decode_like_the_whole() -> None:
    tokenizer = HFTokenizer.from_file(str(ASSETS / "tokenizer/tokenizer.json"))
    text = (ASSETS / "fairytales/val/stories.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text + " 😀 \t 日本語 \x00").ids
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_words_appear_at_once_and_characters_when_complete(byte_level: HFTokenizer) -> None:
    word, emoji = byte_level.encode("kite").ids, byte_level.encode("😀").ids
    assert streamed(byte_level, word)[0] != ""
    assert streamed(byte_level, emoji) == ["", "", "", "😀", ""]


@pytest.mark.parametrize("style", ["llama_style", "byte_level"])
def test_the_work_per_token_does_not_grow_with_the_text(style: str, request: pytest.FixtureRequest) -> None:
    class Counting:
        def __init__(self, tokenizer: HFTokenizer) -> None:
            self.tokenizer, self.decoded = tokenizer, 0

        def __getattr__(self, name: str) -> object:
            return getattr(self.tokenizer, name)

        def decode(self, ids: list[int]) -> str:
            self.decoded += len(ids)
            return self.tokenizer.decode(ids)

    tokenizer = request.getfixturevalue(style)
    words = tokenizer.encode(SENTENCE).ids * 50
    bad_byte = tokenizer.token_to_id("<0xFF>") or tokenizer.encode("😀").ids[0]
    for ids in (words, [bad_byte] * 1000):
        counting = Counting(tokenizer)
        streamed(counting, ids)
        assert counting.decoded <= 20 * len(ids)


def test_the_streamer_writes_everything_before_end_returns(llama_style: HFTokenizer) -> None:
    out = io.StringIO()
    streamer = AsyncTokenStreamer(llama_style, out)
    ids = [*llama_style.encode(SENTENCE).ids, *byte_ids(0xF0, 0x9F)]
    for token_id in ids:
        streamer.put(token_id)
    streamer.end()
    streamer.end()  # harmless
    assert out.getvalue() == llama_style.decode(ids)


def test_an_interrupted_streamer_still_writes_its_tail(llama_style: HFTokenizer) -> None:
    out = io.StringIO()
    with pytest.raises(KeyboardInterrupt), AsyncTokenStreamer(llama_style, out) as streamer:
        for token_id in llama_style.encode(SENTENCE).ids:
            streamer.put(token_id)
        raise KeyboardInterrupt
    assert out.getvalue() == SENTENCE


def test_an_error_of_the_thread_reaches_the_caller(llama_style: HFTokenizer) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), AsyncTokenStreamer(llama_style, Full()) as streamer:
        streamer.put(300)


# --- a story in the middle of training ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


def test_a_story_is_the_prompt_and_its_continuation(storyteller: Path, tokenizer: Tokenizer) -> None:
    model = load_model(storyteller).train()
    story = tell_story(model, tokenizer, "Lily", 60, Sampling(temperature=0.0), seed=1)
    assert story == SENTENCE
    assert not model.training and model.mask_cache is None


def test_a_story_depends_on_its_seed_alone(tiny_checkpoint: Path, tokenizer: Tokenizer) -> None:
    model, sampling = load_model(tiny_checkpoint), Sampling(temperature=0.7, top_p=0.9)
    before = torch.get_rng_state()
    first = tell_story(model, tokenizer, "Tom", 30, sampling, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(7)
    assert tell_story(model, tokenizer, "Tom", 30, sampling, seed=1) == first
    assert tell_story(model, tokenizer, "Tom", 30, sampling, seed=2) != first


def test_a_context_that_the_prompt_fills_leaves_the_prompt(
    tiny_checkpoint: Path, tokenizer: Tokenizer
) -> None:
    prompt = "Tom went " * 40
    assert tell_story(load_model(tiny_checkpoint), tokenizer, prompt, 30, Sampling(), seed=1) == prompt


def test_the_story_by_anothers_tokenizer_says_so(tokenizer: Tokenizer) -> None:
    model = GPT(MoEConfig(**{**TINY_CONFIG, "vocab_size": 8, "padded_vocab_size": 8}))
    story = tell_story(model, tokenizer, "Tom", 30, Sampling(), seed=1)
    assert story.startswith("(none: the tokenizer is not the model's (token ")


def test_the_story_of_a_diverged_model_says_so(tiny_checkpoint: Path, tokenizer: Tokenizer) -> None:
    model = load_model(tiny_checkpoint)
    model.transformer.ln_f.weight.data.fill_(3e38)  # a number, but its products overflow
    story = tell_story(model, tokenizer, "Tom", 30, Sampling(), seed=1)
    assert story == "(none: the model's logits are not finite)"


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_in_fabric_tells_a_story_and_trains_on(
    precision: str, tiny_checkpoint: Path, tokenizer: Tokenizer
) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    raw = load_model(tiny_checkpoint).requires_grad_(True)
    model = fabric.setup(raw)
    alone = tell_story(raw, tokenizer, "Tom", 20, Sampling(temperature=0.0), seed=1)
    story = tell_story(model, tokenizer, "Tom", 20, Sampling(temperature=0.0), seed=1)
    if precision == "32-true":
        assert story == alone
    assert story.startswith("Tom") and story != "Tom"
    model.train()
    fabric.backward(model(torch.tensor([[1, 2, 3]])).sum())
    assert raw.lm_head.weight.grad is not None
