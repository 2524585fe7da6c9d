"""What a person sees while it runs: one line an event, and a live line for a training stage."""

import re

from rich.console import Console
from rich.markup import escape

CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""All but tab and newline, and what changes the direction of writing."""
console = Console(highlight=False)
error_console = Console(highlight=False, stderr=True)


def say(step: str, subject: str, text: str, style: str = "") -> None:
    """One event: the step of the flow, what it is about, and what came of it."""
    console.print(f"[dim]{step:<9}[/dim] [bold]{escape(f'{subject:<16}')}[/bold] ", end="")
    console.print(text, style=style, markup=False)


def shown_address(address: str) -> str:
    """An address without what may be secret in it: user, password and query.

    A password may hold what ends a host. Where that is a `?`, what follows may be a query as well
    as the host: no more than the scheme is shown.
    """
    scheme, mark, rest = address.partition("://")
    if mark and not rest.startswith("/"):  # else it has no host: a path may hold anything
        secret, _, rest = rest.rpartition("@")
        return f"{scheme}://..." if "?" in secret else f"{scheme}://{rest.partition('?')[0]}"
    return re.sub(r"^[^/?#]*@", "", address).partition("?")[0]


def visible(text: str) -> str:
    """A text with its control characters written out, so that none can reorder or hide a line."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
