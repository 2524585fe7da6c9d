"""An MLflow server that is away or lets nobody in, as commands say it: one line, no traceback."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from conftest import QUICKSTART

pytestmark = pytest.mark.slow


class Locked(BaseHTTPRequestHandler):
    """Answers everybody that the password is wrong."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b"You are not authenticated.")

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def locked() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Locked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


def sdft(address: str, home: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and what was said on standard error."""
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *arguments],
        env={
            **os.environ,
            "SDFT_HOME": str(home),
            "MLFLOW_TRACKING_URI": address,
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stderr.strip()


def test_a_wrong_password_is_said_without_it_before_any_work(locked: str, tmp_path: Path) -> None:
    address = f"http://user:s3cret@{locked}"
    expected = (
        f"error: MLflow (http://{locked}) does not let you in; set MLFLOW_TRACKING_USERNAME and "
        "MLFLOW_TRACKING_PASSWORD"
    )
    assert sdft(address, tmp_path, "status") == (2, expected)
    curriculum = str(QUICKSTART / "curriculum.yaml")
    assert sdft(address, tmp_path, "learn", curriculum) == (2, expected)
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "stages").exists()


@pytest.mark.parametrize(
    "command", ["status", "promote demo 1", "matrix demo", "replay demo --without a", "gc"]
)
def test_a_server_that_is_not_there_is_said(command: str, tmp_path: Path) -> None:
    code, said = sdft("http://127.0.0.1:9", tmp_path, *command.split())
    assert (code, said) == (1, "error: MLflow does not answer (http://127.0.0.1:9)")
