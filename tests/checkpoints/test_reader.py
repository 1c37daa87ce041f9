"""From a checkpoint directory to a model: stock LitGPT's logits, every file checked, and no code run."""

import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY_CONFIG
from helpers.errors import one_sentence
from litgpt.config import Config
from litgpt.model import GPT, LLaMAMoE

from litgpt_moe.checkpoints.layout import write_record
from litgpt_moe.checkpoints.reader import (
    check_weights,
    checkpoint_flaw,
    load_model,
    load_tokenizer,
    read_state,
    read_training_state,
    read_weights,
    verify_checkpoint,
)
from litgpt_moe.checkpoints.state import RunState, rng_state
from litgpt_moe.checkpoints.state_file import write_state
from litgpt_moe.config import MoEConfig

pytestmark = pytest.mark.usefixtures("eager")


# --- a whole checkpoint -------------------------------------------------------------------------------------


def test_a_loaded_checkpoint_gives_stock_litgpt_s_logits(tiny_checkpoint: Path) -> None:
    stock = GPT(Config.from_checkpoint(tiny_checkpoint))
    stock.load_state_dict(
        torch.load(tiny_checkpoint / "lit_model.pth", weights_only=True)["model"], strict=True
    )
    model = load_model(tiny_checkpoint)
    tokens = torch.randint(0, 512, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), stock(tokens), rtol=1e-5, atol=1e-6)
    assert isinstance(model.get_submodule("transformer.h.0.mlp"), LLaMAMoE)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_model_is_loaded_in_the_dtype_asked_for(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(torch.tensor([[1, 2, 3]])).dtype == torch.bfloat16


def test_a_model_on_the_meta_device_is_checked_by_names_and_shapes_alone(checkpoint: Path) -> None:
    assert all(p.is_meta for p in load_model(checkpoint, device="meta").parameters())
    weights = read_weights(checkpoint / "lit_model.pth")
    torch.save({name: w for name, w in weights.items() if name != "lm_head.weight"}, "bare.pth")
    shutil.move("bare.pth", checkpoint / "lit_model.pth")
    with pytest.raises(ValueError, match=r"they lack lm_head\.weight \(1 missing\)"):
        load_model(checkpoint, device="meta")


def test_bare_weights_as_litgpt_s_converters_write_them_are_read(checkpoint: Path) -> None:
    weights = {name: w.clone() for name, w in read_weights(checkpoint / "lit_model.pth").items()}
    torch.save(weights, checkpoint / "lit_model.pth")
    again = load_model(checkpoint).state_dict()
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in again)


def test_weights_that_are_not_finite_are_named(checkpoint: Path) -> None:
    state = torch.load(checkpoint / "lit_model.pth", weights_only=True)
    state["model"]["transformer.ln_f.weight"][3] = float("nan")
    torch.save(state, checkpoint / "lit_model.pth")
    with pytest.raises(
        ValueError, match=r"transformer\.ln_f\.weight holds values that are not finite"
    ) as caught:
        load_model(checkpoint)
    one_sentence(caught.value)


def test_weights_of_another_model_are_refused(checkpoint: Path) -> None:
    wider = {**TINY_CONFIG, "moe_intermediate_size": 12}
    (checkpoint / "model_config.yaml").write_text(yaml.dump(wider), encoding="utf-8")
    with pytest.raises(ValueError, match=r"do not fit the model config MoE-tiny: .*experts\.0\.fc_1\.weight"):
        load_model(checkpoint)


def test_weights_that_have_been_read_already_are_checked_without_the_file(checkpoint: Path) -> None:
    # clones: Windows deletes no file that is mapped
    weights = {name: weight.clone() for name, weight in read_weights(checkpoint / "lit_model.pth").items()}
    (checkpoint / "lit_model.pth").unlink()
    _, model = MoEConfig.model_from_file(checkpoint / "model_config.yaml")
    check_weights(checkpoint, model, weights)
    with pytest.raises(ValueError, match=r"they have an unexpected more \(1 too many\)"):
        check_weights(checkpoint, model, {**weights, "more": torch.zeros(1)})


def test_a_checkpoint_s_configuration_may_not_hold_yaml_aliases(checkpoint: Path) -> None:
    with (checkpoint / "model_config.yaml").open("a", encoding="utf-8") as file:
        file.write("n_shared_expert: &one 1\nfirst_k_dense_replace: *one\n")
    with pytest.raises(ValueError, match=r"model_config\.yaml is not readable YAML: it holds an alias"):
        load_model(checkpoint)


def test_the_tokenizer_is_the_one_in_the_folder(checkpoint: Path) -> None:
    assert load_tokenizer(checkpoint).bos_id == 1
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"}', encoding="utf-8")
    with pytest.raises(ValueError, match="its tokenizer files cannot be read"):
        load_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json; copy in the files"):
        load_tokenizer(checkpoint)


# --- damage -------------------------------------------------------------------------------------------------


def with_training_state(checkpoint: Path, step: int = 4) -> Path:
    """The checkpoint as a run of `step` steps leaves it: training state and record."""
    run = RunState(rng=rng_state()).state_dict()
    model = torch.load(checkpoint / "lit_model.pth", weights_only=True)["model"]
    groups = [{"params": list(range(len(model)))}]
    parts = {"optimizer": {"state": {}, "param_groups": groups}, "train_dataloader": {}}
    state = {"model": model, **parts, "iter_num": step, "step_count": step, **run}
    torch.save(state, checkpoint / "lit_model.pth")
    write_record(checkpoint, step, {})
    return checkpoint


def test_a_checkpoint_of_a_run_has_no_flaw_and_is_read_once(checkpoint: Path) -> None:
    with_training_state(checkpoint)
    assert checkpoint_flaw(checkpoint) is None
    assert read_training_state(checkpoint)["step_count"] == 4
    assert read_state(checkpoint / "lit_model.pth")["iter_num"] == 4


def test_a_flaw_is_told_without_the_folder_s_name_and_without_a_way_out(checkpoint: Path) -> None:
    assert checkpoint_flaw(checkpoint) == "holds weights alone; start from it with --initial_checkpoint_dir"
    with_training_state(checkpoint)
    data = bytearray((checkpoint / "lit_model.pth").read_bytes())
    data[len(data) // 2] ^= 1  # one bit, in the middle of a tensor: torch loads it without a word
    (checkpoint / "lit_model.pth").write_bytes(data)
    flaw = checkpoint_flaw(checkpoint)
    assert (
        flaw
        == "lit_model.pth is damaged or not a checkpoint's (its content is not what checkpoint.json recorded)"
    )
    (checkpoint / "model_config.yaml").unlink()
    assert checkpoint_flaw(checkpoint) == "it was not written to its end"


def test_a_checkpoint_named_after_another_step_has_a_flaw(checkpoint: Path) -> None:
    with_training_state(checkpoint, step=4).rename("step-00000008")
    flaw = checkpoint_flaw(Path("step-00000008"))
    assert flaw == "its training state is damaged: step_count is 4, and the checkpoint that of step 8"


def test_a_truncated_checkpoint_is_told_in_one_sentence(checkpoint: Path) -> None:
    weights = checkpoint / "lit_model.pth"
    weights.write_bytes(weights.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"lit_model\.pth is damaged") as caught:
        load_model(checkpoint)
    one_sentence(caught.value)


def test_to_load_a_model_only_the_optimizer_state_is_not_verified(checkpoint: Path) -> None:
    path = checkpoint / "lit_model.pth"
    state = {"model": read_weights(path), "optimizer": {"state": {0: {"exp_avg": torch.zeros(1000)}}}}
    path = path.rename(checkpoint / "before")
    entry = write_state(state, checkpoint / "lit_model.pth")
    (checkpoint / "before").unlink()
    write_record(checkpoint, 4, {"lit_model.pth": entry})
    whole, head = (checkpoint / "lit_model.pth").read_bytes(), entry["weights"]["head"]
    load_model(checkpoint)
    # the list of the tensors, the last weight, a moment, and the archive's directory
    for place, is_weights in ((200, True), (head - 8, True), (head + 400, False), (len(whole) - 90, True)):
        data = bytearray(whole)
        data[place] ^= 1
        (checkpoint / "lit_model.pth").write_bytes(data)
        with pytest.raises(ValueError, match=r"lit_model\.pth is damaged"):
            verify_checkpoint(checkpoint)
        with pytest.raises(ValueError, match=r"lit_model\.pth is damaged") if is_weights else nullcontext():
            load_model(checkpoint)


@pytest.mark.parametrize("name", ["tokenizer.json", "model_config.yaml"])
def test_a_file_that_changed_after_it_was_recorded_is_named(name: str, checkpoint: Path) -> None:
    write_record(checkpoint, 4, {})
    verify_checkpoint(checkpoint)
    content = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(content[:-1] + b" ")
    with pytest.raises(
        ValueError, match=rf"{name} is damaged .*its content is not what checkpoint\.json recorded"
    ):
        verify_checkpoint(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged .*lists it and it is not there"):
        verify_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["lit_model.pth", "model_config.yaml", "tokenizer.json", "notes.txt"])
def test_a_link_out_of_a_checkpoint_is_refused(name: str, checkpoint: Path) -> None:
    target = Path("elsewhere").resolve()
    target.write_bytes((checkpoint / name).read_bytes() if (checkpoint / name).exists() else b"")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to(target)
    with pytest.raises(ValueError, match="is a link out of its folder; copy the file itself there"):
        load_model(checkpoint)


def test_no_file_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
        read_state(tmp_path / "lit_model.pth")
