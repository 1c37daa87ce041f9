"""What we rely on in LitGPT 0.5.13 and Lightning, one test a seam: an upgrade fails here with a sentence."""

import ast
import inspect
from dataclasses import asdict
from pathlib import Path

import lightning as L
import pytest
import torch
from conftest import TINY_CONFIG
from lightning.fabric.plugins import MixedPrecision
from litgpt import pretrain
from litgpt.args import TrainArgs
from litgpt.config import Config
from litgpt.model import GPT, GroupedTopkRouter, LLaMAMoE
from litgpt.utils import save_config

from litgpt_moe.config import MoEConfig
from litgpt_moe.training.fabric import LITGPT_LINES
from moe_layers import MoE

pytestmark = pytest.mark.usefixtures("eager")


def test_main_takes_the_arguments_that_run_train_passes() -> None:
    expected = (
        "fabric devices seed initial_checkpoint_dir resume config data out_dir tokenizer_dir tokenizer "
        "train eval optimizer num_nodes"
    )
    assert list(inspect.signature(pretrain.main).parameters) == expected.split(), (
        "litgpt.pretrain.main has other arguments than the ones run_train.train passes"
    )


def test_save_checkpoint_calls_the_function_that_we_replace() -> None:
    source = inspect.getsource(pretrain.save_checkpoint)
    assert "save_hyperparameters(setup, checkpoint_file.parent)" in source, (
        "save_checkpoint no longer calls save_hyperparameters: must training/loop.py still replace it?"
    )
    assert source.index("fabric.save") < source.index("save_config"), (
        "model_config.yaml is no longer written last: its presence marks a whole checkpoint of LitGPT"
    )


def beginning(text: ast.expr) -> str:
    """Return how a text of the source begins."""
    match text:
        case ast.Constant(value=str(words)):
            return words
        case ast.JoinedStr(values=[first, *_]) | ast.BinOp(left=first):
            return beginning(first)
        case ast.Name(id="separator"):
            return "-----"
    return ast.unparse(text)


def test_all_that_the_loop_prints_is_known_and_said_by_us() -> None:
    source = "".join(inspect.getsource(part) for part in (pretrain.main, pretrain.fit, pretrain.validate))
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    printed = [beginning(call.args[0]) for call in calls if ast.unparse(call.func) == "fabric.print"]
    assert len(printed) > 10
    new = [text for text in printed if not text.startswith(LITGPT_LINES)]
    assert new == [], f"LitGPT prints {new}: decide in training/fabric.py whether a user needs that"


def test_block_builds_the_class_that_the_config_names() -> None:
    model = GPT(MoEConfig(**TINY_CONFIG))
    assert type(model.transformer.h[0].mlp) is MoE, "Block no longer builds config.mlp_class(config)"


def test_a_saved_config_holds_litgpt_keys_alone_and_stock_reads_it(tmp_path: Path) -> None:
    save_config(MoEConfig(**TINY_CONFIG), tmp_path)
    stock = Config.from_file(tmp_path / "model_config.yaml")
    assert asdict(stock) == asdict(Config(**TINY_CONFIG))
    assert type(GPT(stock).transformer.h[0].mlp) is LLaMAMoE


def test_stock_weights_and_ours_have_the_same_names_and_shapes() -> None:
    stock, ours = GPT(Config(**TINY_CONFIG)).state_dict(), GPT(MoEConfig(**TINY_CONFIG)).state_dict()
    assert {name: t.shape for name, t in stock.items()} == {name: t.shape for name, t in ours.items()}


def test_fabric_calls_a_callback_after_each_optimizer_step() -> None:
    steps = []

    class Callback:
        def on_after_optimizer_step(self, strategy: object, optimizer: object) -> None:
            steps.append(1)

    fabric = L.Fabric(accelerator="cpu", devices=1, callbacks=[Callback()])
    layer = torch.nn.Linear(2, 2)
    layer, optimizer = fabric.setup(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    for _ in range(3):
        fabric.backward(layer(torch.ones(1, 2)).sum())
        optimizer.step()
    assert len(steps) == 3, "Fabric no longer calls on_after_optimizer_step"


def test_fabric_logs_to_any_object_with_log_metrics() -> None:
    rows = []

    class Logger:
        def log_metrics(self, metrics: dict, step: int | None = None) -> None:
            rows.append((metrics, step))

    L.Fabric(accelerator="cpu", devices=1, loggers=[Logger()]).log_dict({"loss": 1.0}, step=3)
    assert rows == [({"loss": 1.0}, 3)]


def test_stock_moe_cannot_be_counted_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer, x = LLaMAMoE(Config(**TINY_CONFIG)), torch.randn(1, 4, 16)
    with pytest.raises(NotImplementedError):  # when this passes, no case for meta is needed in moe_layers
        layer(x)


def test_stock_grouped_router_has_no_initialisation() -> None:
    assert not hasattr(GroupedTopkRouter, "reset_parameters"), (
        "GroupedRouter in moe_layers is no longer needed"
    )


def test_the_loop_divides_the_loss_but_not_what_a_layer_adds() -> None:
    source = inspect.getsource(pretrain.fit)
    assert "fabric.backward(loss / train.gradient_accumulation_iters(devices, num_nodes))" in source


def test_the_arguments_that_pretraining_ignores_are_still_ignored() -> None:
    source = inspect.getsource(pretrain.fit) + inspect.getsource(pretrain.main)
    for name in ("max_steps", "max_time", "epochs", "max_new_tokens"):
        assert name not in source, f"LitGPT now reads {name}: training/ need not refuse it or do it"


def test_the_loop_calls_what_the_hooks_wait_for_in_its_order() -> None:
    source = inspect.getsource(pretrain.fit)
    calls = (
        "train_iterator = CycleIterator(train_dataloader)",  # Ending is raised from there, between steps
        "fabric.backward(",
        "fabric.clip_gradients(model, optimizer, max_norm=train.max_norm)",  # the step is judged here
        "optimizer.step()",
        "fabric.log_dict(metrics",
        "val_loss = validate(",
        'state["step_count"] % train.save_interval == 0',  # set to 1 to save before the end
        "save_checkpoint(",
    )
    places = [source.index(call, source.index("total_t0 =") if n > 1 else 0) for n, call in enumerate(calls)]
    assert places[1:] == sorted(places[1:]), "litgpt.pretrain.fit has another order than LoopHooks"


def test_main_asks_for_the_functions_that_we_replace() -> None:
    source = inspect.getsource(pretrain.main)
    assert source.index("fabric.setup(model)") < source.index("instantiate_torch_optimizer("), (
        "the optimizer is built before LoopHooks.on_after_setup knows the model"
    )
    for call in (
        "initialize_weights(",
        "torch.compile(model)",
        "fabric.setup_dataloaders(",
        "fabric.load(resume, state)",
        "save_checkpoint(",
    ):
        assert call in source, f"litgpt.pretrain.main no longer calls {call}"


def test_every_function_that_we_replace_is_called_by_its_name_in_the_module() -> None:
    calls = {
        "save_checkpoint": "save_checkpoint(fabric, state, tokenizer_dir, out_dir /",
        "get_dataloaders": "= get_dataloaders(fabric, data, tokenizer, train, model.max_seq_length)",
        "validate": "validate(fabric, model, val_dataloader, max_iters=eval.max_iters)",
        "instantiate_torch_optimizer": "instantiate_torch_optimizer(optimizer, model.parameters(), **extra",
        "chunked_cross_entropy": "loss = chunked_cross_entropy(logits, targets)",
    }
    source = inspect.getsource(pretrain.main) + inspect.getsource(pretrain.fit)
    for name, call in calls.items():
        assert hasattr(pretrain, name), f"litgpt.pretrain has no {name} to replace: see training/loop.py"
        assert call in source, f"litgpt.pretrain calls {name} with other arguments: see training/loop.py"
    assert "chunk_size=0" in source, "fit no longer marks the loss of the model whose FLOPs are counted"


def test_fit_saves_by_the_train_args_that_main_was_given_so_that_a_change_is_seen() -> None:
    assert "train=train" in inspect.getsource(pretrain.main), "LoopHooks cannot ask for a save at the end"
    assert "replace(" not in inspect.getsource(pretrain.fit), "fit works on a copy of TrainArgs"


def test_a_validation_loss_is_exponentiated_unchecked() -> None:
    assert "math.exp(val_loss)" in inspect.getsource(pretrain.fit), "LoopHooks.validate need not"


def test_a_global_batch_is_rounded_down_in_silence() -> None:
    args = TrainArgs(global_batch_size=10, micro_batch_size=4)
    assert args.gradient_accumulation_iters(devices=1) == 2, "training/checks.py need not"


def test_fabric_does_not_clip_for_a_fused_optimizer_in_fp16() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=plugin)
    model, optimizer = fabric.setup(torch.nn.Linear(2, 2), torch.optim.AdamW([weight], fused=True))
    try:
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
    except NotImplementedError:
        return
    pytest.fail("LossScaling.unscale_gradients in training/loss_scaling.py may not be needed any more")


def test_fabric_takes_bf16_for_fp16_on_a_cpu() -> None:
    precision = L.Fabric(accelerator="cpu", devices=1, precision="16-mixed").strategy.precision
    assert precision.precision == "bf16-mixed", "hardware.training_device may allow 16-mixed on a CPU"


def test_compile_can_be_kept_from_compiling() -> None:
    calls = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> object:
        calls.append(graph)
        return graph.forward

    # the eager fixture sets the stance
    torch.compile(torch.nn.Linear(2, 2), backend=backend)(torch.ones(1, 2))
    assert calls == [], 'set_stance("force_eager") no longer keeps torch.compile from compiling'
