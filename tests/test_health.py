"""Rules on curves: what each finds, what it leaves alone, and that it speaks once."""

import pytest

from schemas.settings import RuntimeSettings, TrainingSettings
from schemas.stage import StepMetrics
from sdft.health import WINDOW, Finding, Health, artifact_share
from sdft.schedule import short_of_steps

SOUND = {
    "divergence": 0.5,
    "entropy": 1.0,
    "completion_tokens": 20.0,
    "clipped_share": 0.1,
    "loss_tokens": 100.0,
    "artifact_share": 0.0,
}


def findings(
    later: dict[str, float],
    method: str = "sdft",
    mode: str = "stop",
    **first: float,
) -> list[Finding]:
    """Of a sound curve that is otherwise from the seventh step on."""
    health = Health(
        TrainingSettings.model_validate({"method": method}),
        RuntimeSettings.model_validate({"health": mode}),
    )
    curve = [{**SOUND, **first}] * 6 + [{**SOUND, **first, **later}] * 3 * WINDOW
    found = []
    for step, metrics in enumerate(curve, 1):
        found += health.look(StepMetrics(step=step, time_ms=0, metrics=metrics))
    return found


@pytest.mark.parametrize(
    ("later", "rule", "stops", "message"),
    [
        ({"loss_tokens": 0.0}, "empty loss mask", True, "skip_first_tokens 0"),
        (
            {"completion_tokens": 60.0, "clipped_share": 0.9},
            "length ratchet",
            True,
            "grew from 20 to",
        ),
        ({"divergence": 0.0}, "nothing is taught", False, "fewer epochs"),
        ({"entropy": 0.001}, "entropy", False, "narrowed from 1 to 0.001"),
        ({"entropy": 9.0}, "entropy", False, "widened from 1 to"),
        ({"artifact_share": 0.5}, "artifacts", False, "set skip_first_tokens to 3"),
    ],
)
def test_what_is_found_once(later: dict[str, float], rule: str, stops: bool, message: str) -> None:
    [found] = findings(later)
    assert (found.rule, found.stops) == (rule, stops)
    assert message in found.message
    assert 6 < found.step <= 6 + WINDOW


@pytest.mark.parametrize(
    "later",
    [
        {},
        {"completion_tokens": 60.0},  # longer, and ends by itself
        {"completion_tokens": 30.0, "clipped_share": 0.9},  # cut short, but was not made longer
        {"completion_tokens": 5.0, "divergence": 0.01, "entropy": 0.1},  # learned
        {"artifact_share": 0.1},
    ],
)
def test_what_is_left_alone(later: dict[str, float]) -> None:
    assert findings(later) == []


def test_a_teacher_that_teaches_nothing_from_the_start_stops_the_stage() -> None:
    [found] = findings({}, divergence=0.0)
    assert (found.rule, found.step, found.stops) == ("nothing is taught", WINDOW, True)
    assert "shows the demonstration" in found.message
    [warning] = findings({}, mode="warn", divergence=0.0)
    assert not warning.stops


def test_artifacts_that_were_there_before_are_the_models_own() -> None:
    assert findings({}, artifact_share=0.5) == []


def test_sft_may_reach_zero() -> None:
    later = {"divergence": 0.0, "completion_tokens": 60.0, "clipped_share": 0.9, "entropy": 0.0}
    assert findings(later, "sft") == []
    [found] = findings({"loss_tokens": 0.0}, "sft")
    assert found.rule == "empty loss mask"


def test_a_curve_of_an_older_version_is_no_finding() -> None:
    health = Health(TrainingSettings(), RuntimeSettings())
    older = {name: SOUND[name] for name in ("divergence", "entropy", "completion_tokens")}
    line = StepMetrics(step=1, time_ms=0, metrics={**older, "clipped_share": 0.0})
    assert [health.look(line) for _ in range(WINDOW)] == [[]] * WINDOW


def test_the_share_of_artifacts() -> None:
    texts = ["Based on the example, 4.", "  following the example: 4", "4", "It is based on the 4"]
    assert artifact_share(texts) == 0.5


def test_a_stage_that_only_warms_up_is_short_of_steps() -> None:
    training = TrainingSettings(epochs=2, prompts_per_step=8)
    assert short_of_steps(training, 41) is None, "12 steps"
    said = short_of_steps(training, 40)
    assert said is not None and said.startswith("10 steps, none of them after the warm-up")
    assert "set more epochs, fewer prompts_per_step or fewer warmup_steps" in said
    without = training.model_copy(update={"warmup_steps": 0})
    assert short_of_steps(without, 1) is None
