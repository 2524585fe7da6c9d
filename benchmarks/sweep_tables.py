"""The tables of benchmarks/retention_sweep.py: functions of scores, a row a stage."""

import math
import statistics
from collections.abc import Callable

from scipy.stats import t

from schemas.curriculum import Curriculum

Scores = dict[str, dict[str, float]]
"""By suite: own, strict, lenient."""
Numbers = Callable[[Curriculum, list[Scores]], dict[str, float]]
"""The named numbers of a chain, from the base's scores and those after each stage."""


def by_suite(curriculum: Curriculum, rows: list[Scores]) -> dict[str, float]:
    skills = [skill.name for skill in curriculum.skills]
    return {
        **{f"{name} new": rows[i][name]["own"] for i, name in enumerate(skills, 1)},
        **{f"{name} kept": rows[-1][name]["own"] for name in skills[:-1]},
        "general": statistics.mean(rows[-1][suite.name]["own"] for suite in curriculum.general),
    }


def by_strictness(curriculum: Curriculum, rows: list[Scores]) -> dict[str, float]:
    skills = [skill.name for skill in curriculum.skills]
    general = [suite.name for suite in curriculum.general]
    found = {}
    for kind in ("strict", "lenient"):
        new = [rows[i][name][kind] for i, name in enumerate(skills, 1)]
        found |= {
            f"new, {kind}": statistics.mean(new),
            f"worst new, {kind}": min(new),
            f"kept, {kind}": statistics.mean(rows[-1][name][kind] for name in skills),
            f"general, {kind}": statistics.mean(rows[-1][name][kind] for name in general),
        }
    return found


def with_interval(values: list[float]) -> str:
    """Mean and half the width of its 95% interval; the mean alone where there is one value."""
    mean = f"{statistics.mean(values):.2f}"
    if len(values) == 1:
        return mean
    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {half:.2f}"


def table(
    numbers: Numbers, curriculum: Curriculum, arms: list[tuple[str, float, list[list[Scores]]]]
) -> str:
    """Markdown; a line an arm: its name, rate and finished chains."""
    base = arms[0][2][0][0]
    columns = numbers(curriculum, [base] * (len(curriculum.skills) + 1))
    lines = [["arm", "rate", "n", *columns], ["---"] * (3 + len(columns))]
    lines.append(["base", "", "", *(f"{value:.2f}" for value in columns.values())])
    for name, rate, chains in arms:
        values = [numbers(curriculum, rows) for rows in chains]
        cells = [with_interval([one[column] for one in values]) for column in columns]
        lines.append([name, f"{rate:g}", f"{len(chains)}", *cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
