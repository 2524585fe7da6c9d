"""The data of a stage that rehearses: its own demonstrations with some of the skills before it."""

import shutil

import pyarrow.parquet as pq

from schemas.base import BadInput
from schemas.digest import digest_json
from schemas.snapshot import Snapshot, SuiteData
from sdft.data import data_hash, write_table
from sdft.files import placed
from sdft.modelfiles import all_files
from sdft.rehearsal import rehearsed
from tasks.console import say
from tasks.home import Home
from tasks.validation import ROWS, SNAPSHOT, verified_snapshot


def with_rehearsal(
    data: SuiteData, earlier: dict[str, SuiteData], share: float, seed: int, home: Home
) -> SuiteData:
    """The data of a skill with demonstrations of the skills that the stage's model knows.

    All of them have passed validation; its result and page are the skill's own. The snapshot is
    made once and kept, like any other.
    """
    own = _train(data)
    learned = {name: _train(one) for name, one in earlier.items()}
    if not share or not learned:
        return data
    key = {
        "own": own.hash,
        "earlier": {name: one.data_hash for name, one in learned.items()},
        "share": share,
        "seed": seed,
    }
    target = home.data / digest_json(key)[:32]
    try:
        made = verified_snapshot(target)
    except BadInput:  # not there, or altered
        made = None
    if made is None:
        tables = [pq.read_table(one.file) for one in learned.values()]
        table, counts = rehearsed(pq.read_table(own.file), tables, share, seed)
        with placed(target) as partial:
            for file in own.files:
                if file.path != ROWS:
                    shutil.copyfile(f"{own.directory}/{file.path}", partial / file.path)
            write_table(table, partial / ROWS)
            changed = {
                "files": all_files(partial),
                "data_hash": data_hash(table),
                "rows": len(table),
                "rehearsed": {
                    name: count for name, count in zip(learned, counts, strict=True) if count
                },
            }
            made = own.model_copy(update=changed).at(target)
            made.write(partial / SNAPSHOT)
        again = ", ".join(f"{count} of {name}" for name, count in made.rehearsed.items())
        say("rehearse", data.eval.name.removesuffix("/eval"), f"learns {again or 'no rows'} again")
    return data.model_copy(update={"train": made.at(target)})


def _train(data: SuiteData) -> Snapshot:
    assert data.train is not None, f"{data.eval.name} has no demonstrations"
    return data.train
