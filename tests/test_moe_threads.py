"""The experts shared out over threads: exact, even, and safe where something goes wrong."""

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from litgpt.model import LLaMAMoE
from test_moe_layers import pair, run
from test_moe_paths import WIDE

import moe_layers

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def threads(monkeypatch) -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, and lets them share experts however small."""
    monkeypatch.setattr(moe_layers, "LEAST_SHARED", 0)
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 1.0, 30.0], ids=["even", "uneven", "one expert has all"])
def test_experts_shared_out_over_threads_give_what_one_thread_gives(threads, dtype, shift, compiled) -> None:
    _, layer = pair(LLaMAMoE, dtype, n_expert=16, n_expert_per_token=2, **WIDE)
    x = torch.randn(4, 32, 64, dtype=dtype)
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
            torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_threads_take_over_the_mode_of_their_caller(threads, mode) -> None:
    _, layer = pair(LLaMAMoE, torch.float32, n_expert=16, n_expert_per_token=2, **WIDE)
    x = torch.randn(4, 32, 64)
    threads(1)
    expected = layer(x).detach()
    threads(2)
    with mode():
        torch.testing.assert_close(layer(x).detach(), expected)


def test_only_what_can_be_shared_evenly_is(threads, monkeypatch) -> None:
    threads(2)
    threads_of: dict[int, int] = {}

    def work(e: int) -> None:
        assert not torch.is_grad_enabled()
        threads_of[e] = torch.get_num_threads()

    matrix = torch.empty(2, 2)
    with torch.no_grad():
        moe_layers._share_out(work, [5, 100, 6, 5, 0], matrix)
        assert threads_of == {1: 2, 2: 2, 0: 1, 3: 1, 4: 1}
        monkeypatch.setattr(moe_layers, "LEAST_SHARED", 1000)
        moe_layers._share_out(work, [5, 5], matrix)
        assert threads_of[0] == threads_of[1] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="the experts are shared out with GCC's OpenMP")
def test_each_thread_does_its_part_alone_and_is_one_of_openmp_s_own(threads) -> None:
    threads(3)
    all_there, ids = threading.Barrier(3), set()

    def work(e: int) -> None:
        all_there.wait(timeout=60)  # breaks unless three threads are here at a time
        torch.ones(1 << 20).add_(1)  # a loop that torch shares out over threads
        ids.add(threading.get_native_id())

    torch.ones(1 << 20).add_(1)
    before = set(Path("/proc/self/task").iterdir())
    for _ in range(5):
        moe_layers._share_out(work, [5, 5, 5], torch.empty(2, 2))
    assert len(ids) == 3 and threading.get_native_id() in ids
    assert set(Path("/proc/self/task").iterdir()) == before
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("in_main", [True, False], ids=["in the caller's thread", "in another"])
def test_what_goes_wrong_in_a_thread_is_told(threads, capfd, error, in_main) -> None:
    threads(2)
    all_there = threading.Barrier(2)

    def work(e: int) -> None:
        all_there.wait(timeout=60)
        if in_main == (threading.current_thread() is threading.main_thread()):
            raise error(f"expert {e}")

    with pytest.raises(error, match="expert"):
        moe_layers._share_out(work, [5, 5], torch.empty(2, 2))
    assert torch.get_num_threads() == 2
    assert capfd.readouterr() == ("", "")


class ForeignOpenMP:
    """What an OpenMP looks like that is in the process, but not torch's."""

    def GOMP_parallel(self, *_: object) -> None:
        raise AssertionError("torch would begin threads in these threads")

    def omp_set_num_threads(self, n_threads: int) -> None:
        pass


@pytest.mark.parametrize("library", [ForeignOpenMP(), object()], ids=["not torch's", "of other names"])
def test_without_torch_s_openmp_one_expert_follows_the_other(threads, monkeypatch, library) -> None:
    threads(2)
    monkeypatch.setattr(moe_layers.ctypes, "CDLL", lambda _: library)
    moe_layers._openmp.cache_clear()
    try:
        done = []
        moe_layers._share_out(lambda e: done.append((e, torch.get_num_threads())), [5, 5], torch.empty(2, 2))
    finally:
        moe_layers._openmp.cache_clear()
    assert done == [(0, 2), (1, 2)]
