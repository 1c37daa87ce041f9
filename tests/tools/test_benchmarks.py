"""The benchmarks and the script that runs them on a GPU: what they compare, write and refuse."""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_CONFIG

from tools.benchmarks import (
    data,
    generate,
    hf_blocks,
    layer,
    layer_variants,
    machine,
    serve,
    startup,
    train,
    train_contestants,
)

# --- train ----------------------------------------------------------------------------------------


def test_benchmark_train_compares_whole_steps_of_all(tmp_path: Path) -> None:
    model, out = tmp_path / "model.yaml", tmp_path / "figures.json"
    model.write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
    flags = ["--model_config", model, "--steps", 2, "--rounds", 1, "--compile", "off", "--out", out]
    flags += ["--override", "name=of-six", "n_expert=6"]
    assert train.main([str(flag) for flag in flags]) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    rates = figures["tokens_per_s"]
    assert rates.keys() - {"dense oneDNN"} == {"ours", "stock", "dense", "stock dense"}
    assert min(rates.values()) > 0 and figures["model"] == "of-six"
    # of medians, which are rounded apart
    assert figures["of_stock"] == pytest.approx(rates["ours"] / rates["stock"], rel=0.01)
    for shares in figures["share_of_step"].values():
        # which part is the longest is the machine's affair: the clock of a test measures its neighbours
        assert list(shares) == list(train_contestants.PARTS) and 0 < sum(shares.values()) < 1.01
        assert min(shares[part] for part in ("forward", "loss", "backward", "optimizer")) > 0


@pytest.mark.parametrize("text", ["n_expert", "n_expert=["])
def test_benchmark_train_tells_of_an_override_without_a_value(
    text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        train.main(["--override", text])
    assert capsys.readouterr().err == f"error: --override: {text} is no KEY=VALUE; write it as n_expert=8\n"


def test_figures_replace_no_file_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "lit_model.pth"
    weights.write_bytes(b"weights")
    for main, flag in ((train.main, "--out"), (layer.main, "--out"), (generate.main, "--out")):
        with pytest.raises(SystemExit) as ended:
            main([flag, str(weights)])
        assert ended.value.code == 2
        told = f"error: {flag}: {weights} exists and is no earlier result; name another file\n"
        assert capsys.readouterr().err == told
    assert weights.read_bytes() == b"weights"


def test_benchmark_train_names_a_missing_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main(["--model_config", str(tmp_path / "none.yaml")])
    assert "none.yaml: no such configuration file; name one that is there" in capsys.readouterr().err


def test_benchmark_generate_compares_all_with_the_tokens_of_stock(tmp_path: Path) -> None:
    model, out = tmp_path / "model.yaml", tmp_path / "figures.json"
    model.write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
    flags = ["--config", model, "--max_tokens", 6, "--rounds", 1, "--max_threads", 1, "--llama_env", ""]
    assert generate.main([str(flag) for flag in [*flags, "--out", out]]) == 0
    cases = json.loads(out.read_text(encoding="utf-8"))["cases"]
    assert [(case["threads"], case["batch"]) for case in cases] == [(1, 1), (1, 4)]
    for case in cases:
        assert {"stock float32", "torch float32", "native float32", "native int8"} <= case["figures"].keys()
        assert min(one["tokens_per_s"] for one in case["figures"].values()) > 0


@pytest.mark.slow
def test_benchmark_serve_counts_the_tokens_of_all_clients(chatterbox: Path, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    flags = ["--ckpt_dir", chatterbox, "--seconds", 1, "--max_tokens", 20, "--out", out]
    assert serve.main([str(flag) for flag in flags]) == 0
    clients = json.loads(out.read_text(encoding="utf-8"))["clients"]
    assert list(clients) == ["1", "4", "16"]
    assert all(one["requests"] >= int(n) and one["tokens_per_s"] > 0 for n, one in clients.items())


@pytest.mark.slow
def test_benchmark_startup_times_the_help_of_each_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert startup.main(["--help_only", "--rounds", "1"]) == 0
    seconds = json.loads(capsys.readouterr().out)["help_s"]
    assert {
        "run_train.py",
        "evaluate.py",
        "tools/report.py",
        "tools/benchmarks/data.py",
    } < seconds.keys() and min(seconds.values()) > 0


@pytest.mark.parametrize("tool", [data, generate, layer, startup, train])
@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("0", "--rounds: 0 is not a number of 1 or more"),
        ("-3", "--rounds: -3 is not a number of 1 or more"),
        ("9" * 30, f"--rounds: {'9' * 30} is not a number of 1 or more"),
        ("x", "--rounds is 'x'; it must be a whole number"),
    ],
)
def test_a_benchmark_refuses_a_count_that_is_none(
    tool: object, value: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        tool.main(["--rounds", value])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {told}\n"


# --- layer ------------------------------------------------------------------------------------------


def test_a_layer_that_computes_something_else_is_not_timed() -> None:
    expected = torch.randn(2, 32, 8)
    hf_blocks.check_output(expected * (1 + 1e-4), expected)
    few = expected.clone()
    few[0, :8] = 0  # other experts, for a tenth of the tokens
    hf_blocks.check_output(few, expected)
    for wrong in (expected * 1.01, torch.zeros_like(expected), expected * torch.nan):
        with pytest.raises(RuntimeError, match="differs from stock's by"):
            hf_blocks.check_output(wrong, expected)
    hf_blocks.check_output((expected * 1.01).bfloat16(), expected)


def test_ratios_are_medians_over_the_rounds() -> None:
    times = {"stock": [(2.0, 4.0), (2.0, 4.0)], "dense": [(1.0, 1.0), (1.0, 1.0)], "ours": [(1.0, 3.0)] * 2}
    ours = layer_variants.figures(times)["ours"]
    assert ours == {"forward_ms": 1000, "forward_backward_ms": 4000, "of_dense": 0.5, "of_stock": 1.5}


WORKER = """
import json, os, sys
print(json.dumps({"transformers": "5"}), flush=True)
for line in sys.stdin:
    if line == "greedy\\n":
        os.abort()  # as the kernel ends what takes all memory
    print(json.dumps("it has no such backend" if line == "odd\\n" else [1.0, 2.0]), flush=True)
"""


def test_the_block_after_one_that_ended_the_process_is_timed_all_the_same(tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER, encoding="utf-8")
    hf = layer_variants.HuggingFace.__new__(layer_variants.HuggingFace)
    hf._folder, hf._command = tempfile.TemporaryDirectory(), [sys.executable, str(script)]
    hf._start()
    assert hf.versions == {"transformers": "5"} and hf.step("plain") == (1.0, 2.0)
    with pytest.raises(RuntimeError, match="no such backend"):
        hf.step("odd")
    with pytest.raises(RuntimeError, match="the process ended with status"):
        hf.step("greedy")
    assert hf.step("plain") == (1.0, 2.0)
    hf.close()


# --- on a GPU -----------------------------------------------------------------------------------------------


def test_results_lie_in_one_folder_and_are_named_by_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.results_path("tools/some.py", "cpu") == Path("tools/results/some.json")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3 (PCIe)")
    assert machine.results_path("tools/some.py", "cuda:0") == Path(
        "tools/results/some_nvidia_h100_80gb_hbm3_pcie.json"
    )
