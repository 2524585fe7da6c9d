"""Answers every item of the given suites with one model and scores them: the evaluator process.

    python -m sdft.evaluate SPEC.json CELLS_DIRECTORY

reads an `EvaluationSpec` and writes one directory a cell, named by its key: items.parquet and
cell.json, whole or not at all. Cells that are there already are left as they are.
"""

import time
from pathlib import Path

import pyarrow as pa

from schemas.data import ITEM_SCHEMA
from schemas.digest import digest_file
from schemas.results import CellFile, EvaluationSpec, SuiteSpec
from sdft.cells import CELL, ITEMS, cell_of
from sdft.data import Item, read_items, write_table
from sdft.drawing import Sampling
from sdft.files import placed
from sdft.model import LanguageModel, load_model, pick_device
from sdft.process import Stop, run_program
from sdft.rollout import Completion, generate
from sdft.scorers import SCORERS, reference_problem


def evaluate(spec: EvaluationSpec, cells_dir: Path, stop: Stop) -> bool:
    """Make the missing cells; returns False when it was stopped before the last one."""
    cells_dir.mkdir(parents=True, exist_ok=True)
    lm = None
    for suite in spec.suites:
        target = cells_dir / spec.cell_key(suite)
        if (target / CELL).is_file():
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

    An item without a score has another status and the reason, not a score of 0 by silence.
    """
    prompts = [lm.prompt_ids(item.messages) for item in items]
    room = lm.max_positions - spec.settings.max_new_tokens
    sampling = Sampling(spec.settings.max_new_tokens)
    results: dict[int, dict[str, object]] = {}
    for index, (item, prompt) in enumerate(zip(items, prompts, strict=True)):
        if problem := _invalid(item, len(prompt), room, suite.scorer):
            results[index] = {"status": "invalid", "error": problem}
    askable = [index for index in range(len(items)) if index not in results]
    by_length = sorted(askable, key=lambda index: len(prompts[index]))
    for start in range(0, len(by_length), spec.settings.batch_size):
        if stop.requested:
            return None
        print(f"{suite.name}: {start} of {len(items)} items", flush=True)  # shows it is alive
        indices = by_length[start : start + spec.settings.batch_size]
        answers = generate(lm, [prompts[index] for index in indices], sampling)
        for index, answer in zip(indices, answers, strict=True):
            text = lm.text(answer.tokens)
            results[index] = _result(answer, text, items[index], suite.scorer)
    unrun: dict[str, object] = {"status": "unrun"}
    return [{"id": item.id, **results.get(index, unrun)} for index, item in enumerate(items)]


def _invalid(item: Item, tokens: int, room: int, scorer: str) -> str | None:
    """Why an item cannot be asked or scored as it is; None when it can."""
    if tokens > room:
        return f"the prompt has {tokens} tokens, only {room} fit"
    if not item.references:
        return "it has no references"
    problems = [reference_problem(scorer, one) for one in item.references]
    return next((f"a reference {problem}" for problem in problems if problem), None)


def _result(answer: Completion, text: str, item: Item, scorer: str) -> dict[str, object]:
    said = {"completion": text, "tokens": len(answer.tokens), "finished": answer.finished}
    if not answer.finite:
        return {**said, "status": "error", "error": "the model's output was not finite"}
    try:
        score = SCORERS[scorer](text, item.references)
    except RecursionError:  # JSON nested too deeply
        return {**said, "status": "error", "error": "the completion is nested too deeply to score"}
    return {**said, "status": "scored", "score": score}


def _write_cell(
    spec: EvaluationSpec,
    suite: SuiteSpec,
    results: list[dict[str, object]],
    seconds: float,
    target: Path,
) -> None:
    with placed(target) as partial:
        write_table(pa.Table.from_pylist(results, schema=ITEM_SCHEMA), partial / ITEMS)
        items_sha256 = digest_file(partial / ITEMS)
        cell = cell_of(spec, suite, results, items_sha256, seconds)
        CellFile(cell=cell).seal().write(partial / CELL)


def main(spec_file: Path, cells_dir: Path, stop: Stop) -> bool:
    return evaluate(EvaluationSpec.read(spec_file), cells_dir, stop)


if __name__ == "__main__":
    run_program(main, smaller="evaluation.batch_size")
