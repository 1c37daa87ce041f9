"""The bar of a run on a terminal: what it does now, how far it is, its losses, and the time left."""

import sys
import time
from typing import Any

from tqdm import tqdm

from litgpt_moe.terminal import Ticker, has_colour


class _LiveBar(tqdm):
    """tqdm's bar with the losses, which stand before the times: a narrow terminal cuts the end."""

    losses = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "losses": self.losses}


class RunBar:
    """Shows a run from before its first step, when most of the waiting is, to its end."""

    def __init__(self, total: float, done: float, doing: str, is_timed: bool = False) -> None:
        """Show the bar at `done` of `total` tokens, or seconds where the learning rate follows the clock."""
        speed = "" if is_timed else ", {rate_noinv_fmt}"
        self.bar = _LiveBar(
            desc=f"{doing}: ",
            total=total,
            initial=done,
            unit=" tokens",
            unit_scale=True,
            bar_format="{desc}{percentage:3.0f}%|{bar}| {losses}[{elapsed}<{remaining}" + speed + "]",
            dynamic_ncols=True,
            colour="green" if has_colour(sys.stderr) else None,
        )
        self.has_trained = False
        self._ticker = Ticker(self.bar)

    def show(self, doing: str) -> None:
        """Say what the run does now; an empty text means training."""
        if not doing:
            # validating and saving take none of the time of steps, by which tqdm measures the speed
            self.bar.last_print_t = time.time()
        self.bar.set_description_str(f"{doing}: " if doing else "")

    def set_losses(self, latest: dict[str, float]) -> None:
        """Show the latest losses."""
        names = {"loss": "loss", "val_loss": "val"}
        texts = [f"{name} {latest[key]:.3f}" for key, name in names.items() if key in latest]
        self.bar.losses = ", ".join(texts) + " " if texts else ""

    def advance(self, done: float) -> None:
        """Move on to `done` after a step. The first one is slow, and does not count for the speed."""
        if self.has_trained:
            self.bar.update(done - self.bar.n)
            return
        self.has_trained = True
        self.bar.n = self.bar.last_print_n = done
        self.show("")

    def close(self) -> None:
        """Leave the bar as it is."""
        self._ticker.stop()
