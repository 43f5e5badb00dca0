"""``make gpu`` runs, so far as the CPU can show."""

import json
from pathlib import Path
from typing import Any

import gpu
import pytest

ALIKE = ("vit, eager", "vit, compiled", "dit, compiled")  # These run the code of others.


@pytest.mark.parametrize("left_out", [ALIKE, pytest.param((), marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_part_runs_on_the_cpu(left_out: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PARTS", {name: part for name, part in gpu.PARTS.items() if name not in left_out})
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found["parts"]) == list(gpu.PARTS)
    assert all(list(part) == ["result"] for part in found["parts"].values())
    assert found["parts"]["tests"]["result"]["code"] == 0
    (kernels,) = found["parts"]["kernels"]["result"]
    assert all(value > 0 for what, value in kernels.items() if what != "shape")
    for name in (name for name in gpu.PARTS if "eager" in name or "compiled" in name):
        rows = {row["variant"]: row for row in found["parts"][name]["result"]}
        assert {"dense", "ideal", "routed"} <= set(rows)
        assert all(row["ms"][0] > 0 for row in rows.values())
        assert rows["ideal"]["efficiency"] == [1, 1, 1]
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("\n## ") == len(gpu.PARTS)
    assert "Failed" not in text


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three parts in place of those that measure: what each returns, or raises, may be set."""
    results: dict[str, Any] = {name: {"tail": ["fine"], "code": 0} for name in ("one", "two", "three")}

    def part(name: str) -> Any:
        def run(dry: bool) -> Any:
            if isinstance(results[name], Exception):
                raise results[name]
            return results[name]

        return run

    monkeypatch.setattr(gpu, "PARTS", {name: part(name) for name in results})
    return results


def test_a_part_that_fails_is_run_again_alone(
    parts: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts["two"] = RuntimeError("no such kernel")
    arguments = ["--dry", "--out", str(tmp_path)]
    assert gpu.main(arguments) == 1
    assert "no such kernel" in (tmp_path / "gpu.md").read_text()
    parts["two"] = {"skipped": "not today"}
    capsys.readouterr()
    assert gpu.main(arguments) == 0
    assert capsys.readouterr().out.count("done before") == 2
    assert "not today" in (tmp_path / "gpu.md").read_text()


def test_goes_on_where_time_ran_out(parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--dry", "--out", str(tmp_path)]
    monkeypatch.setattr(gpu, "SECONDS", -1)
    assert gpu.main(arguments) == 75
    monkeypatch.setattr(gpu, "SECONDS", 60)
    assert gpu.main(arguments) == 0
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["one", "two", "three"]


def test_figures_of_another_card_are_not_added_to(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(json.dumps({"identity": {"card": "another"}, "parts": {"old": {"result": []}}}))
    assert gpu.main(["--dry", "--out", str(tmp_path)]) == 0
    assert list(json.loads((tmp_path / "gpu.json").read_text())["parts"]) == ["one", "two", "three"]


def test_nothing_is_written_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--dry" in capsys.readouterr().err
