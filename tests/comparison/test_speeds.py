"""Speeds: which of those in the file count, which a comparison at equal seconds keeps, and what they say."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from litgpt_moe.comparison import compare as module
from litgpt_moe.comparison.contestants import gather
from litgpt_moe.comparison.facts import Facts
from litgpt_moe.comparison.runs import RunsFile, RunSpec
from litgpt_moe.comparison.settings import RESULTS, CompareSettings
from litgpt_moe.comparison.speed import known_speeds
from litgpt_moe.comparison.train import Trainer

SECONDS = {"budget": 1.0, "match": "seconds", "seeds": 1}


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a speed would be measured."""
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("it measures"))


def test_reused_speeds_are_said_to_be_reused(
    compare: Callable, put_speeds: Callable, no_measuring: None, capsys: pytest.CaptureFixture[str]
) -> None:
    put_speeds(compare(), [1000.0], [2000.0], load=0.04, time="2026-11-30T10:00:00+00:00", commit="abcdef123")
    compare(**SECONDS)
    told = capsys.readouterr().err
    assert "of 2026-11-30 at commit abcdef1, while other programs used 0.04 cores" in told
    assert "one like it, are reused; --measure_again measures anew" in told


def test_speeds_of_a_busy_machine_are_measured_again_for_a_budget_in_seconds(
    compare: Callable,
    put_speeds: Callable,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put_speeds(compare(), [1000.0], [2000.0], load=0.5)
    assert compare().speeds.load == 0.5  # for the verdict they do
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(pytest.fail.Exception, match="measured"):
        compare(**SECONDS)
    assert "0.5 cores, are not taken for a budget in seconds" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["compile", "activation_checkpointing", "devices", "accelerator"])
def test_speeds_with_another_way_of_computing_are_others(
    compare: Callable, put_speeds: Callable, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_speeds(compare(dense=False), [1000.0])
    path, value = (
        Path("train_config.yaml"),
        {"compile": "off", "accelerator": "auto", "devices": 1}.get(key, True),
    )
    text = [line for line in path.read_text().splitlines() if not line.startswith(f"{key}:")]
    path.write_text("\n".join([*text, f"{key}: {json.dumps(value)}"]))
    assert not compare(dense=False).speeds.rounds


def test_a_comparison_at_equal_seconds_keeps_the_speeds_it_began_with(
    compare: Callable, put_speeds: Callable, no_measuring: None, capsys: pytest.CaptureFixture[str]
) -> None:
    put_speeds(compare(), [1000.0], [2000.0])
    first = compare(**SECONDS)
    put_speeds(first, [3000.0], [4000.0], load=0.9)
    capsys.readouterr()
    again = compare(**SECONDS)
    assert "speeds.json of 20" in (told := capsys.readouterr().err) and "are kept; --measure_again" in told
    tokens = [[one.tokens(each) for each in one.contestants] for one in (first, again)]
    assert tokens[0] == tokens[1] == [768, 1792]
    # another folder begins anew, with the newest: measured on a busy machine, they do not count
    with pytest.raises(pytest.fail.Exception):
        compare(**SECONDS, out=Path("other"))


def test_speeds_that_lack_a_model_do_not_stay(
    compare: Callable, put_speeds: Callable, no_measuring: None, capsys: pytest.CaptureFixture[str]
) -> None:
    put_speeds(compare(), [1000.0], [2000.0])
    compare(**SECONDS)
    more = [("shared", {"n_shared_expert": "1"})]
    put_speeds(compare(variants=more), *([float(n)] for n in (1000, 2000, 3000, 4000)))
    capsys.readouterr()
    three = compare(**SECONDS, variants=more)
    assert "does not have all these models" in capsys.readouterr().err
    assert set(three.speeds.rounds) == {one.name for one in three.contestants}


def test_seconds_are_those_of_the_median_round_with_their_range(
    compare: Callable, put: Callable, put_speeds: Callable
) -> None:
    comparison = compare()
    for contestant, loss in zip(comparison.contestants, (3.0, 3.5), strict=True):
        for spec in comparison.specs(contestant):
            put(comparison, spec, loss)
    # the machine is slow for a while: by the two medians the first would be 1,500 / 900 times as fast
    put_speeds(comparison, [3000.0, 1500.0, 900.0], [1000.0, 500.0, 900.0])
    text = compare().write()
    (found,) = json.loads(Path("comparison/comparison.json").read_text())["verdicts"]
    tokens = found["factors"]["tokens"]
    # the first got to 3.5 half way over the logarithm between 1,024 and 2,048 tokens
    assert tokens == pytest.approx(2**0.5)
    assert found["factors"]["seconds"] == pytest.approx(3 * tokens)
    assert found["seconds_range"] == pytest.approx([tokens, 3 * tokens])
    assert f"{3 * tokens:.2f} ({tokens:.2f} to {3 * tokens:.2f}) times the seconds" in text


def test_seconds_that_were_not_measured_are_marked_and_give_no_factor(
    compare: Callable, put: Callable
) -> None:
    comparison = compare()
    for contestant, loss in zip(comparison.contestants, (3.0, 3.5), strict=True):
        for spec in comparison.specs(contestant):
            put(comparison, spec, loss)
    text = comparison.write()
    assert text.count("10 as run") == 2 and "times the FLOPs" in text and "times the seconds" not in text
    page = Path("comparison/comparison.html").read_text(encoding="utf-8")
    assert "10 as run" in page and "seconds, as run" in page


def test_the_committed_rows_are_found_by_the_commands_that_made_them(tmp_path: Path) -> None:
    settings = CompareSettings(data_dir=tmp_path, out=tmp_path / "out", dense=True)
    found = gather([ROOT / "configs/compare_moe.yaml"], settings, True, [8, 32], {}, [], 4096)
    file = RunsFile(RESULTS)
    row = next(row for row in file.rows() if row["kind"] == "speed")
    facts = Facts(row["data"], row["machine"], {}, "")
    for contestant, rate in zip(found, (0.008, 0.004, 0.004), strict=True):
        runs = [
            RunSpec(contestant, seed, contestant.whole_steps(4.45e6, "--budget"), rate) for seed in (42, 43)
        ]
        tokens = contestant.whole_steps(900_000, "--sweep_tokens")
        sweep = [RunSpec(contestant, 42, tokens, each, "sweep") for each in (0.001, 0.002, 0.004, 0.008)]
        for spec in (*runs, *sweep):
            assert file.find(spec.identity(facts.fingerprint), spec.kind) is not None, spec
    speeds = known_speeds(Trainer(settings, facts, file), found, is_for_budget=True)
    assert [len(rounds) for rounds in speeds.rounds.values()] >= [3, 3, 3]
