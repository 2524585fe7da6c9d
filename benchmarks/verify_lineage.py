"""How long it takes to prove a lineage, and to pass over its stages, against hashing its files.

    python benchmarks/verify_lineage.py --stages 100

Everything is real but the training: weights are random bytes of a chosen size. Printed in one run:
seconds to read every file once for its sha256, of `sdft lineage --verify`, and of what every run
does with finished stages: the first time, and again when nobody has touched them.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from registry_home import RegistryHome

from sdft.modelfiles import model_files
from tasks.lineage import read_lineage
from tasks.proof import prove
from tasks.seen import SETTLED_S, known_record


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the proof of a long lineage.")
    parser.add_argument("--stages", type=int, default=100)
    parser.add_argument("--megabytes", type=float, default=8.0, help="weights of one stage")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = RegistryHome(Path(folder), weights=os.urandom(int(arguments.megabytes * 1e6)))
        place.line([f"skill-{number:03}" for number in range(arguments.stages)])
        version = str(arguments.stages)
        hashing = timed(lambda: hash_all(place))
        reading = timed(lambda: read_lineage(place.home, f"demo/{version}"))
        proving = timed(lambda: prove(place.home, f"demo/{version}"))
        time.sleep(SETTLED_S)
        first, again = (timed(lambda: pass_over(place)) for _ in range(2))
    print(f"{arguments.stages} stages of {arguments.megabytes} MB")
    print(f"hashing alone   {hashing:6.2f} s")
    print(f"reading lineage {reading:6.2f} s")
    print(f"proving it      {proving:6.2f} s  {proving / hashing:.2f} x hashing")
    print(f"beside hashing  {proving - hashing:6.2f} s  (target: below 10 s for 100 stages)")
    print(f"a run, first    {first:6.2f} s")
    print(f"a run, again    {again:6.3f} s  {again / first:.3f} x the first")


def hash_all(place: RegistryHome) -> None:
    """What the proof hashes: packages and runs, the trained models, the base model."""
    for folder in (place.home.artifacts, place.home.stages, Path(place.base.path)):
        model_files(folder)


def pass_over(place: RegistryHome) -> None:
    """What a run asks of every stage: whether it is finished, and still what its record lists."""
    for directory in place.home.stages.iterdir():
        assert known_record(directory) is not None


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
