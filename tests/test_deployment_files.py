"""The files of `infra/` for containers and deployments, held against what they are read by."""

import re
import subprocess
import sys
from importlib import import_module

import pytest
import yaml
from conftest import ROOT
from prefect import Flow

from tasks.elsewhere import EVALUATE, TRAIN

INFRA = ROOT / "infra"


def load(name: str) -> dict:
    return yaml.safe_load((INFRA / name).read_text(encoding="utf-8"))


def test_the_compose_file_keeps_to_the_published_schema() -> None:
    tool = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    done = subprocess.run([*tool, str(INFRA / "compose.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_secret_of_the_compose_file_is_asked_for_and_none_has_a_value() -> None:
    text = (INFRA / "compose.yaml").read_text(encoding="utf-8")
    used = set(re.findall(r"\$\{(\w+)[:}]", text))
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    defaults = set(re.findall(r"\$\{(\w+):-", text))
    assert used == asked | defaults
    lines = (INFRA / ".env.example").read_text(encoding="utf-8").splitlines()
    empty = {line[:-1] for line in lines if re.fullmatch(r"\w+=", line)}
    shown = {found[1] for line in lines if (found := re.match(r"# (\w+)=\S", line))}
    assert (empty, shown) == (asked, defaults)


def test_every_service_has_a_pinned_image_a_check_of_its_health_and_no_open_port() -> None:
    for name, service in load("compose.yaml")["services"].items():
        image = service["image"]
        assert re.search(r":v?\d+\.\d+|:\$\{SDFT_VERSION:-\d", image), f"{name}: {image}"
        assert "healthcheck" in service or service["restart"] == "no", name
        assert all(one.startswith("${BIND:-127.0.0.1}:") for one in service.get("ports", [])), name


@pytest.mark.parametrize("one", load("prefect.yaml")["deployments"], ids=lambda one: one["name"])
def test_a_deployment_names_a_flow_its_parameters_and_a_pool_of_the_stack(one: dict) -> None:
    module, _, name = one["entrypoint"].rpartition(".")
    flow = getattr(import_module(module), name)
    assert isinstance(flow, Flow)
    assert one.get("parameters", {}).keys() <= flow.parameters.properties.keys()
    assert one["work_pool"]["name"] in ("cpu", "gpu")
    if name in ("train_skill", "evaluate_suites"):
        return  # as many as there are workers; learn gives them out one after the other
    assert one["concurrency_limit"]["limit"] == 1
    assert one["concurrency_limit"]["collision_strategy"] in ("ENQUEUE", "CANCEL_NEW")
    for schedule in one.get("schedules", []):
        assert {"cron", "timezone", "slug"} <= schedule.keys()


def test_what_learn_gives_out_goes_to_deployments_that_are_there() -> None:
    deployments = load("prefect.yaml")["deployments"]
    there = {
        f"{getattr(import_module(module), name).name}/{one['name']}": one["work_pool"]["name"]
        for one in deployments
        for module, _, name in [one["entrypoint"].rpartition(".")]
    }
    assert len(there) == len(deployments), "two have the same name"
    [learn] = [one for one in deployments if one["entrypoint"] == "flows.learn.learn"]
    named = learn["work_pool"]["job_variables"]["env"]
    assert named.keys() == {TRAIN, EVALUATE}
    assert {there[one] for one in named.values()} == {"gpu"}
    assert learn["work_pool"]["name"] == "cpu"
