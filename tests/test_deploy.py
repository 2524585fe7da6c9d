"""`sdft deploy`: what it makes on a real Prefect server; files for Kubernetes by its schemas."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT
from learning import SKILLS, write_curriculum

from tasks.deploying import pool_template

KUBERNETES = ROOT / "infra" / "kubernetes"
TEMPLATE = json.loads((KUBERNETES / "base-job-template.json").read_text())
VERSION = "1.37"
LONG_S = 300


def deploy(*arguments: str, **variables: str) -> tuple[int, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SDFT_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", "deploy", *arguments],
        env={**kept, "COLUMNS": "200", **variables},
        capture_output=True,
        text=True,
        timeout=LONG_S,
    )
    said = done.stdout + done.stderr
    assert "Traceback" not in said, said
    return done.returncode, said


def test_local_prints_a_line_for_cron(tmp_path: Path) -> None:
    folder = tmp_path / "my 100%"
    folder.mkdir()
    file = write_curriculum(folder, skills=SKILLS[:1])
    home = tmp_path / "50%"
    code, said = deploy(str(file), "--cron", "5 4 * * *", "--home", str(home))
    assert code == 0, said
    line = said.splitlines()[1]
    assert line.startswith("5 4 * * * ")
    assert f"learn '{folder}/curriculum.yaml'".replace("%", r"\%") in line
    written = f"--home {home} >> {home}/nightly.log 2>&1"
    assert line.endswith(written.replace("%", r"\%"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "there is no such file"),
        (["/c.yaml", "--profile", "server"], "PREFECT_API_URL is not set"),
        (
            ["/c.yaml", "--cron", "hello"],
            "is no time for cron (not five fields); write minute, hour",
        ),
        (["/c.yaml", "--cron", ""], "is no time for cron"),
        (["/c.yaml", "--cron", "0 25 * * *"], "'0 25 * * *': is no time for cron (Bad hour)"),
        (["/c.yaml", "--cron", "0 2 L * *", "--profile", "server"], "is no time for cron"),
        (["/c.yaml", "--profile", "cloud"], "Invalid value for '--profile'"),
    ],
)
def test_mistakes_are_exit_code_2(arguments: list[str], message: str) -> None:
    code, said = deploy(*arguments, PREFECT_API_URL="", NO_COLOR="1")
    assert (code, message in said) == (2, True), said


def job(pool: str, **variables: Any) -> dict[str, Any]:
    """The manifest that Prefect's Kubernetes worker would send for a flow run."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.objects import FlowRun
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    nobody = PrefectClient("http://127.0.0.1:9/api")  # no block or variable is named: not asked

    async def configured() -> dict[str, Any]:
        made = await KubernetesWorkerJobConfiguration.from_template_and_values(
            pool_template(pool, TEMPLATE), variables, client=nobody
        )
        made.prepare_for_flow_run(FlowRun(flow_id="00000000-0000-0000-0000-000000000000", name="r"))
        return made.job_manifest

    return asyncio.run(configured())


def test_the_job_template_gives_a_job_that_keeps_to_kubernetes_schema() -> None:
    chosen = {
        "image": "registry/sdft:1",
        "gpu_count": 8,
        "memory_limit": "512Gi",
        "node_selector": {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    manifest = job("gpu", **chosen)
    kubernetes_validate.validate(manifest, VERSION, strict=True)
    pod = manifest["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert container["image"] == "registry/sdft:1"
    assert container["resources"]["limits"] == {"memory": "512Gi", "nvidia.com/gpu": 8}
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 8
    assert (pod["nodeSelector"], pod["tolerations"]) == (
        chosen["node_selector"],
        chosen["tolerations"],
    )


@pytest.mark.parametrize(("pool", "gpus"), [("cpu", 0), ("gpu", 1)])
def test_a_pool_has_defaults_of_its_own(pool: str, gpus: int) -> None:
    manifest = job(pool)
    kubernetes_validate.validate(manifest, VERSION, strict=True)
    [container] = manifest["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": gpus}
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == "30"
    assert container["envFrom"] == [{"secretRef": {"name": "sdft-client"}}]


def test_every_variable_of_the_template_is_used_and_every_one_used_is_there() -> None:
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(TEMPLATE["job_configuration"])))
    assert used == TEMPLATE["variables"]["properties"].keys()


def manifests(name: str) -> list[dict[str, Any]]:
    return [*yaml.safe_load_all((KUBERNETES / name).read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", ["workers.yaml", "servers.yaml"])
def test_the_manifests_keep_to_kubernetes_schema_and_need_no_privilege(name: str) -> None:
    for one in manifests(name):
        kubernetes_validate.validate(one, VERSION, strict=True)
        if one["kind"] != "Deployment":
            continue
        pod = one["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["livenessProbe"] and container["resources"]["limits"]["memory"]
            given = container.get("env", [])
            assert not [one for one in given if "PASSWORD" in one["name"]], "a secret in the file"


def test_the_manifests_have_what_the_job_template_names() -> None:
    found = manifests("workers.yaml")
    accounts = {one["metadata"]["name"] for one in found if one["kind"] == "ServiceAccount"}
    properties = TEMPLATE["variables"]["properties"]
    assert properties["service_account_name"]["default"] in accounts
    [claim] = [one for one in found if one["kind"] == "PersistentVolumeClaim"]
    assert properties["home_claim"]["default"] == claim["metadata"]["name"]
    pools = [one["metadata"]["labels"]["pool"] for one in found if one["kind"] == "Deployment"]
    assert pools == ["cpu", "gpu"]


def test_every_service_finds_its_server() -> None:
    found = manifests("servers.yaml")
    ports = {
        one["metadata"]["labels"]["app"]: one["spec"]["template"]["spec"]["containers"][0]["ports"]
        for one in found
        if one["kind"] == "Deployment"
    }
    for service in [one for one in found if one["kind"] == "Service"]:
        [port] = service["spec"]["ports"]
        assert [one["containerPort"] for one in ports[service["spec"]["selector"]["app"]]] == [
            port["port"]
        ]


class Receiver:
    """A webhook's receiver, and what came."""

    def __init__(self) -> None:
        self.bodies: list[str] = []
        self._came = threading.Condition()
        came, bodies = self._came, self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                self.send_response(200)
                self.end_headers()
                with came:
                    bodies.append(body)
                    came.notify_all()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/t0ken"

    def wait_for(self, text: str) -> None:
        with self._came:
            found = self._came.wait_for(lambda: any(text in one for one in self.bodies), LONG_S)
        assert found, self.bodies


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.mark.slow
def test_a_server_gets_pools_deployments_and_automations_that_work(
    prefect_server: str, receiver: Receiver
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Crashed, Running

    from schemas.ledger import Draft
    from tasks.automations import FAILED, REFUSED, ZOMBIES, apply_automation, zombies
    from tasks.events import _emit
    from tasks.ledger import _seal

    place = ["/data/curriculum.yaml", "--profile", "server", "--home", "/data/home"]
    server = {"PREFECT_API_URL": prefect_server, "SDFT_NOTIFY_URL": receiver.address}
    code, said = deploy(*place, **server)
    assert code == 0, said
    assert "not on this machine: not checked" in said
    assert "t0ken" not in said and "Failed to create" not in said
    again, repeated = deploy(*place, **server)
    assert again == 0
    lines = [line for line in repeated.splitlines() if line.startswith(("pool", "dep", "auto"))]
    assert len(lines) == len([one for one in said.splitlines() if one.rstrip().endswith("made")])
    assert all(line.rstrip().endswith("as it was") for line in lines), repeated
    _, moved = deploy(*place, "--cron", "5 4 * * 1", **server)
    [changed] = [line for line in moved.splitlines() if line.rstrip().endswith("changed")]
    assert "nightly" in changed and "5 4 * * 1 UTC" in changed, moved
    elsewhere = [one.replace("server", "kubernetes") for one in place]
    other, refused = deploy(*elsewhere, **server)
    assert other == 2 and "the pool cpu is of type process, not kubernetes" in refused, refused

    with (
        temporary_settings({PREFECT_API_URL: prefect_server}),
        get_client(sync_client=True) as client,
    ):
        [learn] = [
            one for one in client.read_deployments() if one.entrypoint == "flows.learn.learn"
        ]
        own = {"curriculum_file": "/data/curriculum.yaml", "home_dir": "/data/home"}
        assert own.items() <= learn.parameters.items()
        pool = client.read_work_pool("gpu")
        default = pool.base_job_template["variables"]["properties"]["env"]["default"]
        assert default == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
        names = {one.name for one in client.read_automations()}
        assert names >= {ZOMBIES, REFUSED, FAILED}

        draft = Draft(kind="refused", name="demo", version="3", reason='lists: "lost" 0.40')
        _emit(_seal(draft, 1, "0" * 64))
        receiver.wait_for("refused")
        [told] = [json.loads(one) for one in receiver.bodies]
        assert told == {"text": 'sdft: demo version 3 was refused: lists: "lost" 0.40'}

        # a run that beats once and is not heard of again
        assert apply_automation(client, zombies([learn.flow_id], silent_s=10)) == "changed"
        run = client.create_flow_run_from_deployment(learn.id, state=Running())
        event = {
            "event": "prefect.flow-run.heartbeat",
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}"},
            "related": [
                {
                    "prefect.resource.id": f"prefect.flow.{learn.flow_id}",
                    "prefect.resource.role": "flow",
                }
            ],
            "occurred": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "id": str(run.id),
        }
        client.request("POST", "/events", json=[event])
        receiver.wait_for("taken for dead")
        state = client.read_flow_run(run.id).state
        assert state is not None and state.type == Crashed().type
