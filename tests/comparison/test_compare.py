"""A comparison makes each run once, records it, goes on where it stopped, and says what the rows say."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY_CONFIG

from litgpt_moe.comparison.identity import USUAL, is_same
from litgpt_moe.comparison.processes import Outcome
from litgpt_moe.comparison.runs import RunsFile
from litgpt_moe.comparison.train import curve
from litgpt_moe.config import MoEConfig, model_facts
from tools import compare as tool


def rows() -> list[dict]:
    return [json.loads(line) for line in Path("runs.jsonl").read_text(encoding="utf-8").splitlines()]


def result() -> dict:
    return json.loads(Path("comparison/comparison.json").read_text(encoding="utf-8"))


def test_each_run_is_trained_scored_and_recorded_once(compare: Callable, starts: Callable) -> None:
    text = compare().run()
    assert len(starts.commands) == len(rows()) == 4
    moe, twin = result()["models"]
    assert (moe["reference"], twin["reference"]) == (twin["name"], None)
    assert moe["flops_per_token"] == model_facts(MoEConfig(**TINY_CONFIG)).flops_per_token
    assert [row["seed"] for row in rows()] == [42, 42, 43, 43]
    for model in (moe, twin):
        own = [row for row in rows() if row["name"] == model["name"]]
        assert model["loss"]["mean"] == pytest.approx(sum(row["loss"] for row in own) / 2)
        assert (model["tokens"], model["flops"]) == (2048, 2048 * model["flops_per_token"])
        assert [point[:2] for point in own[0]["curve"]] == [[2, 512], [4, 1024], [6, 1536], [8, 2048]]
        # the whole split, by both; windows of the validation during training are of whole sequences alone
        assert own[0]["curve"][-1][3] == pytest.approx(own[0]["loss"], abs=0.05)
    (verdict,) = result()["verdicts"]
    pairs = [
        next(row["loss"] for row in rows() if (row["name"], row["seed"]) == (model["name"], seed))
        for seed in (42, 43)
        for model in (moe, twin)
    ]
    assert verdict["loss"]["mean"] == pytest.approx((pairs[0] - pairs[1] + pairs[2] - pairs[3]) / 2)
    assert verdict["text"] in text
    compare().run()
    assert len(starts.commands) == 4


def test_the_two_see_the_same_batches_in_the_same_order(compare: Callable, starts: Callable) -> None:
    compare(seeds=1).run()
    seeds = [command[command.index("--seed") + 1] for command in starts.commands]
    assert seeds == ["42", "42"]


@pytest.mark.parametrize("keep", [False, True])
def test_checkpoints_are_deleted_unless_they_are_to_be_kept(compare: Callable, keep: bool) -> None:
    compare(seeds=1, keep=keep, dense=False).run()
    (run,) = Path("comparison/runs").iterdir()
    assert (run / "final/lit_model.pth").is_file() is keep
    assert not list(run.glob("step-*"))
    assert (run / "logs/csv/metrics.csv").is_file()


def test_after_an_interruption_only_what_is_missing_is_made(compare: Callable, starts: Callable) -> None:
    def stop() -> Outcome:
        raise KeyboardInterrupt

    starts.acts[2] = stop
    with pytest.raises(KeyboardInterrupt):
        compare().run()
    assert len(rows()) == 1 and result()["missing"] == 3
    compare().run()
    assert len(starts.commands) == 5 and len(rows()) == 4
    assert starts.commands[1] == starts.commands[2]
    assert result()["missing"] == 0


def test_a_run_that_was_asked_to_end_leaves_no_row(compare: Callable, starts: Callable) -> None:
    # run_train.py saves and ends with status 0, without final/
    starts.acts[1] = lambda: Outcome(0, "", None)
    with pytest.raises(KeyboardInterrupt):
        compare().run()
    assert not Path("runs.jsonl").exists()


def test_another_rate_seed_budget_or_setting_is_another_run(compare: Callable, starts: Callable) -> None:
    one = {"seeds": 1, "dense": False}
    compare(**one).run()
    compare(**one, rate=0.02).run()
    compare(**one, first_seed=7).run()
    compare(**one, budget=4 * 256).run()
    compare(**one, variants=[("no balance", {"moe.aux_loss_coef": "0.5"})]).run()
    assert [row["lr"] for row in rows()] == [0.01, 0.02, 0.01, 0.01, 0.01]
    assert rows()[-1]["name"] == "MoE-tiny no balance"
    assert rows()[-1]["settings"]["moe.aux_loss_coef"] == 0.5


def test_a_variant_of_the_model_is_compared_with_the_first(compare: Callable) -> None:
    compare(seeds=1, dense=False, variants=[("shared", {"n_shared_expert": "1"})]).run()
    first, second = result()["models"]
    assert second["reference"] == first["name"] == "MoE-tiny"
    assert second["total_params"] - first["total_params"] == 2 * 3 * 16 * 8


def test_siblings_with_more_experts_share_one_twin(compare: Callable) -> None:
    found = compare(experts=(4, 8)).contestants
    assert [contestant.config.n_expert for contestant in found] == [4, 8, 0]
    assert [contestant.reference for contestant in found] == [found[2].name, found[2].name, None]
    assert len({contestant.model_file for contestant in found}) == 3


def test_data_that_change_meanwhile_leave_no_row(
    compare: Callable, starts: Callable, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = compare(seeds=1, dense=False)
    data = {**comparison.trainer.facts.data, "fingerprint": "of what was there before"}
    facts = dataclasses.replace(comparison.trainer.facts, data=data)
    comparison.trainer = dataclasses.replace(comparison.trainer, facts=facts)
    with pytest.raises(ValueError, match="has changed since this began"):
        comparison.run()
    assert not Path("runs.jsonl").exists()


def test_equal_flops_are_equal_to_a_step(compare: Callable) -> None:
    flops = 6 * 256 * model_facts(MoEConfig(**TINY_CONFIG)).flops_per_token
    comparison = compare(budget=flops, match="flops", seeds=1)
    moe, twin = comparison.contestants
    assert comparison.tokens(moe) == 6 * 256
    assert comparison.tokens(twin) == flops // twin.facts.flops_per_token // 256 * 256
    of_first = compare(budget=None, budget_of_first=6 * 256, match="flops", seeds=1)
    assert of_first.tokens(moe) == 6 * 256


def test_equal_seconds_are_those_measured_side_by_side(compare: Callable, starts: Callable) -> None:
    comparison = compare(budget=0.5, match="seconds", seeds=1)
    (row,) = rows()
    assert (row["kind"], row["load_of_others"]) == ("speed", 0.25)
    assert [len(rates) for rates in row["rates"]] == [5, 5]
    names = [Path(command[command.index("--model_config") + 1]).stem for command in starts.commands]
    assert names == [names[i] for i in (0, 1, 1, 0, 0, 1, 1, 0, 0, 1)]
    for contestant, rate in zip(comparison.contestants, row["tokens_per_s"], strict=True):
        assert comparison.tokens(contestant) == max(256, int(0.5 * rate // 256) * 256)
    compare(budget=0.5, match="seconds", seeds=1)
    assert len(starts.commands) == 10


def test_a_sweep_takes_the_best_rate_and_looks_beyond_the_edge(compare: Callable, starts: Callable) -> None:
    # of 0.001 and 0.002 the higher is better, and so are those beyond
    comparison = compare(rate=None, lr_first=0.001, lr_count=2, sweep_tokens=1024, seeds=1, dense=False)
    (sweep,) = comparison.sweeps
    assert len(sweep.losses) > 2 and sweep.best == min(sweep.losses, key=sweep.losses.__getitem__)
    assert comparison.rates == {"MoE-tiny": sweep.best}
    assert {row["kind"] for row in rows()} == {"sweep"}
    assert all(row["tokens"] == 1024 for row in rows())
    # a tenth of the run at most, whatever the settings name, and the end is a hundredth of the rate
    assert rows()[0]["settings"]["schedule.warmup_tokens"] == 102
    assert rows()[0]["settings"]["train.min_lr"] == pytest.approx(rows()[0]["lr"] / 100)


def test_a_rate_that_diverges_is_recorded_as_such(compare: Callable, starts: Callable) -> None:
    text = "the loss is nan, its gradient's norm nan in 10 steps in a row; lower optimizer.init_args.lr"
    starts.acts[2] = lambda: Outcome(1, text, None)
    comparison = compare(rate=None, lr_first=0.01, lr_count=2, sweep_tokens=512, seeds=1, dense=False)
    assert comparison.sweeps[0].losses[0.02] == math.inf
    assert rows()[1]["failed"] == text
    assert comparison.sweeps[0].as_json()["losses"]["0.02"] is None


def test_another_failure_is_not_taken_for_a_rate_too_high(compare: Callable, starts: Callable) -> None:
    starts.acts[1] = lambda: Outcome(1, "the disk is full", None)
    with pytest.raises(RuntimeError, match="the disk is full"):
        compare(rate=None, sweep_tokens=512)


def test_runs_by_the_clock_are_refused(compare: Callable) -> None:
    with pytest.raises(ValueError, match="give --match seconds"):
        compare(variants=[("clock", {"train.max_time": "60"})])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "give --budget N, or --budget_of_first N"),
        (["--budget", "1M", "--budget_of_first", "5"], "and not both"),
        (["--budget_of_first", "many"], "many is no amount; write it as 8000000, 8M, 300k or 1.5e15"),
        (["--budget", "8m"], "8m is no amount; write it as 8000000, 8M, 300k or 1.5e15"),
        (["--budget", "much"], "much is no amount; write it as 8000000, 8M, 300k or 1.5e15"),
        (["--budget", "1M", "--lr", "-1"], "write auto, or a number as 3e-3"),
        (["--budget", "1M", "--seeds", "0"], "--seeds is 0; choose 1 to 100"),
        (["--budget", "1M", "--lr_factor", "1"], "--lr_factor is 1.0; choose a number above 1"),
        (["--budget", "1M", "--override", "n_expert"], "write it as n_expert=8"),
        (["--budget", "1M", "--variant", "shared"], "give a name and one or more KEY=VALUE"),
        (["--budget", "1M", "--data_dir", "nowhere"], "nowhere"),
        (
            ["--budget", "1M", "--override", "vocab_size=100", "padded_vocab_size=100"],
            "pieces; add --override",
        ),
        (["--budget", "1M", "--override", "train.max_norn=1"], "unknown key train.max_norn"),
        (["--budget", "1M", "--experts", "0"], "n_expert is 0"),
    ],
)
def test_a_wrong_flag_is_refused_in_a_sentence(
    flags: list[str],
    words: str,
    workspace: Path,
    tiny_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual = ["model_config.yaml", "--config", "train_config.yaml", "--data_dir", str(tiny_data)]
    try:
        status = tool.main([*usual, "--results_file", "runs.jsonl", "--plan", *flags])
    except SystemExit as end:
        status = end.code
    err = capsys.readouterr().err
    assert status == 2 and words in err and "Traceback" not in err
    assert not Path("runs.jsonl").exists()


@pytest.mark.parametrize("flag", ["budget", "budget_of_first"])
@pytest.mark.parametrize("text", ["8900000", "8.9M", "8.9e6"])
def test_both_budgets_are_written_in_the_same_ways(flag: str, text: str) -> None:
    args = tool.build_parser().parse_args(["model_config.yaml", f"--{flag}", text])
    assert getattr(args, flag) == 8_900_000


def test_a_setting_that_a_row_lacks_had_its_usual_value() -> None:
    row = {"model": {"n_layer": 2}, "settings": {"seed": 1}, "data": {"fingerprint": "a"}}
    now = {**row, "settings": {"seed": 1, "schedule.name": USUAL["schedule.name"]}}
    assert is_same(row, now)
    assert not is_same(row, {**now, "settings": {"seed": 1, "schedule.name": "wsd"}})
    assert not is_same(row, {**now, "data": {"fingerprint": "b"}})


def test_a_curve_holds_no_figure_that_json_cannot_write() -> None:
    steps = np.array([1.0, 2.0])
    train = {"tokens": 100 * steps, "rate": np.array([50.0, 100.0]), "loss": np.array([3.0, np.nan])}
    val = {"step": steps, "tokens": 100 * steps, "loss": np.array([np.inf, 2.0])}
    # in the first row the machine warms up: it counts as fast as the median one, 75 tokens a second
    assert curve(train, val) == [[1, 100, 3.0, None, 1.33333], [2, 200, None, 2.0, 2.33333]]


def test_a_damaged_line_of_the_file_is_left_out(tmp_path: Path) -> None:
    row = {"kind": "run", "model": {}, "settings": {}, "data": {"fingerprint": "a"}}
    text = "\n".join(['{"kind": "run"', "[]", "{}", json.dumps(row), '{"kind'])
    (tmp_path / "runs.jsonl").write_text(text, encoding="utf-8")
    assert list(RunsFile(tmp_path / "runs.jsonl").rows()) == [row]


def test_the_page_shows_the_names_as_text(compare: Callable) -> None:
    compare(seeds=1, dense=False, variants=[("<b>", {"n_shared_expert": "1"})]).run()
    page = Path("comparison/comparison.html").read_text(encoding="utf-8")
    assert "MoE-tiny &lt;b&gt;" in page and "<b>" not in page
    assert page.count("<svg") == 3 and "<script" not in page


@pytest.mark.parametrize(
    ("text", "value"), [("600", 600), ("300k", 3e5), ("8M", 8e6), ("2g", 2e9), ("1.5e15", 1.5e15)]
)
def test_an_amount_is_written_as_people_write_it(text: str, value: float) -> None:
    assert tool.amount(text) == value
