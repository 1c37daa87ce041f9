"""Experts in several threads: the same results, the caller's modes, and errors that reach the caller."""

import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.layers import pair, run
from litgpt.model import LLaMAMoE

from litgpt_moe.kernels.cpu import for_each_expert

pytestmark = pytest.mark.usefixtures("eager")

# 2**22 multiplications an expert: just enough for threads of their own
LARGE = {"n_expert": 4, "n_expert_per_token": 2, "n_embd": 256, "moe_intermediate_size": 128}
MATRIX = torch.empty(2048, 2048)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0], ids=["even", "uneven", "one expert has all"])
def test_experts_in_several_threads_give_what_one_thread_gives(threads, dtype, shift, compiled) -> None:
    _, layer = pair(LLaMAMoE, dtype, **LARGE)
    x = torch.randn(4, 128, 256, dtype=dtype)
    x[..., 0] = 1
    with torch.no_grad():
        layer.gate.weight[3, 0] += shift
    if compiled:
        torch.compiler.set_stance("default")
        torch._dynamo.reset()
        layer = torch.compile(layer, backend="aot_eager", fullgraph=True)
    threads(1)
    expected = run(layer, x)
    for n_threads in (2, 3):
        threads(n_threads)
        found = run(layer, x)
        assert torch.get_num_threads() == n_threads
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_take_over_the_mode_of_their_caller(threads, mode) -> None:
    _, layer = pair(LLaMAMoE, torch.float32, **LARGE)
    x = torch.randn(4, 128, 256)
    threads(1)
    expected = layer(x).detach()
    threads(2)
    with mode():
        torch.testing.assert_close(layer(x).detach(), expected, rtol=1e-5, atol=1e-5)


def test_each_thread_runs_its_expert_alone(threads) -> None:
    threads(3)
    all_there, seen = threading.Barrier(3), []

    def run_expert(e: int) -> None:
        all_there.wait(timeout=60)  # breaks unless three threads are here at a time
        seen.append((threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))

    for _ in range(5):
        for_each_expert(run_expert, [5, 5, 5], MATRIX)
    assert len(seen) == 15
    assert {(n_threads, has_grad) for _, n_threads, has_grad in seen} == {(1, False)}
    # the caller and the same two others, at each call
    assert threading.get_ident() in {ident for ident, _, _ in seen}
    assert len({ident for ident, _, _ in seen}) == 3
    assert torch.get_num_threads() == 3
    found = []  # a thread that begins now has all of torch's threads too
    late = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert found == [3]


@pytest.mark.parametrize(
    ("sizes", "matrix"),
    [([5, 100, 6, 5, 0], MATRIX), ([5, 5], torch.empty(2, 2)), ([0, 0], MATRIX)],
    ids=["one has nearly all", "little to do", "nothing to do"],
)
def test_what_cannot_be_shared_evenly_is_done_one_after_another_by_all_threads(
    threads, sizes, matrix
) -> None:
    threads(2)
    seen = {}

    def run_expert(e: int) -> None:
        seen[e] = threading.get_ident(), torch.get_num_threads()

    for_each_expert(run_expert, sizes, matrix)
    assert seen == dict.fromkeys(range(len(sizes)), (threading.get_ident(), 2))


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_an_error_in_a_thread_reaches_the_caller(threads, capfd, error) -> None:
    threads(2)
    all_there = threading.Barrier(2)

    def run_expert(e: int) -> None:
        all_there.wait(timeout=60)
        if e == 1:
            raise error(f"expert {e}")

    with pytest.raises(error, match="expert 1"):
        for_each_expert(run_expert, [5, 5], MATRIX)
    assert torch.get_num_threads() == 2
    assert capfd.readouterr() == ("", "")
