"""What it costs that nothing is lost: saving checkpoints, and carrying metrics to MLflow.

    python benchmarks/durability.py --points 1000000

Printed in one run: the share of the training time that saving by the clock takes, for a model of
SmolLM2-135M's shape with random weights whose clock is set to a second, so that only the limit
holds it back; and points a second into MLflow on SQLite, beside its own one-by-one logging.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from conftest import make_tokenizer, save_tiny_model, tiny_llama, train_rows
from mlflow import MlflowClient

from schemas.settings import RuntimeSettings, TrainingSettings
from schemas.stage import StageSpec
from sdft.checkpoint import MAX_SHARE
from sdft.data import data_hash, train_table, write_table
from sdft.process import Stop
from sdft.stagelog import METRICS, MetricsReader, StageLog
from sdft.train import train
from tasks.stageruns import carry

METRICS_A_STEP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of checkpoints and of carrying metrics.")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--points", type=int, default=100_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        carried(Path(folder), arguments.points)
        checkpoint_share(Path(folder), arguments.steps)


def checkpoint_share(folder: Path, steps: int) -> None:
    config = tiny_llama(make_tokenizer())
    config.update(
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 64,
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
        }
    )
    save_tiny_model(folder / "model", config)
    rows = train_table(train_rows(4 * steps))
    write_table(rows, folder / "train.parquet")
    spec = StageSpec(
        skill="skill",
        parent_dir=str(folder / "model"),
        parent_hash="p",
        train_file=str(folder / "train.parquet"),
        data_hash=data_hash(rows),
        seed=0,
        training=TrainingSettings(epochs=1, prompts_per_step=4, max_new_tokens=24),
        runtime=RuntimeSettings(checkpoint_every_s=1.0),
    )
    directory = folder / "stage"
    directory.mkdir()
    record = train(spec, directory, Stop())
    assert record is not None
    size = sum(path.stat().st_size for path in next(directory.glob("checkpoints/*")).iterdir())
    share = record.checkpoint_seconds / record.train_seconds
    print(
        f"a checkpoint of {size / 1e9:.2f} GB, {record.steps} steps in {record.train_seconds:.0f} s"
    )
    print(
        f"saving {record.checkpoint_seconds:.1f} s: {share:.1%} of the time (limit {MAX_SHARE:.0%})"
    )


def carried(folder: Path, points: int) -> None:
    work = folder / "spool"
    work.mkdir()
    log, steps = StageLog(work, b""), points // METRICS_A_STEP
    values = {f"metric_{number}": 0.5 for number in range(METRICS_A_STEP)}
    written = timed(lambda: [log.step(step, values) for step in range(1, steps + 1)])
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("spool", artifact_location=str(folder / "artifacts"))
    ours, one_by_one = (client.create_run(experiment).info.run_id for _ in range(2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = MetricsReader(work / METRICS)
    ours_s = timed(lambda: carry(client, ours, reader.new()))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    sample = 200
    plain_s = timed(
        lambda: [client.log_metric(one_by_one, "metric", 0.5, step=step) for step in range(sample)]
    )
    ratio = (points / ours_s) / (sample / plain_s)
    print(
        f"{points} points in {steps} steps: written in {written:.1f} s, carried in {ours_s:.1f} s"
    )
    print(
        f"{points / ours_s:.0f} points/s, one by one {sample / plain_s:.0f}: {ratio:.0f} x as fast"
    )
    print(f"peak memory grew by {grown:.0f} MiB while carrying them at once")


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


if __name__ == "__main__":
    main()
