"""Make the pictures of README.md from a real run of the demo: docs/report.webp and docs/playground.webp.

Run: PYTHONPATH=tests uv run python docs/make_pictures.py     (5 minutes on two CPU cores; needs Chromium)

Make them anew when a page looks different. `--run FOLDER` takes a demo run that is there already, in
FOLDER/checkpoints; tests/helpers has the browser.
"""

import argparse
import base64
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helpers.browser import Browser

ROOT = Path(__file__).parents[1]
MAX_BYTES = 150_000
SCALE = 1.5  # pixels of the picture for each of the page's, so that letters stay sharp on most screens
DEMO = ("--model_config", ROOT / "configs/demo_model.yaml", "--config", ROOT / "configs/demo_train.yaml")


def run(folder: Path, script: str, *args: object) -> None:
    """Run one of the project's scripts in a folder."""
    subprocess.run([sys.executable, ROOT / script, *map(str, args)], cwd=folder, check=True)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve the model of the run; yield the address of the playground."""
    command = [sys.executable, str(ROOT / "generate.py"), "--serve", "--port=0"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            yield next(line.split()[1] for line in process.stderr if line.startswith("playground "))
        finally:
            # also after an error: Popen waits for the end of the process
            process.terminate()


def show(browser: Browser, url: str, is_ready: str) -> None:
    """Open a page in a window without scroll bars, and wait until it is ready."""
    size = {"width": 1200, "height": 860, "deviceScaleFactor": SCALE, "mobile": False}
    browser("Emulation.setDeviceMetricsOverride", **size)
    browser("Emulation.setScrollbarsHidden", hidden=True)
    light = {"name": "prefers-color-scheme", "value": "light"}
    browser("Emulation.setEmulatedMedia", features=[light])
    browser("Page.navigate", url=url)
    browser.wait(f"typeof $ === 'function' && {is_ready}")


def take(browser: Browser, out: Path) -> None:
    """Write what the window shows, as well as it can be in MAX_BYTES."""
    for quality in range(90, 0, -10):
        answer = browser("Page.captureScreenshot", format="webp", quality=quality)
        picture = base64.b64decode(answer["data"])
        if len(picture) <= MAX_BYTES:
            break
    out.write_bytes(picture)
    print(f"{out}: {len(picture):,} bytes at quality {quality}")


def make_pictures(folder: Path, browser: Browser, out: Path) -> None:
    """Make both pictures, in the folder `out`, from the run in a folder."""
    run(folder, "evaluate.py", "--results_file", "results.jsonl")
    run(folder, "tools/report.py", "checkpoints")
    show(browser, (folder / "report.html").as_uri(), "document.readyState === 'complete'")
    take(browser, out / "report.webp")
    with serving(folder) as url:
        show(browser, url, "model !== null")
        browser.fill(prompt="One day, a little dog", n=2, seed=3)
        browser.js("void start()")
        browser.wait("samples.length === 2 && abort === null")
        browser.js("showTip(document.querySelectorAll('.token')[30])")
        take(browser, out / "playground.webp")


def main() -> None:
    """Train the demo, unless there is one, and make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--run", type=Path, help="folder with a demo run in checkpoints/ (default: train one)"
    )
    given = parser.parse_args().run
    with tempfile.TemporaryDirectory() as scratch:
        folder = given or Path(scratch)
        if given is None:
            run(folder, "run_train.py", *DEMO)
        browser = Browser(Path(scratch) / "profile")
        try:
            make_pictures(folder.resolve(), browser, ROOT / "docs")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
