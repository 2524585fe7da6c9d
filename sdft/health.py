"""Signs that a stage goes wrong, found in its curve while it is trained.

Each rule looks at the mean of a few steps, speaks once, and says what to change. Where a rule comes
from is in docs/decisions.md.
"""

import math
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from schemas.settings import RuntimeSettings, TrainingSettings
from schemas.stage import StepMetrics

WINDOW = 5
"""Steps that a rule takes the mean of."""
ARTIFACTS = ("based on the", "following the example", "as in the example", "according to the")
"""How completions begin that speak of a demonstration which only the teacher saw."""

MAX_LENGTH_GROWTH, MAX_CLIPPED_SHARE = 2.0, 0.5
NOTHING = 1e-6
"""A divergence in nats a token below which nothing is taught."""
MIN_ENTROPY_RATIO, MAX_ENTROPY_RATIO = 0.01, 3.0
SHARE_OF_ARTIFACTS = 0.2


@dataclass(frozen=True)
class Finding:
    """What a rule found, and what to change."""

    rule: str
    step: int
    message: str
    stops: bool
    """Whether the stage is to end here; otherwise this is a warning."""


def artifact_share(completions: Sequence[str]) -> float:
    """The share of completions that begin as if they had seen the demonstration."""
    return sum(text.strip().lower().startswith(ARTIFACTS) for text in completions) / len(
        completions
    )


class Health:
    """Looks at a stage's steps one after the other; the same steps give the same findings.

    An SFT stage is only asked whether it learns from any token at all: its answers are given, and
    a divergence near 0 is its aim.
    """

    def __init__(self, training: TrainingSettings, runtime: RuntimeSettings) -> None:
        self._training = training
        self._may_stop = runtime.health == "stop"
        self._first: list[dict[str, float]] = []
        self._last: deque[dict[str, float]] = deque(maxlen=WINDOW)
        self._said: set[str] = set()

    def look(self, line: StepMetrics) -> list[Finding]:
        """What this step shows for the first time."""
        self._last.append(line.metrics)
        if len(self._first) < WINDOW:
            self._first.append(line.metrics)
        if len(self._last) < WINDOW:
            return []
        found = [(rule, *said) for rule, said in self._rules() if said and rule not in self._said]
        self._said |= {rule for rule, *_ in found}
        return [
            Finding(rule, line.step, message, stops and self._may_stop)
            for rule, message, stops in found
        ]

    def _rules(self) -> list[tuple[str, tuple[str, bool] | None]]:
        rules = [("empty loss mask", self._empty())]
        if self._training.method == "sdft":
            rules += [
                ("length ratchet", self._ratchet()),
                ("nothing is taught", self._collapse()),
                ("entropy", self._entropy()),
                ("artifacts", self._artifacts()),
            ]
        return rules

    def _now(self, name: str) -> float:
        return _mean(self._last, name)

    def _at_first(self, name: str) -> float:
        return _mean(self._first, name)

    def _empty(self) -> tuple[str, bool] | None:
        if self._now("loss_tokens") != 0:
            return None
        return (
            f"no completion of the last {WINDOW} steps is longer than skip_first_tokens "
            f"{self._training.skip_first_tokens}, so nothing is learned; lower it",
            True,
        )

    def _ratchet(self) -> tuple[str, bool] | None:
        before, now = self._at_first("completion_tokens"), self._now("completion_tokens")
        clipped = self._now("clipped_share")
        if now < MAX_LENGTH_GROWTH * before or clipped < MAX_CLIPPED_SHARE:
            return None
        return (
            f"completions grew from {before:.0f} to {now:.0f} tokens and {clipped:.0%} of them end "
            "at max_new_tokens: teacher and student make each other longer; use the teacher "
            "template compact or dialogue, a lower learning_rate, or more max_new_tokens if such "
            "answers are wanted",
            True,
        )

    def _collapse(self) -> tuple[str, bool] | None:
        if self._now("divergence") > NOTHING:
            return None
        at_start = self._at_first("divergence") <= NOTHING
        return (
            "the teacher says what the student says, so nothing is taught; "
            + (
                "make sure that teacher_template shows the demonstration"
                if at_start
                else "fewer epochs would do"
            ),
            at_start,
        )

    def _entropy(self) -> tuple[str, bool] | None:
        before, now = self._at_first("entropy"), self._now("entropy")
        if MIN_ENTROPY_RATIO * before <= now <= MAX_ENTROPY_RATIO * before:
            return None
        what = "narrowed" if now < before else "widened"
        return (
            f"the student's choice of tokens {what} from {before:.3g} to {now:.3g} nats a token; "
            "a lower learning_rate keeps it nearer to what it was",
            False,
        )

    def _artifacts(self) -> tuple[str, bool] | None:
        before, share = self._at_first("artifact_share"), self._now("artifact_share")
        if not (share >= SHARE_OF_ARTIFACTS and share > before):
            return None
        return (
            f"{share:.0%} of the completions begin as if they had seen the demonstration "
            f"({', '.join(map(repr, ARTIFACTS[:2]))}, ...); set skip_first_tokens "
            "to 3 or word teacher_template so that the teacher does not mention it",
            False,
        )


def _mean(steps: Collection[dict[str, float]], name: str) -> float:
    """NaN, which no rule takes for a finding, where an older version did not measure it."""
    return sum(one.get(name, math.nan) for one in steps) / len(steps)
