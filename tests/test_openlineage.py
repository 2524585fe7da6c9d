"""OpenLineage events: their form, what they hold, and how they go to a file or a server."""

import http.server
import importlib
import json
import pkgutil
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import openlineage.client.generated as standard
import pytest
from conftest import ROOT
from jsonschema import Draft202012Validator
from lineages import HOSTILE, SKILLS, a_lineage, hashes, of_before, sha
from openlineage.client.serde import Serde
from pydantic import ConfigDict, TypeAdapter, ValidationError
from referencing import Registry, Resource

from schemas.base import BadInput
from schemas.lineage import Lineage
from tasks.openlineage_events import run_events, send

ANY_CLASS = ConfigDict(arbitrary_types_allowed=True)


@pytest.fixture(scope="module")
def lineage() -> Lineage:
    return a_lineage()


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    """Ours, see tests/schemas/README.md; what they refer to is found here, never on a network."""
    files = [
        json.loads((ROOT / "tests" / "schemas" / name).read_text(encoding="utf-8"))
        for name in ("run-event.json", "stage-facet.json")
    ]
    registry = Registry().with_resources(
        [(one["$id"], Resource.from_contents(one)) for one in files]
    )
    for one in files:
        Draft202012Validator.check_schema(one)
    return Draft202012Validator(
        files[0], registry=registry, format_checker=Draft202012Validator.FORMAT_CHECKER
    )


def as_json(lineage: Lineage) -> list[dict[str, Any]]:
    return [json.loads(Serde.to_json(event)) for event in run_events(lineage)]


def test_the_events_are_as_the_schema_says(lineage: Lineage, schema: Draft202012Validator) -> None:
    events = as_json(lineage)
    assert [event["eventType"] for event in events] == ["START", "COMPLETE"] * 3
    for event in events:
        schema.validate(event)


BREAKS = {
    "eventTime": lambda event: event.update(eventTime="yesterday"),
    "producer": lambda event: event.pop("producer"),
    "no uri": lambda event: event.update(producer="us and them"),
    "runId": lambda event: event["run"].update(runId="12"),
    "facet without producer": lambda event: event["job"]["facets"]["jobType"].pop("_producer"),
    "no name": lambda event: event["inputs"][0].pop("name"),
    "no output": lambda event: event.update(outputs=[]),
    "hash": lambda event: event["run"]["facets"]["sdft_stage"].update(dataHash="12"),
    "fact left out": lambda event: event["run"]["facets"]["sdft_stage"].pop("decision"),
    "unknown facet": lambda event: event["outputs"][0]["facets"].update(other={}),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_event_is_found(lineage: Lineage, schema: Draft202012Validator, what: str) -> None:
    event = as_json(lineage)[1]
    BREAKS[what](event)
    assert list(schema.iter_errors(event))


def standard_facets() -> dict[str, Any]:
    """The library's classes, generated from the published schemas, by their schema's address."""
    modules = [
        importlib.import_module(f"{standard.__name__}.{module.name}")
        for module in pkgutil.iter_modules(standard.__path__)
    ]
    classes = [one for module in modules for one in vars(module).values()]
    return {one._get_schema(): one for one in classes if hasattr(one, "_get_schema")}


def test_the_standard_facets_are_the_librarys(lineage: Lineage) -> None:
    known, seen = standard_facets(), set()
    for event in as_json(lineage):
        holders = [event["run"]["facets"], event["job"]["facets"]]
        for one in (*event["inputs"], *event["outputs"]):
            holders += [one["facets"], one.get("inputFacets", {}), one.get("outputFacets", {})]
        for name, facet in (item for holder in holders for item in holder.items()):
            if name != "sdft_stage":
                made = known[facet.pop("_schemaURL")]
                again = json.loads(Serde.to_json(made(producer=facet.pop("_producer"), **facet)))
                assert facet.items() <= again.items()
                seen.add(name)
    assert seen == {
        "processing_engine",
        "jobType",
        "version",
        "datasetType",
        "dataSource",
        "schema",
        "inputStatistics",
        "outputStatistics",
    }


def check_types(thing: object) -> None:
    """Every value has the type that the library's classes declare; attrs itself checks none."""
    if attrs.has(type(thing)):
        for field in attrs.fields(attrs.resolve_types(type(thing))):
            value = getattr(thing, field.name)
            TypeAdapter(field.type, config=ANY_CLASS).validate_python(value, strict=True)
            check_types(value)
    elif isinstance(thing, dict | list):
        for one in thing.values() if isinstance(thing, dict) else thing:
            check_types(one)


def test_the_events_have_the_types_that_the_library_declares(lineage: Lineage) -> None:
    for event in run_events(lineage):
        check_types(event)
    wrongs = [
        {"job": event.run},
        {"inputs": [*event.outputs]},
        {"inputs": [attrs.evolve(event.inputs[0], facets=event.run.facets)]},
        {"inputs": [attrs.evolve(event.inputs[0], inputFacets={"inputStatistics": wrong_count()})]},
    ]
    for wrong in wrongs:
        with pytest.raises(ValidationError):
            check_types(attrs.evolve(event, **wrong))


def wrong_count() -> object:
    return importlib.import_module(
        f"{standard.__name__}.input_statistics_input_dataset"
    ).InputStatisticsInputDatasetFacet(rowCount="3")


def test_the_events_chain_the_versions_and_hold_every_fact(lineage: Lineage) -> None:
    events = as_json(lineage)
    assert len({event["run"]["runId"] for event in events}) == 3
    for number, (start, end) in enumerate(zip(events[::2], events[1::2], strict=True), 1):
        assert start["run"]["runId"] == end["run"]["runId"]
        assert start["job"]["name"] == end["job"]["name"] == f"support-bot.{SKILLS[number - 1]}"
        assert (start["eventTime"], end["eventTime"]) == (
            lineage.stages[number - 1].started,
            lineage.stages[number - 1].ended,
        )
        parent = f"support-bot/{number - 1}" if number > 1 else f"base/{lineage.base_hash}"
        assert start["inputs"] == end["inputs"]
        assert end["inputs"][-1]["name"] == parent
        counts = [rows(one) for one in end["inputs"][:-1]]
        assert sum(counts) == 256 + number
        assert end["outputs"][0]["name"] == f"support-bot/{number}"
        assert "sdft_stage" not in start["run"]["facets"]
    facet = events[3]["run"]["facets"]["sdft_stage"]
    assert HOSTILE in facet["settings"]["teacher_template"]
    assert facet["files"] == [file.model_dump() for file in lineage.stages[1].files]
    assert events[5]["run"]["facets"]["sdft_stage"]["decision"] == "refuse"
    assert "uri" not in events[0]["inputs"][0]["facets"]["dataSource"]
    assert events[4]["inputs"][0]["facets"]["dataSource"]["uri"] == "https://example.org/a%20b.csv"
    assert hashes(lineage) <= set(re.findall(r"[0-9a-f]{64}", json.dumps(events)))


def rows(one: dict[str, Any]) -> int:
    return one["inputFacets"]["inputStatistics"]["rowCount"]


def test_every_source_of_rows_is_an_input_with_its_own_count(lineage: Lineage) -> None:
    events = as_json(lineage)
    *parts, _ = events[3]["inputs"]
    facets = [one["facets"] for one in parts]
    told = [(one["name"], rows(one)) for one in parts]
    assert told == [
        ("support-bot.courier/demonstrations", 138),
        ("support-bot.almanac/demonstrations", 64),
        ("support-bot/anchors", 56),
    ]
    assert [one["version"]["datasetVersion"] for one in facets] == [
        *(sha("own courier"), sha("data almanac"), sha("anchors"))
    ]
    assert facets[1]["version"] == events[0]["inputs"][0]["facets"]["version"], "the same data"
    sources = [one["dataSource"]["name"] for one in facets]
    assert sources == [f"skills/{one}" for one in (*TRAINS, "requests.jsonl")]
    facet = events[3]["run"]["facets"]["sdft_stage"]
    assert (facet["rehearsed"], facet["anchors"]) == ({"almanac": 64}, 56)
    assert (facet["anchorsRules"], facet["anchorsRulesMet"], facet["anchorsQuarantined"]) == (
        10,
        9,
        1,
    )

    old = as_json(of_before(lineage))
    assert [(one["name"], rows(one)) for one in old[3]["inputs"][:-1]] == told


TRAINS = ("courier/train.jsonl", "almanac/train.jsonl")


def test_a_file_gets_a_line_an_event_and_the_same_bytes_twice(
    lineage: Lineage, tmp_path: Path
) -> None:
    file = tmp_path / "events.jsonl"
    assert send(lineage, str(file)) == 6
    first = file.read_bytes()
    assert [json.loads(line) for line in first.splitlines()] == as_json(lineage)
    send(Lineage.model_validate_json(lineage.model_dump_json()), str(file))
    assert file.read_bytes() == first
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(BadInput, match="cannot be written: No such file"):
        send(lineage, str(tmp_path / "missing" / "events.jsonl"))


class Collector(http.server.BaseHTTPRequestHandler):
    """Keeps what is posted; after `good` posts it answers 500."""

    got: list[tuple[str, str | None, dict[str, Any]]]
    good = 100

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        taken = len(self.got) < self.good
        if taken:
            self.got.append((self.path, self.headers["Authorization"], body))
        self.send_response(201 if taken else 500)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[str, type[Collector]]]:
    kind = type("Own", (Collector,), {"got": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{running.server_port}", kind
        running.shutdown()


def test_a_server_gets_the_events_in_order(
    lineage: Lineage, server: tuple[str, type[Collector]], monkeypatch: pytest.MonkeyPatch
) -> None:
    address, collector = server
    monkeypatch.delenv("OPENLINEAGE_API_KEY", raising=False)
    assert send(lineage, f"http://{address}") == 6
    assert [body for _, _, body in collector.got] == as_json(lineage)
    assert {(path, key) for path, key, _ in collector.got} == {("/api/v1/lineage", None)}
    monkeypatch.setenv("OPENLINEAGE_API_KEY", "not-a-secret")
    send(lineage, f"http://{address}/other/place?tenant=a")
    path, key, _ = collector.got[-1]
    assert (path, key) == ("/other/place?tenant=a", "Bearer not-a-secret")


def test_an_endpoint_that_does_not_take_the_events_is_said_plainly(
    lineage: Lineage, server: tuple[str, type[Collector]]
) -> None:
    address, collector = server
    collector.good = 2
    with pytest.raises(BadInput, match=rf"^{address}: answered 500; it took 2 of 6 ") as caught:
        send(lineage, f"http://user:password@{address}")
    assert "password" not in str(caught.value)
    with pytest.raises(BadInput, match=r"^127.0.0.1:9: does not answer .* took 0 of 6"):
        send(lineage, "http://127.0.0.1:9")
    for wrong in ("http://", "http://[::1", "http://127.0.0.1:no"):
        with pytest.raises(BadInput, match="is no http address|does not answer"):
            send(lineage, wrong)
