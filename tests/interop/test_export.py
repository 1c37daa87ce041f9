"""export_hf against the real libraries: Transformers' logits and texts, and the way back by import_hf."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import TINY_CONFIG
from helpers.interop import DENSE, LLAMA3, QWEN, TEXTS, refusal, transformers_model, weights_of
from litgpt.tokenizer import Tokenizer

from litgpt_moe.balance import use_selection_bias
from litgpt_moe.checkpoints.reader import load_model
from litgpt_moe.folders import new_folder
from litgpt_moe.generation.decode import generate, make_decoder
from litgpt_moe.generation.settings import Sampling
from litgpt_moe.interop import transformers as conversion
from tools import export_hf, import_hf

SHAPES = {  # name -> what differs from TINY_CONFIG, and the class it must become
    "mixtral": ({}, "MixtralForCausalLM"),
    "mixtral-gqa": (
        {"n_head": 4, "n_query_groups": 2, "head_size": 6, "rope_base": 500},
        "MixtralForCausalLM",
    ),
    "mixtral-llama3-rope": ({"rope_adjustments": LLAMA3}, "MixtralForCausalLM"),
    "mixtral-scaled": ({"routed_scaling_factor": 4.0}, "MixtralForCausalLM"),
    "mixtral-linear-rope": ({"rope_adjustments": {"factor": 4.0}}, "MixtralForCausalLM"),
    "qwen3-moe": (QWEN, "Qwen3MoeForCausalLM"),
    "qwen3-moe-dense-first": (
        {**QWEN, "first_k_dense_replace": 1, "intermediate_size": 20},
        "Qwen3MoeForCausalLM",
    ),
    "llama": (DENSE, "LlamaForCausalLM"),
    "qwen3": ({**DENSE, "norm_qk": True, "head_size": 12}, "Qwen3ForCausalLM"),
}


# --- the same numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_gives_the_logits_and_the_greedy_text_and_the_way_back_gives_the_weights(
    shape: str, is_tied: bool, make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    changes, architecture = SHAPES[shape]
    checkpoint = make_checkpoint(is_tied, **changes)
    assert export_hf.main([str(checkpoint), str(tmp_path / "out")]) == 0
    model, copy = load_model(checkpoint), transformers_model(tmp_path / "out")
    assert type(copy).__name__ == architecture
    ids = torch.randint(TINY_CONFIG["vocab_size"], (3, 64), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected, got = model(ids), copy(ids).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    prompt = ids[0, :9].tolist()
    ours = list(generate(make_decoder(model), prompt, 20, Sampling(temperature=0)))
    theirs = copy.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=20, eos_token_id=None)
    assert theirs[0, 9:].tolist() == ours
    assert import_hf.main([str(tmp_path / "out"), str(tmp_path / "back")]) == 0
    # Transformers has no routed_scaling_factor: it comes back in the experts' last matrices
    factor = float(changes.get("routed_scaling_factor", 1))
    before, after = weights_of(checkpoint), weights_of(tmp_path / "back")
    assert list(before) == list(after)
    for name, weight in before.items():
        is_scaled = ".experts." in name and name.endswith(".proj.weight")
        assert after[name].equal(weight * factor if is_scaled else weight), name


def test_autotokenizer_gives_our_ids_and_our_text(mixtral: SimpleNamespace) -> None:
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(mixtral.checkpoint), AutoTokenizer.from_pretrained(mixtral.out)
    for text in TEXTS:
        ids = ours.encode(text).tolist()
        assert theirs(text).input_ids == ids
        assert theirs.decode(ids, skip_special_tokens=True) == ours.processor.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_bfloat16_stays_bfloat16_and_dtype_changes_it(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    checkpoint = make_checkpoint(dtype=torch.bfloat16)
    for flags, dtype in (([], torch.bfloat16), (["--dtype", "float16"], torch.float16)):
        out = tmp_path / str(dtype)
        assert export_hf.main([str(checkpoint), str(out), *flags]) == 0
        assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {dtype}
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == str(dtype).removeprefix(
            "torch."
        )


def test_a_scaling_factor_is_exported_in_16_bits_too(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    # 2.5 is no power of two: the products are rounded, once
    for name, dtype, flags in (("saved", torch.bfloat16, []), ("cast", None, ["--dtype", "bfloat16"])):
        changes = {"dtype": dtype} if dtype else {}
        checkpoint = make_checkpoint(routed_scaling_factor=2.5, **changes)
        assert export_hf.main([str(checkpoint), str(tmp_path / name), *flags]) == 0


# --- the rest of the folder ---------------------------------------------------------------------------------


def test_the_card_tells_what_the_checkpoint_tells(mixtral: SimpleNamespace, tmp_path: Path) -> None:
    checkpoint = tmp_path / "step-00000007"
    shutil.copytree(mixtral.checkpoint, checkpoint)
    state = {"model": weights_of(mixtral.checkpoint), "step_count": 7}
    torch.save(state, checkpoint / "lit_model.pth")
    (checkpoint / "train_config.yaml").write_text(
        "seed: 11\nprecision: 32-true\ntrain: {global_batch_size: 4, max_seq_length: 32}\n"
        "optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.003}}\n"
        "data: {init_args: {train_data_path: /home/me/data/fables/train}}\n"
    )
    assert export_hf.main([str(tmp_path), str(tmp_path / "out"), "--no_check"]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for told in (
        "MoE-tiny",
        "4 of width 8 in a layer, 2 chosen",
        "896 in 7 steps of 128",
        "`fables`",
        "AdamW",
    ):
        assert told in card
    assert "/home/me" not in card
    assert card.startswith("---\nlibrary_name: transformers\n")


def test_the_card_says_how_lm_eval_adds_one_bos(mixtral: SimpleNamespace, tmp_path: Path) -> None:
    told = "pretrained=.,add_bos_token=False --tasks"
    assert told in (mixtral.out / "README.md").read_text(encoding="utf-8")
    checkpoint = shutil.copytree(mixtral.checkpoint, tmp_path / "no_bos")
    path = checkpoint / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(settings | {"add_bos_token": False}), encoding="utf-8")
    (checkpoint / "checkpoint.json").unlink(missing_ok=True)
    assert export_hf.main([str(checkpoint), str(tmp_path / "out"), "--no_check"]) == 0
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "pretrained=. --tasks" in card and "add_bos_token" not in card


def test_a_name_cannot_add_to_the_card(mixtral: SimpleNamespace, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(mixtral.checkpoint, tmp_path / "hostile")
    (checkpoint / "checkpoint.json").unlink(missing_ok=True)
    config = yaml.safe_load((checkpoint / "model_config.yaml").read_text(encoding="utf-8"))
    config["name"] = "Tiny\n\n## Install\n\n```bash\nx\n```"
    (checkpoint / "model_config.yaml").write_text(yaml.dump(config), encoding="utf-8")
    (checkpoint / "train_config.yaml").write_text('precision: "a | b\\n\\n# c"\n', encoding="utf-8")
    assert export_hf.main([str(checkpoint), str(tmp_path / "out"), "--no_check"]) == 0
    lines = (tmp_path / "out" / "README.md").read_text(encoding="utf-8").splitlines()
    assert "# Tiny ## Install ```bash x ```" in lines and r"| Precision | a \| b # c |" in lines


@pytest.mark.parametrize("group", ["[1]", "7", "text", "{init_args: 3}", "{lr_warmup_steps: [x]}"])
def test_settings_of_another_shape_are_left_out_of_the_card(
    group: str, mixtral: SimpleNamespace, tmp_path: Path
) -> None:
    checkpoint = shutil.copytree(mixtral.checkpoint, tmp_path / "odd")
    (checkpoint / "checkpoint.json").unlink(missing_ok=True)
    torch.save({"model": weights_of(mixtral.checkpoint), "step_count": 7}, checkpoint / "lit_model.pth")
    settings = "".join(f"{name}: {group}\n" for name in ("train", "optimizer", "moe", "data"))
    (checkpoint / "train_config.yaml").write_text(settings, encoding="utf-8")
    assert export_hf.main([str(checkpoint), str(tmp_path / "out"), "--no_check"]) == 0


def test_the_code_in_the_card_runs(mixtral: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    card = (mixtral.out / "README.md").read_text(encoding="utf-8")
    code = card.split("```python\n")[1].split("```")[0]
    exec(code.replace('folder = "."', f"folder = {str(mixtral.out)!r}").replace("=200", "=5"))
    assert capsys.readouterr().out.startswith("Once upon a time")


def test_both_spellings_of_the_rotary_settings_are_written(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(rope_adjustments=LLAMA3, rope_base=5000)
    assert export_hf.main([str(checkpoint), str(tmp_path / "out"), "--no_check"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 16
    assert config["rope_theta"] == 5000.0 and config["rope_scaling"] == scaling  # Transformers 4
    assert config["rope_parameters"] == {"rope_theta": 5000.0, **scaling}  # Transformers 5


# --- refusals -----------------------------------------------------------------------------------------------


GROUPS = {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 1}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_shared_expert": 1}, "n_shared_expert is 1 (experts that every token visits)"),
        (GROUPS, "n_expert_groups is 2 (sigmoid routing within groups)"),
        ({"bias": True}, "bias is True"),
        ({"attn_bias": True}, "attn_bias is True"),
        ({"rotary_percentage": 0.5}, "rotary_percentage is 0.5"),
        ({"norm_class_name": "LayerNorm"}, "norm_class_name is 'LayerNorm'"),
        ({"parallel_residual": True}, "parallel_residual is True"),
        ({"first_k_dense_replace": 1, "intermediate_size": 8}, "first_k_dense_replace is 1"),
        ({"attention_scores_scalar": 4}, "attention_scores_scalar is 4"),
        ({"norm_qk": True, "norm_qk_type": "olmo2"}, "norm_qk_type is 'olmo2'"),
        ({"name": "my-Gemma"}, "name is my-Gemma"),
        ({"rope_adjustments": {"factor": 2.0, "beta_fast": 32, "beta_slow": 1, "original_max_seq_len": 16}},
         "rope_adjustments has the keys beta_fast"),
        ({"scale_embeddings": True}, "scale_embeddings is True"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"sliding_window_size": 8}, "sliding_window_size is 8"),
    ],
)  # fmt: skip
def test_what_no_class_computes_is_refused_with_its_reason(
    changes: dict,
    told: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    line = refusal(capsys, export_hf.main, make_checkpoint(**changes), tmp_path / "out")
    assert told in line and "cannot express" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"rope_adjustments": LLAMA3}, "rope_adjustments"),
     ({**QWEN, "first_k_dense_replace": 1, "intermediate_size": 8}, "first_k_dense_replace is 1")],
)  # fmt: skip
def test_what_llama_cpp_cannot_is_refused_for_gguf_alone(
    changes: dict,
    told: str,
    make_checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    checkpoint = make_checkpoint(**changes)
    line = refusal(capsys, export_hf.main, checkpoint, tmp_path / "out", "--gguf")
    assert told in line and "without --gguf" in line
    assert list(tmp_path.iterdir()) == []
    assert export_hf.main([str(checkpoint), str(tmp_path / "out"), "--no_check"]) == 0


def test_gguf_refuses_a_tokenizer_that_it_cannot_tell(
    mixtral: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from tokenizers import Tokenizer as Library
    from tokenizers import models

    shutil.copytree(mixtral.checkpoint, tmp_path / "in")
    pieces = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}
    Library(models.WordLevel(pieces, unk_token="<unk>")).save(str(tmp_path / "in" / "tokenizer.json"))
    line = refusal(capsys, export_hf.main, tmp_path / "in", tmp_path / "out", "--gguf")
    assert "neither a Llama-style nor a GPT-2-style BPE" in line


def test_export_refuses_bad_input_in_one_sentence(
    mixtral: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert "no such checkpoint" in refusal(capsys, export_hf.main, tmp_path / "none", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert "holds no lit_model.pth" in refusal(capsys, export_hf.main, tmp_path / "empty", tmp_path / "out")
    line = refusal(capsys, export_hf.main, mixtral.checkpoint, mixtral.out)
    assert f"{mixtral.out} is not empty" in line
    line = refusal(capsys, export_hf.main, mixtral.checkpoint, mixtral.checkpoint / "lit_model.pth")
    assert "is a file" in line
    shutil.copytree(mixtral.checkpoint, tmp_path / "damaged")
    data = bytearray((tmp_path / "damaged" / "lit_model.pth").read_bytes())
    (tmp_path / "damaged" / "lit_model.pth").write_bytes(data[: len(data) // 2])
    assert "damaged" in refusal(capsys, export_hf.main, tmp_path / "damaged", tmp_path / "out")
    (tmp_path / "damaged" / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal(capsys, export_hf.main, tmp_path / "damaged", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_told_and_leaves_nothing(
    mixtral: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert export_hf.main([str(mixtral.checkpoint), str(tmp_path / "a" / "out")]) == 1
    assert "1,000 are free" in capsys.readouterr().err
    assert import_hf.main([str(mixtral.out), str(tmp_path / "a" / "out")]) == 1
    assert "1,000 are free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("I/O error: No space left (os 28)")],
)
def test_a_disk_that_fills_up_while_writing_leaves_nothing(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(OSError, match="disk is full"),
        new_folder(tmp_path / "a" / "out", 0) as staging,
    ):
        (staging / "half").write_bytes(b"0")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_bias_on_the_choice_of_experts_is_refused(
    mixtral: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(mixtral.checkpoint, tmp_path / "in")
    model = load_model(mixtral.checkpoint)
    use_selection_bias(model)
    torch.save({"model": model.state_dict()}, tmp_path / "in" / "lit_model.pth")
    line = refusal(capsys, export_hf.main, tmp_path / "in", tmp_path / "out")
    assert "the weights hold transformer.h.0.mlp.e_score_correction_bias, which MixtralForCausalLM" in line
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_logits_differ_never_gets_its_name(
    mixtral: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = conversion.to_hf_config
    wrong = {"num_experts_per_tok": 3}
    monkeypatch.setattr(conversion, "to_hf_config", lambda *args: honest(*args) | wrong)
    assert export_hf.main([str(mixtral.checkpoint), str(tmp_path / "out")]) == 1
    assert "logits differ by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# --- the command as a user runs it --------------------------------------------------------------------------


def test_the_command_says_what_it_made_and_what_comes_next(
    mixtral: SimpleNamespace, tmp_path: Path, run_script: Callable
) -> None:
    done = run_script("tools/export_hf.py", mixtral.checkpoint, tmp_path / "out", "--gguf")
    assert (done.returncode, done.stderr) == (0, "")
    assert "MixtralForCausalLM in float32" in done.stdout and "Checked Transformers" in done.stdout
    assert "hf upload" in done.stdout.splitlines()[-1]
    modes = {path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # others may read the weights where they may read the rest
