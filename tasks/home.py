"""The home directory: where everything of an embedded installation lies, and the environment."""

import os
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from schemas.base import BadInput
from schemas.digest import digest_text

DATABASE_WAIT_S = 120
"""How long a SQLite database that another process has locked is waited for."""
WEBHOOK_URL, WEBHOOK_SECRET = "SDFT_WEBHOOK_URL", "SDFT_WEBHOOK_SECRET"

NOTHING_SENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
"""What keeps every dependency from reporting on its use."""


class Home:
    """Paths under one directory. `activate` must run before Prefect or MLflow are imported."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()
        self.artifacts = self.root / "artifacts"
        self.cache = self.root / "cache"
        self.cells = self.root / "cells"
        self.curricula = self.root / "curricula"
        self.data = self.root / "data"
        self.metrics = self.root / "metrics"
        self.models = self.root / "models"
        self.stages = self.root / "stages"
        self.watched = self.root / "watched"

    @property
    def tracking_uri(self) -> str:
        """MLFLOW_TRACKING_URI where it is set, otherwise the SQLite file in this home."""
        own = f"sqlite:///{self.root / 'mlflow.db'}?timeout={DATABASE_WAIT_S}"
        return os.environ.get("MLFLOW_TRACKING_URI") or own

    @property
    def ledger_uri(self) -> str:
        """SDFT_LEDGER_URL where it is set, otherwise the SQLite file in this home."""
        return os.environ.get("SDFT_LEDGER_URL") or f"sqlite:///{self.root / 'ledger.db'}"

    @property
    def lease_key(self) -> str:
        """What a run in this home holds, and how its runs are found.

        The same on every machine that has the home at this place, another one for a copy of it.
        """
        return f"home-{self._identity}-{digest_text(str(self.root))[:8]}"

    @property
    def _identity(self) -> str:
        """What tells this home from others, written down when it is asked for first."""
        file = self.root / "identity"
        if not file.is_file():
            mine = file.with_name(f".{file.name}-{uuid4().hex}")
            mine.write_text(uuid4().hex[:16], "utf-8")
            with suppress(FileExistsError):
                file.hardlink_to(mine)
            mine.unlink()
        return file.read_text("utf-8")

    def activate(self, offline: bool) -> None:
        """Make the directory and point every dependency at it, with telemetry off.

        `offline` keeps the Hugging Face libraries from asking the hub. Raises BadInput when the
        directory cannot be written, and when events could not be signed.
        """
        if os.environ.get(WEBHOOK_URL) and not os.environ.get(WEBHOOK_SECRET):
            raise BadInput(
                f"{WEBHOOK_URL} is set, but not {WEBHOOK_SECRET}, which signs the events"
            )
        if not os.environ.get(WEBHOOK_URL, "http://").startswith(("http://", "https://")):
            raise BadInput(f"{WEBHOOK_URL} must be an http or https address")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            probe = self.root / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise BadInput(
                f"{self.root}: cannot be used as home ({error.strerror}); name a writable folder "
                "with --home or SDFT_HOME"
            ) from None
        self.set_environment(offline)

    def set_environment(self, offline: bool) -> None:
        """Point every dependency at the home, with telemetry off; nothing is made."""
        forced = NOTHING_SENT | {
            "PREFECT_HOME": str(self.root / "prefect"),
            "PREFECT_LOCAL_STORAGE_PATH": str(self.root / "prefect" / "storage"),
            "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
            "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
            "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
            "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        defaults = {
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true",
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",
            "PREFECT_LOGGING_LEVEL": "CRITICAL",
            "PREFECT_LOGGING_INTERNAL_LEVEL": "CRITICAL",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",  # a minute: what is missed is brought later
            # A store behind MLflow's server may be out of reach for us; where it is not: true.
            "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
            "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
            "PREFECT_SERVER_DATABASE_TIMEOUT": str(DATABASE_WAIT_S),
            "PREFECT_API_REQUEST_TIMEOUT": str(DATABASE_WAIT_S),
            "TOKENIZERS_PARALLELISM": "false",
        }
        if offline:
            defaults["HF_HUB_OFFLINE"] = "1"
        os.environ.update(forced)
        for name, value in defaults.items():
            os.environ.setdefault(name, value)
