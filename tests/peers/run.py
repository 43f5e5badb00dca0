"""Other libraries' own tests, without ltd_fx and with every model transformed: what fails only with it?

python tests/peers/run.py [suite ...]
"""

import json
import os
import subprocess
import sys
from typing import Any

from plugin import MODES
from suites import CACHE, HERE, HUB, SUITES, Suite, unpack
from verdict import Verdict, page

LIMIT = 1800  # seconds for one suite in one mode
Results = dict[str, Any]


def run(suite: Suite, mode: str) -> Results:
    """One run of the suite; ``mode`` is one of the plugin's. What pytest prints goes to a file beside the results."""
    path = CACHE / "results" / f"{suite.name}.{mode}.json"
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE, suite.folder, HERE.parents[1]))),
        "HF_HUB_CACHE": str(HUB),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", suite.tests, f"-k={suite.keyword}", "-p", "plugin", "--tb=short"]
    # their configurations ask for plugins that are not here, and a conftest.py above the tests may be ours
    command += ["-c", os.devnull, f"--rootdir={suite.folder}", f"--confcutdir={suite.folder}", "-p", "no:cacheprovider"]
    command += [f"--ltd-mode={mode}", f"--ltd-library={suite.library}", f"--ltd-results={path}"]
    command += [f"--ltd-layers={suite.layers}"] * bool(suite.layers) + ["--ltd-train"] * suite.train
    print(f"{suite.name}, {mode}", flush=True)
    with path.with_suffix(".log").open("w") as log:
        subprocess.run(command, cwd=suite.folder, env=environment, stdout=log, stderr=log, timeout=LIMIT)
    return json.loads(path.read_text())


def main(names: list[str]) -> int:
    known = [suite.name for suite in SUITES]
    if not set(names) <= set(known):
        raise SystemExit(f"no such suite; there are {', '.join(known)}")
    verdicts = []
    for suite in SUITES:
        if not names or suite.name in names:
            unpack(suite)
            without = run(suite, "without")
            for mode in MODES:
                verdicts.append(Verdict(suite, mode, without, run(suite, mode)))
                print(verdicts[-1].summary(), flush=True)
    if not names:
        (HERE.parents[1] / "docs" / "peers.md").write_text(page(verdicts))
    return int(any(verdict.faults for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
