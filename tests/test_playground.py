"""generate.py --serve: a real server, OpenAI's own client, clients that go away, and the page in Chromium."""

import asyncio
import contextlib
import http.client
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from conftest import OFFLINE, ROOT, SENTENCE, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import generate
from generate import Engine, OwnHostOnly, StopText, main

pytestmark = pytest.mark.usefixtures("eager")
SMILE = "Tom \N{GRINNING FACE} saw a cat."


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """One thread for the servers, too: two threads wait for each other on a busy machine."""
    torch.set_num_threads(1)


@contextlib.contextmanager
def serving(folder: Path, *flags: str) -> Iterator[SimpleNamespace]:
    """Serve a checkpoint from a thread: `.engine`, `.port`, `.name`, `.client` (OpenAI's, no retries)."""
    args = generate.parse_args(["--serve", "--port=0", "--device=cpu", f"--ckpt_dir={folder}", *flags])
    args.prompt = generate.DEFAULT_PROMPT
    with generate.open_port(args.host, 0) as listener:
        engine = Engine(*generate.load(args), args)
        server = generate.make_server(engine, args.host)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
            yield SimpleNamespace(engine=engine, port=port, client=client, name=engine.name)
        server.handle_exit(signal.SIGTERM, None)
        thread.join(timeout=30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> Iterator[SimpleNamespace]:
    with serving(tiny_checkpoint, "--max_tokens=20", "--seed=3") as server:
        yield server


@pytest.fixture(scope="module")
def talker(chatterbox: Path) -> Iterator[SimpleNamespace]:
    """A server whose stories go on for 4,000 tokens."""
    with serving(chatterbox, "--max_tokens=4000") as server:
        yield server


def complete(server: SimpleNamespace, prompt: Any = "Tom", routing: bool = False, **options: Any) -> Any:
    extra = {"extra_body": {"routing": True}} if routing else {}
    return server.client.completions.create(model=server.name, prompt=prompt, **options, **extra)


def post(server: SimpleNamespace, body: bytes | Iterator[bytes], **headers: str) -> tuple[int, dict]:
    """Send a request as no well-behaved client would; return the status and the parsed answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    names = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    connection.request("POST", "/v1/completions", body, names)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


# --- what the clients get -----------------------------------------------------------------------------------


def test_the_models_are_listed_as_openai_lists_them(tiny: SimpleNamespace) -> None:
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
    tiny: SimpleNamespace, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--prompt=Tom", "--max_tokens=20", "--seed=5", "--num_samples=3", "--top_p=0.9"]
    assert main([f"--ckpt_dir={tiny_checkpoint}", *flags]) == 0
    expected = capsys.readouterr().out.removesuffix("\n").split("\n<|endoftext|>\n")
    answer = complete(tiny, seed=5, n=3, top_p=0.9, echo=True)
    assert [choice.text for choice in answer.choices] == expected
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
        len(tiny.engine.tokenizer.encode("Tom")),
        60,
    )


def test_what_a_request_leaves_out_is_as_on_the_servers_command_line(tiny: SimpleNamespace) -> None:
    answer = complete(tiny)
    assert answer.usage.completion_tokens == 20 and answer.seed == 3
    assert complete(tiny, seed=3, max_tokens=20).choices == answer.choices


def test_pieces_streamed_side_by_side_join_to_the_same_texts(tiny: SimpleNamespace) -> None:
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


def test_requests_at_the_same_time_get_what_each_gets_alone(tiny: SimpleNamespace) -> None:
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


def test_several_prompts_get_n_choices_each_in_order(tiny: SimpleNamespace) -> None:
    answer = complete(tiny, ["Tom", "Lily had"], n=2, echo=True, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    beginnings = ["Tom", "Tom", "Lily had", "Lily had"]
    assert all(map(str.startswith, (choice.text for choice in answer.choices), beginnings))
    alone = complete(tiny, "Lily had", n=2, echo=True, seed=1)
    assert [choice.text for choice in alone.choices] == [choice.text for choice in answer.choices[2:]]


def test_a_story_ends_at_its_end_and_a_full_context_is_told(storyteller: Path, tiny: SimpleNamespace) -> None:
    with serving(storyteller, "--temperature=0") as server:
        choice = complete(server, "Lily had").choices[0]
    assert choice.text == SENTENCE.removeprefix("Lily had")
    assert (choice.finish_reason, choice.ending) == ("stop", "the story ended")
    choice = complete(tiny, "Once upon a time", max_tokens=64, temperature=0).choices[0]
    assert (choice.finish_reason, choice.ending) == ("length", "the context of 64 tokens is full")
    assert complete(tiny, "Tom", max_tokens=3).choices[0].ending == "max_tokens reached"


def test_more_tokens_than_the_context_holds_are_refused_as_by_openai(tiny: SimpleNamespace) -> None:
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


OVERLAPPING = ("abc", "b")  # whoever sees "ab" first stops at b, and whoever sees "abc" at a


@pytest.mark.parametrize("stops", [("ab",), ("aab", "ba"), ("c",), (), OVERLAPPING])
def test_any_cut_into_pieces_stops_at_the_same_place(stops: tuple[str, ...]) -> None:
    for text in map("".join, itertools.product("abc", repeat=5)):
        ends = [text.find(stop) for stop in stops if stop in text]
        expected = text[: min(ends)] if ends else text
        for cut in range(6):
            stop = StopText(stops)
            got = "".join([*map(stop.put, (text[:cut], *text[cut:])), stop.end()])
            assert stop.found == bool(ends) and text.startswith(got)
            assert got == expected or (stops == OVERLAPPING and not any(s in got for s in stops))


# --- the routing --------------------------------------------------------------------------------------------


def read_tokens(server: SimpleNamespace, **options: Any) -> tuple[str, list[dict]]:
    """Return the text, prompt included, and what the stream told of each token that the model read."""
    text, reads = "", []
    for chunk in complete(server, stream=True, echo=True, routing=True, **options):
        text += chunk.choices[0].text
        reads += chunk.choices[0].routing
    return text, reads


GROUPS = {"n_expert_groups": 2, "n_topk_groups": 1, "n_topk_scores_per_group": 2}
DENSE_FIRST = {"first_k_dense_replace": 1, "intermediate_size": 32}


@pytest.mark.parametrize("change", [{}, GROUPS, DENSE_FIRST], ids=["softmax", "grouped", "dense-first"])
def test_the_routing_told_is_the_routing_that_was(
    change: dict[str, int], overfitted: Callable[..., Path]
) -> None:
    from moe_layers import count_expert_load, expert_load

    with serving(overfitted(SENTENCE, **change), "--temperature=0") as server:
        text, reads = read_tokens(server, prompt="Lily had")
        model, told = server.engine.model, server.client.models.list().data[0].routing
        count_expert_load(model, True)
        with torch.no_grad():
            model(server.engine.tokenizer.encode(text)[None])
    assert text == SENTENCE == "".join(read["text"] for read in reads)
    assert told["scores"] == ("sigmoid" if change == GROUPS else "softmax")
    assert told["layers"] == ([1] if change == DENSE_FIRST else [0, 1])
    for place, load_E in enumerate(expert_load(model).values()):
        chosen = torch.tensor([read["experts"][place] for read in reads])
        assert torch.equal(torch.bincount(chosen.flatten(), minlength=4).double(), load_E)
        probs = torch.tensor([read["probs"][place] for read in reads])
        first, second = probs.gather(1, chosen).unbind(1)
        assert (first >= second).all()  # the first named has the largest weight
        if change != GROUPS:
            assert (first == probs.max(1).values).all() and ((probs.sum(1) - 1000).abs() <= 2).all()


def test_a_dense_model_is_served_without_routing(overfitted: Callable[..., Path]) -> None:
    dense = {"mlp_class_name": "LLaMAMLP", "intermediate_size": 32, "n_expert": 0, "n_expert_per_token": 0}
    with serving(overfitted(SENTENCE, **dense), "--temperature=0") as server:
        assert server.client.models.list().data[0].routing is None
        text, reads = read_tokens(server, prompt="Lily had")
    assert text == SENTENCE == "".join(read["text"] for read in reads)
    assert not any(read["experts"] or read["probs"] for read in reads)


def test_the_last_token_of_a_cut_story_was_not_read(tiny: SimpleNamespace) -> None:
    text, reads = read_tokens(tiny, prompt="Tom", max_tokens=5)
    assert text.startswith("".join(read["text"] for read in reads))
    assert len(reads) == len(tiny.engine.tokenizer.encode("Tom")) + 4


# --- what is refused ----------------------------------------------------------------------------------------

BAD = {
    "temperature": [(-1, "choose 0 (greedy) or 0.001 or more"), ("hot", "it must be a number")],
    "top_p": [(0, "above 0"), (2, "above 0"), (10**400, "it must be a number")],
    "top_k": [(-1, "0 (off) or more"), (1.5, "it must be a whole number")],
    "max_tokens": [(0, "choose 1 or more"), (True, "a whole number"), (65, "64 or fewer"), (10**30, "64 or")],
    "n": [(0, "choose 1 to 8"), (9, "choose 1 to 8")],
    "seed": [(-1, "choose 0 to 9223372036854775807"), (2**63, "choose 0 to")],
    "stop": [("", "1 to 100 characters"), (["a"] * 5, "one to four"), ([1], "texts"), (7, "texts")],
    "stream": [("yes", "it must be true or false")],
    "prompt": [
        (None, "a text or a list"),
        ([], "a text or a list"),
        ([1, 2], "a text or a list"),
        ("Tom went " * 40, "block_size is 64"),
        (["x"] * 9, "give 8 at most"),
        ("\ud800", "half a surrogate pair"),
    ],
    "logprobs": [(1, "not supported")],
    "best_of": [(2, "not supported")],
    "frequency_penalty": [(0.5, "not supported")],
    "logit_bias": [({"5": 1}, "not supported")],
    "suffix": [("x", "not supported")],
    "tempratur": [(1, "unknown parameter")],
    "model": [(5, "it must be text")],
}


@pytest.mark.parametrize("param", BAD)
def test_a_bad_parameter_is_told_in_openais_form(param: str, tiny: SimpleNamespace) -> None:
    for value, message in BAD[param]:
        body = {"model": "MoE-tiny", "prompt": "Tom", param: value}
        status, answer = post(tiny, json.dumps(body).encode())
        error = answer["error"]
        assert status == 400 and message in error["message"] and len(error["message"]) < 300
        assert (error["type"], error["param"]) == ("invalid_request_error", param)


def test_values_without_effect_are_taken(tiny: SimpleNamespace) -> None:
    none = {"best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "user": "me"}
    assert complete(tiny, **none, stop=None, suffix=None).choices == complete(tiny).choices


def test_a_model_that_is_not_here_is_not_found(tiny: SimpleNamespace) -> None:
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' is here") as caught:
        tiny.client.completions.create(model="gpt", prompt="Tom")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="this server has /"):
        tiny.client.chat.completions.create(model="MoE-tiny", messages=[])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(st.text(), parts, max_size=3),
    max_leaves=5,
)
NESTED = [b'{"temperature": ' + b"[" * depth + b"]" * depth + b"}" for depth in (100, 500, 900, 990, 5000)]
NAMES = [*BAD, "min_p", "repetition_penalty", "presence_penalty", "user", "echo", "routing", "stream_options"]


@given(changes=st.dictionaries(st.sampled_from(NAMES) | st.text(), JSON, max_size=3))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_parameters_are_checked_or_told(changes: dict[str, Any], tiny: SimpleNamespace) -> None:
    try:
        request = generate.read_request({"prompt": "Tom", **changes}, tiny.engine)
    except generate.ApiError as error:
        assert error.status in (400, 404) and generate.error_response(error).body
    else:
        assert request.sampling and 1 <= len(request.prompts) * request.n <= generate.MAX_CHOICES


def test_extreme_settings_draw_a_token(tiny: SimpleNamespace) -> None:
    for extreme in (
        {"temperature": 1e308},
        {"temperature": 1e-3, "repetition_penalty": 1e30},
        {"repetition_penalty": 1e-3},
        {"top_p": 1e-12, "min_p": 1, "top_k": 10**30},
        {"max_tokens": 64},
    ):
        body = {"prompt": "Tom Tom", "max_tokens": 10, **extreme}
        status, answer = post(tiny, json.dumps(body).encode())
        assert status == 200 and answer["usage"]["completion_tokens"] >= 1, extreme


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"Tom"', b"\xff", b"[" * 100_000, b"9" * 5000, b'{"prompt": NaN}', *NESTED]
)
def test_what_is_no_request_is_told_so(body: bytes, tiny: SimpleNamespace) -> None:
    status, answer = post(tiny, body)
    assert status == 400 and len(answer["error"]["message"]) < 300


def test_a_request_that_is_too_large_is_refused_with_and_without_its_length(tiny: SimpleNamespace) -> None:
    body = b" " * (generate.MAX_BODY_BYTES + 1)
    assert post(tiny, body)[0] == 413
    assert post(tiny, iter([body]))[0] == 413  # chunked
    assert complete(tiny).choices  # and the server goes on


def test_another_sites_page_gets_nothing(tiny: SimpleNamespace) -> None:
    body = json.dumps({"prompt": "Tom"}).encode()
    assert post(tiny, body, Host="evil.example")[0] == 403
    assert post(tiny, body, Host=f"evil.example:{tiny.port}")[0] == 403
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
def test_an_address_is_nobodys_name(host: str, is_own: bool) -> None:
    assert OwnHostOnly(None, {"localhost"})._is_own(host) == is_own


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
    stream: bool, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("of the device")

    monkeypatch.setattr(tiny.engine.watch, "stop", fail)
    with pytest.raises(openai.APIError, match="an error in the server"):
        for _ in complete(tiny, stream=stream, routing=True):
            pass
    wait_until(lambda: tiny.engine.n_running == 0 and "of the device" in caplog.text)


# --- clients that go away -----------------------------------------------------------------------------------


def test_clients_that_go_away_free_their_slots_and_too_many_are_refused(talker: SimpleNamespace) -> None:
    engine = talker.engine
    streams = [complete(talker, stream=True) for _ in range(engine.RUNNING)]
    for stream in streams:
        next(stream)
    assert engine.n_running == engine.RUNNING
    body = json.dumps({"prompt": "Tom"}).encode()
    waiting = [http.client.HTTPConnection("127.0.0.1", talker.port) for _ in range(engine.WAITING)]
    for connection in waiting:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    wait_until(lambda: engine.n_waiting == engine.WAITING)
    with pytest.raises(openai.InternalServerError, match="requests wait already") as caught:
        complete(talker)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
    for connection in waiting[1:]:
        connection.close()
    wait_until(lambda: engine.n_waiting == 1)
    streams[0].close()
    wait_until(lambda: engine.n_waiting == 0)  # the first in the queue has the slot
    assert engine.n_running == engine.RUNNING
    for gone in (*streams[1:], waiting[0]):
        gone.close()
    wait_until(lambda: engine.n_running == 0)
    # the steps under way have ended, and no cache is left behind
    engine._thread.submit(lambda: None).result()
    assert talker.engine.model.mask_cache is None
    assert complete(talker, max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_reads_nothing_loses_its_slot(
    stream: bool, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "PATIENCE_S", 0.05)
    request = generate.read_request({"prompt": "Tom", "stream": stream}, tiny.engine)

    async def never(*_: Any) -> None:
        await asyncio.Event().wait()

    async def answer() -> Engine:
        engine = Engine(tiny.engine.model, tiny.engine.tokenizer, tiny.engine.args)
        await generate.CompletionResponse(engine, request)({"type": "http"}, never, never)
        return engine

    assert asyncio.run(answer()).n_running == 0


# --- the command --------------------------------------------------------------------------------------------


def start(folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "generate.py"), "--serve", f"--ckpt_dir={folder}", *flags]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **OFFLINE}, **pipes)


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is sent as a signal")
def test_ctrl_c_ends_a_server_in_the_middle_of_a_story_with_status_0(chatterbox: Path) -> None:
    process = start(chatterbox, "--port=0", "--max_tokens=4000")
    assert process.stderr is not None
    log = [next(line for line in process.stderr if line.startswith("playground "))]
    url = log[0].split()[1]
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
    tiny: SimpleNamespace, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--serve", f"--port={tiny.port}", f"--ckpt_dir={tiny_checkpoint}"]) == 2
    assert f"port {tiny.port} on 127.0.0.1 is in use" in one_sentence(capsys)


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
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


def test_the_page_loads_nothing_from_elsewhere(tiny: SimpleNamespace) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", tiny.port)
    connection.request("GET", "/")
    response = connection.getresponse()
    page = response.read().decode()
    assert response.status == 200 and "<title>Playground</title>" in page
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "://" not in page and "innerHTML =" not in page
