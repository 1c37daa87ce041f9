"""Connections of the server: silent, slow, many, half-closed; real sockets, and uvicorn under them."""

import http.client
import json
import logging
import socket
import sys
import time

import pytest
from conftest import wait_until
from helpers.server import Running, complete, completion_request, post, read_all

from litgpt_moe.serving import connections

pytestmark = pytest.mark.usefixtures("eager")
REQUEST = b"%s %s HTTP/1.1\r\nHost: localhost\r\n"


def connect(server: Running, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), 30, (source, 0))


@pytest.mark.parametrize("n_addresses", [1, 15 if sys.platform == "linux" else 1])
@pytest.mark.parametrize("start", [b"", completion_request()[:-3]], ids=["silent", "half a request"])
def test_slow_connections_shut_nobody_out(start: bytes, n_addresses: int, tiny: Running) -> None:
    silent = []
    for i in range(150):
        silent.append(connect(tiny, f"127.0.0.{1 + i % n_addresses}"))
        silent[-1].sendall(start)
    n_left = connections.MAX_PER_ADDRESS if n_addresses == 1 else connections.MAX_CONNECTIONS
    try:
        assert post(tiny, b'{"prompt": "Tom", "max_tokens": 3}')[0] == 200  # by a connection of its own
        assert all(read_all(connection) == b"" for connection in silent[: 150 - n_left])
    finally:
        for connection in silent:
            connection.close()


@pytest.mark.parametrize("start", [b"", b"GET / HT", REQUEST % (b"GET", b"/")])
def test_a_header_that_does_not_arrive_ends_the_connection(
    start: bytes, tiny: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEADER_S", 0.2)
    with connect(tiny) as connection:
        connection.sendall(start)
        assert read_all(connection) == b""


def test_a_second_header_has_a_limit_too(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_S", 0.2)
    with connect(tiny) as connection:
        connection.sendall(REQUEST % (b"GET", b"/v1/models") + b"\r\n" + b"GET / HT")
        assert read_all(connection).startswith(b"HTTP/1.1 200")


def test_the_limit_is_not_one_of_the_answer(talker: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "HEADER_S", 0.05)
    assert complete(talker, max_tokens=300).usage.completion_tokens == 300


def test_a_busy_connection_is_not_closed_for_new_ones(talker: Running) -> None:
    stream = complete(talker, stream=True)
    next(stream)
    silent = [connect(talker) for _ in range(2 * connections.MAX_PER_ADDRESS)]
    next(stream)
    stream.close()
    for connection in silent:
        connection.close()
    wait_until(lambda: talker.engine.n_running == 0)


@pytest.mark.parametrize("stream", [False, True])
def test_a_half_closed_client_gets_its_answer(stream: bool, tiny: Running) -> None:
    with connect(tiny) as connection:
        connection.sendall(completion_request(stream=stream))
        connection.shutdown(socket.SHUT_WR)
        answer = read_all(connection)
    head, _, body = answer.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and b'"finish_reason": "length"' in body.replace(b'":"', b'": "')


def test_a_client_that_waits_skips_the_probes(talker: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "PROBE_S", 0.01)
    connection = http.client.HTTPConnection("127.0.0.1", talker.port, timeout=60)
    connection.connect()
    connection.sock.sendall(completion_request(max_tokens=300))
    connection.sock.shutdown(socket.SHUT_WR)
    response = http.client.HTTPResponse(connection.sock)
    response.begin()
    assert response.status == 200
    assert json.loads(response.read())["usage"]["completion_tokens"] == 300


def test_a_client_that_has_gone_is_told_apart_from_a_half_closed_one(talker: Running) -> None:
    connection = connect(talker)
    connection.sendall(completion_request())
    wait_until(lambda: talker.engine.n_running == 1)
    connection.close()
    wait_until(lambda: talker.engine.n_running == 0)


def test_half_a_request_before_the_end_is_no_request(tiny: Running) -> None:
    with connect(tiny) as connection:
        connection.sendall(completion_request()[:-3])
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) == b""


def test_a_client_that_reads_nothing_is_disconnected(tiny: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READING_S", 0.2)
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", tiny.port))
    with connection, pytest.raises((ConnectionError, TimeoutError)) as raised:
        while True:  # until the server, whose answers nobody reads, has ended the connection
            connection.sendall(REQUEST % (b"GET", b"/") + b"\r\n")
    assert not isinstance(raised.value, TimeoutError)


CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
AS_JSON = REQUEST % (b"POST", b"/v1/completions") + b"Content-Type: application/json\r\n"
MALFORMED = {
    "a bad chunk": (AS_JSON + CHUNKED + b"zz\r\n", b""),
    "a bad chunk later": (AS_JSON + CHUNKED, b"zz\r\n"),
    "a bad chunk without a type": (REQUEST % (b"POST", b"/v1/completions") + CHUNKED + b"zz\r\n", b""),
    "a bad chunk after the answer": (REQUEST % (b"POST", b"/v1/completions") + CHUNKED, b"zz\r\n"),
    "a bad chunk for a page": (REQUEST % (b"GET", b"/") + CHUNKED + b"zz\r\n", b""),
    "a bad chunk for no page": (REQUEST % (b"GET", b"/no") + CHUNKED, b"zz\r\n"),
    "a bad chunk of another host": (b"GET / HTTP/1.1\r\nHost: evil\r\n" + CHUNKED + b"zz\r\n", b""),
    "a bad chunk that is awaited": (AS_JSON + b"Expect: 100-continue\r\n" + CHUNKED, b"zz\r\n"),
    "an endless chunk extension": (AS_JSON + CHUNKED + b"5;" + b"a" * 100_000, b""),
    "a bad trailer": (AS_JSON + CHUNKED + b"2\r\n{}\r\n0\r\nno trailer\r\n\r\n", b""),
    "a negative length": (AS_JSON + b"Content-Length: -1\r\n\r\n{}", b""),
    "two lengths": (AS_JSON + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}", b""),
    "a length and chunks": (AS_JSON + b"Content-Length: 2\r\n" + CHUNKED + b"2\r\n{}\r\n0\r\n\r\n", b""),
    "no HTTP": (b"\x16\x03\x01\x02\x00\r\n\r\n", b""),
    "no HTTP after a request": (REQUEST % (b"GET", b"/v1/models") + b"\r\n", b"\0\xff\r\n\r\n"),
    "a huge header": (REQUEST % (b"GET", b"/") + b"X: " + b"a" * 200_000, b""),
}


@pytest.mark.parametrize("parts", MALFORMED.values(), ids=MALFORMED)
def test_what_is_no_http_is_refused_or_closed_without_a_traceback(
    parts: tuple[bytes, bytes], tiny: Running, caplog: pytest.LogCaptureFixture
) -> None:
    loggers = [logging.getLogger(name) for name in ("uvicorn.error", "asyncio")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    try:
        with connect(tiny) as connection:
            first, second = parts
            connection.sendall(first)
            if second:
                time.sleep(0.1)  # the answer to the first part is on its way
                connection.sendall(second)
            answer = read_all(connection)  # until the server closes it
        assert complete(tiny).choices  # the event loop has gone round meanwhile
    finally:
        for logger in loggers:
            logger.removeHandler(caplog.handler)
    assert not caplog.records
    statuses = [line.split()[1][:1] for line in answer.splitlines() if line.startswith(b"HTTP/1.1")]
    assert statuses[:1] != [b"5"] and len(answer) < 30_000


def test_a_bad_chunk_while_a_story_streams_ends_it(talker: Running) -> None:
    with connect(talker) as connection:
        connection.sendall(completion_request(stream=True) + b"\0\xff\r\n\r\n")
        wait_until(lambda: talker.engine.n_running == 1)
    wait_until(lambda: talker.engine.n_running == 0)
