"""The watched folder: what is taken, in which order, and what is said of everything else."""

import errno
import os
import shutil
from pathlib import Path

import pytest
from conftest import eval_rows, train_rows, write_jsonl
from sqlalchemy import text
from sqlalchemy.exc import DatabaseError

from schemas.base import BadInput
from schemas.curriculum import Curriculum, load_curriculum
from tasks.dropped import COPY, list_drops
from tasks.garbage import collect
from tasks.home import Home
from tasks.ledger import Ledger
from tasks.watched import OrderRaced, record_order, watch

CURRICULUM = """\
name: demo
base_model: model
skills_from: drop
general:
  - {name: sums, eval: sums.jsonl}
training: {epochs: 7, learning_rate: 1.0e-4}
gate: {min_gain: 0.2}
"""
SKILL = "train: train.jsonl\neval: eval.jsonl\nscorer: contains\ntraining: {epochs: 3}\n"


def drop(folder: Path, name: str, skill: str = SKILL, rows: int = 4, complete: bool = True) -> Path:
    """A skill's directory, the marker last."""
    place = folder / name
    place.mkdir(parents=True)
    write_jsonl(place / "train.jsonl", train_rows(rows, name))
    write_jsonl(place / "eval.jsonl", eval_rows(3, name))
    (place / "skill.yaml").write_text(skill)
    if complete:
        (place / "COMPLETE").touch()
    return place


class Case:
    """A curriculum with a watched folder, and homes that share a ledger."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.drops = folder, folder / "drop"
        self.drops.mkdir()
        (folder / "curriculum.yaml").write_text(CURRICULUM)
        monkeypatch.setenv("SDFT_LEDGER_URL", f"sqlite:///{folder / 'ledger.db'}")
        self.home, self.other = Home(folder / "one"), Home(folder / "other")
        for home in (self.home, self.other):
            home.root.mkdir()

    @property
    def curriculum(self) -> Curriculum:
        return load_curriculum(self.folder / "curriculum.yaml")

    def names(self, home: Home | None = None) -> list[str]:
        watched = watch(self.curriculum, home or self.home)
        return [skill.name for skill in watched.curriculum.skills]

    def record(self) -> None:
        record_order.fn(watch(self.curriculum, self.home), str(self.home.root))

    def remarks(self) -> dict[str, str]:
        return {one.name: one.said for one in watch(self.curriculum, self.home).remarks}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    return Case(tmp_path, monkeypatch)


def test_a_skill_inherits_and_is_read_from_a_copy(case: Case) -> None:
    place = drop(case.drops, "refunds")
    [skill] = watch(case.curriculum, case.home).curriculum.skills
    assert (skill.training.epochs, skill.training.learning_rate) == (3, 1e-4)
    assert (skill.gate.min_gain, skill.scorer) == (0.2, "contains")
    copied = Path(skill.train.path)
    assert copied.is_relative_to(case.home.watched)
    assert copied.read_bytes() == (place / "train.jsonl").read_bytes()
    assert watch(case.curriculum, case.home).curriculum.skills_from is None, "it is expanded"


def test_the_order_is_written_once_and_the_same_for_every_machine(case: Case) -> None:
    for name in ("b", "c"):
        drop(case.drops, name)
    case.record()
    drop(case.drops, "a")
    assert case.names() == ["b", "c", "a"]
    assert case.names(case.other) == ["b", "c", "a"]
    case.record()
    case.record()
    assert case.names(case.other) == ["b", "c", "a"]
    assert watch(case.curriculum, case.other).new == ()
    ledger = Ledger(case.home)
    for change in ("UPDATE watched_skill SET place = 9", "DELETE FROM watched_skill"):
        with pytest.raises(DatabaseError, match="append-only"), ledger.engine.begin() as connection:
            connection.execute(text(change))


def test_of_two_runs_that_find_other_skills_one_is_told_to_look_again(case: Case) -> None:
    drop(case.drops, "b")
    early = watch(case.curriculum, case.home)
    drop(case.drops, "a")
    case.record()
    with pytest.raises(OrderRaced, match="run the same command again"):
        record_order.fn(early, str(case.home.root))
    assert case.names() == ["a", "b"]


def test_what_was_changed_after_it_was_recorded_stays_as_it_was(case: Case) -> None:
    place = drop(case.drops, "refunds")
    case.record()
    before = watch(case.curriculum, case.home).curriculum.skills
    write_jsonl(place / "train.jsonl", train_rows(9, "other"))
    assert watch(case.curriculum, case.home).curriculum.skills == before
    said = {"refunds": "was changed after it was recorded; it stays as it was then"}
    assert case.remarks() == said
    with pytest.raises(BadInput, match="was changed after it was recorded .* has no copy of it"):
        case.names(case.other)
    shutil.rmtree(place)
    assert case.remarks()["refunds"].startswith("is gone")
    assert case.names() == ["refunds"]


def test_a_copy_that_was_altered_is_made_again(case: Case) -> None:
    drop(case.drops, "refunds")
    case.record()
    [skill] = watch(case.curriculum, case.home).curriculum.skills
    good = Path(skill.train.path).read_bytes()
    Path(skill.train.path).write_bytes(good + b"{}\n")
    assert case.names() == ["refunds"]
    assert Path(skill.train.path).read_bytes() == good


def test_a_copy_goes_that_became_no_skill_and_one_that_did_stays(case: Case) -> None:
    drop(case.drops, "refunds")
    case.record()
    drop(case.drops, "returns")
    assert case.names() == ["refunds", "returns"]
    gone = [one.path for one in collect(case.home, 0, remove=True)]
    [kept] = case.home.watched.glob("*-*")
    assert kept.name.startswith("refunds-")
    assert [path.partition("-")[0] for path in gone] == ["watched/returns"]
    assert case.names() == ["refunds", "returns"], "it is copied again"


def test_files_that_were_only_touched_are_not_copied_twice(case: Case) -> None:
    place = drop(case.drops, "refunds")
    case.record()
    os.utime(place / "train.jsonl", ns=(1, 1))
    assert case.remarks() == {}
    [copy] = case.home.watched.glob(f"*/{COPY}")
    written = copy.stat().st_mtime_ns
    assert case.names() == ["refunds"]
    assert copy.stat().st_mtime_ns == written


def test_a_directory_may_be_mended_until_it_is_recorded(case: Case) -> None:
    place = drop(case.drops, "refunds", complete=False)
    with pytest.raises(BadInput, match=r"no skill to learn yet\nrefunds: not taken: incomplete"):
        case.names()
    (place / "COMPLETE").touch()
    write_jsonl(place / "train.jsonl", train_rows(5, "mended"))
    assert case.names() == ["refunds"]


@pytest.mark.parametrize(
    ("skill", "said"),
    [
        ("train: ../x/train.jsonl\neval: eval.jsonl\n", "train: '../x/train.jsonl' is no file"),
        ("train: /etc/passwd\neval: eval.jsonl\n", "train: '/etc/passwd' is no file"),
        ("train: train.jsonl\neval: other.jsonl\n", "eval: 'other.jsonl' is no file"),
        ("train: {path: hub:a/b, revision: c}\neval: eval.jsonl\n", "train: 'hub:a/b' is no"),
        ("train: train.jsonl\n", "skill.yaml:1: eval: is required"),
        (f"{SKILL}epochs: 3\n", "skill.yaml:5: epochs: is no known key"),
        (f"{SKILL}name: other\n", "name: is 'other', the directory's is 'bad'"),
        ("- a\n", "must be a mapping with train and eval"),
    ],
)
def test_a_bad_skill_file_is_said_and_the_others_are_taken(
    skill: str, said: str, case: Case
) -> None:
    drop(case.drops, "bad", skill)
    drop(case.drops, "good")
    assert case.names() == ["good"]
    assert said in case.remarks()["bad"]
    assert str(case.home.root) not in case.remarks()["bad"]


def test_a_skill_without_a_teacher_is_said_where_there_are_anchors(case: Case) -> None:
    """Those of the curriculum's file stop the run; from the folder the others are taken."""
    by_sft = SKILL.replace("{epochs: 3}", "{method: sft}")
    drop(case.drops, "bare", by_sft)
    drop(case.drops, "good")
    assert case.names() == ["bare", "good"]
    with (case.folder / "curriculum.yaml").open("a") as file:
        file.write("anchors: anchors.jsonl\n")
    assert case.names() == ["good"]
    said = "not taken: anchors: the skill bare is learned by sft, which has no teacher"
    assert case.remarks()["bare"].startswith(said)


def test_bad_names_links_and_taken_names_are_refused(case: Case, tmp_path: Path) -> None:
    drop(case.drops, "Bad Name")
    drop(case.drops, "sums")
    linked = drop(case.drops, "linked")
    (linked / "eval.jsonl").unlink()
    (linked / "eval.jsonl").symlink_to(tmp_path / "curriculum.yaml")
    (case.drops / "whole").symlink_to(drop(tmp_path / "elsewhere", "whole"))
    (linked / "round").symlink_to(case.drops)
    drop(case.drops, ".hidden")
    (case.drops / "README.md").write_text("how to add a skill")
    drop(case.drops, "good")
    assert case.names() == ["good"]
    remarks = case.remarks()
    assert remarks.keys() == {"Bad Name", "sums", "linked", "whole"}
    assert "is no safe name" in remarks["Bad Name"]
    assert "of that name already" in remarks["sums"]
    assert all("is a symbolic link" in remarks[name] for name in ("linked", "whole"))


def test_a_recorded_name_that_the_curriculum_takes_later_is_a_mistake(case: Case) -> None:
    drop(case.drops, "foo")
    case.record()
    with (case.folder / "curriculum.yaml").open("a") as file:
        file.write("skills: [{name: foo, train: t.jsonl, eval: e.jsonl}]\n")
    with pytest.raises(
        BadInput, match=r"^foo: was recorded as a skill from .*drop, and the curric"
    ):
        case.names()


def test_a_directory_that_cannot_be_read_keeps_no_other_one_out(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk has them: lost+found, a bin of one user's."""
    drop(case.drops, "good")
    drop(case.drops, "half")
    closed = [case.drops / name for name in (".Trash-0", "lost+found", "half/private")]
    for folder in closed:
        folder.mkdir()
    real = os.scandir

    def scandir(path: str | Path) -> object:
        if Path(path) in closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert case.names() == ["good"]
    remarks = case.remarks()
    assert remarks.keys() == {"half", "lost+found"}
    assert remarks["half"] == "not taken: private cannot be read: Permission denied"


def test_a_full_disk_here_is_no_fault_of_the_skill(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    drop(case.drops, "good")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "x")

    monkeypatch.setattr("sdft.files.sync", full)
    with pytest.raises(OSError, match="No space left"):
        case.names()


def test_a_folder_that_is_not_there_is_a_mistake(case: Case) -> None:
    case.drops.rmdir()
    with pytest.raises(BadInput, match="drop: cannot be read"):
        case.names()


@pytest.mark.parametrize("address", ["s3://key:secret@bucket/x", "https://host/x", "gs://bucket"])
def test_an_address_must_be_one_that_can_be_watched_and_hold_no_key(
    address: str, tmp_path: Path
) -> None:
    file = tmp_path / "curriculum.yaml"
    file.write_text(CURRICULUM.replace("skills_from: drop", f"skills_from: {address}"))
    with pytest.raises(BadInput, match=r"curriculum.yaml:3: skills_from: must be a folder or s3"):
        load_curriculum(file)


@pytest.mark.slow
def test_an_s3_prefix_is_read_as_a_folder_is(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    from moto.server import ThreadedMotoServer

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "ada")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        place = server.get_host_and_port()
        store = boto3.client(
            "s3", endpoint_url=f"http://{place[0]}:{place[1]}", region_name="us-east-1"
        )
        store.create_bucket(Bucket="skills")
        for name in ("b", "a"):
            for file in sorted(drop(case.drops, name).iterdir()):
                store.upload_file(str(file), "skills", f"team/{name}/{file.name}")
        store.put_object(Bucket="skills", Key="team/c/train.jsonl", Body=b"{}")
        store.put_object(Bucket="skills", Key="team/Bad/COMPLETE", Body=b"")
        address = (
            "s3://skills/team?region=us-east-1&scheme=http"
            f"&endpoint_override={place[0]}%3A{place[1]}"
        )
        assert [*list_drops(address)] == ["Bad", "a", "b", "c"]
        watched = watch(case.curriculum.model_copy(update={"skills_from": address}), case.home)
        assert [one.skill for one in watched.new] == ["a", "b"]
        assert [one.name for one in watched.remarks] == ["Bad", "c"]
        on_disk = watch(case.curriculum, case.other)
        assert watched.new == on_disk.new, "the same hashes"
        assert list_drops(address.replace("/team?", "/gone?")) == {}, "of which all is removed"
        with pytest.raises(BadInput, match="there is no bucket others"):
            list_drops(address.replace("//skills/", "//others/"))
    finally:
        server.stop()
