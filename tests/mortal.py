"""Runs a program of sdft as `python -m` does, and strikes it where MORTAL says."""

import json
import os
import runpy
import sys
from pathlib import Path

from patching import patched, strike

sys.argv = sys.argv[1:]
wanted = json.loads(os.environ["MORTAL"])
for name in [one for one in sys.modules if one.startswith("sdft.")]:
    del sys.modules[name]  # what is imported from them is to be what is patched
if wanted["program"] == sys.argv[0]:
    Path("/proc/self/comm").write_text(sys.argv[0])
    patched(wanted["function"], wanted["turn"], lambda: strike(wanted["victims"], wanted["parent"]))
sys.modules.pop(sys.argv[0], None)  # as `sdft.forking` has it
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
