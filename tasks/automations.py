"""Prefect automations of an installation: dead runs become Crashed, refusals and failures are told.

Prefect's own server makes none of them by itself; they are found by name, so that deploying again
changes nothing.
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal, cast
from urllib.parse import urlsplit
from uuid import UUID

from prefect.blocks.notifications import SlackWebhook
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.events.actions import ActionTypes, CallWebhook, ChangeFlowRunState, SendNotification
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

from schemas.base import BadInput

ZOMBIES, REFUSED, FAILED = "sdft: dead runs", "sdft: refused", "sdft: failed"
BLOCK = "sdft-notifications"
SLACK = ("hooks.slack.com", "hooks.slack-gov.com")
SILENT_S = 240
"""Above Prefect's 180 s between heartbeats, for runs whose pool says nothing else; ours say 30."""
_HEARTBEAT = "prefect.flow-run.heartbeat"
_ENDS = {f"prefect.flow-run.{end}" for end in ("Completed", "Failed", "Crashed", "Cancelled")}

Done = Literal["made", "changed", "as it was"]


def zombies(flows: Sequence[UUID], silent_s: float = SILENT_S) -> AutomationCore:
    """Runs of these flows whose heartbeat is gone are Crashed, which frees what they hold."""
    return AutomationCore(
        name=ZOMBIES,
        description=f"A run that gave no sign of life for {silent_s:.0f} s is taken for dead.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            expect={_HEARTBEAT, *_ENDS},
            match=_specification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=_of(flows),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silent_s),
        ),
        actions=[_crash(f"no heartbeat for {silent_s:.0f} s: taken for dead")],
    )


def notifications(flows: Sequence[UUID], block_id: UUID, is_slack: bool) -> list[AutomationCore]:
    """A refused candidate, and a run of these flows that failed or crashed, are told to a block."""
    refused = (
        '"sdft: " ~ event.payload.name ~ " version " ~ event.payload.version '
        '~ " was refused: " ~ event.payload.reason'
    )
    failed = (
        '"sdft: " ~ flow.name ~ " " ~ flow_run.name ~ " " ~ flow_run.state.name '
        '~ ": " ~ (flow_run.state.message or "")'
    )
    return [
        AutomationCore(
            name=REFUSED,
            description="The gate did not let a candidate pass.",
            trigger=EventTrigger(
                expect={"sdft.refused"},
                match=_specification({"prefect.resource.id": "sdft.model.*"}),
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[_tell(refused, block_id, is_slack)],
        ),
        AutomationCore(
            name=FAILED,
            description="A run failed or crashed.",
            trigger=EventTrigger(
                expect={"prefect.flow-run.Failed", "prefect.flow-run.Crashed"},
                match=_specification({"prefect.resource.id": "prefect.flow-run.*"}),
                match_related=_of(flows),
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[_tell(failed, block_id, is_slack)],
        ),
    ]


def save_block(url: str) -> tuple[UUID, bool]:
    """Keep an address that is told of refusals and failures, on the server, as a secret.

    Returns the block's id and whether it is Slack's. Raises BadInput for no http address.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise BadInput("SDFT_NOTIFY_URL must be an http or https address")
    is_slack = parts.hostname in SLACK
    kind: Any = SlackWebhook if is_slack else Webhook
    return cast(UUID, kind(url=url).save(BLOCK, overwrite=True)), is_slack


def apply_automation(client: SyncPrefectClient, wanted: AutomationCore) -> Done:
    """Make an automation, or change the one of its name into it."""
    there = client.read_automations_by_name(wanted.name)
    for double in there[1:]:
        client.delete_automation(double.id)
    if not there:
        client.create_automation(wanted)
        return "made"
    if there[0].model_dump(exclude={"id"}) == wanted.model_dump():
        return "as it was"
    client.update_automation(there[0].id, wanted)
    return "changed"


def _crash(message: str) -> ActionTypes:
    return ChangeFlowRunState(name=None, state=StateType.CRASHED, message=message, force=False)


def _tell(text: str, block_id: UUID, is_slack: bool) -> ActionTypes:
    if is_slack:
        body = "{{ " + text + " }}"
        return SendNotification(block_document_id=block_id, subject="sdft", body=body)
    payload = '{"text": {{ (' + text + ") | tojson }}}"
    return CallWebhook(block_document_id=block_id, payload=payload)


def _of(flows: Sequence[UUID]) -> Any:
    """Events that are about one of these flows."""
    ids = [f"prefect.flow.{one}" for one in sorted(flows, key=str)]
    return _specification({"prefect.resource.role": "flow", "prefect.resource.id": ids})


def _specification(labels: dict[str, str | list[str]]) -> Any:
    return labels
