"""Peak memory of a training step, and what it saves for the backward, against the ideal; bytes of the allocator.

pytest tests/benchmarks/test_memory.py --benchmark-only -s
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import pytest
import torch
from models import Setting, stepper
from peers import peers_for, prepare
from results import results
from torch import Tensor, nn

SETTINGS = [
    *(Setting("llama", width=256, tokens=512, batch=4, depth=8, share=share) for share in (2, 4, 8)),
    Setting("bert", width=256, tokens=512, batch=4, depth=8, padded=True),
]


def peak_bytes(run: Callable[[], Any]) -> int:
    """The most bytes that were live at once during ``run``, beyond those before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def saved_bytes(run: Callable[[], Any], model: nn.Module) -> int:
    """What the forward saves for the backward, without the parameters."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_memory(benchmark: Any, setting: Setting, how: str) -> None:
    found: dict[str, tuple[int, int]] = {}
    compiled = how == "compiled"
    for name in sorted(peers_for(setting, compiled=compiled), key=lambda name: name != "ideal"):
        torch._dynamo.reset()
        model = setting.build()
        step = stepper(prepare(name, model, setting, compiled=compiled), setting.inputs())
        step()
        found[name] = peak_bytes(step), saved_bytes(step, model)
        ratios = [ours / bound for ours, bound in zip(found[name], found["ideal"], strict=True)]
        peak, saved = found[name]
        results().add(
            "memory",
            {"setting": str(setting), "how": how, "variant": name, "peak": peak, "saved": saved, "ratios": ratios},
        )
        print(f"\n{setting}, {how}, {name:>12}: peak {peak / 2**20:.1f} MiB, {ratios[0]:.3f} of the ideal;", end="")
        print(f" saved {saved / 2**20:.1f} MiB, {ratios[1]:.3f}", end="")
    benchmark.pedantic(lambda: None, rounds=1)
