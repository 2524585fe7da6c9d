"""SDFT against SFT over learning rates and seeds: what is learned, and what is kept.

    python benchmarks/retention_sweep.py examples/quickstart/curriculum.yaml WORK_DIR
        [--arms sdft:2e-4 sft:4e-4 sdft-lora:1e-3 ...] [--seeds 0 1 2]
        [--training epochs=1 teacher=ema ...] [--rehearsal 0.5]

An arm is a method, all weights or adapters (`-lora`, as `training.lora` has them by default), and a
rate. A chain is an arm and a seed: every stage follows the one before (no gate stands between, and
no health rule stops one), with the same data and number of steps in all arms. Chains run in the
order of the arms; those that are finished are not run again, one that was killed goes on from its
last checkpoint, and the same command started twice shares the chains out. Of a finished chain its
scores, curves and answers are kept, not its weights. `--training` and `--rehearsal` are of all.

Prints, and writes to WORK_DIR/sweep.md, means over the seeds of all chains that are finished there,
with 95% intervals (Student's t; n is the number of chains):

- by suite, with the curriculum's own scorers: each skill right after its own stage (*new*) and
  after the last (*kept*), and the mean of the general suites after the last stage (*general*);
- strict: the completion is the reference; lenient: it is anywhere in the completion, which forgives
  the demonstrations' wording that SFT learns along with the answer. Suites that the curriculum has
  scored as tool calls or regular expressions are scored so in both.
"""

import itertools
import json
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from sweep_options import Arm, changed, parse_options
from sweep_tables import Scores, by_strictness, by_suite, table

from schemas.base import BadInput, write_atomically
from schemas.curriculum import Curriculum, Skill, load_curriculum
from schemas.digest import digest_json
from schemas.results import EvaluationSpec, SuiteSpec
from schemas.settings import LoraSettings
from schemas.stage import ALGORITHM_VERSION, StageSpec
from sdft.data import data_hash, eval_table, read_items, train_table, write_table
from sdft.evaluate import evaluate
from sdft.modelfiles import chat_template, convert_gguf, model_files, model_hash
from sdft.process import StageFailed, Stop, exclusive, is_locked
from sdft.record import code_version, library_versions, verified_record
from sdft.rehearsal import rehearsed
from sdft.scorers import SCORERS, contains, exact_match
from sdft.sources import read_rows
from sdft.train import train


@dataclass(frozen=True)
class Sweep:
    """What all chains share."""

    curriculum: Curriculum
    work: Path
    base: Path
    train_files: dict[str, tuple[Path, str]]
    """By skill: canonical demonstrations and their hash."""
    suites: list[SuiteSpec]
    anchors: pa.Table | None
    stop: Stop

    def chain_dir(self, arm: Arm, seed: int) -> Path:
        return self.work / "chains" / f"{arm.name}-{arm.rate:g}-seed{seed}"

    def demonstrations(self, place: int, chain: Path, seed: int) -> tuple[Path, str]:
        """The file of the skill at this place, with what is learned beside it; and its hash."""
        names = [skill.name for skill in self.curriculum.skills[: place + 1]]
        *earlier, own = (self.train_files[name] for name in names)
        share = self.curriculum.rehearsal
        if not (earlier and share) and not self.anchors:
            return own
        tables = [pq.read_table(file) for file, _ in earlier] if share else []
        own_rows = pq.read_table(own[0])
        anchors = [self.anchors] if self.anchors else []
        table = pa.concat_tables([own_rows, *rehearsed(own_rows, tables, share, seed), *anchors])
        file = chain / f"{names[-1]}-train.parquet"
        write_table(table, file)
        return file, data_hash(table)

    def finished(self) -> dict[Arm, list[list[Scores]]]:
        """By arm: the scores of each chain in `work` that came to its end, the base's first."""
        found: dict[Arm, list[list[Scores]]] = {}
        for file in self.work.glob("chains/*/scores.json"):
            result = json.loads(file.read_text())
            if "rows" in result:
                found.setdefault(Arm.parse(result["arm"]), []).append(result["rows"])
        return dict(sorted(found.items()))


class Stopped(Exception):
    """A signal came; what is finished is kept."""


def open_sweep(curriculum: Curriculum, work: Path, stop: Stop) -> Sweep:
    """The data and the base model in `work`; BadInput where it holds chains of another sweep."""
    (work / "data").mkdir(parents=True, exist_ok=True)
    train_files: dict[str, tuple[Path, str]] = {}
    suites: list[SuiteSpec] = []
    for suite in curriculum.suites:
        items = eval_table(read_rows(suite.eval, "eval", work / "cache"))
        file = work / "data" / f"{suite.name}-eval.parquet"
        write_table(items, file)
        suites.append(
            SuiteSpec(
                name=suite.name, file=str(file), suite_hash=data_hash(items), scorer=suite.scorer
            )
        )
        if isinstance(suite, Skill):
            table = train_table(read_rows(suite.train, "train", work / "cache"))
            file = work / "data" / f"{suite.name}-train.parquet"
            write_table(table, file)
            train_files[suite.name] = file, data_hash(table)
    anchors = None
    if curriculum.anchors:
        anchors = train_table(read_rows(curriculum.anchors, "anchors", work / "cache"))
    base = Path(curriculum.base_model)
    if base.suffix == ".gguf":
        source, base = base, work / "base"
        if not base.is_dir():
            convert_gguf(source, base)
    shared = {
        "algorithm": ALGORITHM_VERSION,
        "libraries": library_versions(),
        "base": model_hash(model_files(base)),
        "data": {name: digest for name, (_, digest) in train_files.items()}
        | {f"{suite.name}, eval": suite.suite_hash for suite in suites}
        | ({"anchors": data_hash(anchors)} if anchors else {}),
        "settings": curriculum.model_dump(
            mode="json",
            include={"skills": {"__all__": {"training"}}, "evaluation": True, "rehearsal": True},
        ),
    }
    file = work / "sweep.json"
    if file.is_file() and (before := json.loads(file.read_text())) != shared:
        changed = ", ".join(key for key in shared if before.get(key) != shared[key])
        raise BadInput(f"{work}: its chains differ in {changed}; give another directory")
    write_atomically(file, json.dumps(shared, indent=2) + "\n")
    return Sweep(curriculum, work, base, train_files, suites, anchors, stop)


def run_chain(sweep: Sweep, arm: Arm, seed: int) -> list[Scores]:
    """Scores of the base, of each stage on its own skill, and of the last on all suites."""
    of_the_arm = {
        "method": arm.method,
        "learning_rate": arm.rate,
        "lora": LoraSettings() if arm.lora else None,
    }
    parent, rows = sweep.base, [score(sweep, sweep.base, sweep.suites)]
    for place, skill in enumerate(sweep.curriculum.skills):
        chain = sweep.chain_dir(arm, seed)
        file, digest = sweep.demonstrations(place, chain, seed)
        spec = StageSpec(
            skill=skill.name,
            parent_dir=str(parent),
            parent_hash=model_hash(model_files(parent)),
            train_file=str(file),
            data_hash=digest,
            seed=seed,
            training=skill.training.model_copy(update=of_the_arm),
            runtime=sweep.curriculum.runtime.model_copy(update={"health": "warn"}),
        )
        directory = chain / skill.name
        directory.mkdir(exist_ok=True)
        if verified_record(directory) is None and train(spec, directory, sweep.stop) is None:
            raise Stopped
        parent = directory / "model"
        is_last = skill is sweep.curriculum.skills[-1]
        own = [suite for suite in sweep.suites if suite.name == skill.name]
        rows.append(score(sweep, parent, sweep.suites if is_last else own))
    return rows


def score(sweep: Sweep, model: Path, suites: list[SuiteSpec]) -> Scores:
    spec = EvaluationSpec(
        model_dir=str(model),
        model_hash=model_hash(model_files(model)),
        template_hash=digest_json(chat_template(model)),
        suites=tuple(suites),
        settings=sweep.curriculum.evaluation,
        device=sweep.curriculum.runtime.device,
        libraries=library_versions(),
    )
    if not evaluate(spec, sweep.work / "cells", sweep.stop):
        raise Stopped
    found: Scores = {}
    for suite in suites:
        cell = sweep.work / "cells" / spec.cell_key(suite)
        completions = pq.read_table(cell / "items.parquet")["completion"].to_pylist()
        references = [item.references for item in read_items(Path(suite.file))]
        own = SCORERS[suite.scorer]
        worded = suite.scorer in ("exact_match", "contains")
        kinds = {
            "own": own,
            "strict": exact_match if worded else own,
            "lenient": contains if worded else own,
        }
        found[suite.name] = {
            kind: statistics.mean(map(scorer, completions, references))
            for kind, scorer in kinds.items()
        }
    return found


def finish_chain(sweep: Sweep, arm: Arm, seed: int) -> None:
    """Run a chain to its end, or find it finished; a stage that failed is an end too."""
    directory = sweep.chain_dir(arm, seed)
    with exclusive(directory):
        if (directory / "scores.json").is_file():
            return
        print(f"{arm}, seed {seed}", flush=True)
        result: dict[str, Any] = {"arm": str(arm), "seed": seed, "code": code_version()}
        try:
            result["rows"] = run_chain(sweep, arm, seed)
        except StageFailed as failure:
            result["failed"] = str(failure)
            print(f"failed: {failure}", flush=True)
        write_atomically(directory / "scores.json", json.dumps(result, indent=2) + "\n")
        for skill in sweep.curriculum.skills:
            for weights in ("model", "adapter", "checkpoints"):
                shutil.rmtree(directory / skill.name / weights, ignore_errors=True)


def tables(sweep: Sweep) -> str:
    """Both tables of all chains that are finished."""
    arms = [(arm.name, arm.rate, chains) for arm, chains in sweep.finished().items()]
    if not arms:
        return "no chain is finished\n"
    return "\n".join(
        table(numbers, sweep.curriculum, arms) for numbers in (by_suite, by_strictness)
    )


def main() -> None:
    arguments = parse_options(__doc__.splitlines()[0])
    stop = Stop()
    stop.listen()
    try:
        curriculum = changed(load_curriculum(arguments.curriculum), arguments)
        with exclusive(arguments.work):
            sweep = open_sweep(curriculum, arguments.work, stop)
            score(sweep, sweep.base, sweep.suites)
        for arm, seed in itertools.product(arguments.arms, arguments.seeds):
            if not is_locked(sweep.chain_dir(arm, seed)):  # else another process is at it
                finish_chain(sweep, arm, seed)
                write_atomically(arguments.work / "sweep.md", tables(sweep))
    except BadInput as problem:
        sys.exit(f"error: {problem}")
    except Stopped:
        sys.exit("stopped; the same command goes on")
    print(tables(sweep))


if __name__ == "__main__":
    main()
