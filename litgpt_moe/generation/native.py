"""The decoder that reads a step's tokens by one call of compiled code: native.cpp, on a CPU."""

import ctypes
import dataclasses
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int64, c_void_p
from typing import Any

import torch
from litgpt.config import Config
from litgpt.model import GPT
from torch import nn

from litgpt_moe.balance import layers_of
from litgpt_moe.generation.compiling import NoLibrary, load_library
from litgpt_moe.generation.decoder import Read, Routing
from litgpt_moe.generation.quantization import quantize_rows
from litgpt_moe.threads import free_threads

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MLP_CLASSES = ("LLaMAMoE", "LLaMAMLP")
# keys of a model's configuration whose every value native.cpp follows, or which it need not know
FREE_KEYS = {
    *("name", "hf_config", "block_size", "vocab_size", "padding_multiple", "padded_vocab_size"),
    *("n_layer", "n_embd", "n_head", "n_query_groups", "head_size", "norm_eps", "attention_scores_scalar"),
    *("rope_base", "rope_condense_ratio", "rope_adjustments", "rotary_percentage", "rope_local_base_freq"),
    *("intermediate_size", "moe_intermediate_size", "n_expert", "n_shared_expert", "n_expert_per_token"),
    *("first_k_dense_replace", "routed_scaling_factor", "mlp_class_name", "norm_qk_type", "gelu_approximate"),
    *("n_topk_groups", "n_topk_scores_per_group", "norm_topk_prob"),  # these go with n_expert_groups
}
# the only other values that it knows; a key that is named nowhere must have LitGPT's default
KNOWN_VALUES = {"norm_class_name": "RMSNorm", "parallel_residual": False, "bias": False}


class _Matrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("scale", c_void_p))


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_void_p) for name in ("norm_1", "norm_2")),
        *((name, _Matrix) for name in ("qkv", "proj")),
        *((name, c_void_p) for name in ("router", "selection_bias", "gates", "ups", "downs")),
        *((name, c_int64) for name in ("n_expert", "top_k", "width", "shared_width")),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("dtype", "n_layer", "n_embd", "n_head", "n_query_groups")),
        *((name, c_int64) for name in ("head_size", "rope_n_elem", "vocab")),
        *((name, c_float) for name in ("norm_eps", "attention_scale", "routed_scale")),
        ("layers", POINTER(_Layer)),
        *((name, _Matrix) for name in ("embedding", "head")),
        *((name, c_void_p) for name in ("norm", "cos", "sin")),
    )


class _Row(ctypes.Structure):
    _fields_ = (
        ("token", c_int64),
        ("position", c_int64),
        ("cache", c_void_p),
        ("capacity", c_int64),
        ("logits", c_int64),
    )


def unsupported(config: Config) -> str | None:
    """Return the first key of a configuration, with its value, that native.cpp does not compute, or None."""
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.name not in FREE_KEYS and value != KNOWN_VALUES.get(field.name, field.default):
            return f"{field.name} {value}"
    if (config.rope_n_elem or 0) % 2:  # LitGPT pairs the elements of an odd number in a way of its own
        return f"rope_n_elem {config.rope_n_elem}"
    return None if config.mlp_class_name in MLP_CLASSES else f"mlp_class_name {config.mlp_class_name}"


@dataclasses.dataclass
class NativeCache:
    """The keys and values of one sequence: (n_layer, 2, n_query_groups, capacity, head_size), float32."""

    tensor: torch.Tensor
    n_read: int = 0


class NativeDecoder:
    """Reads tokens by native.cpp, with the model's own weights; activations are float32 in every dtype."""

    name = "native"

    def __init__(self, model: GPT, quantize: bool = False) -> None:
        """Raise NoLibrary where the model, its device or this machine is none for compiled code.

        Args:
            model: on a CPU, in float32 or bfloat16. Its matrices are read where they lie; of norms and
                routers that are not in float32 there are copies.
            quantize: round each row of each matrix to 8 bits, in a copy.
        """
        weight = model.lm_head.weight
        if weight.device.type != "cpu" or weight.dtype not in DTYPES:
            raise NoLibrary(
                f"compiled code is for float32 and bfloat16 on a CPU, not {weight.dtype} on {weight.device}"
            )
        if lack := unsupported(model.config):
            raise NoLibrary(f"compiled code does not know {lack}; use --engine torch")
        self._step = load_library().decode_step
        self._step.argtypes = (POINTER(_Model), POINTER(_Row), c_int64, c_int64, c_void_p, c_void_p)
        self.model, self.block_size, self.vocab = model, model.max_seq_length, weight.size(0)
        self.quantize, self._kept = quantize, []
        self._routers = [layer.config.n_expert for layer in layers_of(model).values()]
        self._struct = self._describe(model)

    def open(self, capacity: int) -> NativeCache:
        """Return an empty cache with room for `capacity` tokens."""
        struct = self._struct
        return NativeCache(torch.empty(struct.n_layer, 2, struct.n_query_groups, capacity, struct.head_size))

    def close(self, cache: NativeCache) -> None:
        """Free the cache's memory."""
        cache.tensor = torch.empty(0)

    def read(self, work: Sequence[tuple[NativeCache, Sequence[int]]], with_routing: bool = False) -> Read:
        """Read the next tokens of each cache's sequence; see `Decoder.read`."""
        rows, logits = [], torch.empty(len(work), self.vocab)
        for place, (cache, tokens) in enumerate(work):
            data, capacity = cache.tensor.data_ptr(), cache.tensor.size(3)
            # native.cpp checks nothing: it would read and write beyond the memory
            assert cache.n_read + len(tokens) <= capacity <= self.block_size
            assert min(tokens) >= 0 and max(tokens) < self.vocab
            for number, token in enumerate(tokens):
                wanted = place if number + 1 == len(tokens) else -1
                rows.append(_Row(token, cache.n_read + number, data, capacity, wanted))
        routing = torch.empty(len(rows) * sum(self._routers)) if with_routing else None
        routing_at = None if routing is None else routing.data_ptr()
        struct, n_threads = ctypes.byref(self._struct), free_threads()
        if self._step(struct, (_Row * len(rows))(*rows), len(rows), n_threads, logits.data_ptr(), routing_at):
            raise MemoryError
        read = Read(logits, [] if routing is None else self._routing(routing, len(rows)))
        # only now: after a step that failed, the same tokens can be read again
        for cache, tokens in work:
            cache.n_read += len(tokens)
        return read

    def _routing(self, logits: torch.Tensor, n_rows: int) -> list[Routing]:
        parts = logits.split([n_rows * n_expert for n_expert in self._routers])
        found = []
        for layer, part in zip(layers_of(self.model).values(), parts, strict=True):
            logits_NE = part.view(n_rows, -1)
            weights_NK, indices_NK = layer._choose(logits_NE)
            found.append(Routing.of(logits_NE.softmax(dim=-1), weights_NK, indices_NK))
        return found

    # --- where the weights lie ---

    def _describe(self, model: GPT) -> _Model:
        transformer: Any = model.transformer
        config, attention = model.config, transformer.h[0].attn
        layers = [self._layer(block) for block in transformer.h]
        kind = torch.int8 if self.quantize else model.lm_head.weight.dtype
        scale = (config.attention_scores_scalar or attention.config.head_size) ** -0.5 * attention.mscale**2
        return _Model(
            *(DTYPES[kind], config.n_layer, config.n_embd, config.n_head, config.n_query_groups),
            *(config.head_size, config.rope_n_elem, self.vocab),
            *(config.norm_eps, scale, config.routed_scaling_factor),
            (_Layer * len(layers))(*layers),
            *(self._matrix(transformer.wte), self._matrix(model.lm_head)),
            *(self._norm(transformer.ln_f), self._floats(model.cos), self._floats(model.sin)),
        )

    def _layer(self, block: Any) -> _Layer:
        mlp, attention = block.mlp, block.attn
        has_experts = hasattr(mlp, "experts")
        shared = mlp if not has_experts else getattr(mlp, "shared_experts", None)
        experts = [*(mlp.experts if has_experts else ()), *([] if shared is None else [shared])]
        bias = self._floats(mlp.selection_bias) if has_experts and mlp.has_selection_bias else None
        maps = [self._matrices([getattr(e, name) for e in experts]) for name in ("fc_1", "fc_2", "proj")]
        return _Layer(
            *map(self._norm, (block.norm_1, block.norm_2)),
            *map(self._matrix, (attention.qkv, attention.proj)),
            *(self._floats(mlp.gate.weight) if has_experts else None, bias, *maps),
            *(
                (len(mlp.experts), mlp.config.n_expert_per_token, experts[0].fc_1.out_features)
                if has_experts
                else (0, 0, 0)
            ),
            0 if shared is None else shared.fc_1.out_features,
        )

    def _norm(self, norm: Any) -> int:
        # LitGPT adds 1 to the weights where the model's name has "Gemma" in it
        return self._floats(1 + norm.weight if norm.add_unit_offset else norm.weight)

    def _floats(self, tensor: torch.Tensor) -> int:
        return self._keep(tensor.detach().float().contiguous())

    def _matrices(self, layers: Sequence[nn.Module]) -> int:
        array = (_Matrix * len(layers))(*map(self._matrix, layers))
        self._kept.append(array)
        return ctypes.addressof(array)

    def _matrix(self, layer: nn.Module) -> _Matrix:
        weight = layer.get_parameter("weight").detach()
        if not self.quantize:
            return _Matrix(self._keep(weight.contiguous()), None)
        rounded, scale = quantize_rows(weight)
        return _Matrix(self._keep(rounded), self._keep(scale))

    def _keep(self, tensor: torch.Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()
