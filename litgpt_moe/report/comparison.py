"""comparison.html: the figures, verdicts and curves of models that were trained side by side, in one page."""

import math
from html import escape
from typing import Any

from litgpt_moe.report.charts import Series, axis_number, line_chart

Content = dict[str, Any]
MATCHES = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds of training on this machine"}
HEAD = ("model", "parameters", "active", "FLOPs a token", "tokens", "FLOPs", "seconds", "learning rate")
HEAD += ("loss, nats a token", "bits a byte")
LOSS = "validation loss, nats a token"
STYLE = """
:root { color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }
body { margin: 0 auto; padding: 16px 20px 40px; max-width: 1300px; }
h1 { font-size: 1.3rem; } h2 { font-size: 1rem; margin-top: 2em; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 5px 9px; border-top: 1px solid #8884; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; }
.charts { display: grid; gap: 20px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 480px), 1fr)); }
svg { width: 100%; } .soft { opacity: .7; font-size: .87rem; }
"""


def comparison_page(content: Content) -> str:
    """Return the page of what comparison.json holds; it needs no network, no script and no other file."""
    models, runs = content["models"], f"{content['seeds']} seeds"
    left = f", {content['missing']} runs still missing" if content["missing"] else ""
    title = f"Models at equal {MATCHES[content['match']]}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Budget {axis_number(content["budget"])} {MATCHES[content["match"]]}, {runs} from '
        f"{content['first_seed']} on{left}. Scores are of the whole validation split.</p>",
        _table(models),
        *_notes(content),
        "<h2>Verdicts</h2>",
        *(f"<p>{escape(verdict['text'])}</p>" for verdict in content["verdicts"]),
        '<p class="soft">A difference is the mean over the seeds of the model minus its reference, with its '
        "95% interval (paired t): with the same seed both see the same batches, unless a warning says that "
        "they do not. The factors are read from the curves: the better model passed the other's last loss so "
        "much earlier. In brackets is the range of that of the seconds, over the measured rounds.</p>",
        "<h2>Curves</h2>",
        f'<div class="charts">{"".join(_charts(models))}</div>',
        *_sweeps(content["sweeps"]),
        "<h2>Machine and command</h2>",
        f"<p><code>{escape(str(content['command']))}</code></p>",
        f'<p class="soft">{escape(_machine(content))}</p>',
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="generator" content="tools/compare.py">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _table(models: list[Content]) -> str:
    rows = ["".join(f"<th>{escape(name)}</th>" for name in HEAD)]
    for model in models:
        seconds = "-" if model["seconds"] is None else f"{model['seconds']:,.0f}"
        cells = [
            model["name"],
            f"{model['total_params']:,}",
            f"{model['active_params']:,}",
            f"{model['flops_per_token']:,}",
            f"{model['tokens']:,}",
            f"{model['flops']:.4g}",
            seconds if model["is_measured_side_by_side"] else f"{seconds} as run",
            _rate(model["lr"], model["lr_is_at_edge"]),
            *(_spread(model[key], bool(model["failed"])) for key in ("loss", "bits_per_byte")),
        ]
        rows.append("".join(f"<td>{escape(cell)}</td>" for cell in cells))
    return f'<div class="scroll"><table>{"".join(f"<tr>{row}</tr>" for row in rows)}</table></div>'


def _notes(content: Content) -> list[str]:
    """Return what failed, where the runs are from if that differs, and the warnings."""
    failed = [
        f"{model['name']}, {what} failed: {why}"
        for model in content["models"]
        for what, why in model["failed"].items()
    ]
    origin = [f"These are {content['provenance']}: see comparison.json."] if content["provenance"] else []
    return [f"<p>{escape(text)}</p>" for text in (*failed, *origin, *content["warnings"])]


def _rate(rate: float | None, is_at_edge: bool) -> str:
    if rate is None:
        return "-"
    return f"{rate:g}{' (at the edge of those tried)' if is_at_edge else ''}"


def _spread(value: Content | None, is_failed: bool) -> str:
    if value is None:
        return "failed" if is_failed else "not run yet"
    sd = "" if value["sd"] is None else f" ± {value['sd']:.4f}"
    return f"{value['mean']:.4f}{sd} (n = {value['n']})"


def _charts(models: list[Content]) -> list[str]:
    """Return a chart over tokens, one over FLOPs, one over seconds, and one over the number of experts."""
    charts = [curve_chart(models, unit) for unit in ("tokens", "FLOPs", "seconds")]
    # dense is one expert
    points = [(max(1, model["n_expert"]), model["loss"]["mean"]) for model in models if model["loss"]]
    if len({n_expert for n_expert, _ in points}) > 2:
        experts = [Series("loss at the end", sorted(points))]
        charts.append(line_chart(experts, "experts (1: dense)", LOSS, log_x=True, dots=True))
    return charts


def curve_chart(models: list[Content], unit: str) -> str:
    """Return the chart of the validation losses over tokens, FLOPs or seconds, as SVG."""
    series = []
    for model in models:
        seconds = (model["seconds"] or math.nan) / model["tokens"]
        per_token = {"tokens": 1.0, "FLOPs": model["flops_per_token"], "seconds": seconds}[unit]
        series.append(Series(model["name"], [(at * per_token, loss) for at, loss in model["curve"]]))
    is_as_run = unit == "seconds" and not all(model["is_measured_side_by_side"] for model in models)
    return line_chart(series, f"{unit}, as run" if is_as_run else unit, LOSS, log_x=True)


def sweep_chart(sweeps: list[Content]) -> str:
    """Return the chart of losses by learning rate, as SVG."""
    lines = []
    for one in sweeps:
        points = [(float(rate), loss) for rate, loss in one["losses"].items() if loss is not None]
        lines.append(Series(one["name"], sorted(points)))
    return line_chart(lines, "learning rate", "loss on the validation split", log_x=True, dots=True)


def _sweeps(sweeps: list[Content]) -> list[str]:
    if not sweeps:
        return []
    rates = [_rate(one["best"], one["is_at_edge"]) for one in sweeps]
    pairs = zip(sweeps, rates, strict=True)
    found = ", ".join(f"{one['name']} {rate} ({one['tokens']:,} tokens each)" for one, rate in pairs)
    return [
        "<h2>Learning rates</h2>",
        f"<p>Found by short runs of each model over the same grid: {escape(found)}.</p>",
        f'<div class="charts">{sweep_chart(sweeps)}</div>',
    ]


def _machine(content: Content) -> str:
    machine = ", ".join(f"{key} {value}" for key, value in content["machine"].items())
    load = content["load_of_others_while_measured"]
    busy = "" if load is None else f"; other programs used {load} cores while the speeds were measured"
    return f"{machine}; commit {content.get('commit', 'unknown')}{busy}"
