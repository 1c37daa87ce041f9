"""Matrix products by either CPU library, and the linear maps that use them."""

import pytest
import torch
from conftest import TINY_CONFIG
from litgpt.model import GPT

from litgpt_moe.config import MoEConfig
from litgpt_moe.kernels import matmul

pytestmark = pytest.mark.usefixtures("eager")


@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
def test_matmul_takes_any_strides_and_nothing_at_all(monkeypatch, library) -> None:
    monkeypatch.setattr(matmul, "_is_amd_with_avx512", lambda: library == "oneDNN")
    x, weight = torch.randn(13, 40), torch.randn(24, 40)
    expected = (x.double() @ weight.double().t()).float()
    out, wide = torch.empty(2, 13, 24), torch.empty(13, 24, dtype=torch.float64)
    matmul.matmul(x, weight.t(), out=out[1])
    matmul.matmul(x, weight.t(), out=wide)
    matmul.add_matmul(total := torch.ones(13, 24), x, weight.t())
    transposed = matmul.matmul(x.t().contiguous().t(), weight.t().contiguous())
    for found in (matmul.matmul(x, weight.t()), transposed, out[1], wide.float(), total - 1):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert matmul.matmul(x[:0], weight.t()).shape == (0, 24)
    assert torch.equal(matmul.matmul(x[:0].t(), weight.t()[:0]), torch.zeros(40, 24))


@pytest.mark.parametrize("library", ["oneDNN", "MKL"])
def test_a_model_of_fast_linear_maps_gives_the_same_logits_and_gradients(monkeypatch, library) -> None:
    monkeypatch.setattr(matmul, "_is_amd_with_avx512", lambda: library == "oneDNN")
    torch.manual_seed(0)
    model, words = GPT(MoEConfig(**TINY_CONFIG)), torch.randint(0, 10, (3, 16))

    def outcome() -> list[torch.Tensor]:
        model.zero_grad()
        logits = model(words)
        logits.log_softmax(-1)[..., 0].sum().backward()
        return [logits.detach(), model(words[:1, :3]).detach(), *(p.grad for p in model.parameters())]

    expected, names = outcome(), list(model.state_dict())
    matmul.use_fast_linear(model)
    calls = []
    product = matmul.matmul
    monkeypatch.setattr(matmul, "matmul", lambda *args, **kw: calls.append(1) or product(*args, **kw))
    layer = model.transformer.h[0].attn.qkv
    assert layer(torch.randn(2, 16, 16)).shape == (2, 16, layer.out_features)
    assert len(calls) == (library == "oneDNN")
    for found, wanted in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == names
    assert type(model.lm_head) is matmul.Linear
    model.float().double()(words)  # what oneDNN does not take goes the old way
    with torch.device("meta"):
        matmul.use_fast_linear(meta := GPT(model.config))
    assert meta(torch.zeros(2, 16, dtype=torch.int64, device="meta")).shape == (2, 16, 512)
