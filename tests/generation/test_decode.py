"""Decoding: the same tokens as LitGPT, with and without a cache, alone and in turns."""

from pathlib import Path

import pytest
import torch
from helpers.native import need_compiler
from tokenizers import Tokenizer as HFTokenizer

from litgpt_moe.generation.decode import Diverged, generate, lay_out_for_decoding
from litgpt_moe.generation.decoder import Decoder, TorchDecoder
from litgpt_moe.generation.native import NativeDecoder
from litgpt_moe.generation.settings import Sampling

GREEDY = Sampling(temperature=0.0)

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """One thread for the module's fixtures, too: two threads wait for each other on a busy machine."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Path) -> torch.nn.Module:
    from litgpt_moe.checkpoints.reader import load_model

    return load_model(tiny_checkpoint)


@pytest.fixture(params=["torch", "native"])
def decoder(request: pytest.FixtureRequest, model: torch.nn.Module) -> Decoder:
    if request.param == "torch":
        return TorchDecoder(model)
    need_compiler()
    return NativeDecoder(model)


@pytest.fixture(scope="module")
def prompt_ids(llama_style: HFTokenizer) -> list[int]:
    return [1, *llama_style.encode("Tom went to the park").ids]


def test_greedy_equals_litgpts_generate_token_for_token(
    decoder: Decoder, model: torch.nn.Module, tiny_checkpoint: Path, prompt_ids: list[int]
) -> None:
    from litgpt.config import Config
    from litgpt.generate.base import generate_fn
    from litgpt.model import GPT

    stock = GPT(Config.from_checkpoint(tiny_checkpoint)).eval()
    stock.load_state_dict(model.state_dict())
    stock.max_seq_length = len(prompt_ids) + 40
    stock.set_kv_cache(batch_size=1)
    steps = generate_fn(
        stock,
        torch.tensor(prompt_ids),
        stock.max_seq_length,
        temperature=0.0,
        include_prompt=False,
        include_eos=True,
    )
    assert list(generate(decoder, prompt_ids, 40, GREEDY)) == [int(token) for token in steps]


def test_greedy_equals_litgpt_llm_token_for_token(
    tiny_checkpoint: Path, decoder: Decoder, model: torch.nn.Module
) -> None:
    from litgpt import LLM
    from litgpt.tokenizer import Tokenizer

    # left alone, LitGPT computes in bfloat16 even on a CPU
    llm = LLM.load(str(tiny_checkpoint), distribute=None)
    llm.distribute(accelerator="cpu", precision="32-true")
    theirs = llm.generate("Tom had", max_new_tokens=30, temperature=0.0, return_as_token_ids=True)
    tokenizer = Tokenizer(tiny_checkpoint)
    ours = list(generate(decoder, tokenizer.encode("Tom had").tolist(), 30, GREEDY, tokenizer.eos_id))
    assert ours == theirs.tolist()


def test_cached_and_uncached_logits_agree(model: torch.nn.Module, prompt_ids: list[int]) -> None:
    uncached = model(torch.tensor([prompt_ids]))[0]
    model.set_kv_cache(1, max_seq_length=len(prompt_ids))
    steps = [
        model(torch.tensor([[token]]), torch.tensor([place]), input_pos_maxp1=place + 1)[0, 0]
        for place, token in enumerate(prompt_ids)
    ]
    model.clear_kv_cache()
    assert torch.allclose(torch.stack(steps), uncached, atol=1e-5)


def test_the_weights_layout_changes_neither_names_shapes_nor_logits(
    tiny_checkpoint: Path, decoder: Decoder, model: torch.nn.Module, prompt_ids: list[int]
) -> None:
    from litgpt_moe.checkpoints.reader import load_model

    other = load_model(tiny_checkpoint)
    lay_out_for_decoding(other)
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in model.state_dict().items())
    assert list(generate(TorchDecoder(other), prompt_ids, 40, GREEDY)) == list(
        generate(decoder, prompt_ids, 40, GREEDY)
    )
    ids = torch.tensor([prompt_ids])
    assert torch.allclose(other(ids), model(ids), atol=1e-5)


def test_the_same_seed_gives_the_same_tokens(
    decoder: Decoder, model: torch.nn.Module, prompt_ids: list[int]
) -> None:
    def drawn(seed: int) -> list[int]:
        return list(generate(decoder, prompt_ids, 20, generator=torch.Generator().manual_seed(seed)))

    assert drawn(1) == drawn(1) != drawn(2)


def test_iterators_that_take_turns_give_what_each_gives_alone(
    decoder: Decoder, model: torch.nn.Module, prompt_ids: list[int]
) -> None:
    prompts = [prompt_ids, prompt_ids[:3], [*prompt_ids, *prompt_ids]]
    alone = [list(generate(decoder, prompt, 20, GREEDY)) for prompt in prompts]
    in_turns = [generate(decoder, prompt, 20, GREEDY) for prompt in prompts]
    assert list(zip(*in_turns, strict=True)) == list(zip(*alone, strict=True))
    assert model.mask_cache is None


def test_a_penalty_without_bound_never_repeats_a_token(
    decoder: Decoder, model: torch.nn.Module, prompt_ids: list[int]
) -> None:
    # the penalised are divided to about 0 or multiplied far below it; most of the others are above
    settings = Sampling(temperature=0.0, repetition_penalty=1e9)
    ids = prompt_ids + list(generate(decoder, prompt_ids, 20, settings))
    assert len(set(ids[-20:])) == 20


def test_generating_leaves_the_callers_gradient_mode_alone(
    decoder: Decoder, model: torch.nn.Module, prompt_ids: list[int]
) -> None:
    steps = generate(decoder, prompt_ids, 5, GREEDY)
    next(steps)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    steps.close()
    assert model.mask_cache is None


def test_generating_stops_where_the_context_is_full(
    decoder: Decoder, model: torch.nn.Module, prompt_ids: list[int]
) -> None:
    assert len(list(generate(decoder, prompt_ids, 1000, GREEDY))) == 64 - len(prompt_ids)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_not_sampled(
    value: float,
    decoder: Decoder,
    model: torch.nn.Module,
    prompt_ids: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def diverge(hidden: torch.Tensor) -> torch.Tensor:
        return torch.full((*hidden.shape[:2], 512), value)

    monkeypatch.setattr(model.lm_head, "forward", diverge)
    decoder = TorchDecoder(model)
    with pytest.raises(Diverged, match="logits are NaN or infinite"):
        next(generate(decoder, prompt_ids, 5))
    assert model.mask_cache is None
