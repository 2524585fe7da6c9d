"""New skills from a watched folder: found, checked, and put into an order that is written once."""

from datetime import UTC, datetime
from pathlib import Path

from prefect import task
from sqlalchemy import Connection, insert, select

from schemas.base import BadInput
from schemas.curriculum import HUB, Curriculum, Skill, load_skill
from schemas.names import check_name
from schemas.watched import SKILL_FILE, Drop, Recorded, Remark, Watched
from tasks.console import say, shown_address
from tasks.dropped import CONTENT, copy_name, copy_of, list_drops, whole_copy
from tasks.failures import RunFailed
from tasks.home import Home
from tasks.ledger import Ledger, who
from tasks.ledger_tables import WATCHED


class OrderRaced(RunFailed):
    """Another run has recorded skills meanwhile."""


def watch(curriculum: Curriculum, home: Home) -> Watched:
    """The curriculum with what its watched folder holds: recorded skills, then new ones by name.

    What is recorded is taken as it was then, from this home's copy of it. What is incomplete, bad
    or changed is in the remarks. Raises BadInput where a recorded skill can be had no more, and
    where there is nothing to learn.
    """
    address = curriculum.skills_from
    if address is None:
        return Watched(curriculum=curriculum)
    drops = list_drops(address)
    with Ledger(home).reading() as connection:
        recorded = _order(connection, curriculum.name)
    skills: list[Skill] = []
    remarks: list[Remark] = []
    for one in recorded:
        if one.skill in {suite.name for suite in curriculum.suites}:
            raise BadInput(
                f"{one.skill}: was recorded as a skill from {shown_address(address)}, and the "
                "curriculum has a skill or general suite of that name now, too; take it out or "
                "give it another name"
            )
        skill, remark = _as_recorded(one, drops.pop(one.skill, None), curriculum, home)
        skills.append(skill)
        remarks += [Remark(name=one.skill, said=remark)] if remark else []
    new: list[Recorded] = []
    for drop in drops.values():
        try:
            skill, content_hash = _new(drop, curriculum, home)
        except BadInput as problem:
            remarks.append(Remark(name=drop.name, said=f"not taken: {problem}"))
        else:
            skills.append(skill)
            new.append(Recorded(skill=drop.name, content_hash=content_hash))
    if not curriculum.skills and not skills:
        told = "".join(f"\n{one.name}: {one.said}" for one in remarks)
        raise BadInput(f"{shown_address(address)}: holds no skill to learn yet{told}")
    whole = {"skills": (*curriculum.skills, *skills), "skills_from": None}
    return Watched(
        curriculum=curriculum.model_copy(update=whole),
        recorded=tuple(recorded),
        new=tuple(new),
        remarks=tuple(remarks),
    )


@task
def watch_skills(curriculum: Curriculum, home_dir: str) -> Watched:
    """`watch`, said to people."""
    watched = watch(curriculum, Home(home_dir))
    for remark in watched.remarks:
        say("watch", remark.name, remark.said, "yellow")
    return watched


@task
def record_order(watched: Watched, home_dir: str) -> None:
    """Write down, once and for every machine, in which order the new skills come.

    To be called when their data have passed their checks: until then a directory may be mended.
    Raises OrderRaced where another run was faster.
    """
    if not watched.new:
        return
    name = watched.curriculum.name
    with Ledger(Home(home_dir)).transaction() as connection:
        if _order(connection, name) != [*watched.recorded]:
            raise OrderRaced(
                f"{name}: another run has recorded new skills meanwhile; run the same command again"
            )
        for place, one in enumerate(watched.new, len(watched.recorded) + 1):
            values = {"curriculum": name, "place": place, "who": who()} | one.model_dump()
            time = datetime.now(UTC).isoformat(timespec="milliseconds")
            connection.execute(insert(WATCHED).values(**values, time=time))
    for one in watched.new:
        say("watch", one.skill, f"new; recorded as the next skill of {name}")


def recorded_copies(ledger: Ledger) -> set[str]:
    """The names of the directories with copies of recorded skills, of all curricula."""
    with ledger.reading() as connection:
        rows = connection.execute(select(WATCHED.c.skill, WATCHED.c.content_hash))
        return {copy_name(row.skill, row.content_hash) for row in rows}


def _order(connection: Connection, name: str) -> list[Recorded]:
    query = select(WATCHED.c.skill, WATCHED.c.content_hash).order_by(WATCHED.c.place)
    rows = connection.execute(query.where(WATCHED.c.curriculum == name))
    return [Recorded(skill=row.skill, content_hash=row.content_hash) for row in rows]


def _as_recorded(
    one: Recorded, drop: Drop | None, curriculum: Curriculum, home: Home
) -> tuple[Skill, str | None]:
    """The skill as it was recorded, and what is to be said of its directory now."""
    address = str(curriculum.skills_from)
    remark = "is gone"
    if drop is not None and (remark := drop.refused) is None:
        copy, _ = copy_of(drop, address, home)
        if copy.content_hash != one.content_hash:
            remark = "was changed"
    folder = home.watched / copy_name(one.skill, one.content_hash)
    if whole_copy(folder) is None:
        raise BadInput(
            f"{shown_address(address)}/{one.skill}: {remark or 'cannot be copied'} after it was "
            f"recorded ({one.content_hash[:12]}), and this home has no copy of it; put it back as "
            "it was"
        )
    said = f"{remark} after it was recorded; it stays as it was then" if remark else None
    return _skill(folder / CONTENT, one.skill, curriculum), said


def _new(drop: Drop, curriculum: Curriculum, home: Home) -> tuple[Skill, str]:
    """A skill that is not recorded yet; raises BadInput where it cannot be taken."""
    try:
        name = check_name(drop.name)
    except ValueError as error:
        raise BadInput(str(error)) from None
    if drop.refused:
        raise BadInput(drop.refused)
    if name in {suite.name for suite in curriculum.suites}:
        raise BadInput("the curriculum has a skill or general suite of that name already")
    copy, folder = copy_of(drop, str(curriculum.skills_from), home)
    skill = _skill(folder, name, curriculum)
    if problem := curriculum.problem_with(skill):
        raise BadInput(problem)
    return skill, copy.content_hash


def _skill(folder: Path, name: str, curriculum: Curriculum) -> Skill:
    """The skill of a copied directory; it may use nothing that lies outside."""
    try:
        skill = load_skill(folder / SKILL_FILE, name, curriculum)
    except BadInput as error:
        raise BadInput(str(error).replace(f"{folder}/", "")) from None
    if skill.name != name:
        raise BadInput(f"{SKILL_FILE}: name: is {skill.name!r}, the directory's is {name!r}")
    for key, source in (("train", skill.train), ("eval", skill.eval)):
        path = Path(source.path)
        outside = source.path.startswith(HUB) or path.is_absolute() or ".." in path.parts
        if outside or not (folder / path).exists():
            raise BadInput(f"{SKILL_FILE}: {key}: {source.path!r} is no file of the directory")
    return skill.under(folder)
