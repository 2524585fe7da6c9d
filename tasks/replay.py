"""Taking a skill out: the newest curriculum of a name, without it, as a file of its own."""

from pathlib import Path

import yaml

from schemas.base import BadInput, write_atomically
from schemas.curriculum import load_curriculum
from schemas.digest import digest_text
from tasks.home import Home
from tasks.reporting import latest_curriculum


def curriculum_without(home: Home, name: str, skill: str) -> Path:
    """The curriculum file to learn; asked again, after it was learned, the same one.

    Raises BadInput where there is no such curriculum or skill.
    """
    found = latest_curriculum(home, name)
    if found is None:
        raise BadInput(f"{home.root}: has learned no curriculum named {name!r}; see sdft status")
    names = [one.name for one in found.skills]
    if names == [skill]:
        raise BadInput(
            f"{name}: {skill} is the only skill of its newest curriculum; without it the base "
            "model is left"
        )
    kept = tuple(one for one in found.skills if one.name != skill)
    left = found.model_copy(update={"skills": kept}).model_dump(mode="json")
    text = yaml.safe_dump(left, sort_keys=False, allow_unicode=True)
    path = home.curricula / f"{name}-without-{skill}-{digest_text(text)[:8]}.yaml"
    if skill in names:
        home.curricula.mkdir(exist_ok=True)
        write_atomically(path, text)
    elif not (path in home.curricula.glob("*.yaml") and load_curriculum(path) == found):
        raise BadInput(
            f"{name}: its newest curriculum has no skill {skill!r}; it has {', '.join(names)}"
        )
    return path
