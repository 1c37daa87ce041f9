"""import_hf: folders that Transformers saved, damaged ones, and a small hub."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.hub import serve
from helpers.interop import TEXTS, refusal, transformers_model, weights_of
from litgpt.tokenizer import Tokenizer
from litgpt.utils import copy_config_files

from litgpt_moe.checkpoints.layout import TOKENIZER_FILES
from litgpt_moe.checkpoints.reader import load_model, verify_checkpoint
from litgpt_moe.interop.import_folder import INDEX
from tools import import_hf


def test_the_imported_checkpoint_is_whole_and_tokenizes_as_the_source(
    mixtral: SimpleNamespace, tmp_path: Path
) -> None:
    assert import_hf.main([str(mixtral.out), str(tmp_path / "back")]) == 0
    record = json.loads((tmp_path / "back" / "checkpoint.json").read_text())
    assert set(record["files"]) == {path.name for path in (tmp_path / "back").iterdir()} - {"checkpoint.json"}
    verify_checkpoint(tmp_path / "back")
    before, after = Tokenizer(mixtral.checkpoint), Tokenizer(tmp_path / "back")
    for text in TEXTS:
        assert before.encode(text).tolist() == after.encode(text).tolist()
    assert after.eos_id == before.eos_id


@pytest.mark.parametrize("inside", [".", ".cache", "config.json"])
def test_a_download_does_not_go_through_a_link(
    inside: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    link = tmp_path / ".new.litgpt_moe-download" / inside
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "elsewhere")
    assert import_hf.main(["owner/name", str(tmp_path / "new")]) == 2
    assert f"{link} is a link" in capsys.readouterr().err
    assert not any((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused_unless_it_is_the_hub_s_cache(
    mixtral: SimpleNamespace, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(mixtral.out, tmp_path / "snapshots" / "0123"))
    (tmp_path / "elsewhere").mkdir()
    (folder / name).rename(tmp_path / "elsewhere" / name)
    (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    assert import_hf.main([str(folder), str(tmp_path / "new")]) == 2
    assert f"{folder / name} is a link out of its folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "elsewhere").rename(tmp_path / "blobs")
    (folder / name).unlink()
    (folder / name).symlink_to(Path("../../blobs", name))
    assert import_hf.main([str(folder), str(tmp_path / "new")]) == 0


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe", "Llama", "Qwen3"])
def test_a_folder_that_transformers_saved_is_imported_exactly(
    kind: str, tiny_tokenizer_dir: Path, tmp_path: Path
) -> None:
    import transformers

    experts = {"num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 8}
    experts |= {"num_local_experts": 4} if kind == "Mixtral" else {"num_experts": 4}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=500,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        head_dim=4,
        **(experts if kind in ("Mixtral", "Qwen3Moe") else {}),
    )
    torch.manual_seed(3)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    model.save_pretrained(tmp_path / "hf", max_shard_size="40KB")
    assert (tmp_path / "hf" / INDEX).is_file()
    copy_config_files(tiny_tokenizer_dir, tmp_path / "hf")
    assert import_hf.main([str(tmp_path / "hf"), str(tmp_path / "lit")]) == 0
    ids = torch.randint(500, (2, 64), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected, got = model(ids).logits, load_model(tmp_path / "lit")(ids)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; mixtral, qwen3_moe, llama, qwen3 can be imported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 16}, "sliding_window is 16"),
        ({"sliding_window": "16"}, "config.json is damaged or incomplete"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_size": None}, "n_embd is None, not a whole number"),
        ({"num_experts_per_tok": 9}, "n_expert_per_token is 9"),
        ({"num_hidden_layers": 10**9}, "n_layer"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}, "rope_scaling": None}, "rope_type yarn"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 2}},
            "rope_parameters and rope_scaling contradict each other",
        ),
        ({"rope_parameters": {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta is 500000.0 and 10000.0"),
        ({"rope_parameters": {}, "rope_scaling": {}, "rope_theta": 0}, "rope_base is 0; choose 1 or more"),
        ({"num_key_value_heads": 0}, "n_query_groups is 0"),
        ({"num_attention_heads": 0, "head_dim": None}, "config.json is damaged or incomplete"),
        ({"head_dim": 0}, "head_size is 0"),
        ({"num_hidden_layers": 3}, "the weights lack what becomes transformer.h.2"),
        ({"num_hidden_layers": 1}, "transformer.h.1.mlp.experts.0.fc_1.weight, which config"),
        ({"num_local_experts": 5}, "mlp.gate.weight are (4, 16), config.json wants (5, 16)"),
        ({"intermediate_size": 9}, "config.json wants (9, 16)"),
    ],
)
def test_what_litgpt_would_compute_otherwise_is_not_imported(
    changes: dict, told: str, mixtral: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(mixtral.out, tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, **changes}))
    assert told in refusal(capsys, import_hf.main, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("config.json", None, "holds no config.json"),
        ("config.json", b"{", "config.json: not JSON"),
        ("config.json", b"[1]", "config.json: not a JSON object"),
        ("tokenizer.json", None, "holds no tokenizer.json"),
        ("tokenizer_config.json", b'{"bos_token": "\\ud800"}', "holds half a surrogate pair"),
        ("tokenizer.json", b"{}", "tokenizer.json: not a tokenizer"),
        ("model.safetensors", None, "holds neither model.safetensors nor model.safetensors.index.json"),
        ("model.safetensors", b"no weights at all", "model.safetensors is damaged"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_sentence(
    name: str, content: bytes | None, told: str, mixtral: SimpleNamespace, tmp_path: Path, capsys
) -> None:
    shutil.copytree(mixtral.out, tmp_path / "in")
    (tmp_path / "in" / name).unlink() if content is None else (tmp_path / "in" / name).write_bytes(content)
    assert told in refusal(capsys, import_hf.main, tmp_path / "in", tmp_path / "out")


def test_weights_whose_parts_do_not_fit_together_are_refused(
    mixtral: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(mixtral.out, tmp_path / "in")
    weights = load_file(tmp_path / "in/model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    weights[name] = weights[name][:, :-1].contiguous()
    save_file(weights, tmp_path / "in/model.safetensors", {"format": "pt"})
    line = refusal(capsys, import_hf.main, tmp_path / "in", tmp_path / "out")
    assert "model.layers.0.self_attn" in line and "do not fit" in line


def test_an_index_that_points_out_of_its_folder_is_refused(
    mixtral: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(mixtral.out, tmp_path / "in")
    (tmp_path / "in" / "model.safetensors").rename(tmp_path / "other.safetensors")
    index = {"weight_map": {"lm_head.weight": "../other.safetensors"}}
    (tmp_path / "in" / INDEX).write_text(json.dumps(index))
    line = refusal(capsys, import_hf.main, tmp_path / "in", tmp_path / "out")
    assert "'../other.safetensors', which is no file of its folder" in line


def test_import_says_what_a_name_that_is_nothing_could_be(tmp_path: Path, capsys) -> None:
    line = refusal(capsys, import_hf.main, tmp_path / "none", tmp_path / "out")
    assert "no such folder, and no OWNER/NAME of the hub either" in line


@pytest.fixture
def hub(mixtral: SimpleNamespace) -> Iterator[SimpleNamespace]:
    """A hub on this machine with one repository."""
    files = {f"/me/tiny/resolve/main/{path.name}": path.read_bytes() for path in mixtral.out.iterdir()}
    with serve(files) as (url, handler):
        yield SimpleNamespace(url=url, handler=handler)


@pytest.mark.slow  # the next test fetches the same way
def test_a_repository_of_the_hub_is_imported(
    hub: SimpleNamespace, mixtral: SimpleNamespace, tmp_path: Path, run_script: Callable
) -> None:
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    done = run_script("tools/import_hf.py", "me/tiny", tmp_path / "lit", env=env)
    assert done.returncode == 0, done.stderr
    assert f"Wrote {tmp_path / 'lit'}: MoE-tiny" in done.stdout
    assert "--initial_checkpoint_dir" in done.stdout.splitlines()[-1]
    before, after = weights_of(mixtral.checkpoint), weights_of(tmp_path / "lit")
    assert all(before[name].equal(after[name]) for name in before)
    assert {path.name for path in tmp_path.iterdir()} <= {"lit", "home"}
    fetched = {path.rpartition("/")[2] for path in hub.handler.asked}
    assert "model.safetensors" in fetched and not fetched & {"README.md", "MoE-tiny-float32.gguf"}
    missing = run_script("tools/import_hf.py", "me/none", tmp_path / "other", env=env)
    assert missing.returncode == 1 and "config.json of me/none could not be downloaded" in missing.stderr
    assert len(missing.stderr.splitlines()) == 1 and not (tmp_path / "other").exists()


def test_a_repository_in_several_files_is_imported_after_an_interrupted_download(
    mixtral: SimpleNamespace, hub: SimpleNamespace, tmp_path: Path, run_script: Callable
) -> None:
    transformers_model(mixtral.out).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    names = sorted(path.name for path in (tmp_path / "shards").glob("model-*.safetensors"))
    assert len(names) > 2
    address = "/me/several/resolve/main/"
    kept = {name: hub.handler.files[f"/me/tiny/resolve/main/{name}"] for name in TOKENIZER_FILES}
    parts = {path.name: path.read_bytes() for path in (tmp_path / "shards").iterdir()} | kept
    hub.handler.files |= {address + name: content for name, content in parts.items()}
    hub.handler.gone = [address + names[-1]]
    env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    command = ("tools/import_hf.py", "me/several", tmp_path / "lit")
    broken = run_script(*command, env=env)
    assert broken.returncode == 1 and names[-1] in broken.stderr and "Traceback" not in broken.stderr
    assert not (tmp_path / "lit").exists()
    unreachable = run_script(*command, env={**env, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert unreachable.returncode == 1 and names[-1] in unreachable.stderr
    assert "Traceback" not in unreachable.stderr and not (tmp_path / "lit").exists()
    hub.handler.gone = []
    hub.handler.asked.clear()
    again = run_script(*command, env=env)
    assert again.returncode == 0, again.stderr
    # what the first try brought is not asked for again
    assert [path for path in hub.handler.asked if path.startswith(address)] == [address + names[-1]]
    before, after = weights_of(mixtral.checkpoint), weights_of(tmp_path / "lit")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
