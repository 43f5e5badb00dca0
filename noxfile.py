"""The compatibility suite on other versions than the locked ones: ``make canary`` and ``make matrix``."""

import re
from pathlib import Path

import nox

nox.options.default_venv_backend = "venv"  # and pip, whose configuration counts
PROJECT = nox.project.load_toml("pyproject.toml")["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIREMENTS = [*PROJECT["dependencies"], *EXTRAS["hf"], *EXTRAS["vision"], *EXTRAS["compat"]]


def oldest(torch: bool) -> list[str]:
    """The lower bounds of pyproject.toml as exact versions: torch's, or those of the other libraries."""
    bounds = (re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement) for requirement in REQUIREMENTS)
    return [f"{bound[1]}=={bound[2]}" for bound in bounds if bound and (bound[1] == "torch") == torch]


def compat(session: nox.Session, name: str, *pins: str, success_codes: tuple[int, ...] = (0,)) -> None:
    """Install ``pins`` and the newest of everything else, run the suite, and write its outcomes to a JSON file."""
    session.install("--upgrade", "--upgrade-strategy", "eager", "--editable", ".[compat]", *pins)
    outcomes = Path("build/compat", f"{name}.json")
    outcomes.unlink(missing_ok=True)
    plugin = ("-p", "compat.report", f"--outcomes={outcomes}", "--continue-on-collection-errors")
    command = ("python", "-m", "pytest", "-q", "-m", "compat", *plugin)
    session.run(*command, env={"PYTHONPATH": "tests"}, success_codes=success_codes)


@nox.session
def canary(session: nox.Session) -> None:
    """The newest of everything."""
    compat(session, "canary")


@nox.session
@nox.parametrize("libraries", ["oldest", "newest"])
@nox.parametrize("torch", ["oldest", "newest"])
def matrix(session: nox.Session, torch: str, libraries: str) -> None:
    """The oldest and the newest torch, with the oldest and the newest transformers and other libraries."""
    pins = [pin for is_torch, age in ((True, torch), (False, libraries)) if age == "oldest" for pin in oldest(is_torch)]
    # failed tests are in the table, whose script fails
    compat(session, f"torch-{torch}-libraries-{libraries}", *pins, success_codes=(0, 1))
