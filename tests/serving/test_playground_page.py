"""The playground in a real browser: what a reader does and sees. Skips where there is no Chromium."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until
from helpers.browser import PROGRAM, Browser
from helpers.server import Running, complete, serving

pytestmark = [
    pytest.mark.usefixtures("eager"),
    pytest.mark.skipif(PROGRAM is None or os.name != "posix", reason="no Chromium here"),
]
WCAG_AA = 4.5  # contrast of text and its background, WCAG 2.2, 1.4.3
CONTRASTS = """
(() => {
  const canvas = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d");
  const luminance = (colour) => {
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll("#legend b")].map((chip) => {
    const style = getComputedStyle(chip);
    const [low, high] = [luminance(style.color), luminance(style.backgroundColor)].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05);
  });
})()
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[Running]:
    with serving(tiny_checkpoint, "--max_tokens=20") as server:
        yield server


TEXTS = "[...document.querySelectorAll('{}')].map((e) => e.textContent)"
COLOURS = "[...document.querySelectorAll('{}')].map((e) => getComputedStyle(e).backgroundColor)"
STORIES = TEXTS.format(".story")
TOLD = "document.querySelector('#error').textContent"
DONE = "samples.length > 0 && abort === null"


def test_ctrl_enter_tells_the_stories_that_the_server_has_for_the_seed(
    browser: Browser, server: Running
) -> None:
    browser.open(server)
    assert browser.js("field('prompt').value") == "Once upon a time"
    browser.fill(prompt="Tom went", n=3, seed=5, temperature=1.2, top_p=0.9)
    browser.js("field('prompt').focus()")
    browser.press("Enter", modifiers=2)
    browser.wait(DONE)
    answer = complete(server, "Tom went", n=3, seed=5, temperature=1.2, top_p=0.9, echo=True)
    assert browser.js(STORIES) == [choice.text for choice in answer.choices]
    state = browser.js("samples[0].state.textContent")
    assert state.startswith("20 tokens, ") and state.endswith(" · max_tokens reached")
    command = browser.js("$('repeat').lastElementChild.textContent")
    assert command.startswith(
        f"uv run python generate.py --ckpt_dir {server.engine.served.settings.ckpt_dir} --prompt"
    )
    assert command.endswith(
        "--prompt 'Tom went' --seed 5 --num_samples 3 --max_tokens 20 --temperature 1.2 --top_k 50 "
        "--top_p 0.9 --min_p 0 --repetition_penalty 1"
    )
    assert browser.problems == []


def told(browser: Browser, server: Running) -> list[dict]:
    """Have the page tell a story, and return the routing that the API tells of the same one."""
    browser.open(server)
    browser.fill(seed=5)
    browser.js("start()")
    browser.wait(DONE)
    return complete(server, "Once upon a time", seed=5, echo=True, routing=True).choices[0].routing


def test_tokens_wear_their_experts_colour_in_the_chosen_layer(browser: Browser, server: Running) -> None:
    reads = told(browser, server)
    colours = browser.js(COLOURS.format("#legend b"))
    assert len(set(colours)) == 4
    worn = COLOURS.format(".token")
    for layer in (0, 1):
        browser.js(f"$('layer').value = {layer}; $('layer').onchange()")
        assert browser.js(worn) == [colours[read["experts"][layer][0]] for read in reads if read["text"]]
        counts = [sum(e in read["experts"][layer] for read in reads) for e in range(4)]
        shares = browser.js(TEXTS.format("#legend span"))
        assert shares == [f"{100 * count / sum(counts):.1f}%" for count in counts]
    browser.js("$('layer').value = -1; $('layer').onchange()")
    assert set(browser.js(worn)) == {"rgba(0, 0, 0, 0)"}
    assert browser.problems == []


def test_a_token_under_the_mouse_or_the_arrow_keys_tells_all_probabilities(
    browser: Browser, server: Running
) -> None:
    reads = told(browser, server)
    reads = [read for read in reads if read["text"]]
    rows, chosen = TEXTS.format("#tip .expert span"), TEXTS.format("#tip .chosen b")
    for read, reach in ((reads[3], "mouse"), (reads[0], "key"), (reads[1], "key")):
        if reach == "mouse":
            browser.click("document.querySelectorAll('.token')[3]", press=False)
        elif read is reads[0]:
            browser.js("hideTip(); document.querySelector('.story').focus()")
        if reach == "key":
            browser.press("ArrowRight")
        assert browser.js(rows) == [f"{prob / 10:.1f}%" for prob in read["probs"][1]]
        assert browser.js(chosen) == [str(e) for e in sorted(read["experts"][1])]
    browser.press("Escape")
    assert browser.js("$('tip').hidden")


def test_errors_are_shown_in_the_page(browser: Browser, server: Running) -> None:
    browser.open(server)
    for values, message in [
        ({"temperature": -1}, "temperature is -1.0; choose 0 (greedy) or 0.001 or more"),
        ({"temperature": 1, "prompt": "Tom went " * 40}, "the model's block_size is 64"),
        ({"prompt": "Tom", "seed": "five"}, "seed is five; it must be a number."),
    ]:
        browser.fill(**values)
        browser.click("$('start')")
        browser.wait(f"!$('error').hidden && {TOLD}.includes({json.dumps(message)})")
    browser.fill(seed="")
    browser.click("$('start')")
    browser.wait(f"{DONE} && $('error').hidden")


def test_stop_frees_the_slot_and_keeps_the_text(browser: Browser, chatterbox: Path) -> None:
    with serving(chatterbox, "--max_tokens=4000") as server:
        browser.open(server)
        browser.js("void start()")
        browser.wait("samples.length && samples[0].reads.length > 20")
        assert server.engine.n_running == 1
        browser.click("$('stop')")
        wait_until(lambda: server.engine.n_running == 0)
        browser.wait(DONE)
        assert browser.js("samples[0].state.textContent").endswith(" · stopped")
        assert browser.js(STORIES)[0].startswith("Once upon a time")
    browser.js("start()")
    browser.wait(f"{TOLD} === 'The server does not answer. Is it still running?'")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_it_fits_the_window_and_every_colour_is_readable(
    width: int, scheme: str, browser: Browser, server: Running
) -> None:
    browser.open(server, width, scheme)
    browser.fill(n=4)
    browser.js("showExperts({n_expert: 64, layers: [0, 1]})")  # more colours than the tiny model needs
    browser.js("start()")
    browser.wait(DONE)
    contrasts = browser.js(CONTRASTS)
    assert len(contrasts) == 68 and min(contrasts) >= WCAG_AA
    assert browser.js("document.documentElement.scrollWidth === document.documentElement.clientWidth")
    assert browser.js("getComputedStyle(document.documentElement).backgroundColor") == (
        "rgb(246, 246, 243)" if scheme == "light" else "rgb(20, 22, 26)"
    )


def test_what_the_model_writes_is_text_and_no_html(browser: Browser, server: Running) -> None:
    browser.open(server)
    browser.fill(prompt="<img src=x onerror=alert(1)> Tom", n=1)
    browser.js("start()")
    browser.wait(DONE)
    assert browser.js(STORIES)[0].startswith("<img src=x onerror=alert(1)> Tom")
    assert browser.js("document.images.length") == 0 and browser.problems == []
