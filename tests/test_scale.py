"""docs/scale.md holds what its script computes."""

import re
import subprocess
import sys

from conftest import ROOT


def test_the_numbers_of_the_document_are_those_of_the_script() -> None:
    script = str(ROOT / "benchmarks" / "scale.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line][2:]
    assert len(rows) == 10
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    shown = [re.split(r"\s*\|\s*", line.strip("| ")) for line in text.splitlines() if "|" in line]
    documented = [[re.sub(r"\*\*| \(mean\)", "", cell) for cell in row[1:]] for row in shown]
    for _, *numbers in rows:
        assert numbers in documented, numbers
    [even] = re.findall(r"from (\d+) skills on", done.stdout)
    assert f"From {even} skills on" in text
