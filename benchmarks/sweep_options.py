"""What benchmarks/retention_sweep.py can be told: arms, seeds, and settings of all chains."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from schemas.base import BadInput
from schemas.curriculum import Curriculum
from schemas.settings import TrainingSettings

OF_THE_ARM = ("method", "learning_rate", "lora")


@dataclass(frozen=True, order=True)
class Arm:
    """What is compared: what is trained, by which method, at which rate."""

    lora: bool
    method: str
    rate: float

    @classmethod
    def parse(cls, text: str) -> Self:
        name, _, rate = text.partition(":")
        method, _, adapters = name.partition("-")
        try:
            if method not in ("sdft", "sft") or adapters not in ("", "lora"):
                raise ValueError
            return cls(bool(adapters), method, float(rate))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no arm; one is sdft, sft, sdft-lora or sft-lora with its rate, such "
                "as sdft:2e-4"
            ) from None

    @property
    def name(self) -> str:
        return self.method + "-lora" * self.lora

    def __str__(self) -> str:
        return f"{self.name}:{self.rate:g}"


QUICKSTART_ARMS = [
    Arm(False, method, rate)
    for method in ("sdft", "sft")
    for rate in (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
]


def parse_options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("curriculum", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--arms", type=Arm.parse, nargs="+", default=QUICKSTART_ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--training",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="settings in place of the curriculum's own",
    )
    parser.add_argument("--rehearsal", type=fraction, help="in place of the curriculum's own")
    return parser.parse_args()


def fraction(text: str) -> float:
    if not 0.0 <= (value := float(text)) <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def changed(curriculum: Curriculum, options: argparse.Namespace) -> Curriculum:
    """The same with the options' settings, those of training in every skill.

    Raises BadInput for what is no setting, or is given by the arms.
    """
    given = dict(one.split("=", 1) if "=" in one else (one, "") for one in options.training)
    if taken := [name for name in OF_THE_ARM if name in given]:
        raise BadInput(f"--training {taken[0]}: is given by --arms")
    if curriculum.anchors and (without := [arm for arm in options.arms if arm.method == "sft"]):
        raise BadInput(f"--arms {without[0]}: has no teacher to learn the curriculum's anchors of")
    try:
        skills = [
            skill.model_copy(
                update={
                    "training": TrainingSettings.model_validate(
                        {**skill.training.model_dump(), **given}
                    )
                }
            )
            for skill in curriculum.skills
        ]
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        where = f" {name}={given.get(name, '')}" if name else ""
        raise BadInput(f"--training{where}: {first['msg']}") from None
    share = curriculum.rehearsal if options.rehearsal is None else options.rehearsal
    return curriculum.model_copy(update={"skills": tuple(skills), "rehearsal": share})
