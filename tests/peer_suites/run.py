"""Other libraries' own tests, without ltd_fx and with every model transformed: what fails only with it?

python -m peer_suites.run [suite ...]
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from .suites import HERE, HUB, SUITES, Suite, unpack
from .verdict import MODES, Verdict, page

LIMIT = 1800  # seconds for one suite in one mode


def results(suite: Suite, mode: str) -> Path:
    """Of the installed version; what pytest printed is beside it."""
    return suite.folder.parent / "results" / suite.folder.name / f"{suite.name}.{mode}.json"


def run(suite: Suite, mode: str) -> None:
    """Run the suite; ``mode`` is one of the plugin's."""
    path = results(suite, mode)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent, suite.folder, HERE.parents[1]))),
        "HF_HUB_CACHE": str(HUB),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        suite.tests,
        f"-k={suite.keyword}",
        "-p",
        "peer_suites.plugin",
        "--tb=short",
    ]
    # their configurations ask for plugins that are not here, and a conftest.py above the tests may be ours
    command += ["-c", os.devnull, f"--rootdir={suite.folder}", f"--confcutdir={suite.folder}", "-p", "no:cacheprovider"]
    command += [f"--ltd-mode={mode}", f"--ltd-library={suite.library}", f"--ltd-results={path}"]
    command += [f"--ltd-layers={suite.layers}"] * bool(suite.layers) + ["--ltd-train"] * suite.train
    print(f"{suite.name}, {mode}", flush=True)
    with path.with_suffix(".log").open("w") as log:
        subprocess.run(command, cwd=suite.folder, env=environment, stdout=log, stderr=log, timeout=LIMIT)
    if not path.exists():
        raise SystemExit(f"pytest did not come to its end: see {log.name}")


def verdicts(suite: Suite) -> list[Verdict]:
    """One for each mode; none where the suite was not run."""
    paths = [results(suite, mode) for mode in ("without", *MODES)]
    if not all(path.exists() for path in paths):
        return []
    without, *others = (json.loads(path.read_text()) for path in paths)
    return [Verdict(suite, mode, without, other) for mode, other in zip(MODES, others, strict=True)]


def main(names: list[str]) -> int:
    known = [suite.name for suite in SUITES]
    if not set(names) <= set(known):
        raise SystemExit(f"no such suite; there are {', '.join(known)}")
    faults = False
    for suite in SUITES:
        if not names or suite.name in names:
            unpack(suite)
            for mode in ("without", *MODES):
                run(suite, mode)
            for verdict in verdicts(suite):
                print(verdict.summary(), flush=True)
                faults |= bool(verdict.faults)
    found = [verdicts(suite) for suite in SUITES]
    if all(found):
        (HERE.parents[1] / "docs" / "peers.md").write_text(page([verdict for each in found for verdict in each]))
    return int(faults)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
