"""The demo's client where the demo itself cannot show it: connections that stay open, and those that end early."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge.api_client import Answer, ApiClient, ConnectionClosed

Ends = tuple[ApiClient, socket.socket]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """A client with a connection already made (without TLS), and the server's end of it."""
    monkeypatch.setattr("ssl.create_default_context", lambda cafile: None)
    client = ApiClient("localhost", 1, Path("ca.pem"), timeout=5)
    ours, theirs = socket.socketpair()
    client._connection.sock = ours
    with theirs, client:
        yield client, theirs


def test_an_open_connection_is_not_called_closed(ends: Ends) -> None:
    client, _ = ends
    assert client.connected
    assert client.closed_by_server(0.01) is None


def test_a_closed_one_is_whatever_was_said_before(ends: Ends) -> None:
    client, theirs = ends
    theirs.sendall(b"some last words")
    theirs.shutdown(socket.SHUT_WR)
    closed_after = client.closed_by_server(5)
    assert closed_after is not None
    assert closed_after < 5000
    assert not client.connected


def test_an_answer_is_decoded_and_the_connection_kept(ends: Ends) -> None:
    client, theirs = ends
    theirs.sendall(b'HTTP/1.1 202 Accepted\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\r\n{"a": 1}')
    answer = client.post("/telemetry", {"t": 1}, bearer="sk_live_x")
    assert (answer.status, answer.body) == (202, {"a": 1})
    assert client.connected
    sent = theirs.recv(4096)
    assert sent.startswith(b"POST /api/v1/telemetry HTTP/1.1\r\n")
    assert b"Authorization: Bearer sk_live_x\r\n" in sent


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf", b"not HTTP\r\n\r\n"])
def test_an_end_before_the_answer_is_told_apart_from_an_answer(said: bytes, ends: Ends) -> None:
    client, theirs = ends
    theirs.sendall(said)
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(ConnectionClosed, match="GET /devices"):
        client.get("/devices")
    assert not client.connected


def test_an_answers_repr_keeps_its_body_to_itself() -> None:
    assert "sk_live" not in repr(Answer(201, {"api_key": "sk_live_x"}, 1.0))
