"""Device, precision and memory: what is chosen by itself, and what is refused with one sentence."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from litgpt_moe import hardware
from litgpt_moe.hardware import pick_device, precision_dtype, training_device, will_compile


@pytest.fixture
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a GPU, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """A function that makes this a machine with two GPUs, with or without bf16."""

    def pretend(has_bf16: bool, capability: tuple[int, int] = (7, 5)) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)

    return pretend


@pytest.mark.usefixtures("no_cuda")
def test_without_a_gpu_auto_is_the_cpu_in_float32() -> None:
    assert pick_device("auto", "auto") == (torch.device("cpu"), torch.float32)
    assert pick_device("cpu", "bf16-true") == (torch.device("cpu"), torch.bfloat16)
    assert training_device("auto", "auto", 1, None) == ("32-true", 1)
    assert training_device("cpu", 2, 1, "bf16-true") == ("bf16-true", 2)


@pytest.mark.parametrize(
    ("device", "precision", "message"),
    [
        ("abacus", "auto", "--device abacus cannot be used here (torch knows no such device)"),
        ("meta", "auto", "--device meta cannot be used here (it computes nothing); choose cpu or auto"),
        ("cpu", "bf16", "--precision bf16 is unknown; choose auto, 32-true, bf16-true, 16-true"),
    ],
)
def test_a_device_that_cannot_be_used_is_named(device: str, precision: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        pick_device(device, precision)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_cuda")
@pytest.mark.parametrize(
    ("accelerator", "devices", "precision", "message"),
    [
        ("gpu", "auto", None, "accelerator is gpu but this torch sees no CUDA device; use accelerator: cpu"),
        ("cpu", "many", None, "devices is 'many'; choose auto (or -1, the same) or a number of 1 or more"),
        ("cpu", 0, None, "devices is 0; choose auto (or -1, the same) or a number of 1 or more"),
        (
            *("cpu", 1, "16-true"),
            "precision is '16-true'; did you mean bf16-true? "
            "Choose one of 32-true, bf16-true, bf16-mixed, 16-mixed",
        ),
        ("auto", 1, "16-mixed", "precision is 16-mixed, which is for CUDA; use bf16-mixed or 32-true"),
    ],
)
def test_a_run_is_refused_for_what_this_machine_lacks(
    accelerator: str, devices: int | str, precision: str | None, message: str
) -> None:
    with pytest.raises(ValueError) as caught:
        training_device(accelerator, devices, 1, precision)
    assert str(caught.value) == message


def test_a_run_takes_every_gpu_in_the_precision_that_it_has(
    two_gpus: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    two_gpus(True)
    assert training_device("auto", "auto", 1, None) == ("bf16-true", 2)
    with pytest.raises(ValueError, match="devices is 3 but this machine has 2"):
        training_device("cuda", 3, 1, None)
    assert training_device("auto", 1, 1, "16-mixed") == ("16-mixed", 1)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), "16-mixed"), ((7, 5), "16-mixed"), ((6, 1), "32-true")],
    ids=["V100", "T4 or RTX 20", "GTX 10"],
)
def test_a_gpu_without_bf16_trains_in_fp16_if_it_has_tensor_cores(
    capability: tuple[int, int],
    expected: str,
    two_gpus: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    two_gpus(False, capability)
    for precision in (None, "auto"):
        assert training_device("auto", -1, 1, precision) == (expected, 2)
        assert training_device("cpu", 1, 1, precision) == ("32-true", 1)
    for precision in ("bf16-mixed", "bf16-true"):
        with pytest.raises(
            ValueError, match=f"precision is {precision}, which this GPU lacks; use {expected}"
        ):
            training_device("auto", 1, 1, precision)
    assert training_device("auto", 1, 1, "32-true") == ("32-true", 1)
    # to use a model, whose weights would be in fp16, float32 is safe
    assert hardware.default_precision("cuda") == "32-true"


def test_the_dtype_of_each_precision() -> None:
    names = ("32-true", "bf16-true", "bf16-mixed", "16-mixed", "16-true")
    bf16, fp16 = torch.bfloat16, torch.float16
    assert [precision_dtype(name) for name in names] == [torch.float32, bf16, bf16, fp16, fp16]


def test_several_gpus_are_refused_on_windows(
    two_gpus: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_gpus(True)
    monkeypatch.setattr("sys.platform", "win32")
    assert training_device("auto", 1, 1, None) == ("bf16-true", 1)
    with pytest.raises(ValueError, match="several GPUs need NCCL, which Windows lacks"):
        training_device("auto", "auto", 1, None)


def test_a_model_is_compiled_where_triton_and_a_gpu_are(
    two_gpus: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    two_gpus(True)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    monkeypatch.setattr("shutil.which", lambda name: name if name == "clang" else None)
    assert will_compile("auto", "auto") == (True, "CUDA and Triton")
    if sys.platform == "linux":
        monkeypatch.setattr("shutil.which", lambda _: None)
        monkeypatch.delenv("CC", raising=False)
        assert will_compile("auto", "auto") == (
            False,
            "there is no C compiler, which Triton needs; install gcc",
        )
    assert will_compile("off", "auto") == (False, "compile: off")
    assert will_compile("auto", "cpu")[0] is False
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert will_compile("auto", "auto") == (False, "Triton is not installed (on Windows: triton-windows)")
    assert will_compile("on", "cpu") == (True, "compile: on")


# --- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "files", "limits"),
    [
        (
            "0::/a/b\n",
            {"a/b/memory.max": "max\n", "a/memory.max": "3000\n", "memory.max": "9000"},
            [3000, 9000],
        ),
        ("9:memory:/docker/x\n8:cpu:/\n", {"memory/memory.limit_in_bytes": "5000\n"}, [5000]),  # of version 1
        ("0::/../other\n", {}, []),
        ("", {}, []),
    ],
)
def test_the_memory_that_a_container_may_use_is_read(
    tmp_path: Path, groups: str, files: dict[str, str], limits: list[int]
) -> None:
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{k}": v for k, v in files.items()},
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert hardware.cgroup_limits(tmp_path) == limits


def test_a_container_s_limit_goes_before_the_machine_s_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "cgroup_limits", lambda: [])
    assert hardware.memory_bytes() > 100_000
    monkeypatch.setattr(hardware, "cgroup_limits", lambda: [100_000, 200_000])
    assert hardware.memory_bytes() == 100_000


def test_freed_memory_is_kept(faults_of_new_memory: Callable[[], int]) -> None:
    hardware.keep_freed_memory()
    assert faults_of_new_memory() < 100


@pytest.mark.usefixtures("no_cuda")
def test_peak_memory_grows_with_what_is_held() -> None:
    before = hardware.peak_memory_gb()
    held = torch.ones(int(before * 1e9) // 4 + 2**24)
    assert hardware.peak_memory_gb() >= held.nbytes / 1e9


def test_peak_flops_are_measured_where_no_maker_s_figure_is_known() -> None:
    assert hardware.peak_flops(torch.device("cpu"), "32-true") > 1e6


@pytest.mark.parametrize(
    ("text", "gib"),
    [
        ("12GB", 12),
        ("12", 12),
        ("7.5 gib", 7.5),
        ("RTX 3060", 12),
        ("nvidia GeForce rtx3060", 12),
        ("T4", 16),
    ],
)
def test_a_card_is_known_by_its_name_or_its_memory(text: str, gib: float) -> None:
    assert hardware.card_bytes(text) == gib * 2**30


@pytest.mark.parametrize("text", ["RTX 9999", "", "-5GB", "12TB", "1e9"])
def test_an_unknown_card_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="give its memory, as in 12GB"):
        hardware.card_bytes(text)


def test_a_step_fits_with_a_margin_alone() -> None:
    assert hardware.fits(4 << 30, 6 << 30)
    assert not hardware.fits(5 << 30, 6 << 30)


def test_the_peak_of_a_gpu_is_that_of_the_run_s_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    # NVIDIA's data sheet of the T4
    peaks = {torch.float32: 8.1e12, torch.float16: 65e12}
    monkeypatch.setattr(hardware, "get_available_flops", lambda _, dtype: peaks[dtype])
    device = torch.device("cuda")
    assert [hardware.peak_flops(device, name) for name in ("32-true", "16-mixed")] == [8.1e12, 65e12]
