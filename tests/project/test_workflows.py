"""CI and the workflows ask for what the Makefile has."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def steps(workflow: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(workflow.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_there_is(workflow: Path) -> None:
    runs = [step["run"] for step in steps(workflow) if "run" in step]
    assert runs
    for command in runs:
        assert command == ".ci/run" or command.removeprefix("make ") in TARGETS, command
    assert steps(workflow)[0]["uses"].startswith("actions/checkout@")


def test_ci_runs_targets_that_there_are() -> None:
    (targets,) = re.findall(r"for target in (.*); do", (ROOT / ".ci" / "run").read_text())
    assert {"lint", "docs", "package", "test"} == set(targets.split()) <= TARGETS


def test_each_target_is_phony_and_says_what_it_is_for() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert set(phony.split()) == TARGETS
    explained = set(re.findall(r"^([a-z-]+):.*## .+", makefile, re.MULTILINE))
    assert explained == TARGETS - {"clean"}


def test_the_citation_is_whole() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"title", "authors", "message", "license"} <= citation.keys()
    assert "https://arxiv.org/abs/2211.11586" in [reference["url"] for reference in citation["references"]]
