"""generate.py --serve: a real server and OpenAI's own client, the command, and what other sites get."""

import http.client
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from conftest import SENTENCE, wait_until
from helpers.server import Running, complete, post, serving, start_server

from generate import main
from litgpt_moe.serving import engine

pytestmark = pytest.mark.usefixtures("eager")
SMILE = "Tom \N{GRINNING FACE} saw a cat."


# --- what the clients get -----------------------------------------------------------------------------------


def test_the_models_are_listed_as_openai_lists_them(tiny: Running) -> None:
    (model,) = tiny.client.models.list()
    assert (model.id, model.object, model.max_model_len) == ("MoE-tiny", "model", 64)
    assert model.routing == {
        "layers": [0, 1],
        "n_expert": 4,
        "n_expert_per_token": 2,
        "scores": "softmax",
    }
    assert tiny.client.models.retrieve("MoE-tiny") == model
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' is here"):
        tiny.client.models.retrieve("gpt")


def test_every_sample_is_the_command_lines_for_the_same_seed(
    tiny: Running, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt=Tom", "--max_tokens=20", "--seed=5", "--num_samples=3", "--top_p=0.9"]
    assert main([f"--ckpt_dir={tiny_checkpoint}", *flags]) == 0
    expected = capsys.readouterr().out.removesuffix("\n").split("\n<|endoftext|>\n")
    answer = complete(tiny, seed=5, n=3, top_p=0.9, echo=True)
    assert [choice.text for choice in answer.choices] == expected
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(tiny.engine.served.tokenizer.encode("Tom")),
        60,
    )


def test_what_a_request_leaves_out_is_as_on_the_servers_command_line(tiny: Running) -> None:
    answer = complete(tiny)
    assert answer.usage.completion_tokens == 20 and answer.seed == 3
    assert complete(tiny, seed=3, max_tokens=20).choices == answer.choices


def test_pieces_streamed_side_by_side_join_to_the_same_texts(tiny: Running) -> None:
    whole = complete(tiny, n=2).choices
    texts, reasons, usage = ["", ""], [None, None], None
    order = []
    for chunk in complete(tiny, n=2, stream=True, routing=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            order.append(choice.index)
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole] and reasons == ["length", "length"]
    assert usage.completion_tokens == 40
    assert order == [0, 1] * 20  # one after the other; the routing makes each token a piece


def test_requests_at_the_same_time_get_what_each_gets_alone(tiny: Running) -> None:
    alone = [complete(tiny, "Tom went", seed=seed).choices[0].text for seed in range(6)]
    together: dict[int, str] = {}

    def ask(seed: int) -> None:
        together[seed] = complete(tiny, "Tom went", seed=seed).choices[0].text

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[seed] for seed in range(6)] == alone


def test_several_prompts_get_n_choices_each_in_order(tiny: Running) -> None:
    answer = complete(tiny, ["Tom", "Lily had"], n=2, echo=True, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    beginnings = ["Tom", "Tom", "Lily had", "Lily had"]
    assert all(map(str.startswith, (choice.text for choice in answer.choices), beginnings))
    alone = complete(tiny, "Lily had", n=2, echo=True, seed=1)
    assert [choice.text for choice in alone.choices] == [choice.text for choice in answer.choices[2:]]


def test_a_story_ends_at_its_end_and_a_full_context_is_told(storyteller: Path, tiny: Running) -> None:
    with serving(storyteller, "--temperature=0") as server:
        choice = complete(server, "Lily had").choices[0]
    assert choice.text == SENTENCE.removeprefix("Lily had")
    assert (choice.finish_reason, choice.ending) == ("stop", "the story ended")
    choice = complete(tiny, "Once upon a time", max_tokens=64, temperature=0).choices[0]
    assert (choice.finish_reason, choice.ending) == ("length", "the context of 64 tokens is full")
    assert complete(tiny, "Tom", max_tokens=3).choices[0].ending == "max_tokens reached"


def test_more_tokens_than_the_context_holds_are_refused_as_by_openai(tiny: Running) -> None:
    told = "max_tokens is 1000000000, but the model's context holds 64 tokens.* ask for 64 or fewer"
    with pytest.raises(openai.BadRequestError, match=told) as caught:
        complete(tiny, "Tom", max_tokens=10**9)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "invalid_value")


def test_a_server_whose_max_tokens_are_above_the_context_fills_it(storyteller: Path) -> None:
    with serving(storyteller, "--max_tokens=4000", "--temperature=0") as server:
        (model,) = server.client.models.list().data
        assert model.defaults["max_tokens"] == 64  # what the page asks for
        assert complete(server, "Lily had").choices[0].finish_reason == "stop"


@pytest.mark.parametrize("prompt", ["Tom", "Tom \N{GRINNING FACE}"])
def test_a_character_of_several_tokens_is_streamed_whole(
    prompt: str, overfitted: Callable[..., Path]
) -> None:
    with serving(overfitted(SMILE), "--temperature=0") as server:
        pieces = [chunk.choices[0].text for chunk in complete(server, prompt, stream=True)]
        echoed = [chunk.choices[0].text for chunk in complete(server, prompt, stream=True, echo=True)]
    assert "".join(pieces) == SMILE.removeprefix(prompt) and "".join(echoed) == SMILE
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_a_stop_sequence_ends_the_text_and_is_not_shown(storyteller: Path) -> None:
    with serving(storyteller, "--temperature=0") as server:
        whole = complete(server, "Lily", stop=["elephant", "kite and"]).choices[0]
        streamed = [c.choices[0] for c in complete(server, "Lily", stop="kite and", stream=True)]
        never = complete(server, "Lily", stop="cat. The end").choices[0]
    assert (whole.text, whole.finish_reason) == (" had a blue ", "stop")
    assert "".join(choice.text for choice in streamed) == whole.text
    assert never.text == SENTENCE.removeprefix("Lily")  # what waited for the rest of the sequence comes out


def asked_as(server: Running, host: str) -> tuple[int, bytes]:
    """Return status and answer to a request that calls the server by this name."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", "/v1/models", headers={"Host": host})
    response = connection.getresponse()
    return response.status, response.read()


def test_another_sites_page_gets_nothing(tiny: Running) -> None:
    body = json.dumps({"prompt": "Tom"}).encode()
    assert asked_as(tiny, "evil.example") == (400, b"Invalid host header")
    assert asked_as(tiny, f"evil.example:{tiny.port}") == (400, b"Invalid host header")
    assert post(tiny, body, Content_Type="text/plain")[0] == 415
    connection = http.client.HTTPConnection("127.0.0.1", tiny.port)
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    connection.request("OPTIONS", "/v1/completions", headers=headers)
    response = connection.getresponse()
    assert response.status == 405 and response.headers["allow"] == "POST"
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        *[(host, True) for host in ("127.0.0.1:8000", "[::1]:8000", "10.0.0.7", "localhost:1", "LOCALHOST")],
        *[(host, False) for host in ("evil.example", "", "[::1", "127.0.0.1.evil.example", "localhost.x:80")],
    ],
)
def test_an_address_is_nobodys_name(host: str, is_own: bool, tiny: Running) -> None:
    assert (asked_as(tiny, host)[0] == 200) == is_own


@pytest.mark.parametrize("stream", [False, True])
def test_logits_of_nan_are_told(stream: bool, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "diverged")
    state = torch.load(folder / "lit_model.pth", weights_only=True)
    state["model"]["transformer.ln_f.weight"].fill_(3e38)  # a number, but not what comes of it
    torch.save(state, folder / "lit_model.pth")
    with serving(folder) as server, pytest.raises(openai.APIError, match="logits are NaN"):
        for _ in complete(server, stream=stream):
            pass


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_error_is_told_as_one_and_logged(
    stream: bool, tiny: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("of the device")

    monkeypatch.setattr(engine.Choice, "put", fail)
    with pytest.raises(openai.APIError, match="an error in the server"):
        for _ in complete(tiny, stream=stream, routing=True):
            pass
    wait_until(lambda: tiny.engine.n_running == 0 and "of the device" in caplog.text)


# --- the command --------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a signal")
def test_ctrl_c_ends_a_server_in_the_middle_of_a_story_with_status_0(chatterbox: Path) -> None:
    process, url = start_server(chatterbox, "--port=0", "--max_tokens=4000")
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        stream = client.completions.create(model="MoE-tiny", prompt="Tom", stream=True)
        next(stream)
        process.send_signal(signal.SIGINT)
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "Traceback" not in errors


def one_sentence(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def test_a_port_in_use_is_told_in_one_sentence(
    tiny: Running, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--serve", f"--port={tiny.port}", f"--ckpt_dir={tiny_checkpoint}"]) == 2
    assert f"port {tiny.port} on 127.0.0.1 is in use" in one_sentence(capsys)


@pytest.mark.parametrize("package", ["pydantic", "starlette", "uvicorn"])
def test_a_missing_package_is_told_with_the_command_that_installs_it(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["--serve", "--port=0"]) == 2
    assert "uv sync --extra serve" in one_sentence(capsys)


@pytest.mark.parametrize(
    "flags", [["--port=70000"], ["--num_samples=9"], ["--host=no.such.host.invalid", "--port=0"]]
)
def test_a_bad_flag_of_the_server_ends_in_one_sentence(
    flags: list[str], tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--serve", *flags, f"--ckpt_dir={tiny_checkpoint}"]) == 2
    assert flags[0].split("=")[1] in one_sentence(capsys)


# --- the page -----------------------------------------------------------------------------------------------


def test_the_page_loads_nothing_from_elsewhere(tiny: Running) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", tiny.port)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    assert response.status == 200 and "<title>Playground</title>" in page
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "://" not in page and "innerHTML =" not in page
