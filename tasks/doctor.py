"""What `sdft doctor` looks at on this machine: settings, home, disk, versions, GPU, ledger.

Nothing is made or changed. Every finding says what is well, or what is wrong and what to mend.
"""

import importlib.metadata
import os
import shutil
import time
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from sqlalchemy import create_engine, func, inspect, make_url, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.pool import NullPool

from schemas.base import BadInput
from sdft.chain import first_break
from sdft.record import code_version
from tasks.console import shown_address
from tasks.failures import RunFailed
from tasks.findings import PATIENCE_S, Findings, clock, note, well, wrong
from tasks.home import WEBHOOK_SECRET, WEBHOOK_URL, Home
from tasks.ledger import Ledger
from tasks.ledger_tables import ENTRIES

LEAST_FREE_BYTES = 2 * 2**30
MODELS_A_STAGE = 10
"""A checkpoint has weights and two moments; two are kept while a third is written; the result."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
GPU_DEVICE = Path("/dev/nvidiactl")


def examine(home: Home) -> Findings:
    """Every finding, one check after the other; what fails in one does not keep others back."""
    checks: dict[str, Callable[[], Findings]] = {
        "settings": lambda: settings(os.environ),
        "home": lambda: own_home(home),
        "versions": versions,
        "gpu": gpu,
        "ledger": lambda: ledger(home),
        "mlflow": lambda: _mlflow(home),
        "prefect": lambda: _prefect(home),
    }
    for what, check in checks.items():
        try:
            yield from check()
        except (BadInput, RunFailed, OSError) as error:
            said, _, mend = str(error).partition("; ")
            yield wrong(what, said, mend or "is it running, and is its address right?")
        except ValueError as error:  # its text may hold a part of an address
            yield wrong(what, f"an address cannot be read ({type(error).__name__})", "look at it")


def _mlflow(home: Home) -> Findings:
    uri = home.tracking_uri
    if uri.startswith("sqlite:") and not _is_there(uri):
        yield well("mlflow", f"{shown_address(uri)}: not there yet, sdft learn makes it")
        return
    from tasks.doctor_mlflow import mlflow_server

    yield from mlflow_server(home)


def _prefect(home: Home) -> Findings:
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        yield well("prefect", "embedded: each run starts a server of its own")
        return
    with TemporaryDirectory() as folder:
        if not home.root.is_dir():  # Prefect makes its folder when it is imported
            os.environ["PREFECT_HOME"] = folder
        from tasks.doctor_prefect import prefect_server

        yield from prefect_server(url)


def settings(given: Mapping[str, str]) -> Findings:
    """Variables that do not go together."""
    problems = [wrong("settings", found, mend) for found, mend in _disagreements(given)]
    yield from problems
    for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI"):
        parts = urlsplit(given.get(name, ""))
        if parts.scheme == "http" and parts.hostname not in LOOPBACK:
            found = f"{name} ({shown_address(given[name])}): passwords go there unencrypted"
            yield note("settings", found, "put TLS in front, unless the network is yours alone")
    if not problems:
        shared = ", ".join(name for name in _ADDRESSES if given.get(name))
        yield well("settings", shared or "embedded: no server is named")


def _disagreements(given: Mapping[str, str]) -> Generator[tuple[str, str]]:
    """What is wrong, and what to mend."""
    mlflow = given.get("MLFLOW_TRACKING_URI", "").startswith("http")
    if mlflow and not given.get("SDFT_LEDGER_URL"):
        found = "the registry (MLFLOW_TRACKING_URI) is shared, the ledger is this home's own"
        yield found, "set SDFT_LEDGER_URL: homes that share one share the other"
    if given.get("SDFT_LEDGER_URL") and not given.get("MLFLOW_TRACKING_URI"):
        found = "the ledger (SDFT_LEDGER_URL) is shared, the registry is this home's own"
        yield found, "set MLFLOW_TRACKING_URI: homes that share one share the other"
    if (prefect := given.get("PREFECT_API_URL", "").rstrip("/")) and not prefect.endswith("/api"):
        found = f"PREFECT_API_URL ({shown_address(prefect)}) does not end with /api"
        yield found, "set it to the server's address with /api"
    for name, wants in _PAIRS:
        if given.get(name) and not given.get(wants):
            yield f"{name} is set, {wants} is not", f"set {wants} as well, or neither"


_PAIRS = (
    ("PREFECT_API_AUTH_STRING", "PREFECT_API_URL"),
    ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_URI"),
    ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME"),
    (WEBHOOK_URL, WEBHOOK_SECRET),
)
_ADDRESSES = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "SDFT_LEDGER_URL", WEBHOOK_URL)


def own_home(home: Home) -> Findings:
    """Whether the home can be written, and how much room there is."""
    there = home.root
    while not there.exists():
        there = there.parent
    if home.root.is_dir():
        usable = os.access(home.root, os.W_OK | os.X_OK)
        text = f"{home.root}"
    else:
        usable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        text = f"{home.root}: not there yet, sdft learn makes it"
    if usable:
        yield well("home", text)
    else:
        yield wrong("home", f"{there}: cannot be written", "name another with --home or SDFT_HOME")
    free = shutil.disk_usage(there).free
    largest = max((_size(model) for model in home.stages.glob("*/model")), default=0)
    wanted = max(LEAST_FREE_BYTES, MODELS_A_STAGE * largest)
    text = f"{_gib(free)} free"
    if free >= wanted:
        yield well("disk", text)
    else:
        why = f"ten times its largest model, {_gib(largest)}" if largest else "the least there is"
        yield wrong(
            "disk", f"{text}, a stage may want {_gib(wanted)} ({why})", "sdft gc, or a larger disk"
        )


def versions() -> Findings:
    """Whether what is installed is what this version asks for."""
    try:
        asked = [Requirement(one) for one in importlib.metadata.requires("sdft") or []]
    except importlib.metadata.PackageNotFoundError:
        yield wrong(
            "versions", "sdft is not installed", "in a clone: pip install -c constraints.txt ."
        )
        return
    needed = [one for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    bad = [problem for one in needed if (problem := unmet(one))]
    for problem in bad:
        yield wrong("versions", problem, "in a clone: pip install -c constraints.txt .")
    if not bad:
        shown = ", ".join(
            f"{name} {importlib.metadata.version(name)}" for name in ("prefect", "mlflow", "torch")
        )
        yield well("versions", f"sdft {code_version()}, {shown}; all {len(needed)} asked for fit")


def unmet(asked: Requirement) -> str | None:
    try:
        there = importlib.metadata.version(asked.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{canonicalize_name(asked.name)} is missing"
    if asked.specifier.contains(there, prereleases=True):
        return None
    return f"{canonicalize_name(asked.name)} is {there}, asked for is {asked.specifier}"


def gpu() -> Findings:
    """The GPUs that torch can use, and whether there is one that it cannot."""
    import torch

    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            yield well("gpu", f"{number}: {name}, {_gib(free)} of {_gib(total)} free")
    elif not GPU_DEVICE.exists():
        yield well("gpu", f"none; trains on the CPU, {os.cpu_count()} cores")
    elif torch.version.cuda is None:
        yield wrong(
            "gpu",
            f"there is one, but torch {torch.__version__} is built for CPUs",
            "install the CUDA build of the same version of torch",
        )
    else:
        yield wrong("gpu", "there is one, but torch cannot use it", "look at nvidia-smi's driver")


def ledger(home: Home) -> Findings:
    """Whether the ledger's database answers, its chain is whole, and its clock is ours."""
    url = home.ledger_uri
    where = shown_address(url) if "://" in url else "SDFT_LEDGER_URL"  # else it may be anything
    if url.startswith("sqlite:") and not _is_there(url):
        yield well("ledger", f"{where}: not there yet, sdft learn makes it")
        return
    os.environ.setdefault("PGCONNECT_TIMEOUT", str(PATIENCE_S))
    before = time.time()
    try:
        engine = create_engine(url, poolclass=NullPool)
        with engine.connect() as connection:
            there = inspect(connection).has_table(ENTRIES.name)
            if engine.dialect.name == "postgresql":
                now = connection.execute(select(func.clock_timestamp())).scalar_one()
                yield clock("ledger", now, before)
    except (SQLAlchemyError, ImportError, ValueError) as error:  # its text may hold the password
        yield wrong(
            "ledger",
            f"{where}: cannot be used ({type(error).__name__})",
            "look at SDFT_LEDGER_URL: host, user, password, database",
        )
        return
    if not there:
        yield well("ledger", f"{where}: answers; its tables are made by the first run")
        return
    entries = Ledger(home).entries()
    if broken := first_break(entries):
        yield wrong("ledger", broken, "it was altered: compare it with a copy")
    else:
        yield well("ledger", f"{where}: {len(entries)} entries, the chain is whole")


def _is_there(sqlite_url: str) -> bool:
    return Path(make_url(sqlite_url).database or "").is_file()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
