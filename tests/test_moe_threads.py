"""The experts shared out over threads: exact, even, and safe where something goes wrong."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import ROOT
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
    where: dict[int, str] = {}

    def work(e: int) -> None:
        assert torch.get_num_threads() == (2 if threading.current_thread() is threading.main_thread() else 1)
        assert not torch.is_grad_enabled()
        time.sleep(0.01)  # or one thread takes all before the other wakes
        where[e] = threading.current_thread().name.rpartition("_")[0] or "main"

    matrix = torch.empty(2, 2)
    with torch.no_grad():
        moe_layers._share_out(work, [5, 100, 6, 5, 0], matrix)
        assert where == {1: "main", 2: "main", **dict.fromkeys((0, 3, 4), "experts")}
        monkeypatch.setattr(moe_layers, "LEAST_SHARED", 1000)
        moe_layers._share_out(work, [5, 5], matrix)
        assert where[0] == where[1] == "main"


@pytest.mark.parametrize(("most", "name"), [(16, "MainThread"), (17, "experts")])
def test_a_compiled_graph_s_large_products_are_done_by_all_threads(threads, monkeypatch, most, name) -> None:
    threads(2)
    monkeypatch.setattr(moe_layers, "MOST_SHARED", most)
    names = []
    monkeypatch.setattr(moe_layers, "matmul", lambda *_, **__: names.append(threading.current_thread().name))
    product = moe_layers._Product(*[torch.empty(2, 2)] * 3)
    moe_layers._multiply([[product], [product]], [4, 4], torch.empty(2, 2))
    assert [found.rpartition("_")[0] or found for found in names] == [name, name]


def test_what_goes_wrong_in_a_thread_is_told(threads) -> None:
    threads(2)

    def work(e: int) -> None:
        raise MemoryError(f"expert {e}")

    with pytest.raises(MemoryError, match="expert"):
        moe_layers._share_out(work, [5, 5], torch.empty(2, 2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    code = """if True:
        import os, torch, moe_layers
        torch.set_num_threads(2)
        moe_layers.LEAST_SHARED = 0
        done = []
        moe_layers._share_out(done.append, [1, 1], torch.empty(2, 2))
        if not (child := os.fork()):
            moe_layers._share_out(done.append, [1, 1], torch.empty(2, 2))
            os._exit(len(done))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
        """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
