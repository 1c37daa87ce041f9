"""tools/plan.py prints what docs/gpu-memory.md and README.md show, and fits steps into cards."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, TINY_CONFIG

from litgpt_moe.hardware import card_bytes
from litgpt_moe.training.card_plan import SHOWN, Plan, Speed, Text, length_text, make_plan
from tools import plan

PAGE = (ROOT / "docs/gpu-memory.md").read_text(encoding="utf-8")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def demo() -> Plan:
    return make_plan(plan.MODELS[0], "bf16-true", "torch.optim.AdamW")


@pytest.mark.slow
def test_the_page_shows_what_the_tool_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([]) == 0
    assert capsys.readouterr().out in PAGE


def test_the_page_shows_the_demo_model_as_it_is(demo: Plan) -> None:
    for row in demo.peaks():
        assert f"| {' | '.join(row)} |" in PAGE
    assert f"- {demo.name}: {demo.steps[False][SHOWN]}\n" in PAGE
    fits = [row for row in map(cells, PAGE.splitlines()) if row[0] in plan.CARDS]
    assert [row[1] for row in fits] == [demo.fit(card_bytes(card)) for card in plan.CARDS]


def test_the_front_page_has_the_same_numbers() -> None:
    rows = [
        cells(line)
        for line in PAGE.splitlines()
        if line.startswith(("| Card |", "| 6 GB", "| 8 GB", "| 12 GB"))
    ]
    rows += [cells(line) for line in PAGE.splitlines() if line.startswith("| 24 GB")]
    head, *cards = rows
    assert [card[0] for card in cards] == plan.CARDS
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [cells(line)[-1] for line in front.splitlines() if line.startswith("| `configs/")]
    assert len(shown) == len(head) - 1 > 0
    for n, text in enumerate(shown, start=1):
        assert text == " / ".join(card[n].split(" ")[0] for card in cards)


def test_a_card_is_named_and_what_does_not_fit_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], demo: Plan
) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.dump(TINY_CONFIG), encoding="utf-8")
    flags = ["--model_config", str(path), "--optimizer", "bitsandbytes.optim.AdamW8bit"]
    assert plan.main(["--gpu", "RTX 3060", "--memory", "1GB", *flags]) == 0
    printed = capsys.readouterr().out
    # 1 GiB is left for CUDA and others
    assert "| RTX 3060 | 32 (32) |" in printed and "| 1GB | no |" in printed
    assert re.search(r"MoE-tiny: weights [\d.e-]+ \+ gradients", printed)
    peaks = {flag: {size: step.peak for size, step in steps.items()} for flag, steps in demo.steps.items()}
    between = (peaks[True][32] + peaks[False][32]) // 2
    assert re.fullmatch(r"(1|2|4|8|16) \(32\)", demo.fit(round(between * 1.05) + (1 << 30)))


def test_an_unknown_card_is_an_error_before_anything_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--gpu", "RTX 9999"]) == 2
    assert "'RTX 9999' is no card that is known here; give its memory, as in 12GB" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        plan.main(["--precision", "8"])


def test_the_time_is_told_on_a_card_of_known_speed(demo: Plan) -> None:
    text = Text(Path("data/mine"), 1_000_000, 2048)
    cost = demo.facts.flops_per_token
    speed = Speed("a card", 1e12, 0.5)
    (row,) = [
        cells(line) for line in length_text([demo], [speed], None, text).splitlines() if "MoE-4M" in line
    ]
    assert row[:4] == [demo.name, "4M", "4", f"{4e6 * cost / 5e11:.0f} s"]
    (row,) = [cells(line) for line in length_text([demo], [speed], 2, text).splitlines() if "MoE-4M" in line]
    assert float(row[2]) == pytest.approx(7200 * 5e11 / cost / 1e6, rel=0.05) and row[3] == "2.0 hours"
    # without a speed or a text: as many tokens as suit the model, and the work that they are
    (row,) = [cells(line) for line in length_text([demo], [], None, None).splitlines() if "MoE-4M" in line]
    assert row[1:3] == ["78.8M", f"{20 * demo.facts.total_params * cost / 1e15:,.0f} PFLOP"]


def test_a_share_of_the_peak_and_hours_are_above_zero(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main(["--hours", "0"]) == 2 and plan.main(["--mfu", "1.5"]) == 2
    told = capsys.readouterr().err
    assert "--hours is 0; choose a number above 0" in told and "--mfu is 1.5; choose" in told
    assert plan.main(["--data_dir", "nowhere"]) == 2
