"""What gc may take, and what it must never touch."""

import shutil
from pathlib import Path

import pytest
from registry_home import RegistryHome

from tasks.garbage import collect
from tasks.proof import prove


@pytest.fixture
def place(tmp_path: Path) -> RegistryHome:
    place = RegistryHome(tmp_path)
    place.line(["a", "b"])
    return place


def found(place: RegistryHome, remove: bool = False, age_s: float = 0.0) -> dict[str, str]:
    return {one.path: one.what for one in collect(place.home, age_s, remove)}


def test_nothing_that_a_version_rests_on_is_garbage(place: RegistryHome) -> None:
    assert found(place, remove=True) == {}
    assert prove(place.home, "demo").stages == 2


def test_what_nothing_reaches_is_told_with_its_size_and_removed_on_demand(
    place: RegistryHome,
) -> None:
    home = place.home
    lost = place.grow("c")  # never registered
    stage = str(Path(lost.directory).relative_to(home.root))
    kept = next(path for path in home.stages.iterdir() if str(path) != lost.directory)
    (kept / "checkpoints" / "step-000001").mkdir(parents=True)
    (kept / "checkpoints" / "step-000001" / "model.safetensors").write_bytes(b"x" * 1000)
    shutil.copytree(kept, kept.with_name(f"{kept.name}.7"))
    (home.cells / ("0" * 64)).mkdir(parents=True)
    orphan = place.client.create_logged_model(
        place.client.get_experiment_by_name("demo").experiment_id,
        name="demo-c",
        tags={"sdft.stage_key": "k"},
    )
    foreign = place.client.create_logged_model("0", name="not-of-ours")
    expected = {
        stage: "a stage that is not registered",
        f"stages/{kept.name}/checkpoints": "checkpoints of a finished stage",
        f"stages/{kept.name}.7": "work on a stage that is finished",
        f"cells/{'0' * 64}": "a score of a model that is gone",
        orphan.artifact_location: "a package that became no version",
    }
    [data] = [p for p in home.data.iterdir() if p.name.startswith("c-")]
    expected[f"data/{data.name}"] = "data that no version rests on"
    assert found(place, age_s=3600) == {}, "it may be needed yet"
    assert found(place) == expected
    assert found(place) == expected, "nothing was removed by looking"
    sizes = {one.path: one.size_bytes for one in collect(home, 0, remove=False)}
    assert sizes[f"stages/{kept.name}/checkpoints"] == 1000
    assert found(place, remove=True) == expected
    assert found(place) == {}
    assert prove(home, "demo").stages == 2
    assert place.client.get_logged_model(foreign.model_id).model_id == foreign.model_id
