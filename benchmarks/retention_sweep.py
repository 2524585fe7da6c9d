"""SDFT against SFT over learning rates and seeds: what is learned, and what is kept.

    python benchmarks/retention_sweep.py examples/quickstart/curriculum.yaml WORK_DIR
        [--rates 5e-5 1e-4 2e-4 4e-4 8e-4] [--seeds 0 1 2]

Every stage follows the one before (no gate), with the same data and number of steps in both arms.
Runs the trainer's and the evaluator's own functions in one process; finished stages and cells in
WORK_DIR are not run again. Prints, and writes to WORK_DIR/sweep.md, a table of means over seeds:

- strict: the completion is the reference; lenient: it is anywhere in the completion, which forgives
  the demonstrations' wording that SFT learns along with the answer. A tool call counts anywhere.
"""

import argparse
import json
import statistics
from pathlib import Path

import pyarrow.parquet as pq

from schemas.curriculum import Curriculum, Skill, load_curriculum
from schemas.digest import digest_json
from schemas.results import EvaluationSpec, SuiteSpec
from schemas.stage import StageSpec
from sdft.data import data_hash, eval_table, read_items, read_rows, train_table, write_table
from sdft.evaluate import evaluate
from sdft.modelfiles import chat_template, model_files, model_hash
from sdft.process import Stop
from sdft.record import library_versions, verified_record
from sdft.scorers import contains, exact_match, tool_call
from sdft.train import train


def snapshot(curriculum: Curriculum, work: Path) -> tuple[dict[str, Path], list[SuiteSpec]]:
    """Canonical files: demonstrations by skill, and the suites to score on."""
    (work / "data").mkdir(parents=True, exist_ok=True)
    train_files: dict[str, Path] = {}
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
            train_files[suite.name] = work / "data" / f"{suite.name}-train.parquet"
            rows = read_rows(suite.train, "train", work / "cache")
            write_table(train_table(rows), train_files[suite.name])
    return train_files, suites


def run_chain(
    curriculum: Curriculum,
    method: str,
    rate: float,
    seed: int,
    work: Path,
    data: tuple[dict[str, Path], list[SuiteSpec]],
) -> list[dict[str, tuple[float, float]]]:
    """(strict, lenient) by suite for every row of the retention matrix."""
    train_files, suites = data
    parent = Path(curriculum.base_model)
    rows = [score(curriculum, parent, suites, work)]
    for skill in curriculum.skills:
        changed = {"method": method, "learning_rate": rate}
        spec = StageSpec(
            skill=skill.name,
            parent_dir=str(parent),
            parent_hash=model_hash(model_files(parent)),
            train_file=str(train_files[skill.name]),
            data_hash=train_files[skill.name].name,
            seed=seed,
            training=skill.training.model_copy(update=changed),
            runtime=curriculum.runtime,
        )
        directory = work / "stages" / spec.key[:16]
        directory.mkdir(parents=True, exist_ok=True)
        if verified_record(directory) is None:
            train(spec, directory, Stop())
        parent = directory / "model"
        rows.append(score(curriculum, parent, suites, work))
    return rows


def score(
    curriculum: Curriculum, model: Path, suites: list[SuiteSpec], work: Path
) -> dict[str, tuple[float, float]]:
    spec = EvaluationSpec(
        model_dir=str(model),
        model_hash=model_hash(model_files(model)),
        template_hash=digest_json(chat_template(model)),
        suites=tuple(suites),
        settings=curriculum.evaluation,
        device=curriculum.runtime.device,
        libraries=library_versions(),
    )
    evaluate(spec, work / "cells", Stop())
    found = {}
    for suite in suites:
        cell = work / "cells" / spec.cell_key(suite)
        completions = pq.read_table(cell / "items.parquet")["completion"].to_pylist()
        references = [item.references for item in read_items(Path(suite.file))]
        is_call = suite.scorer == "tool_call"
        strict, lenient = (
            statistics.mean(scorer(c, r) for c, r in zip(completions, references, strict=True))
            for scorer in (
                tool_call if is_call else exact_match,
                tool_call if is_call else contains,
            )
        )
        found[suite.name] = (strict, lenient)
    return found


def summary(
    curriculum: Curriculum, rows: list[dict[str, tuple[float, float]]], kind: int
) -> dict[str, float]:
    """The three numbers of a chain; kind 0 is strict, 1 lenient."""
    skills = [skill.name for skill in curriculum.skills]
    general = [suite.name for suite in curriculum.general]
    return {
        "new": statistics.mean(rows[i][name][kind] for i, name in enumerate(skills, 1)),
        "kept": statistics.mean(rows[-1][name][kind] for name in skills),
        "general": statistics.mean(rows[-1][name][kind] for name in general),
        "worst new": min(rows[i][name][kind] for i, name in enumerate(skills, 1)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curriculum", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1e-4, 2e-4, 4e-4, 8e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=["sdft", "sft"])
    arguments = parser.parse_args()
    curriculum = load_curriculum(arguments.curriculum)
    data = snapshot(curriculum, arguments.work)
    columns = ("new", "worst new", "kept", "general")
    header = ["method", "rate", *(f"{c}, {k}" for k in ("strict", "lenient") for c in columns)]
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    results = []
    for method in arguments.methods:
        for rate in arguments.rates:
            chains = [
                run_chain(curriculum, method, rate, seed, arguments.work, data)
                for seed in arguments.seeds
            ]
            cells = []
            for kind in (0, 1):
                summaries = [summary(curriculum, rows, kind) for rows in chains]
                for column in columns:
                    values = [one[column] for one in summaries]
                    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.mean(values):.2f}{spread}")
            results.append({"method": method, "rate": rate, "chains": chains})
            lines.append(f"| {method} | {rate:g} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
            (arguments.work / "sweep.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
            (arguments.work / "sweep.json").write_text(json.dumps(results), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
