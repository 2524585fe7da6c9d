"""Models of other families go the whole way without a line that knows them.

Their weights are random and tiny; what differs is real: learned positions, a head of its own, soft
caps and windows, a vocabulary of 200,064.
"""

from pathlib import Path

import mlflow.transformers
import pytest
import torch
from conftest import eval_rows, train_rows
from families import FAMILIES, save_family

from schemas.digest import digest_file
from schemas.results import CellFile, EvaluationSpec, SuiteSpec
from schemas.settings import EvaluationSettings, LoraSettings, RuntimeSettings, TrainingSettings
from schemas.stage import StageSpec
from sdft.cells import CELL
from sdft.data import data_hash, eval_table, train_table, write_table
from sdft.evaluate import evaluate
from sdft.model import load_model
from sdft.modelfiles import model_files, model_hash
from sdft.process import Stop
from sdft.record import ADAPTER, verified_record
from sdft.stagelog import METRICS, read_metrics
from sdft.train import train
from tasks.packages import AdapterStack, save_package

TRAINING = TrainingSettings(
    epochs=2, prompts_per_step=4, learning_rate=1e-3, warmup_steps=1, max_new_tokens=12
)


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained_resumed_evaluated_and_packed(
    family: str, lora: LoraSettings | None, tmp_path: Path
) -> None:
    parent = save_family(family, tmp_path / "parent")
    table = train_table(train_rows(10))
    write_table(table, tmp_path / "train.parquet")
    spec = StageSpec(
        skill="alpha",
        parent_dir=str(parent),
        parent_hash="p",
        train_file=str(tmp_path / "train.parquet"),
        data_hash=data_hash(table),
        seed=1,
        training=TRAINING.model_copy(update={"lora": lora}),
        runtime=RuntimeSettings(device="cpu"),
    )
    whole, stopped, parts = (tmp_path / name for name in ("whole", "stopped", "parts"))
    for directory in (whole, stopped, parts):
        directory.mkdir()
    record = train(spec, whole, Stop())
    assert record is not None
    losses = [line.metrics["divergence"] for line in read_metrics(whole / METRICS)]
    assert losses[-1] < losses[0]

    stop = Stop()
    stop.requested = True
    assert train(spec, stopped, stop) is None
    resumed = train(spec, stopped, Stop())
    assert resumed is not None
    assert resumed.model_hash == record.model_hash

    one_by_one = spec.model_copy(update={"runtime": RuntimeSettings(micro_batch_tokens=1)})
    train(one_by_one, parts, Stop())
    again = [line.metrics["divergence"] for line in read_metrics(parts / METRICS)]
    assert again == pytest.approx(losses, rel=2e-3)

    model = whole / "model"
    verified_record(whole)
    check_answers(model, tmp_path)
    adapters = (str(whole / ADAPTER),)
    stack = AdapterStack(base_dir=str(parent), adapter_dirs=adapters) if lora else None
    save_package(model, stack, tmp_path / "package")
    loaded = mlflow.transformers.load_model(str(tmp_path / "package"), return_type="components")
    ours = load_model(model, torch.device("cpu")).model
    assert loaded["model"].config.model_type == ours.config.model_type
    ids = torch.tensor([[5, 6, 7, 8]])
    rounding = {"rtol": 1e-4, "atol": 1e-4} if lora else {"rtol": None, "atol": None}
    torch.testing.assert_close(loaded["model"](ids).logits, ours(ids).logits, **rounding)


def test_a_package_has_the_files_of_weights_that_the_trainer_wrote(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a model that MLflow by itself cuts in pieces, as it does above 500 MB."""
    monkeypatch.setenv("MLFLOW_HUGGINGFACE_MODEL_MAX_SHARD_SIZE", "20KB")
    save_package(tiny_dir, None, tmp_path / "package")
    trained, packed = (
        [digest_file(file) for file in folder.rglob("*.safetensors")]
        for folder in (tiny_dir, tmp_path / "package")
    )
    assert packed == trained


def check_answers(model: Path, folder: Path) -> None:
    """A suite is answered, every item of it."""
    items = eval_table(eval_rows(3))
    write_table(items, folder / "eval.parquet")
    suite = SuiteSpec(
        name="alpha",
        file=str(folder / "eval.parquet"),
        suite_hash=data_hash(items),
        scorer="exact_match",
    )
    spec = EvaluationSpec(
        model_dir=str(model),
        model_hash=model_hash(model_files(model)),
        template_hash="t",
        suites=(suite,),
        settings=EvaluationSettings(max_new_tokens=8),
        libraries={},
    )
    assert evaluate(spec, folder / "cells", Stop())
    cell = CellFile.read(folder / "cells" / spec.cell_key(suite) / CELL).cell
    assert (cell.items, cell.scored) == (3, 3)
