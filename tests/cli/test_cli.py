"""The commands, as a script uses them: output, ``--json``, exit codes. ``plan`` is in test_planner.py."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CASES, decoder
from safetensors.torch import load_file
from torch import nn

import ltd_fx
from ltd_fx.cli import main

ROOT = Path(__file__).parents[2]


def answer(capsys: Any, *arguments: Any) -> Any:
    """What the command prints with ``--json``."""
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: Any, *arguments: Any) -> str:
    """What the command says as it exits with 2."""
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    return str(captured.err)


def test_the_exit_code_is_the_process_s() -> None:
    command = [sys.executable, "-m", "ltd_fx", "schedule", "1:2:3"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "ltd_fx: a schedule is MIN:MAX:MULTIPLE:STEPS, got '1:2:3'\n"


# ---- env


def test_env(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("LTD_FX_LOWERING", "kernel")
    found = answer(capsys, "env")
    assert found["ltd_fx"] == ltd_fx.__version__
    assert found["torch"] == torch.__version__.split("+")[0]
    assert found["LTD_FX_LOWERING"] == "kernel"
    if not torch.cuda.is_available():
        assert found["CUDA kernels"] == "torch's: no CUDA device"
    assert main(["env"]) == 0
    assert "safetensors" in capsys.readouterr().out


# ---- inspect


def llama_without_inputs() -> nn.Module:
    return decoder("Llama")()


def llama_with_inputs() -> tuple[nn.Module, Any]:
    return decoder("Llama")(), CASES["llama"].inputs()


def number() -> int:
    return 3


class Shift(nn.Module):
    """Mixes neighbours by place, which no gathering can keep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x).roll(1, 1)


def unfit() -> tuple[nn.Module, Any]:
    return nn.Sequential(Shift(), Shift(), Shift()), (torch.randn(2, 16, 8),)


@pytest.mark.parametrize("family", ["llama", "vit"])
def test_inspect_a_configuration(family: str, capsys: Any, tmp_path: Path) -> None:
    model = CASES[family].model()
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    found = answer(capsys, "inspect", tmp_path, "--depth", 5)
    assert found["verified"]
    layers = found["layers"]
    assert [layer["name"] for layer in layers] == [f"{CASES[family].layers}.{i}" for i in range(5)]
    assert [layer["routed"] for layer in layers] == [False, True, True, True, False]
    assert [layer["status"] for layer in layers] == [None, *["proven"] * 3, None]
    assert all(layer["error"] < 1e-12 for layer in layers[1:4])


@pytest.mark.parametrize(("factory", "code"), [("with", 0), ("without", 1)])
def test_inspect_a_factory(factory: str, code: int, capsys: Any) -> None:
    """Without inputs nothing is proven."""
    assert main(["inspect", f"test_cli:llama_{factory}_inputs", "--layers", r".*layers\.[012]"]) == code
    table = capsys.readouterr().out
    assert "1 of 3 layers routed" in table
    assert ("proven, error" if code == 0 else "to be tested at the first training forward") in table


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("test_cli:unfit", [], "cannot be routed"),
        ("test_cli:number", [], "must return an nn.Module, or one and example inputs, got 3"),
        ("test_cli:missing", [], "test_cli:missing cannot be built"),
        ("no_such_module:f", [], "No module named 'no_such_module'"),
        ("/no/such/folder", [], "/no/such/folder is no transformers configuration"),
        ("test_cli:llama_with_inputs", ["--layers", "nothing"], "layers='nothing' matches nothing"),
    ],
)
def test_inspect_refuses(model: str, options: list[str], message: str, capsys: Any) -> None:
    assert message in error(capsys, "inspect", model, *options)


# ---- schedule


@pytest.mark.parametrize(("kind", "last"), [("linear", 65), ("cosine", 60), ("step", 60), ("constant", 0)])
def test_schedule(kind: str, last: int, capsys: Any) -> None:
    """To the step from which on the length stays; linear goes on to the next multiple, 64 at (64 - 10) / 50 * 60."""
    found = answer(capsys, "schedule", "10:60:8:60", "--kind", kind)
    scheduler = ltd_fx.LTDScheduler(10, 60, 60, multiple_of=8, kind=kind)
    lengths = [scheduler.length_at(step) for step in range(found["steps"])]
    assert [tuple(change) for change in found["changes"]] == [
        (step, length) for step, length in enumerate(lengths) if step == 0 or length != lengths[step - 1]
    ]
    assert found["steps"] - 1 == found["changes"][-1][0] == last
    assert lengths[-1] == scheduler.length_at(10**6)


def test_schedule_as_a_table(capsys: Any) -> None:
    assert main(["schedule", "128:2048:16:200000", "--steps", "100000"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 22
    assert lines[1].split() == ["0", "128"]
    assert lines[-2].split() == ["98334", "1072"]
    assert lines[-1] == "60 lengths over 100000 steps"


def test_schedule_drawn(capsys: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "schedule.png"
    assert main(["schedule", "8:64:8:30", "--plot", str(file)]) == 0
    assert file.read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    for path in (tmp_path / "no" / "x.png", tmp_path / "x.what"):
        assert "cannot be written" in error(capsys, "schedule", "8:64:8:30", "--plot", path)
    assert "--steps must be positive" in error(capsys, "schedule", "8:64:8:30", "--steps", 0)


# ---- clean


@pytest.mark.parametrize("nested", [None, "state_dict", "module"])
@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_clean(nested: str | None, suffix: str, capsys: Any, tmp_path: Path) -> None:
    model = CASES["llama"].model()
    plain = model.state_dict()
    wrapped = {
        "module._orig_mod." + key.replace("layers.1.", "layers.1.random_ltd_layer."): t for key, t in plain.items()
    }
    file, out = tmp_path / f"in{suffix}", tmp_path / "out.safetensors"
    if suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(wrapped, file)
    else:
        torch.save(wrapped if nested is None else {nested: wrapped, "step": 3}, file)
    found = answer(capsys, "clean", file, out)
    assert found == {"tensors": len(plain), "renamed": len(plain), "output": str(out)}
    loaded = load_file(out)
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[key], plain[key]) for key in plain)


def test_clean_refuses(capsys: Any, tmp_path: Path) -> None:
    whole, cut, out = tmp_path / "whole.pt", tmp_path / "cut.pt", tmp_path / "out.safetensors"
    torch.save({"w": torch.ones(3)}, whole)
    cut.write_bytes(whole.read_bytes()[:-40])
    assert "cut.pt cannot be read" in error(capsys, "clean", cut, out)
    assert "missing.pt cannot be read" in error(capsys, "clean", tmp_path / "missing.pt", out)
    assert "must end in .safetensors or .pt" in error(capsys, "clean", whole, tmp_path / "out.bin")
    torch.save({"optimizer": {"w": torch.ones(3)}, "step": 3}, cut)
    assert "holds no mapping from names to tensors" in error(capsys, "clean", cut, out)
    torch.save({"a.random_ltd_layer.w": torch.ones(3), "a.w": torch.ones(3)}, cut)
    assert "both become 'a.w'" in error(capsys, "clean", cut, out)
    assert not out.exists()
