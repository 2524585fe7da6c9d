"""Which stages are registered as stacks of adapters, and from which base."""

from pathlib import Path

from sdft.record import ADAPTER
from tasks.packages import AdapterStack
from tasks.publishing import stack_of
from tasks.training import TrainedStage


def stage(folder: Path, number: int, adapter_bytes: int) -> TrainedStage:
    """A stage with adapters, of a model of 100 bytes, on the one before."""
    directory = folder / str(number)
    for place, size in ((ADAPTER, adapter_bytes), ("model", 100)):
        (directory / place).mkdir(parents=True)
        (directory / place / "weights.safetensors").write_bytes(bytes(size))
        (directory / place / "config.json").write_bytes(bytes(1000))
    parent = folder / str(number - 1) / "model" if number > 1 else folder / "base"
    return TrainedStage.model_construct(directory=str(directory), parent_dir=str(parent))


def test_a_stack_goes_down_to_the_last_model_with_all_its_weights(tmp_path: Path) -> None:
    line = [stage(tmp_path, number, 30) for number in (1, 2, 3)]
    for upto in (1, 2, 3):
        adapters = tuple(f"{tmp_path}/{number}/{ADAPTER}" for number in range(1, upto + 1))
        assert stack_of(line[:upto]) == AdapterStack(
            base_dir=str(tmp_path / "base"), adapter_dirs=adapters
        )
    assert stack_of([]) is None, "a stage that trained all weights"


def test_a_stack_that_outgrows_the_model_is_a_model_and_the_next_begins_on_it(
    tmp_path: Path,
) -> None:
    line = [stage(tmp_path, number, 40) for number in (1, 2, 3, 4)]
    assert stack_of(line[:2]) is not None
    assert stack_of(line[:3]) is None, "120 bytes of adapters for a model of 100"
    assert stack_of(line) == AdapterStack(
        base_dir=str(tmp_path / "3" / "model"), adapter_dirs=(f"{tmp_path}/4/{ADAPTER}",)
    )
