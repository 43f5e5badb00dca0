"""All runs of the study, two side by side, in the order that gives an answer soonest: ``make study-all``.

Runs whose result is there are left out; one that was killed goes on where it was. Then ``python study/report.py``.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from files import HERE, RESULTS, SCRATCH
from tqdm import tqdm

SEEDS = (0, 1, 2)
MORE_SEEDS = (3, 4)  # for the small ones
# the dense model's learning rate: a quarter of the steps, then whole runs beside the best one
SWEEP = {"text/lr-1e-3": 100, "text/lr-2e-3": 100, "text/lr-4e-3": 100, "text/lr-8e-3": 100}
SWEEP |= {"text/long-1e-3": 0, "text/long-8e-3": 0}
TEXT = ["dense", "random-ltd", "dense-short", "random-ltd-lr", "truncation", "both", "route", "half"]
ARMS = [
    *(f"text/{arm}" for arm in TEXT),
    *("digits/dense", "digits/random-ltd", "letters/dense", "letters/random-ltd"),
    *("diffusion/dense", "diffusion/route-half", "diffusion/route-quarter", "diffusion/route-to-the-end"),
    "diffusion/random-ltd",
]
Job = tuple[str, int, int | None]  # run, seed, the step to stop after


def jobs() -> list[Job]:
    """In order: every claim by one seed first, then by another."""
    first = list(SWEEP.items()) + [(arm, seed) for seed in SEEDS for arm in ARMS]
    more = [(arm, seed) for seed in MORE_SEEDS for arm in ARMS if arm.startswith("digits/")]
    hot = [(f"hot/{arm}", SEEDS[0]) for arm in TEXT]
    return [(run, seed, None) for run, seed in first + more + hot]


def run_all(todo: list[Job], results: Path, side_by_side: int = 2) -> None:
    """Each in a process of its own, with one thread.

    Raises:
        SystemExit: one failed, or SIGTERM; as after Ctrl-C, runs under way have left checkpoints.
    """
    todo = [job for job in todo if not (results / f"{job[0]}-{job[1]}.json").exists()]
    under_way: dict[Job, subprocess.Popen[bytes]] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that the runs are, too
    with tqdm(total=len(todo), desc="runs", dynamic_ncols=True) as bar:
        try:
            while todo or under_way:
                while todo and len(under_way) < side_by_side:
                    job = todo.pop(0)
                    under_way[job] = start(job, results)
                    bar.write(f"{time.strftime('%H:%M')} {job[0]}, seed {job[1]}")
                time.sleep(0.2)
                for job in [job for job, process in under_way.items() if process.poll() is not None]:
                    if under_way.pop(job).returncode:
                        sys.exit(f"{job[0]}, seed {job[1]}: failed; see {log_of(job)}")
                    bar.update()
        finally:
            for process in under_way.values():
                process.send_signal(signal.SIGTERM)


def start(job: Job, results: Path) -> subprocess.Popen[bytes]:
    run, seed, until = job
    log_of(job).parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "train.py"), run, "--seed", str(seed), "--results", str(results)]
    command += [] if until is None else ["--until", str(until)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log_of(job).open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def log_of(job: Job) -> Path:
    return SCRATCH / f"{job[0]}-{job[1]}.log"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only runs whose name begins so, as in text/")
    parser.add_argument("--seed", type=int, help="only runs of this seed")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--side-by-side", type=int, default=2, help="runs at once, a core each")
    args = parser.parse_args()
    chosen = [job for job in jobs() if job[0].startswith(args.only) and args.seed in (None, job[1])]
    run_all(chosen, args.results, args.side_by_side)


if __name__ == "__main__":
    main()
