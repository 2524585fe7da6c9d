"""Runs a program of sdft as `python -m` does, and strikes it where MORTAL says."""

import json
import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

_, _, module, *arguments = sys.argv
wanted = json.loads(os.environ.get("MORTAL", "{}"))


if wanted.get("program") == module:
    from patching import patched, strike

    patched(wanted["function"], wanted["turn"], lambda: strike(wanted["victims"]))
sys.argv = [module, *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
