"""The loss that does the head's product itself: exact, in chunks, and what LitGPT's loop trains on."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_CONFIG
from litgpt.model import GPT
from litgpt.utils import chunked_cross_entropy

from litgpt_moe import loss as loss_module
from litgpt_moe.config import MoEConfig
from litgpt_moe.kernels import matmul
from litgpt_moe.loss import IGNORED_TOKEN, defer_head, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("eager")


def gradients(loss: torch.Tensor, *leaves: torch.Tensor) -> list[torch.Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss * 0.25, leaves)]  # as with four accumulated batches


@pytest.mark.parametrize("rows", [1, 4, 100], ids="chunks of {} rows".format)
@pytest.mark.parametrize("ignored", [0, 5, 21], ids="{} ignored".format)
def test_loss_and_gradients_are_those_of_pytorch(monkeypatch, rows: int, ignored: int) -> None:
    monkeypatch.setitem(loss_module.CHUNK_VALUES, "cpu", rows * 13)
    hidden = torch.randn(3, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 13, (3, 7))
    targets.view(-1)[:ignored] = IGNORED_TOKEN
    ours = gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    theirs = gradients(chunked_cross_entropy(hidden @ weight.t(), targets), hidden, weight)
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("target", [-1, -101, 13])
def test_a_target_outside_the_vocabulary_raises_as_in_pytorch(target: int) -> None:
    hidden, weight, targets = torch.randn(4, 5), torch.randn(13, 5), torch.tensor([3, target, 0, 12])
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        F.cross_entropy(hidden @ weight.t(), targets)
    with pytest.raises(RuntimeError, match=f"index {target} is out of bounds"):
        linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
def test_either_library_gives_pytorch_s_loss_and_the_least_likely_word_stays_finite(monkeypatch, library):
    monkeypatch.setattr(matmul, "_is_amd_with_avx512", lambda: library == "oneDNN")
    monkeypatch.setitem(loss_module.CHUNK_VALUES, "cpu", 16 * 50)
    hidden, weight = torch.randn(37, 24), torch.randn(50, 24)
    hidden[0], weight[7] = 20 * weight[3], -weight[3]  # word 7 is some 900 nats away: exp gives 0
    targets = torch.randint(0, 50, (37,))
    targets[0] = 7
    leaves = hidden.requires_grad_(True), weight.requires_grad_(True)
    ours = gradients(linear_cross_entropy(hidden, weight, targets), *leaves)
    theirs = gradients(F.cross_entropy(hidden.double() @ weight.double().t(), targets), *leaves)
    assert ours[0] > 5
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-4)


def test_in_bfloat16_the_loss_is_float32_and_chunks_are_added_up_exactly(monkeypatch) -> None:
    monkeypatch.setitem(loss_module.CHUNK_VALUES, "cpu", 4 * 100)  # 64 chunks
    hidden = torch.randn(256, 32, requires_grad=True)  # float32, as Fabric hands over a bf16 model's output
    weight = torch.randn(100, 32).bfloat16().requires_grad_(True)
    targets = torch.randint(0, 100, (256,))
    loss, *ours = gradients(linear_cross_entropy(hidden, weight, targets), hidden, weight)
    exact = hidden.bfloat16().double() @ weight.double().t()
    expected, *theirs = gradients(F.cross_entropy(exact, targets), hidden, weight)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert [grad.dtype for grad in ours] == [torch.float32, torch.bfloat16]
    for found, wanted in zip(ours, theirs, strict=True):
        assert (found - wanted).norm() <= 0.01 * wanted.norm()


def test_the_expected_gradient_of_the_loss_changes_nothing_but_the_rounding() -> None:
    leaves = [torch.randn(9, 5, dtype=torch.float64), torch.randn(13, 5, dtype=torch.float64)]
    leaves, targets = [leaf.requires_grad_() for leaf in leaves], torch.randint(0, 13, (9,))
    targets[2] = IGNORED_TOKEN
    plain = gradients(linear_cross_entropy(*leaves, targets), *leaves)
    for expected_grad in (0.25, 3.7):
        loss = linear_cross_entropy(*leaves, targets, None, torch.tensor(expected_grad))
        for found, expected in zip(gradients(loss, *leaves), plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)  # 3.7 is of float32


def test_in_float16_the_expected_gradient_keeps_the_gradients_of_unlikely_words() -> None:
    hidden, weight = torch.eye(8, 32), torch.zeros(100, 32)
    weight[:8, :8] = 20 * torch.eye(8)  # each other word has a probability of 2e-9
    targets, leaves = torch.arange(8), (hidden.requires_grad_(), weight.requires_grad_())
    _, _, exact = gradients(linear_cross_entropy(*leaves, targets), *leaves)

    def rounded(expected_grad: float | None) -> torch.Tensor:
        scale = None if expected_grad is None else torch.tensor(expected_grad)
        loss = linear_cross_entropy(*leaves, targets, torch.float16, scale)
        assert loss.isfinite()
        _, grad = torch.autograd.grad(loss * (expected_grad or 1.0), leaves)
        assert grad.dtype == torch.float32
        return grad[8:] / (expected_grad or 1.0)

    assert exact[8:, :8].all() and not rounded(None).any()
    torch.testing.assert_close(rounded(2.0**20), exact[8:] * 4, rtol=0.02, atol=0)
    # too high a scale shows in the gradient, as the scaler expects
    assert not rounded(2.0**50).isfinite().any()


def test_without_gradients_none_are_computed(monkeypatch) -> None:
    monkeypatch.setattr(loss_module, "_add_gradients", None)  # would be called
    hidden, weight, targets = torch.randn(4, 8), torch.randn(6, 8, requires_grad=True), torch.arange(4)
    with torch.no_grad():
        loss = linear_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ weight.t(), targets).detach())


def test_a_deferred_head_leaves_the_product_to_the_loss_and_gives_logits_when_asked() -> None:
    torch.manual_seed(0)
    model = GPT(MoEConfig(**TINY_CONFIG))
    words = torch.randint(0, model.config.vocab_size, (2, 9))
    logits, names = model(words), list(model.state_dict())
    head = defer_head(model)
    assert model(words).shape == (2, 9, model.config.n_embd)
    ours = linear_cross_entropy(model(words), head.weight, words)
    torch.testing.assert_close(ours, chunked_cross_entropy(logits, words))
    head.is_deferred = False
    torch.testing.assert_close(model(words), logits)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("key", [{"lm_head_bias": True}, {"final_logit_softcapping": 30.0}])
def test_a_head_with_more_to_do_is_left_alone(key: dict) -> None:
    model = GPT(MoEConfig(**{**TINY_CONFIG, **key}))
    assert defer_head(model) is None and type(model.lm_head) is torch.nn.Linear
