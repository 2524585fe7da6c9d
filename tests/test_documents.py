"""The documents of a lineage: the ML-BOM and the auditor's page."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.schema._res import BOM_JSON_STRICT
from cyclonedx.validation.json import JsonStrictValidator
from jsonschema import Draft7Validator
from lineages import HOSTILE, a_lineage, hashes, of_before, sha
from rfc3986_validator import validate_rfc3986

from schemas.lineage import Lineage
from tasks.mlbom import ml_bom
from tasks.page import lineage_page


@pytest.fixture(scope="module")
def lineage() -> Lineage:
    return a_lineage()


# ML-BOM


@Draft7Validator.FORMAT_CHECKER.checks("iri-reference")
def is_iri_reference(value: object) -> bool:
    """RFC 3987, 3.1: it is one where the URI that it maps to is one.

    jsonschema has its own check for it with a package that costs every start of ours a second.
    """
    if not isinstance(value, str):
        return True
    mapped = "".join(one if one.isascii() else quote(one) for one in value)
    return validate_rfc3986(mapped, rule="URI_reference") is not None


def broken_by(text: str) -> object:
    return JsonStrictValidator(SchemaVersion.V1_7).validate_str(text)


def test_the_validator_checks_every_format_of_the_schema() -> None:
    """jsonschema passes over a format that it knows no check for."""
    schema = Path(str(BOM_JSON_STRICT[SchemaVersion.V1_7])).read_text(encoding="utf-8")
    formats = set(re.findall(r'"format": *"([a-z-]+)"', schema))
    assert formats == {"date", "date-time", "idn-email", "iri-reference"}
    assert formats <= {*Draft7Validator.FORMAT_CHECKER.checkers}


def facts(component: dict[str, Any]) -> dict[str, str]:
    return {one["name"]: one["value"] for one in component["properties"]}


def test_the_bom_passes_the_librarys_strict_validator_and_a_broken_one_does_not(
    lineage: Lineage,
) -> None:
    text = ml_bom(lineage)
    assert broken_by(text) is None
    for field, wrong in (("bomFormat", "Other"), ("serialNumber", "urn:uuid:no"), ("extra", 1)):
        assert broken_by(json.dumps(json.loads(text) | {field: wrong})) is not None
    broken = json.loads(text)
    broken["metadata"]["component"]["hashes"][0]["content"] = "12"
    assert broken_by(json.dumps(broken)) is not None
    for place, wrong in (
        ({"metadata": {"timestamp": "2026-10-20 at noon"}}, "2026-10-20 at noon"),
        ({"metadata": {"authors": [{"email": "nobody"}]}}, "nobody"),
        ({"externalReferences": [{"type": "website", "url": "http://a b/"}]}, "http://a b/"),
    ):
        assert f"'{wrong}' is not" in str(broken_by(json.dumps(json.loads(text) | place)))
    page = {"externalReferences": [{"type": "website", "url": "https://example.org/漢字?a#b"}]}
    assert broken_by(json.dumps(json.loads(text) | page)) is None


def test_the_bom_is_the_same_bytes_for_the_same_lineage_and_others_for_another(
    lineage: Lineage,
) -> None:
    again = Lineage.model_validate_json(lineage.model_dump_json())
    assert ml_bom(lineage) == ml_bom(again)
    bom, other = (
        json.loads(ml_bom(one)) for one in (lineage, lineage.model_copy(update={"aliases": ()}))
    )
    assert bom["serialNumber"] != other["serialNumber"]
    assert bom["metadata"]["timestamp"] == lineage.stages[-1].ended


def test_the_bom_tells_what_is_in_the_model(lineage: Lineage) -> None:
    bom = json.loads(ml_bom(lineage))
    model = bom["metadata"]["component"]
    assert (model["type"], model["name"], model["version"]) == (
        "machine-learning-model",
        "support-bot",
        "3",
    )
    assert model["hashes"] == [{"alg": "SHA-256", "content": sha("model 3")}]
    assert {one["name"]: one["hashes"][0]["content"] for one in model["components"]} == {
        file.path: file.sha256 for file in lineage.stages[-1].files
    }
    assert sorted(one["type"] for one in bom["components"]) == [
        *["data"] * 4,
        *["machine-learning-model"] * 3,
    ]
    told = facts(model)
    assert told["sdft:decision"] == "refuse"
    assert told["sdft:aliases"] == "champion, candidate"
    assert told["sdft:setting:learning_rate"] == "0.0002"
    assert told["sdft:setting:max_prompt_tokens"] == "null"
    assert told["sdft:score:almanac"] == "0.914"
    assert told["sdft:environment:device"] == "NVIDIA H100 80GB HBM3"
    assert HOSTILE in told["sdft:overridden:9"] and "by kim" in told["sdft:overridden:9"]
    assert json.loads(told["sdft:ledger:10"])["kind"] == "promoted"
    assert hashes(lineage) <= set(re.findall(r"[0-9a-f]{64}", json.dumps(bom)))
    assert "licenses" not in model, "nothing is known about the model's licence"


def test_the_boms_dependencies_go_from_version_to_base_and_data(lineage: Lineage) -> None:
    bom = json.loads(ml_bom(lineage))
    graph = {one["ref"]: set(one.get("dependsOn", [])) for one in bom["dependencies"]}
    base = f"base:{lineage.base_hash}"
    for version, parent in (
        ("3", "model:support-bot/2"),
        ("2", "model:support-bot/1"),
        ("1", base),
    ):
        more = {"data:support-bot/1", "anchors:support-bot/2"} if version == "2" else set()
        own = f"data:support-bot/{version}"
        assert graph[f"model:support-bot/{version}"] == {parent, own, *more}
    assert graph[base] == set()


def test_the_bom_tells_own_rows_from_those_learned_again_and_anchors(lineage: Lineage) -> None:
    bom = json.loads(ml_bom(lineage))
    parts = {one["bom-ref"]: one for one in bom["components"]}
    own, anchors = parts["data:support-bot/2"], parts["anchors:support-bot/2"]
    assert own["description"] == "The 138 demonstrations of the skill courier."
    assert (own["version"], facts(own)["sdft:rows"]) == (sha("own courier"), "138")
    assert anchors["description"].startswith("56 prompts of no skill")
    assert anchors["hashes"] == [{"alg": "SHA-256", "content": sha("anchors")}]
    told = facts(anchors)
    assert told["sdft:source"] == "skills/requests.jsonl"
    assert (told["sdft:rules_met"], told["sdft:rules"], told["sdft:quarantined"]) == (
        "9",
        "10",
        "1",
    )
    model = facts(parts["model:support-bot/2"])
    assert (model["sdft:rows"], model["sdft:data_hash"]) == ("258", sha("data courier"))
    assert (model["sdft:rows_rehearsed"], model["sdft:rows_anchors"]) == ('{"almanac":64}', "56")


def test_documents_of_a_lineage_that_was_kept_before_parts_were_told_apart(
    lineage: Lineage,
) -> None:
    old = of_before(lineage)
    assert broken_by(ml_bom(old)) is None
    assert "56 prompts of no skill, to be answered as before\n" in Reader(lineage_page(old)).text


# Page


class Reader(HTMLParser):
    """The tags and attributes of a page, and its text as a reader sees it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.text += "\n"
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are nested"

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_hostile_text_as_text(lineage: Lineage) -> None:
    page = Reader(lineage_page(lineage))
    assert page.open == []
    assert not {"script", "img", "iframe", "link", "b", "object", "form"} & set(page.tags)
    shown = HOSTILE.replace("\u202e", "\\u202e").replace("\x07", "\\u0007")
    assert page.text.count(shown) == 4, "overview, a setting, its stage's history, the ledger"
    assert "models/qwen <b>" in page.text
    assert "javascript:alert(1)" in page.text
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src"):
            assert (value or "").startswith(("https://mlflow.example.org/", "#stage-"))


def test_the_page_has_every_hash_and_fact(lineage: Lineage) -> None:
    page = Reader(lineage_page(lineage))
    assert hashes(lineage) <= set(re.findall(r"[0-9a-f]{64}", page.text))
    assert all(stage.run_link in page.text for stage in lineage.stages)
    for fact in (
        "138 rows, 2 more refused and set aside",
        "64 rows of almanac, from skills/almanac/train.jsonl",
        "56 prompts of no skill, to be answered as before, 1 more refused and set aside, from "
        "skills/requests.jsonl; 9 of 10 rules met",
        "of all 258 rows",
        "10 of 11 rules met",
        "80 steps in 23 s",
        "NVIDIA H100 80GB HBM3",
        "by kim on trainer-2",
        "overridden",
        "verdict: refused",
        "0.914",
        "0.0002",
        "champion",
        "2026-10-20 02:13:48",
    ):
        assert fact in page.text, fact


def test_the_page_is_the_same_bytes_for_the_same_lineage(lineage: Lineage) -> None:
    again = Lineage.model_validate_json(lineage.model_dump_json())
    assert lineage_page(lineage) == lineage_page(again)


def test_the_page_of_a_first_stage_without_alias_score_or_ledger(lineage: Lineage) -> None:
    bare = lineage.stages[0].model_copy(update={"history": (), "scores": {}, "decision": "none"})
    page = Reader(
        lineage_page(lineage.model_copy(update={"aliases": (), "version": "1", "stages": (bare,)}))
    )
    assert "no alias points here" in page.text
    assert "not judged" in page.text
    assert "The ledger has no entry about this version." in page.text
