"""A lineage made by hand, with every kind of fact in it and text that means harm."""

import re

from schemas.digest import digest_text
from schemas.ledger import GENESIS, Draft, Entry
from schemas.lineage import DataFacts, Lineage, LineageStage
from schemas.settings import TrainingSettings
from schemas.snapshot import AnchorsOrigin, Origin
from schemas.stage import FileDigest

HOSTILE = '<script>alert("x")</script>\' & "quoted" {{ 7 * 7 }} \u202eüñí 漢字 \x07'
SKILLS = ("almanac", "courier", "blick")


class Chain:
    """Seals drafts one after the other, as the ledger does."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def add(self, draft: Draft, who: str = "dana") -> None:
        seq = len(self.entries) + 1
        entry = Entry(
            **draft.model_dump(),
            seq=seq,
            time=f"2026-10-{18 + seq // 4}T02:{10 + seq}:07.120000+00:00",
            who=who,
            host="trainer-2",
            code_version="0.1.0+3f9c2a77d1e0",
            previous=self.entries[-1].hash if self.entries else GENESIS,
        )
        self.entries.append(entry.seal())


def sha(text: str) -> str:
    return digest_text(text)


def a_ledger() -> list[Entry]:
    """Two versions pass and are promoted; the third is refused and let in by a person."""
    chain = Chain()
    for number, skill in enumerate(SKILLS, 1):
        draft = Draft(
            kind="registered",
            name="support-bot",
            version=str(number),
            skill=skill,
            parent_version=str(number - 1) if number > 1 else None,
            stage_key=sha(f"key {skill}"),
            model_hash=sha(f"model {number}"),
            data_hash=sha(f"data {skill}"),
            evidence_hash=sha(f"evidence {number}"),
            package_hash=sha(f"package {number}"),
        )
        chain.add(draft)
        decision = "pass" if number < 3 else "refuse"
        verdict = {"verdict_hash": sha(f"verdict {number}"), "decision": decision}
        chain.add(draft.model_copy(update={"kind": "verdict", **verdict}))
        if number == 3:
            because = {"reason": f"courier is retired next week, agreed with support. {HOSTILE}"}
            chain.add(draft.model_copy(update={"kind": "overridden", **verdict, **because}), "kim")
        place = {"epoch": number, "expected": str(number - 1) if number > 1 else None}
        chain.add(draft.model_copy(update={"kind": "promoted", **verdict, **place}))
    return chain.entries


A_FIRST = Origin(source=f"skills/{SKILLS[0]}/train.jsonl", data_hash=sha(f"data {SKILLS[0]}"))
ANCHORS = AnchorsOrigin(
    source="skills/requests.jsonl",
    data_hash=sha("anchors"),
    quarantined=1,
    rules=10,
    rules_met=9,
)


def a_stage(number: int, entries: list[Entry]) -> LineageStage:
    skill, version = SKILLS[number - 1], str(number)
    settings = TrainingSettings(learning_rate=2e-4).model_dump(mode="json")
    if number == 2:
        settings["teacher_template"] = f"{HOSTILE}\n{{prompt}} {{demonstration}}"
    return LineageStage(
        version=version,
        stage=number,
        skill=skill,
        parent_version=str(number - 1) if number > 1 else None,
        parent_hash=sha(f"model {number - 1}"),
        model_hash=sha(f"model {number}"),
        stage_key=sha(f"key {skill}"),
        files=tuple(
            FileDigest(path=path, size_bytes=size, sha256=sha(f"{path} {number}"))
            for path, size in (
                ("config.json", 812),
                ("model.safetensors", 8_123_904),
                ("tokenizer.json", 91_204),
                ("tokenizer_config.json", 1_733),
            )
        ),
        data=DataFacts(
            source=f"skills/{skill}/train.jsonl" if number < 3 else "https://example.org/a%20b.csv",
            rows=256 + number,
            quarantined=2 if number == 2 else 0,
            rehearsed={SKILLS[0]: 64} if number == 2 else {},
            anchors=56 if number == 2 else 0,
            data_hash=sha(f"data {skill}"),
            own_hash=sha(f"own {skill}" if number == 2 else f"data {skill}"),
            rehearsed_from={SKILLS[0]: A_FIRST} if number == 2 else {},
            anchors_from=ANCHORS if number == 2 else None,
            rules=11,
            rules_met=11 if number != 2 else 10,
        ),
        settings=settings | {"seed": 0},
        steps=80,
        train_seconds=11.4 * number,
        code_version="0.1.0+3f9c2a77d1e0",
        environment={
            "python": "3.11.7",
            "platform": "Linux-6.1.0-x86_64-with-glibc2.36",
            "device": "NVIDIA H100 80GB HBM3" if number > 1 else "cpu",
            "threads": "2",
            "torch": "2.13.0",
            "transformers": "5.23.0",
        },
        run_id=sha(f"run {number}")[:32],
        run_link=f"https://mlflow.example.org/#/experiments/1/runs/{sha(f'run {number}')[:32]}"
        if number < 3
        else "javascript:alert(1)",
        started=f"2026-10-{17 + number}T02:1{number}:00+00:00",
        ended=f"2026-10-{17 + number}T02:1{number}:48.250000+00:00",
        scores=dict(zip((*SKILLS, "capitals"), (0.914, 0.5 * (number > 1), 0.031, 1), strict=True)),
        decision="pass" if number < 3 else "refuse",
        history=tuple(entry for entry in entries if entry.version == version),
    )


def a_lineage() -> Lineage:
    """Three stages, the last one in through an override, with hostile text in many places."""
    entries = a_ledger()
    return Lineage(
        name="support-bot",
        version="3",
        aliases=("champion", "candidate"),
        base_path="models/qwen <b>",
        base_hash=sha("model 0"),
        stages=tuple(a_stage(number, entries) for number in (1, 2, 3)),
    )


def of_before(lineage: Lineage) -> Lineage:
    """The same as it was written before parts of the data were told apart."""
    document = lineage.model_dump(mode="json")
    for stage in document["stages"]:
        for field in ("own_hash", "rehearsed_from", "anchors_from"):
            del stage["data"][field]
    return Lineage.model_validate(document)


def hashes(lineage: Lineage) -> set[str]:
    """Every sha256 that is anywhere in a lineage."""
    return set(re.findall(r"[0-9a-f]{64}", lineage.model_dump_json()))
