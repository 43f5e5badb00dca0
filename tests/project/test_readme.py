"""README's quickstart, pasted as it stands."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

README = Path(__file__).parents[2] / "README.md"
# what the quickstart compiles, in seconds rather than in a minute
QUICK = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='aot_eager')\n"


def quickstart() -> str:
    (code,) = re.findall(r"## Quickstart\n```python\n(.*?)```", README.read_text(), re.DOTALL)
    return str(code)


@pytest.mark.parametrize("before", [QUICK, pytest.param("", marks=pytest.mark.slow)], ids=["aot_eager", "as pasted"])
def test_the_quickstart_runs(before: str, tmp_path: Path) -> None:
    (tmp_path / "pasted.py").write_text(before + quickstart())
    command = [sys.executable, "pasted.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 of 4 layers routed" in done.stdout
    rows = re.findall(r"^(\d) (\d+) ([\d.]+)$", done.stdout, re.MULTILINE)
    assert [int(step) for step, _, _ in rows] == list(range(8))
    lengths = [int(length) for _, length, _ in rows]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (16, 64)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == plain.state_dict().keys()
    assert all(torch.isfinite(value).all() for value in saved.values())


def test_it_is_a_front_door() -> None:
    assert len(README.read_text().splitlines()) < 150
    assert len(quickstart().splitlines()) <= 22
