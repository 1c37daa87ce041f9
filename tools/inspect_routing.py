"""Show which tokens each expert takes, and how specialised the experts are, as a table, JSON and a picture.

Run: uv run python tools/inspect_routing.py checkpoints/final stories.txt      (25 s, most of it imports)

"Token tells" is the mutual information between a token and the expert it goes to, as a share of the
experts' entropy: 0 % if a word goes anywhere, 100 % if it always goes to the same. "Overlap" of two layers is
the mutual information between the experts of a token's first choice in both, over the geometric mean of their
entropies: 1 if one tells the other. What chance gives, found by shuffling, is taken off both.
"""

import argparse
import json
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litgpt_moe.cli import FlagParser

if TYPE_CHECKING:
    import numpy as np
    import torch
    from litgpt.model import GPT
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_TYPICAL = 8  # tokens named for an expert
Pieces = Callable[[int], str]  # a token's text by its id
JSON_NAME, PNG_NAME = "routing.json", "routing.png"
INK, MUTED, ACCENT = "#1f2430", "#6b7280", "#3b6ea8"


@dataclass
class Expert:
    """What one expert of a layer takes."""

    share: float
    """Of all the layer's choices, K for each token; 1 / E is even."""
    kinds: float
    """Effective number of different tokens: 2 to the entropy, in bits, of what it takes."""
    typical: list[dict[str, Any]]
    """Tokens that it takes more than its share of: piece, count, and share of the occurrences it takes."""


@dataclass
class Layer:
    """How one layer routes."""

    index: int
    load_imbalance: float
    """Largest load over the mean, 1.0 is even."""
    load_entropy: float
    """Entropy of the loads over that of even ones, 0 to 1."""
    first_weight: float
    """Mean weight of a token's first choice; 1 / K is undecided."""
    token_tells: float
    """Share of the routing that the token alone tells, 0 to 1."""
    experts: list[Expert]


# --- what the model does ------------------------------------------------------------------------------------


def record_choices(model: "GPT", ids: "np.ndarray") -> "tuple[dict[int, np.ndarray], dict[int, np.ndarray]]":
    """Return block index -> the K experts of each token, (N, K) with the first choice first, and weights."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from moe_layers import moe_layers

    experts: dict[int, list[np.ndarray]] = {}
    weights: dict[int, list[np.ndarray]] = {}

    def note(index: int, layer: Any, x: "torch.Tensor") -> None:
        _, weights_NK, indices_NK = layer._route(x.reshape(-1, x.size(-1)))
        weights_NK, order_NK = weights_NK.float().sort(dim=1, descending=True, stable=True)
        experts.setdefault(index, []).append(indices_NK.gather(1, order_NK).cpu().numpy())
        weights.setdefault(index, []).append(weights_NK.cpu().numpy())

    hooks = [
        layer.register_forward_pre_hook(lambda layer, args, index=index: note(index, layer, args[0]))
        for index, layer in moe_layers(model).items()
    ]
    device, window = model.transformer.wte.weight.device, model.max_seq_length
    try:
        with torch.inference_mode(), tqdm(total=len(ids), unit="tok", unit_scale=True, disable=None) as bar:
            for start in range(0, len(ids), window):
                part = torch.from_numpy(ids[start : start + window]).to(device)
                model(part[None])
                bar.update(len(part))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple({i: np.concatenate(parts) for i, parts in kept.items()} for kept in (experts, weights))


# --- what that tells ----------------------------------------------------------------------------------------


def entropy(counts: "np.ndarray") -> float:
    """Return the entropy, in nats, of the distribution that `counts` are of."""
    import numpy as np

    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def mutual_information(a: "np.ndarray", b: "np.ndarray", seed: int = 0) -> float:
    """Return the mutual information of two equally long sequences of small numbers, in nats, less chance's.

    Chance's is that of `a` with `b` shuffled; many kinds of tokens and few occurrences make it large.
    """
    import numpy as np

    _, a = np.unique(a, return_inverse=True)
    _, b = np.unique(b, return_inverse=True)

    def plain(b: np.ndarray) -> float:
        joint = np.bincount(a * (b.max() + 1) + b)
        return entropy(np.bincount(a)) + entropy(np.bincount(b)) - entropy(joint)

    return max(0.0, plain(b) - plain(np.random.default_rng(seed).permutation(b)))


def describe_layer(
    index: int,
    experts_NK: "np.ndarray",
    weights_NK: "np.ndarray",
    ids: "np.ndarray",
    n_expert: int,
    pieces: Pieces,
) -> Layer:
    """Return the figures of a layer."""
    import numpy as np

    kinds, kind_N = np.unique(ids, return_inverse=True)
    top_k = experts_NK.shape[1]
    flat = np.repeat(kind_N, top_k) * n_expert + experts_NK.ravel()
    counts_TE = np.bincount(flat, minlength=len(kinds) * n_expert).reshape(-1, n_expert)
    load_E = counts_TE.sum(axis=0)
    spread = entropy(load_E)
    told = mutual_information(np.repeat(ids, top_k), experts_NK.ravel())
    return Layer(
        index=index,
        load_imbalance=float(load_E.max() / load_E.mean()),
        load_entropy=spread / np.log(n_expert) if n_expert > 1 else 1.0,
        first_weight=float(weights_NK[:, 0].mean() / weights_NK.sum(axis=1).mean()),
        token_tells=min(1.0, told / spread) if spread else 0.0,
        experts=[
            Expert(
                share=float(load_E[e] / load_E.sum()),
                kinds=float(np.exp(entropy(counts_TE[:, e]))) if load_E[e] else 0.0,
                typical=typical_tokens(counts_TE, e, kinds, top_k, pieces),
            )
            for e in range(n_expert)
        ],
    )


def typical_tokens(
    counts_TE: "np.ndarray", e: int, kinds: "np.ndarray", top_k: int, pieces: Pieces
) -> list[dict[str, Any]]:
    """Return the tokens that tell most about expert `e`: the largest terms n log(n / expected)."""
    import numpy as np

    n_T, all_T = counts_TE[:, e].astype(float), counts_TE.sum(axis=1)
    expected_T = all_T * (n_T.sum() / all_T.sum())
    score_T = np.zeros_like(n_T)
    taken = n_T > expected_T
    score_T[taken] = n_T[taken] * np.log(n_T[taken] / expected_T[taken])
    best = [t for t in np.argsort(-score_T, kind="stable")[:N_TYPICAL] if score_T[t] > 0]
    return [
        {"piece": pieces(int(kinds[t])), "count": int(n_T[t]), "share": float(n_T[t] * top_k / all_T[t])}
        for t in best
    ]


def overlaps(experts: "dict[int, np.ndarray]") -> list[list[float]]:
    """Return the overlap of every layer with every layer, by the experts of the first choice."""
    import numpy as np

    first = [choices[:, 0] for choices in experts.values()]
    spread = [entropy(np.bincount(choices)) for choices in first]
    size = len(first)
    table = [[1.0] * size for _ in range(size)]
    for i in range(size):
        for j in range(i):
            scale = (spread[i] * spread[j]) ** 0.5
            shared = mutual_information(first[i], first[j]) / scale if scale else 0.0
            table[i][j] = table[j][i] = min(1.0, shared)
    return table


# --- as text and as a picture -------------------------------------------------------------------------------


def table(layers: list[Layer], shown: Layer) -> str:
    """Return the figures of all layers, and what each expert of `shown` takes."""
    lines = ["layer  max/mean load  entropy of load  first weight  token tells"]
    lines += [
        f"{layer.index:>5}  {layer.load_imbalance:>13.2f}  {layer.load_entropy:>15.3f}"
        f"  {layer.first_weight:>12.2f}  {layer.token_tells:>11.0%}"
        for layer in layers
    ]
    lines += ["", f"layer {shown.index}: what each expert takes (of the piece's occurrences)"]
    lines += ["expert   load   kinds  most typical"]
    for e, expert in enumerate(shown.experts):
        typical = "  ".join(f"{token['piece']} {token['share']:.0%}" for token in expert.typical)
        lines.append(f"{e:>6} {expert.share:>6.1%} {expert.kinds:>7.0f}  {typical or '-'}")
    return "\n".join(lines)


def draw(title: str, layers: list[Layer], table_LL: list[list[float]], shown: Layer) -> "Figure":
    """Return the picture: load and overlap above, the typical tokens of `shown` and what tells below."""
    import matplotlib
    from matplotlib.figure import Figure

    n_layer, n_expert = len(layers), len(shown.experts)
    left, above, below = max(6.5, 0.42 * n_expert), max(2.6, 0.42 * n_layer), max(2.6, 0.27 * n_expert)
    colours = {"text.color": INK, "axes.labelcolor": MUTED, "xtick.color": MUTED, "ytick.color": MUTED}
    with matplotlib.rc_context({**colours, "font.size": 9, "axes.edgecolor": "#c8ccd2"}):
        figure = Figure(figsize=(left + 4.6, above + below + 1.6), layout="constrained", dpi=130)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False)
        ratios = {"width_ratios": (left, 3.6), "height_ratios": (above, below)}
        ((load, overlap), (tokens, tells)) = figure.subplots(2, 2, gridspec_kw=ratios)
        _draw_load(figure, load, layers)
        _draw_overlap(figure, overlap, layers, table_LL)
        _draw_tokens(tokens, shown)
        _draw_tells(tells, layers, shown)
    return figure


def _head(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, parse_math=False)


def _draw_load(figure: "Figure", axes: "Axes", layers: list[Layer]) -> None:
    import numpy as np

    n_expert = len(layers[0].experts)
    load_LE = np.array([[expert.share * n_expert for expert in layer.experts] for layer in layers])
    shade_LE = np.log2(load_LE.clip(0.125, 8))
    limit = max(1.0, float(np.abs(shade_LE).max()))
    image = axes.imshow(shade_LE, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    _head(axes, "Load: share of the tokens, times even")
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_yticks(range(len(layers)), [layer.index for layer in layers])
    axes.set_xticks(range(n_expert) if n_expert <= 40 else range(0, n_expert, 8))
    if n_expert <= 40:
        for (y, x), value in np.ndenumerate(load_LE):
            ink = "white" if abs(shade_LE[y, x]) > 0.65 * limit else INK
            axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=7, color=ink)
    bar = figure.colorbar(image, ax=axes, pad=0.01, aspect=30)
    ticks = [t for t in (-3, -2, -1, 0, 1, 2, 3) if abs(t) <= limit]
    bar.set_ticks(ticks, labels=[f"{2.0**t:g}" for t in ticks])
    bar.outline.set_visible(False)


def _draw_overlap(figure: "Figure", axes: "Axes", layers: list[Layer], table_LL: list[list[float]]) -> None:
    import numpy as np

    values = np.array(table_LL)
    image = axes.imshow(np.ma.masked_where(np.eye(len(values), dtype=bool), values), cmap="Blues", vmin=0.0)
    others = values[~np.eye(len(values), dtype=bool)]
    image.set_clim(0, max(0.2, float(others.max(initial=0))))
    _head(axes, "Overlap of first choices")
    names = [layer.index for layer in layers]
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="layer")
    if len(names) <= 8:
        for (y, x), value in np.ndenumerate(values):
            ink = "white" if value > 0.6 * image.get_clim()[1] else INK
            if y != x:
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
    figure.colorbar(image, ax=axes, pad=0.02, aspect=30).outline.set_visible(False)


def _draw_tokens(axes: "Axes", shown: Layer) -> None:
    """Write the typical tokens, the more of their occurrences come here the darker."""
    _head(axes, f"Layer {shown.index}: most typical tokens of each expert (darker: more of them go there)")
    n_expert = len(shown.experts)
    axes.set(xlim=(0, N_TYPICAL), ylim=(n_expert - 0.5, -0.5), ylabel="expert", xticks=[])
    axes.set_yticks(range(n_expert))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    for e, expert in enumerate(shown.experts):
        for place, token in enumerate(expert.typical):
            style = {"boxstyle": "round,pad=0.25", "facecolor": ACCENT, "alpha": 0.08 + 0.62 * token["share"]}
            axes.text(
                *(place + 0.05, e),
                token["piece"][:12],
                va="center",
                fontsize=8,
                parse_math=False,
                bbox={**style, "edgecolor": "none"},
            )


def _draw_tells(axes: "Axes", layers: list[Layer], shown: Layer) -> None:
    names = [str(layer.index) for layer in layers]
    colours = [ACCENT if layer is shown else "#a9bfd6" for layer in layers]
    bars = axes.barh(names, [100 * layer.token_tells for layer in layers], color=colours, height=0.55)
    axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8)
    _head(axes, "How much the token alone tells")
    axes.set(xlabel="% of the experts' entropy", ylabel="layer", xlim=(0, 110))
    axes.set_xticks(range(0, 101, 25))
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)


# --- the command line ---------------------------------------------------------------------------------------


def piece_text(piece: str | None, number: int) -> str:
    """Return a token's piece as it can be shown: line breaks escaped, a number for what has none."""
    return repr(piece)[1:-1] if piece else f"#{number}"


def inspect(args: argparse.Namespace) -> "tuple[str, dict[str, Any], Figure]":
    """Return the table, what goes into the JSON, and the picture.

    Raises:
        ValueError: one sentence on what is wrong with the checkpoint or the text.
    """
    from evaluate import take_off_head, text_corpus
    from generate import read_tokenizer
    from moe_layers import find_checkpoint, load_model, moe_layers, pick_device, verify_checkpoint

    device, dtype = pick_device(args.device, args.precision)
    folder = find_checkpoint(args.checkpoint)
    verify_checkpoint(folder)
    processor = read_tokenizer(folder).processor
    corpus = text_corpus([args.text], folder)
    model = load_model(folder, device, dtype)
    if not moe_layers(model):
        raise ValueError(f"{folder}: the model has no experts; tools/upcycle.py makes some of a dense model")
    if args.layer is not None and args.layer not in moe_layers(model):
        known = ", ".join(map(str, moe_layers(model)))
        raise ValueError(f"layer is {args.layer}; {folder} has experts in the layers {known}")
    ids = corpus.read(0, min(args.max_tokens, corpus.n_tokens))
    if ids.max() >= model.config.padded_vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer is not the model's (token {ids.max():,}); copy in the right one"
        )
    take_off_head(model)  # its logits, half of the work in a small model, are not wanted
    experts, weights = record_choices(model, ids)
    n_expert = model.config.n_expert

    def pieces(number: int) -> str:
        return piece_text(processor.id_to_token(number), number)

    layers = [describe_layer(i, experts[i], weights[i], ids, n_expert, pieces) for i in experts]
    most = max(layers, key=lambda layer: layer.token_tells)
    shown = next((layer for layer in layers if layer.index == args.layer), most)
    shared = overlaps(experts)
    content = {"checkpoint": str(folder), "text": str(args.text), "n_tokens": len(ids), "n_expert": n_expert}
    content |= {"n_expert_per_token": model.config.n_expert_per_token, "overlap": shared}
    content["layers"] = [asdict(layer) for layer in layers]
    title = f"{model.config.name}: how {len(ids):,} tokens of {args.text.name} are routed"
    return table(layers, shown), content, draw(title, layers, shared, shown)


def check_args(args: argparse.Namespace) -> None:
    """Raise ValueError or OSError for what can be refused before the imports."""
    from importlib.util import find_spec

    if args.max_tokens < 2:
        raise ValueError(f"max_tokens is {args.max_tokens}; choose 2 or more")
    if find_spec("matplotlib") is None:
        raise ValueError("the package matplotlib is not installed; run uv sync --extra report")
    if not args.text.is_file():
        raise FileNotFoundError(f"{args.text}: no such text file")
    if args.out.exists() and not args.out.is_dir():
        raise FileExistsError(f"{args.out} is a file; name a folder")
    for path in (args.out / JSON_NAME, args.out / PNG_NAME):
        if path.exists() and not args.overwrite:
            raise FileExistsError(f"{path} exists; add --overwrite or name another --out")


def write(out: Path, content: dict[str, Any], figure: "Figure") -> None:
    """Write both files whole to the folder `out`, which is made."""
    from litgpt_moe.files import open_whole

    out.mkdir(parents=True, exist_ok=True)
    with open_whole(out / JSON_NAME) as file:
        file.write(json.dumps(content, indent=1, ensure_ascii=False).encode())
    with open_whole(out / PNG_NAME) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a script that the font lacks becomes boxes
        figure.savefig(file, format="png", facecolor="white")


def run(args: argparse.Namespace) -> list[str]:
    """Do what the flags say and return what to print. Raises ValueError or OSError with one sentence."""
    check_args(args)
    text, content, figure = inspect(args)
    write(args.out, content, figure)
    return [
        text,
        f"\nWrote {args.out / JSON_NAME} (all layers) and {args.out / PNG_NAME}",
        "Next: look at the picture; --layer N --overwrite lists the experts of another layer",
    ]


def main(argv: list[str] | None = None) -> int:
    """Return the exit status: 0, 1 for failed work, 2 for bad input, 130 after Ctrl-C."""
    parser = FlagParser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, help="a checkpoint directory, or an out_dir (then its final or newest)")
    add("text", type=Path, help="UTF-8 text, stories separated by a line <|endoftext|>")
    add(
        "--out",
        type=Path,
        default=Path("routing"),
        help=f"folder for {JSON_NAME} and {PNG_NAME} (%(default)s)",
    )
    add("--layer", type=int, help="layer whose experts are listed (default: the most specialised)")
    add("--max_tokens", type=int, default=20_000, help="tokens of the text to read (default %(default)s)")
    add("--overwrite", action="store_true", help="replace the files of an earlier run")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu, cuda, cuda:1, ...")
    add(
        "--precision",
        default="auto",
        help="auto (bf16-true on CUDA, else 32-true), 32-true, bf16-true, 16-true",
    )
    args = parser.parse_args(argv)
    from litgpt_moe.cli import run_command

    return run_command(lambda: "\n".join(run(args)))


if __name__ == "__main__":
    raise SystemExit(main())
