"""The examples, started as docs/examples.md starts them, for a few steps; the slow tests run them whole."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ltd_fx

ROOT = Path(__file__).parents[2]


def start(*command: Any) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def accuracies(output: str) -> list[float]:
    return [float(share) for share in re.findall(r"accuracy ([\d.]+)%", output)]


@pytest.mark.slow
def test_tokens(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    start("examples/tokens.py", tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_vit_digits() -> None:
    pytest.importorskip("timm", exc_type=(ImportError, RuntimeError))
    pytest.importorskip("sklearn")
    assert len(accuracies(start("examples/vit_digits.py", "--steps", 2))) == 2


@pytest.mark.slow
def test_vit_digits_learns() -> None:
    dense, routed = accuracies(start("examples/vit_digits.py"))
    assert dense > 90
    assert routed > 90


@pytest.mark.slow
def test_hf_trainer(tmp_path: Path) -> None:
    """Logs, a picture of them, and a model that plain transformers loads."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tensorboard")
    start("examples/hf_trainer.py", "--steps", 2, "--out", tmp_path, "--plot", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(plain, nn.Module)
    assert not ltd_fx.is_transformed(plain)


@pytest.mark.slow
def test_from_deepspeed(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    output = start("examples/from_deepspeed.py", "--steps", 2, "--out", tmp_path)
    assert "4 of 6 layers routed" in output
    config = transformers.GPT2Config(vocab_size=256, n_positions=256, n_embd=128, n_layer=6, n_head=4)
    ltd_fx.load_clean(transformers.GPT2LMHeadModel(config), tmp_path / "model.safetensors")


def fsdp2(out: Path, *options: Any) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
    start(*torchrun, "examples/fsdp2.py", "--out", out, "--steps", 4, "--save-every", 2, *options)


@pytest.mark.slow
def test_fsdp2_resumed_is_uninterrupted(tmp_path: Path) -> None:
    """A checkpoint that was not finished is passed over; the one before gives the same weights to the bit."""
    fsdp2(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "checkpoint-4" / ".metadata").unlink()
    fsdp2(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == whole
    fsdp2(tmp_path / "compiled", "--compile")
