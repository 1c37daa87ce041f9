"""The playground in a real browser: what a reader does and sees. Skips where there is no Chromium."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until
from helpers.browser import PROGRAM, Browser
from helpers.server import Running, complete, serving, start_server

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
    assert state.startswith("20 tokens") and state.endswith(" · max_tokens reached")
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
        browser.js("$('stop').focus()")
        browser.click("$('stop')")
        wait_until(lambda: server.engine.n_running == 0)
        browser.wait(DONE)
        assert browser.js("document.activeElement.id") == "start"  # Stop is disabled now
        assert browser.js("samples[0].state.textContent").endswith(" · stopped")
        (story,) = browser.js(STORIES)
        assert story.startswith("Once upon a time")
    browser.js("start()")
    browser.wait(f"{TOLD} === 'The server does not answer. Is it still running?'")
    assert browser.js(STORIES) == [story]


def test_a_refused_request_leaves_the_stories_and_leads_to_the_field(
    browser: Browser, server: Running
) -> None:
    told(browser, server)
    before = browser.js(STORIES)
    for name, wrong, right in (("top_p", 5, 1), ("seed", "five", 5), ("prompt", "Tom went " * 40, "Tom")):
        browser.fill(**{name: wrong})
        browser.js("start()")
        browser.wait(f"abort === null && {TOLD}")
        focused = "[document.activeElement.name, document.activeElement.getAttribute('aria-invalid')]"
        assert browser.js(focused) == [name, "true"] and browser.js(STORIES) == before
        browser.fill(**{name: right})
    browser.js("start()")
    browser.wait(f"{DONE} && {STORIES}[0].startsWith('Tom') && {TOLD} === ''")
    assert browser.js("document.querySelector('[aria-invalid]')") is None
    assert browser.js("tellings.length") == 2


@pytest.mark.slow
def test_a_server_that_is_killed_half_way_leaves_what_it_wrote(browser: Browser, chatterbox: Path) -> None:
    process, url = start_server(chatterbox, "--port=0", "--max_tokens=4000")
    browser.open_url(url)
    browser.js("void start()")
    browser.wait("samples.length && samples[0].reads.length > 20")
    process.kill()
    process.communicate(timeout=60)
    browser.wait(f"{DONE} && {TOLD}.startsWith('The connection to the server broke off')")
    (story,) = browser.js(STORIES)
    assert story.startswith("Once upon a time") and len(story) > 20
    assert browser.js("samples[0].state.textContent").endswith(" · broken off")
    browser.js("start()")
    browser.wait(f"{TOLD} === 'The server does not answer. Is it still running?'")
    assert browser.js(STORIES) == [story] and browser.js("tellings.length") == 1


def test_earlier_stories_come_back_with_their_colours_and_outlive_a_reload(
    browser: Browser, server: Running
) -> None:
    told(browser, server)
    first, colours = browser.js(STORIES), browser.js(COLOURS.format(".token"))
    browser.fill(prompt="Tom went", n=2, seed=7)
    browser.js("start()")
    browser.wait(DONE)
    second = browser.js(STORIES)
    assert len(second) == 2 and browser.js("$('past').querySelectorAll('li').length") == 2
    browser.click("$('past').querySelectorAll('button')[1]")
    assert browser.js(STORIES) == first and browser.js(COLOURS.format(".token")) == colours
    assert browser.js("document.activeElement.className") == "story"
    browser("Page.reload")
    browser.wait("typeof $ === 'function' && model && tellings.length === 2")
    browser.click("$('past').querySelectorAll('button')[0]")
    assert browser.js(STORIES) == second
    assert browser.js("$('repeat').lastElementChild.textContent").count("--prompt 'Tom went' --seed 7") == 1
    assert browser.js(TEXTS.format(".sample header button")) == ["seed 7", "seed 8"]
    assert browser.problems == []


def test_the_stories_are_saved_as_files_that_prepare_data_reads(
    browser: Browser, server: Running, tmp_path: Path
) -> None:
    told(browser, server)
    browser.fill(prompt="Tom went", n=2, seed=7)
    browser.js("start()")
    browser.wait(DONE)
    expected = browser.js("tellings.flatMap(({samples}) => samples.map(({text}) => text))")
    browser("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for button, name in (("astext", "stories.txt"), ("asrows", "stories.jsonl")):
        browser.click(f"$('{button}')")
        wait_until((tmp_path / name).is_file)
    text = (tmp_path / "stories.txt").read_text("utf-8").removesuffix("\n")
    rows = [json.loads(line) for line in (tmp_path / "stories.jsonl").read_text("utf-8").splitlines()]
    assert text.split("\n<|endoftext|>\n") == [row["text"] for row in rows] == expected
    assert [row["seed"] for row in rows] == [5, 7, 8] and rows[2]["prompt"] == "Tom went"
    assert rows[0]["checkpoint"] == str(server.engine.served.settings.ckpt_dir)
    assert browser.problems == []


def test_on_a_phone_the_story_comes_first_and_the_prompt_stays_in_reach(
    browser: Browser, server: Running
) -> None:
    browser.open(server, 390)
    browser.fill(n=4)
    browser.js("start()")
    browser.wait(DONE)
    top = "Math.round({}.getBoundingClientRect().top)"
    places = [top.format(f"$('{name}')") for name in ("samples", "routing", "repeat", "past")]
    tops = browser.js(f"[{', '.join(places)}]")
    assert tops == sorted(tops) and 0 <= tops[0] < 30  # the stories are scrolled to, and stay there
    box = browser.js("form.getBoundingClientRect().toJSON()")
    assert box["bottom"] == 800 and box["top"] > 400  # of a window 800 high
    assert box["width"] == browser.js("document.documentElement.clientWidth")


def test_text_from_right_to_left_is_laid_out_and_walked_that_way(browser: Browser, server: Running) -> None:
    browser.open(server)
    browser.fill(prompt="\u05d0\u05d1 \u05d2\u05d3", n=1, seed=5)
    browser.js("start()")
    browser.wait(DONE)
    for where in ("$('prompt')", "document.querySelector('.story')"):
        assert browser.js(f"getComputedStyle({where}).direction") == "rtl"
    browser.js("document.querySelector('.story').focus()")
    at = "[...document.querySelectorAll('.token')].findIndex((e) => e.classList.contains('at'))"
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.js(at) == 1
    browser.press("ArrowRight")
    assert browser.js(at) == 0


def test_what_is_shown_is_also_said(browser: Browser, server: Running) -> None:
    reads = [read for read in told(browser, server) if read["text"]]
    said = "$('said').textContent"
    assert browser.js("$('said').getAttribute('role')") == "status"
    assert browser.js(said).startswith("The story has ended: 20 tokens")
    browser.js("document.querySelector('.story').focus()")
    browser.press("ArrowRight")
    first, second = reads[0]["experts"][1]
    assert browser.js(said).endswith(
        f"went to experts {first} and {second}: "
        f"{reads[0]['probs'][1][first] / 10:.1f}%, {reads[0]['probs'][1][second] / 10:.1f}%"
    )


def test_the_tab_has_an_icon(browser: Browser, server: Running) -> None:
    browser.open(server)
    code = """(async () => {
      const icon = new Image();
      icon.src = document.querySelector("link[rel=icon]").href;
      await icon.decode();
      return icon.naturalWidth > 0;
    })()"""
    assert browser.js(code) and browser.problems == []


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
