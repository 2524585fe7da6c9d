"""Names that may become paths, registry names and metric keys."""

import re
from typing import Annotated

from pydantic import AfterValidator

_SAFE = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?", re.ASCII)


def check_name(value: str) -> str:
    """`value`, if it is safe as a folder, registry and metric name; raises ValueError if not."""
    if not _SAFE.fullmatch(value):
        shown = value if len(value) <= 40 else value[:37] + "..."
        raise ValueError(
            f"{shown!r} is no safe name: use 1 to 63 of a-z, 0-9, '-' and '_', "
            "with a letter or digit at both ends"
        )
    return value


SafeName = Annotated[str, AfterValidator(check_name)]
