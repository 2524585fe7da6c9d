"""Events to a real HTTP server: signed, in order, at least once; held up by nothing but itself."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from schemas.base import BadInput
from schemas.ledger import Draft
from tasks.events import deliver, signature
from tasks.home import Home
from tasks.ledger import Ledger


class Receiver:
    """A webhook that takes what it is sent, or answers with `status`."""

    def __init__(self) -> None:
        self.status = 204
        self.taken: list[tuple[dict[str, str], bytes]] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if receiver.status < 300:
                    receiver.taken.append((dict(self.headers), body))
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/hook?token=hidden"

    def versions(self) -> list[str]:
        return [json.loads(body)["entry"]["version"] for _, body in self.taken]


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    receiver = Receiver()
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("SDFT_WEBHOOK_URL", receiver.url)
    monkeypatch.setenv("SDFT_WEBHOOK_SECRET", "secret")
    yield receiver
    receiver.server.shutdown()


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def write(home: Home, kind: str, version: str) -> None:
    ledger = Ledger(home)
    ledger.append([Draft(kind=kind, name="demo", version=version)], ledger.champion("demo"))


def test_promotions_and_refusals_are_sent_once_signed_and_in_order(
    home: Home, receiver: Receiver
) -> None:
    for kind, version in [
        ("registered", "1"),
        ("promoted", "1"),
        ("refused", "2"),
        ("promoted", "3"),
        ("rolled back", "1"),
    ]:
        write(home, kind, version)
    deliver(home, "demo")
    deliver(home, "demo")
    assert receiver.versions() == ["1", "2", "3", "1"]
    entries = {entry.hash: entry for entry in Ledger(home).entries()}
    for headers, body in receiver.taken:
        assert headers["X-Sdft-Signature"] == f"sha256={signature('secret', body)}"
        assert json.loads(body)["entry"] == entries[headers["X-Sdft-Delivery"]].model_dump()
    names = [headers["X-Sdft-Event"] for headers, _ in receiver.taken]
    assert names == ["sdft.promoted", "sdft.refused", "sdft.promoted", "sdft.rolled-back"]


def test_the_signature_is_plain_hmac_sha256() -> None:
    """Test vector 2 of RFC 4231."""
    expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
    assert signature("Jefe", b"what do ya want for nothing?") == expected


def test_what_was_not_taken_is_sent_again(
    home: Home, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    write(home, "promoted", "1")
    deliver(home, "demo")
    receiver.status = 500
    write(home, "promoted", "2")
    deliver(home, "demo")
    said = capsys.readouterr().out
    assert "did not take entry 2" in said
    assert "hidden" not in said, "an address may hold a secret"
    write(home, "promoted", "3")
    receiver.status = 204
    deliver(home, "demo")
    assert receiver.versions() == ["1", "2", "3"]


def test_nobody_there_is_said_and_not_an_error(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("SDFT_WEBHOOK_URL", "http://127.0.0.1:9/hook")
    monkeypatch.setenv("SDFT_WEBHOOK_SECRET", "secret")
    write(home, "promoted", "1")
    deliver(home, "demo")
    assert "did not take entry 1" in capsys.readouterr().out


@pytest.mark.parametrize("api", ["http://127.0.0.1:9/api", None])
def test_prefect_away_is_said_and_not_an_error(
    api: str | None,
    home: Home,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nobody at its address, or its own temporary server that does not come up in time."""
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_CLIENT_MAX_RETRIES,
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
        temporary_settings,
    )

    monkeypatch.delenv("SDFT_WEBHOOK_URL", raising=False)
    monkeypatch.setenv("PREFECT_API_URL", api or "unknown to settings that were read before")
    settings = {
        PREFECT_API_URL: api,
        PREFECT_CLIENT_MAX_RETRIES: 0,
        PREFECT_SERVER_ALLOW_EPHEMERAL_MODE: True,
        PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 0,
    }
    write(home, "promoted", "1")
    with temporary_settings(settings):
        deliver(home, "demo")
    SubprocessASGIServer().stop()  # which it would do at exit, but for processes of xdist
    said = " ".join(capsys.readouterr().out.split())
    assert "prefect did not take entry 1 (Prefect's server does not answer" in said
    assert Ledger(home).cursor("prefect", "demo") == 0


def test_a_webhook_without_a_secret_is_refused_before_any_work(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDFT_WEBHOOK_URL", "http://127.0.0.1:9/hook")
    monkeypatch.delenv("SDFT_WEBHOOK_SECRET", raising=False)
    with pytest.raises(BadInput, match="SDFT_WEBHOOK_SECRET, which signs the events"):
        home.activate(offline=True)
