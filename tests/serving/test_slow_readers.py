"""Clients that read their answers slowly or not at all: real sockets whose buffers hold little."""

import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until
from helpers.server import Running, complete, completion_request, read_all, serving
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT

from litgpt_moe.serving import connections, responses

pytestmark = pytest.mark.usefixtures("eager")
Ask = Callable[..., socket.socket]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """A function that asks a server and reads nothing; the system's buffers hold a few events."""
    accept, opened = connections.Connection.connection_made, []

    def made(self: connections.Connection, transport: Any) -> None:
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        accept(self, transport)

    def asked(server: Running, request: bytes = b"", **body: Any) -> socket.socket:
        opened.append(connection := socket.socket())
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request or completion_request(close=True, stream=True, **body))
        return connection

    monkeypatch.setattr(connections.Connection, "connection_made", made)
    yield asked
    for connection in opened:
        connection.close()


def test_a_text_that_ended_holds_no_slot_while_its_client_reads_nothing(talker: Running, ask: Ask) -> None:
    slow = ask(talker, max_tokens=1500, seed=5)
    wait_until(lambda: talker.engine.n_running == 1)
    wait_until(lambda: talker.engine.n_running == 0)
    answer = read_all(slow)
    # more than the buffers of the connection hold: the rest has waited for the client
    assert len(answer) > 2 * HIGH_WATER_LIMIT and answer.count(b'"finish_reason": "length"') == 1
    assert answer.count(b"data: [DONE]") == 1


def test_a_sample_that_ended_holds_no_slot_while_others_of_its_request_go_on(talker: Running) -> None:
    engine, options = talker.engine, {"stream": True, "max_tokens": 4000}
    long = "Tom went " * 1000
    n_tokens = len(engine.served.tokenizer.encode(long))
    # the first sample fills the context with its prompt
    long += " went" * (engine.served.model.max_seq_length - 5 - n_tokens)
    streams = [complete(talker, [long, "Tom"], **options)]
    streams += [complete(talker, n=n, **options) for n in (8, engine.RUNNING - 10)]
    streams += [complete(talker, **options)]
    assert next(streams[-1]).choices
    assert engine.n_running == 4
    for stream in streams:
        stream.close()
    wait_until(lambda: engine.n_running == 0)


def test_a_stream_of_which_too_much_is_unread_ends(
    talker: Running, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses, "MAX_UNREAD_BYTES", 20_000)
    slow = ask(talker, max_tokens=4000)
    wait_until(lambda: talker.engine.n_running == 1)
    wait_until(lambda: talker.engine.n_running == 0)
    answer = read_all(slow)
    assert b"wait to be read" in answer and answer.count(b"data: [DONE]") == 1
    assert b'"finish_reason": "length"' not in answer and len(answer) < 3 * HIGH_WATER_LIMIT


def test_of_too_many_slow_clients_the_slowest_is_disconnected(
    talker: Running, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MAX_UNREAD", 1)
    slow = []
    for _ in range(2):
        slow.append(ask(talker, max_tokens=1500))
        wait_until(lambda: talker.engine.n_running == 1)
        wait_until(lambda: talker.engine.n_running == 0)
    first, second = map(read_all, slow)
    assert b"[DONE]" not in first and b"[DONE]" in second


def test_a_client_may_read_on_when_its_answer_is_complete(
    tiny: Running, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_S", 0.2)
    slow = ask(tiny, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
    time.sleep(1)  # beyond the limit for a next request
    answer = b""
    while not answer.endswith(b"</html>\n"):
        part = slow.recv(1 << 16)
        assert part, "the page was cut off"
        answer += part


def test_a_server_stops_quietly_although_a_client_reads_nothing(
    chatterbox: Path, ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("uvicorn.error")
    with serving(chatterbox) as server:
        logger.addHandler(caplog.handler)  # only now: uvicorn has set up its loggers
        ask(server, max_tokens=1500)
        wait_until(lambda: server.engine.n_running == 1)
        wait_until(lambda: server.engine.n_running == 0)
    logger.removeHandler(caplog.handler)
    assert not caplog.records
