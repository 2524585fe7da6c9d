"""Answers every item of the given suites with one model and scores them: the evaluator process.

    python -m sdft.evaluate SPEC.json CELLS_DIRECTORY

reads an `EvaluationSpec` and writes one directory a cell, named by its key: items.parquet and
cell.json, whole or not at all. Cells that are there already are left as they are.
"""

import os
import shutil
import time
from pathlib import Path

import pyarrow as pa
from scipy.stats import binomtest

from schemas.data import ITEM_SCHEMA
from schemas.results import Cell, EvaluationSpec, SuiteSpec
from schemas.templates import student_messages
from sdft.data import Item, read_items, write_table
from sdft.model import LanguageModel, load_model, pick_device
from sdft.process import Stop, run_program
from sdft.rollout import Sampling, generate
from sdft.scorers import SCORERS


def evaluate(spec: EvaluationSpec, cells_dir: Path, stop: Stop) -> bool:
    """Make the missing cells; returns False when it was stopped before the last one."""
    cells_dir.mkdir(parents=True, exist_ok=True)
    lm = None
    for suite in spec.suites:
        target = cells_dir / spec.cell_key(suite)
        if (target / "cell.json").is_file():
            continue
        if stop.requested:
            return False
        lm = lm or load_model(Path(spec.model_dir), pick_device(spec.device))
        began = time.monotonic()
        results = answer_items(lm, read_items(Path(suite.file)), suite, spec, stop)
        if results is None:
            return False
        _write_cell(spec, suite, results, time.monotonic() - began, target)
    return True


def answer_items(
    lm: LanguageModel, items: list[Item], suite: SuiteSpec, spec: EvaluationSpec, stop: Stop
) -> list[dict[str, object]] | None:
    """One result an item (columns of ITEM_SCHEMA), in the order of the items; None when stopped.

    An item that cannot be answered or scored is an error of its own, not a score of 0 by silence.
    """
    lm.model.eval()
    prompts = [lm.prompt_ids(student_messages(item.messages)) for item in items]
    room = lm.max_positions - spec.settings.max_new_tokens
    sampling = Sampling(spec.settings.max_new_tokens)
    fitting = [index for index, prompt in enumerate(prompts) if len(prompt) <= room]
    by_length = sorted(fitting, key=lambda index: len(prompts[index]))
    results: dict[int, dict[str, object]] = {}
    for start in range(0, len(by_length), spec.settings.batch_size):
        if stop.requested:
            return None
        print(f"{suite.name}: {start} of {len(items)} items", flush=True)  # shows it is alive
        indices = by_length[start : start + spec.settings.batch_size]
        answers = generate(lm, [prompts[index] for index in indices], sampling)
        for index, answer in zip(indices, answers, strict=True):
            completion = lm.text(answer.tokens)
            results[index] = {
                "completion": completion,
                "score": SCORERS[suite.scorer](completion, items[index].references),
                "status": "scored",
                "tokens": len(answer.tokens),
                "finished": answer.finished,
            }
    for index, prompt in enumerate(prompts):
        if index not in results:
            error = f"the prompt has {len(prompt)} tokens, only {room} fit"
            results[index] = {"status": "error", "error": error}
    return [{"id": item.id, **results[index]} for index, item in enumerate(items)]


def _write_cell(
    spec: EvaluationSpec,
    suite: SuiteSpec,
    results: list[dict[str, object]],
    seconds: float,
    target: Path,
) -> None:
    scored = [result for result in results if result["status"] == "scored"]
    correct = sum(result["score"] == 1.0 for result in scored)
    interval = binomtest(correct, len(results)).proportion_ci(method="wilson")
    cell = Cell(
        model_hash=spec.model_hash,
        suite_hash=suite.suite_hash,
        fingerprint=spec.fingerprint(suite),
        items=len(results),
        scored=len(scored),
        errors=len(results) - len(scored),
        score=correct / len(results),
        interval=(interval.low, interval.high),
        seconds=seconds,
    )
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    table = pa.Table.from_pylist(results, schema=ITEM_SCHEMA)
    write_table(table, partial / "items.parquet")
    cell.write(partial / "cell.json")
    if target.exists():  # another evaluator made the same cell meanwhile
        shutil.rmtree(partial)
    else:
        partial.rename(target)


def main(spec_file: Path, cells_dir: Path, stop: Stop) -> bool:
    return evaluate(EvaluationSpec.read(spec_file), cells_dir, stop)


if __name__ == "__main__":
    run_program(main)
