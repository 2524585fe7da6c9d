"""The real flow on a tiny random model, everything read back through MLflow's own client."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import QUICKSTART, eval_rows, save_tiny_model, train_rows, write_jsonl
from mlflow import MlflowClient
from typer.testing import CliRunner

from schemas.base import BadInput

pytestmark = pytest.mark.slow


def write_curriculum(folder: Path, skills: list[str], **changes: Any) -> Path:
    for skill in [*skills, "general"]:
        write_jsonl(folder / f"{skill}-train.jsonl", train_rows(6, skill))
        write_jsonl(folder / f"{skill}-eval.jsonl", eval_rows(3, skill))
    content = {
        "name": "demo",
        "base_model": "model",
        "skills": [
            {
                "name": skill,
                "train": f"{skill}-train.jsonl",
                "eval": f"{skill}-eval.jsonl",
                "training": {} if skill == "alpha" else {"lora": {"rank": 4}},
            }
            for skill in skills
        ],
        "general": [{"name": "general", "eval": "general-eval.jsonl"}],
        "training": {
            "epochs": 2,
            "prompts_per_step": 3,
            "learning_rate": 1e-3,
            "max_new_tokens": 12,
        },
        "runtime": {"checkpoint_every_steps": 2},
        "evaluation": {"max_new_tokens": 8},
        "gate": {"min_gain": 0.0, "max_forgetting": 1.0},
    }
    path = folder / "curriculum.yaml"
    path.write_text(yaml.safe_dump(content | changes), encoding="utf-8")
    return path


class Place:
    """A home with a curriculum of two skills that was learned once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        save_tiny_model(folder / "model")
        self.learned = self.learn(["alpha", "beta"])
        self.client = MlflowClient(f"sqlite:///{self.home / 'mlflow.db'}")

    def learn(self, skills: list[str], **changes: Any) -> Any:
        from flows.learn import learn

        return learn(str(write_curriculum(self.folder, skills, **changes)), str(self.home))

    def versions(self) -> list[Any]:
        found = self.client.search_model_versions("name = 'demo'")
        return sorted(found, key=lambda one: int(one.version))

    def champion(self) -> str:
        return str(self.client.get_model_version_by_alias("demo", "champion").version)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("learn")
    os.environ["PREFECT_LOCAL_STORAGE_PATH"] = str(folder / "prefect-storage")
    from prefect.testing.utilities import prefect_test_harness

    from tasks.home import Home

    Home(folder / "home").activate(offline=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
        with prefect_test_harness(server_startup_timeout=180):
            yield Place(folder)


def test_one_version_a_stage_with_its_story_in_tags(place: Place) -> None:
    first, second = place.versions()[:2]
    assert [one.tags["sdft.skill"] for one in (first, second)] == ["alpha", "beta"]
    assert (first.tags["sdft.parent_version"], second.tags["sdft.parent_version"]) == ("base", "1")
    assert second.tags["sdft.parent_hash"] == first.tags["sdft.model_hash"]
    assert first.tags["sdft.verdict"] == "pass"
    rows = place.learned.matrix.rows
    assert [row.model_hash for row in rows[1:]] == [
        one.tags["sdft.model_hash"] for one in (first, second)
    ]
    assert [row.version for row in rows] == [None, "1", "2"]


def test_every_step_of_every_curve_is_there_once(place: Place) -> None:
    for version in place.versions()[:2]:
        for metric in (
            "divergence",
            "entropy",
            "completion_tokens",
            "clipped_share",
            "grad_norm",
            "learning_rate",
            "tokens_per_s",
        ):
            history = place.client.get_metric_history(version.run_id, f"train/{metric}")
            assert sorted(point.step for point in history) == [1, 2, 3, 4], metric


def test_how_the_machine_fared_is_beside_the_curves(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tasks.machine import MachineMetrics

    for version in place.versions()[:2]:
        for metric in ("cpu_utilization_percentage", "system_memory_usage_percentage"):
            history = place.client.get_metric_history(version.run_id, f"system/{metric}")
            assert history and all(0 <= point.value <= 100 for point in history), metric
            assert {point.step for point in history} <= {0, 1, 2, 3, 4}, "as training has reached"
    machine = MachineMetrics("none", "sqlite://")
    time.sleep(0.2)
    assert machine.new(1) != []
    monkeypatch.setattr("psutil.net_io_counters", lambda: None)  # as where there is no /proc/net
    time.sleep(0.2)
    assert machine.new(2) == []
    time.sleep(0.2)
    assert MachineMetrics("none", "sqlite://").new(1) == []
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    machine = MachineMetrics("none", "sqlite://")
    time.sleep(0.2)
    assert machine.new(1) == []


def test_runs_hold_settings_data_scores_and_artifacts(place: Place) -> None:
    version = place.versions()[0]
    run = place.client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["learning_rate"] == "0.001"
    assert run.data.params["method"] == "sdft"
    assert set(run.data.metrics) >= {"eval/alpha", "eval/beta", "eval/general"}
    digests = {
        one.dataset.name: (one.dataset.digest, one.tags[0].value)
        for one in run.inputs.dataset_inputs
    }
    assert digests["alpha-train"] == (version.tags["sdft.data_hash"][:32], "training")
    assert digests["alpha-eval"][1] == "evaluation"
    root = {one.path for one in place.client.list_artifacts(version.run_id)}
    assert root >= {
        "checkpoints",
        "evaluation",
        "metrics.jsonl",
        "record.json",
        "rollouts",
        "validation",
        "verdicts",
    }
    kept = place.client.list_artifacts(version.run_id, "checkpoints")
    assert [one.path for one in kept] == ["checkpoints/step-000002", "checkpoints/step-000004"]


def test_an_adapter_lies_with_its_run_and_comes_with_the_stage_to_another_home(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a copy of its parent, from which the model is made again there."""
    from schemas.stage import StageRecord
    from sdft.record import verified_record
    from tasks.fetching import fetch_stage
    from tasks.home import Home
    from tasks.stagefiles import finished_dir

    full, adapted = place.versions()[:2]
    kept = place.client.list_artifacts(adapted.run_id, "adapter")
    assert [Path(one.path).name for one in kept] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert not place.client.list_artifacts(full.run_id, "adapter")
    record = StageRecord.read(Path(place.client.download_artifacts(adapted.run_id, "record.json")))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", Home(place.home).tracking_uri)
    assert fetch_stage(Home(tmp_path), record.spec, "demo")
    fetched = finished_dir(Home(tmp_path), record.spec)
    assert verified_record(fetched) == record
    assert (fetched / "adapter" / "adapter_model.safetensors").is_file()


def test_the_matrix_is_an_artifact_in_three_forms(place: Place, tmp_path: Path) -> None:
    run_id = place.learned.report.run_id
    folder = Path(place.client.download_artifacts(run_id, "retention", str(tmp_path)))
    matrix = json.loads((folder / "matrix.json").read_text())
    assert matrix == place.learned.matrix.model_dump(mode="json")
    assert len(matrix["rows"]) == 3
    cells = pq.read_table(folder / "matrix.parquet").to_pylist()
    assert len(cells) == 3 * 3
    assert (folder / "matrix.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert len(place.client.list_artifacts(run_id, "evaluation")) == 3, "the base model's items"
    [general] = place.client.get_run(run_id).inputs.dataset_inputs
    assert general.dataset.name == "general-eval"


def test_the_whole_lineage_is_proven_from_the_name_alone(place: Place) -> None:
    from tasks.home import Home
    from tasks.lineage import read_lineage
    from tasks.proof import prove

    proof = prove(Home(place.home), "demo")
    assert (proof.stages, proof.base_checked) == (2, True)
    lineage = read_lineage(Home(place.home), "demo")
    assert [stage.skill for stage in lineage.stages] == ["alpha", "beta"]
    assert lineage.stages[1].data.rows == 6
    assert lineage.stages[1].settings["learning_rate"] == 1e-3
    assert [entry.kind for entry in lineage.stages[1].history] == [
        "registered",
        "verdict",
        "promoted",
    ]


def test_promotions_are_prefect_events(place: Place) -> None:
    from prefect.client.orchestration import get_client

    wanted = {"filter": {"event": {"name": ["sdft.promoted"]}}}
    with get_client(sync_client=True) as client:
        for _ in range(50):  # the server writes them down a moment later
            found = client.request("POST", "/events/filter", json=wanted).json()["events"]
            if len(found) >= 2:
                break
            time.sleep(0.2)
    assert {one["payload"]["version"] for one in found} >= {"1", "2"}
    assert {one["resource"]["prefect.resource.id"] for one in found} == {"sdft.model.demo"}


def test_the_registered_model_loads_with_mlflow_itself(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place.home / 'mlflow.db'}")
    pipeline = mlflow.transformers.load_model("models:/demo/2")
    answer = pipeline([{"role": "user", "content": "Say alpha 1"}], max_new_tokens=4)
    assert answer[0]["generated_text"]


def test_the_downloaded_artifact_is_a_plain_transformers_model(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place.home / 'mlflow.db'}")
    for version, part in (("1", "model"), ("2", "peft")):  # all weights; adapters
        folder = mlflow.artifacts.download_artifacts(f"models:/demo/{version}")
        model = AutoModelForCausalLM.from_pretrained(Path(folder) / part)
        assert model.config.max_position_embeddings == 256


def test_the_champion_answers_a_chat_request_when_mlflow_serves_it(place: Place) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{place.home / 'mlflow.db'}",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = ["models", "serve", "-m", "models:/demo@champion", "--env-manager", "local"]
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow", *command, "--port", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            transport = httpx.HTTPTransport(retries=0)
            with httpx.Client(base_url=address, transport=transport, timeout=60) as client:
                _wait_for(client, server)
                question = [{"role": "user", "content": "Say alpha 1"}]
                reply = client.post("/invocations", json={"messages": question, "max_tokens": 4})
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    message = reply.json()[0]["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"]


def _wait_for(client: httpx.Client, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        with contextlib.suppress(httpx.TransportError):
            if client.get("/ping").status_code == 200:
                return
        time.sleep(0.2)
    raise AssertionError("the server did not come up")


def test_a_run_leaves_metrics_for_prometheus_and_tables_in_prefect(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.client.orchestration import get_client
    from prometheus_client.parser import text_string_to_metric_families

    pushed: list[tuple[str, str]] = []

    class Gateway(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            pushed.append(
                (self.path, self.rfile.read(int(self.headers["Content-Length"])).decode())
            )
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Gateway)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SDFT_PUSHGATEWAY_URL", f"http://127.0.0.1:{server.server_port}")
    place.learn(["alpha", "beta"])
    server.shutdown()
    server.server_close()

    text = (place.home / "metrics" / "demo.prom").read_text()
    found = {
        one.name: (one.value, one.labels)
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
    assert found["sdft_skills_waiting"] == (0.0, {"curriculum": "demo"})
    assert found["sdft_verdict"] == (1.0, {"curriculum": "demo", "skill": "beta"})
    [record] = [
        content
        for path in (place.home / "stages").glob("*/record.json")
        if (content := json.loads(path.read_text()))["model_hash"]
        == place.learned.matrix.rows[2].model_hash
    ]
    assert found["sdft_stage_seconds"][0] == record["train_seconds"]
    assert found["sdft_tokens_per_second"][0] > 0
    assert pushed[-1] == ("/metrics/job/sdft/curriculum/demo", text)
    assert 'sdft_skills_waiting{curriculum="demo"} 1.0' in pushed[0][1]

    with get_client(sync_client=True) as client:
        tables = {one.key: str(one.data) for one in client.read_latest_artifacts()}
    score = place.learned.matrix.rows[1].cells[0].score
    assert f"| 1 alpha | **{score:.2f}** |" in tables["retention-demo"]
    run_id = place.learned.report.run_id
    assert f"run `{run_id}`" in tables["retention-demo"]
    assert "| 2 beta | alpha | earlier skill |" in tables["gate-demo"]


def test_again_does_nothing_and_a_refusal_leaves_the_champion(place: Place) -> None:
    from tasks.home import Home
    from tasks.reporting import latest_curriculum

    again = place.learn(["alpha", "beta"])
    assert again.trained == ()
    assert again.matrix.model_dump() == place.learned.matrix.model_dump()
    assert again.report.run_id == place.learned.report.run_id
    assert not again.report.is_new
    assert len(place.versions()) == 2
    test_every_step_of_every_curve_is_there_once(place)

    other = place.learn(["alpha", "beta"], runtime={"checkpoint_every_steps": 3})
    assert (other.trained, other.matrix) == ((), again.matrix)
    newest = latest_curriculum(Home(place.home), "demo")
    assert newest is not None
    assert newest.runtime.checkpoint_every_steps == 3, "replay starts from it"

    champion = place.champion()
    refused = place.learn(["alpha", "beta"], seed=9, gate={"min_gain": 0.9, "max_forgetting": 1.0})
    assert refused.trained == ("alpha", "beta")
    assert not any(verdict.passed for verdict in refused.verdicts)
    assert "alpha: gained" in refused.verdicts[0].reasons[0]
    assert place.champion() == champion
    assert [one.tags["sdft.verdict"] for one in place.versions()] == ["pass"] * 2 + ["refuse"] * 2
    assert place.versions()[3].tags["sdft.parent_version"] == "base", "the next starts from it"
    assert [row.parent_stage for row in refused.matrix.rows] == [None, 0, 0]


def test_a_plan_reuses_only_what_the_verdicts_of_these_rules_let_in(place: Place) -> None:
    from flows.plan import plan_curriculum
    from schemas.curriculum import load_curriculum
    from tasks.home import Home

    def planned(skills: list[str], **changes: Any) -> Any:
        curriculum = load_curriculum(write_curriculum(place.folder, skills, **changes))
        return plan_curriculum(curriculum, Home(place.home))

    def actions(skills: list[str], **changes: Any) -> list[str]:
        return [one.action for one in planned(skills, **changes).stages]

    before = len(place.versions())
    skills = ["alpha", "beta"]
    place.learn(skills)
    assert actions([*skills, "omega"]) == ["reused", "reused", "learned"]
    assert actions(skills, seed=77) == ["learned", "learned"]
    other_rules = [
        {"gate": {"min_gain": 0.9, "max_forgetting": 1.0}},
        {"evaluation": {"max_new_tokens": 7}},
        {"general": []},
    ]
    for change in other_rules:
        assert actions(skills, **change) == ["judged anew", "open"], change
    [remark] = planned([*skills, "omega"]).remarks
    assert remark.name == "omega"
    assert remark.said.startswith("4 steps, none of them after the warm-up")
    assert len(place.versions()) == before


def test_a_plan_misses_a_gpu_only_where_something_is_to_be_trained(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flows.plan import plan_curriculum
    from schemas.curriculum import load_curriculum
    from tasks import placement
    from tasks.home import Home

    monkeypatch.setattr(placement, "devices", list)
    monkeypatch.setattr(placement, "_asked", list)
    place.learn(["alpha", "beta"])

    def plan(skills: list[str]) -> Any:
        file = write_curriculum(place.folder, skills, runtime={"device": "cuda"})
        return plan_curriculum(load_curriculum(file), Home(place.home))

    assert [one.action for one in plan(["alpha", "beta"]).stages] == ["reused"] * 2
    with pytest.raises(BadInput, match="this machine has no CUDA device"):
        plan(["alpha", "beta", "omega"])


def test_a_stage_that_is_there_keeps_the_name_of_its_skill(place: Place) -> None:
    """Else registry and ledger would go on saying the old one, the matrix the new one."""
    from flows.learn import learn
    from flows.plan import plan_curriculum
    from schemas.curriculum import load_curriculum
    from tasks.home import Home

    file = write_curriculum(place.folder, ["alpha", "beta"])
    content = yaml.safe_load(file.read_text())
    content["skills"][1]["name"] = "omega"
    file.write_text(yaml.safe_dump(content))
    before = len(place.versions())
    message = "skill omega: what it would learn is there as the skill beta"
    with pytest.raises(BadInput, match=message):
        plan_curriculum(load_curriculum(file), Home(place.home))
    with pytest.raises(BadInput, match=message):
        learn(str(file), str(place.home))
    assert len(place.versions()) == before


def test_a_new_skill_is_the_only_one_that_is_learned(place: Place) -> None:
    more = place.learn(["alpha", "beta", "gamma"])
    assert more.trained == ("gamma",)
    assert len(more.matrix.rows) == 4
    assert all(cell is not None for row in more.matrix.rows for cell in row.cells)
    assert place.champion() == more.matrix.rows[-1].version


def test_versions_with_adapters_hold_no_copy_of_their_base(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stack of them from the last model with all its weights on; plain calls load it."""
    import mlflow
    import torch
    from transformers import AutoModelForCausalLM

    from tasks.home import Home
    from tasks.proof import Disproved, prove

    learned = place.learn(["alpha", "beta", "gamma"])
    version = learned.matrix.rows[3].version
    assert [row.passed for row in learned.matrix.rows] == [True] * 4
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.client.tracking_uri)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", place.client.tracking_uri)
    package = Path(mlflow.artifacts.download_artifacts(f"models:/demo/{version}"))
    weights = [path.relative_to(package).as_posix() for path in package.rglob("*.safetensors")]
    assert weights == ["peft/adapter_model.safetensors"]
    config = json.loads((package / "peft" / "adapter_config.json").read_text())
    assert config["r"] == 8, "two stages of rank 4"

    loaded = mlflow.transformers.load_model(f"models:/demo/{version}", return_type="components")
    by_transformers = AutoModelForCausalLM.from_pretrained(package / "peft")
    [trained] = [
        path.parent / "model"
        for path in place.home.glob("stages/*/record.json")
        if json.loads(path.read_text())["model_hash"] == learned.matrix.rows[3].model_hash
    ]
    models = (AutoModelForCausalLM.from_pretrained(trained), loaded["model"], by_transformers)
    with torch.no_grad():
        expected, *found = (model(torch.tensor([[5, 17, 200, 31, 8]])).logits for model in models)
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

    proof = prove(Home(place.home), f"demo/{version}")
    assert proof.stages == 3
    adapter = package / "peft" / "adapter_model.safetensors"
    honest = adapter.read_bytes()
    adapter.write_bytes(honest[:-1] + bytes([honest[-1] ^ 1]))
    with pytest.raises(Disproved, match=r"peft/adapter_model\.safetensors is not as it was"):
        prove(Home(place.home), f"demo/{version}")
    adapter.write_bytes(honest)


def test_a_skill_can_be_taken_out_again(place: Place) -> None:
    from flows.learn import learn
    from tasks.home import Home
    from tasks.lineage import read_lineage
    from tasks.replay import curriculum_without
    from tasks.tracing import trace

    home = Home(place.home)
    before = place.learn(["alpha", "beta", "gamma"])
    champion = place.champion()
    replayed = learn(str(curriculum_without(home, "demo", "beta")), str(place.home))
    assert replayed.trained == ("gamma",), "alpha comes before it and is as it was"
    assert [row.skill for row in replayed.matrix.rows] == [None, "alpha", "gamma"]
    assert replayed.matrix.rows[1].model_hash == before.matrix.rows[1].model_hash
    candidate = read_lineage(home, "demo@candidate")
    assert [stage.skill for stage in candidate.stages] == ["alpha", "gamma"]
    assert candidate.version not in [one.version for one in trace(home, "beta").found]
    assert place.champion() == champion, "it knows less; that is for a person to decide"
    again = learn(str(curriculum_without(home, "demo", "beta")), str(place.home))
    assert (again.trained, again.report) == (
        (),
        replayed.report.model_copy(update={"is_new": False}),
    )
    with pytest.raises(BadInput, match="curriculum has no skill 'delta'; it has alpha, gamma"):
        curriculum_without(home, "demo", "delta")
    with pytest.raises(BadInput, match="has learned no curriculum named 'nobody'"):
        curriculum_without(home, "nobody", "alpha")


def test_without_forward_transfer_a_refusal_does_not_doom_the_next_skill(place: Place) -> None:
    """After a refusal the next skill's reference is a model that was not scored on it yet."""
    gate = {"min_gain": 0.0, "max_forgetting": 0.0}
    evaluation = {"max_new_tokens": 8, "forward_transfer": False}
    learned = place.learn(["alpha", "beta", "gamma"], seed=3, gate=gate, evaluation=evaluation)
    reasons = [reason for verdict in learned.verdicts for reason in verdict.reasons]
    assert not [reason for reason in reasons if "missing" in reason]
    refusing = {"min_gain": 0.9, "max_forgetting": 0.0}
    refused = place.learn(["alpha", "beta", "gamma"], seed=4, gate=refusing, evaluation=evaluation)
    assert [verdict.passed for verdict in refused.verdicts] == [False] * 3
    assert all("missing" not in reason for one in refused.verdicts for reason in one.reasons)
    assert refused.matrix.rows[1].cells[2] is None, "alpha's row was not scored on gamma"


def test_the_refused_example_is_refused_with_exit_code_3(place: Place, tmp_path: Path) -> None:
    """Its last skill alone, held against the suite that it costs most."""
    from flows.cli import app
    from schemas.curriculum import load_curriculum

    whole = load_curriculum(QUICKSTART / "refused.yaml")
    cut = {"skills": whole.skills[-1:], "general": whole.general[-1:]}
    file = tmp_path / "refused.yaml"
    file.write_text(yaml.safe_dump(whole.model_copy(update=cut).model_dump(mode="json")))
    result = CliRunner().invoke(app, ["learn", str(file), "--home", str(place.home)])
    assert result.exit_code == 3, result.output
    assert "lists: lost 0." in result.output
    assert "champion: none, no stage of quickstart has passed" in result.output
    [asked] = [line.split()[5:] for line in result.output.splitlines() if "look at the" in line]
    assert (asked[0], asked[2]) == ("answers", "lists"), "the suite that it is refused for"
    shown = CliRunner().invoke(app, [*asked, "--json", "--home", str(place.home)])
    found = json.loads(shown.output)
    assert found["wrong"] == len(found["answers"]) > found["reference_wrong"]
    assert found["items"] == 60


def test_a_skill_in_the_watched_folder_is_planned_learned_and_then_recorded(place: Place) -> None:
    from flows.plan import plan_curriculum
    from schemas.curriculum import load_curriculum
    from tasks.home import Home

    drop = place.folder / "drop" / "omega"
    drop.mkdir(parents=True)
    write_jsonl(drop / "train.jsonl", train_rows(6, "omega"))
    write_jsonl(drop / "eval.jsonl", eval_rows(3, "omega"))
    (drop / "skill.yaml").write_text("train: train.jsonl\neval: eval.jsonl\n")
    changes = {"skills_from": "drop", "name": "watching"}

    def plan() -> tuple[list[tuple[str, str | None]], list[str]]:
        curriculum = load_curriculum(write_curriculum(place.folder, ["alpha"], **changes))
        planned = plan_curriculum(curriculum, Home(place.home))
        stages = [(one.skill, one.watched) for one in planned.stages]
        return stages, [one.name for one in planned.remarks]

    assert plan() == ([("alpha", None)], ["omega"])
    (drop / "COMPLETE").touch()
    assert plan() == plan() == ([("alpha", None), ("omega", "new")], []), "a plan writes nothing"
    learned = place.learn(["alpha"], **changes)
    assert learned.trained == ("omega",), "alpha is known from another curriculum"
    assert [row.skill for row in learned.matrix.rows] == [None, "alpha", "omega"]
    assert plan() == ([("alpha", None), ("omega", "recorded")], [])
    assert place.learn(["alpha"], **changes).trained == ()


def test_a_stage_learns_rows_again_of_skills_that_were_let_in(place: Place) -> None:
    from flows.plan import plan_curriculum
    from schemas.curriculum import load_curriculum
    from tasks.artifacts import run_file
    from tasks.home import Home
    from tasks.lineage import data_folder, read_lineage, row_hashes
    from tasks.proof import prove
    from tasks.tracing import trace

    home, changes = Home(place.home), {"rehearsal": 0.5, "name": "rehearsing"}

    def planned(**more: Any) -> list[tuple[str, int, int]]:
        file = write_curriculum(place.folder, ["alpha", "beta"], **changes, **more)
        stages = plan_curriculum(load_curriculum(file), home).stages
        return [(one.action, one.demonstrations, one.rehearsed) for one in stages]

    place.learn(["alpha", "beta"])
    assert planned() == [("judged anew", 6, 0), ("open", 6, 3)]
    learned = place.learn(["alpha", "beta"], **changes)
    assert learned.trained == ("beta",), "alpha comes first, with nothing to learn again"
    assert planned() == [("reused", 6, 0), ("reused", 6, 3)]
    assert place.learn(["alpha", "beta"], **changes).trained == ()

    alpha, beta = read_lineage(home, "rehearsing@champion").stages
    assert (alpha.data.rows, alpha.data.rehearsed) == (6, {})
    assert (beta.data.rows, beta.data.rehearsed) == (9, {"alpha": 3})
    folders = [
        run_file(place.client.get_run(one.run_id), data_folder(one.skill)) for one in (alpha, beta)
    ]
    first, second = map(row_hashes, folders)
    again = second[6]
    by_row = [one for one in trace(home, again).found if one.name == "rehearsing"]
    assert [(one.learned_with, one.skill, one.found) for one in by_row if one.aliases] == [
        ("alpha", "alpha", f"row {first.index(again) + 1}"),
        ("beta", "alpha", "row 7"),
    ]
    assert prove(home, "rehearsing@champion").stages == 2

    strict = {"seed": 41, "gate": {"min_gain": 0.9, "max_forgetting": 1.0}}
    assert place.learn(["alpha", "beta"], **changes, **strict).trained == ("alpha", "beta")
    assert planned(**strict) == [("reused", 6, 0), ("reused", 6, 0)], "alpha was refused"


def test_a_stage_learns_anchors_beside_its_own_rows(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    from flows.plan import plan_curriculum
    from schemas.curriculum import load_curriculum
    from sdft.data import train_table
    from tasks.home import Home
    from tasks.lineage import read_lineage
    from tasks.tracing import trace

    rows = [{"prompt": f"Name {n}"} for n in range(3)]
    write_jsonl(place.folder / "anchors.jsonl", rows)
    changes = {"anchors": "anchors.jsonl", "name": "anchored", "seed": 42}
    file = write_curriculum(place.folder, ["alpha"], **changes)
    home = Home(place.home)
    [planned] = plan_curriculum(load_curriculum(file), home).stages
    assert (planned.demonstrations, planned.anchors, planned.steps) == (6, 3, 6)
    capsys.readouterr()
    assert place.learn(["alpha"], **changes).trained == ("alpha",)
    assert "6 steps, none of them after the warm-up" in " ".join(capsys.readouterr().out.split())
    assert place.learn(["alpha"], **changes).trained == ()
    [alpha] = read_lineage(home, "anchored@champion").stages
    assert (alpha.data.rows, alpha.data.rehearsed, alpha.data.anchors) == (9, {}, 3)
    asked = train_table(rows)["row_hash"][1].as_py()
    [found] = trace(home, asked).found
    told = (found.name, found.skill, found.learned_with, found.found)
    assert told == ("anchored", "", "alpha", "row 8")
    origin = alpha.data.anchors_from
    assert origin is not None and origin.source == str(place.folder / "anchors.jsonl")
    assert origin.rules == origin.rules_met > 0


def test_every_form_of_a_version_is_exported_to_what_was_trained(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the registry alone: all weights, adapters on such a version, adapters on the base."""
    from flows.cli import app
    from tasks.artifacts import run_file
    from tasks.home import Home
    from tasks.parcels import send_model

    adapted = place.learn(["beta"], name="adapted")
    assert adapted.trained == ("beta",)
    learned = place.learn(["alpha", "beta", "gamma"])
    wanted = {f"demo/{row.version}": row.model_hash for row in learned.matrix.rows[1:]}
    wanted |= {"adapted": adapted.matrix.rows[1].model_hash}
    trained = {
        json.loads(path.read_text())["model_hash"]: path.parent / "model"
        for path in place.home.glob("stages/*/record.json")
    }
    monkeypatch.setenv("MLFLOW_TRACKING_URI", place.client.tracking_uri)
    monkeypatch.setenv("SDFT_LEDGER_URL", f"sqlite:///{place.home / 'ledger.db'}")
    elsewhere = tmp_path / "home"
    elsewhere.mkdir()

    def export(reference: str, target: Path) -> Any:
        return CliRunner().invoke(app, ["export", reference, str(target), "--home", str(elsewhere)])

    for number, (reference, model_hash) in enumerate(wanted.items()):
        target = tmp_path / f"out-{number}"
        result = export(reference, target)
        assert result.exit_code == 0, result.output
        assert f"proven: model {model_hash}" in result.output
        assert_same_model(target, trained[model_hash])
    assert not (elsewhere / "stages").exists()

    version = place.client.get_model_version("demo", "2")
    adapter = run_file(place.client.get_run(version.run_id), "adapter/adapter_model.safetensors")
    honest = adapter.read_bytes()
    adapter.write_bytes(honest[:-4] + bytes(byte ^ 0x40 for byte in honest[-4:]))
    above = list(wanted)[2]
    result = export(above, tmp_path / "altered")
    adapter.write_bytes(honest)
    assert result.exit_code == 4, "it was learned on top of that adapter"
    assert f"{above}: model.safetensors of what the registry has is not" in result.output

    base = place.folder / "model"
    base.rename(place.folder / "aside")
    result = export("adapted", tmp_path / "altered")
    send_model(Home(elsewhere), place.folder / "aside", adapted.matrix.rows[0].model_hash)
    sent = export("adapted", tmp_path / "of-a-parcel")
    (place.folder / "aside").rename(base)
    assert sent.exit_code == 0, sent.output
    assert_same_model(tmp_path / "of-a-parcel", trained[wanted["adapted"]])
    assert isinstance(result.exception, BadInput)
    assert f"is not at {base}; export it where that is" in str(result.exception)
    assert not list(tmp_path.glob("*altered*"))


def assert_same_model(exported: Path, trained: Path) -> None:
    """Plain transformers opens the two, and they say the same, prompted by the chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert {file.name: file.read_bytes() for file in exported.iterdir()} == {
        file.name: file.read_bytes() for file in trained.iterdir()
    }
    answers = []
    for directory in (exported, trained):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory)
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Say alpha 1"}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        with torch.no_grad():
            said = model.generate(**asked, max_new_tokens=8, do_sample=False)
        answers.append(said.tolist())
    assert answers[0] == answers[1]
    assert len(answers[0][0]) > asked["input_ids"].shape[1]


def test_an_altered_model_is_never_taken_for_the_trained_one(place: Place) -> None:
    place.learn(["delta"])
    [stage] = [
        path
        for path in (place.home / "stages").iterdir()
        if json.loads((path / "record.json").read_text())["spec"]["skill"] == "delta"
    ]
    with (stage / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(BadInput, match=r"is not as .*record\.json lists it"):
        place.learn(["delta"])
