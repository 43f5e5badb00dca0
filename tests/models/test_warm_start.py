"""A second process starts from what the first compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import torch
import ltd_fx
from transformers import LlamaConfig, LlamaModel

blob, layerwise = sys.argv[1], sys.argv[2] == "layers"
sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
torch.manual_seed(0)
model = LlamaModel(LlamaConfig(**sizes, vocab_size=64, use_cache=False)).train()
ltd_fx.transform(model, ltd_fx.LTDScheduler(5, 32, 10))
if sys.argv[3] == "load":
    torch.compiler.load_cache_artifacts(open(blob, "rb").read())
step = ltd_fx.compile_layers(model) if layerwise else torch.compile(model)
out = step(input_ids=torch.arange(64).view(2, 32))[0]
out.square().sum().backward()
if sys.argv[3] == "save":
    open(blob, "wb").write(torch.compiler.save_cache_artifacts()[0])
counters = torch._dynamo.utils.counters["inductor"]
print(counters["fxgraph_cache_hit"], counters["fxgraph_cache_miss"], out.double().sum().item())
"""


def run(tmp_path: Path, how: str, what: str) -> list[str]:
    cache = tmp_path / what
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "artifacts"), how, what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-3:]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "layers"])
def test_cache_artifacts_serve_another_process(tmp_path: Path, how: str) -> None:
    pytest.importorskip("transformers")
    first = run(tmp_path, how, "save")
    assert (first[0], int(first[1]) > 0) == ("0", True)
    second = run(tmp_path, how, "load")
    assert int(second[0]) == int(first[1])
    assert second[1:] == ["0", first[2]]
