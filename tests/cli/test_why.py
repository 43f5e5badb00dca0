"""``inspect --why``: what is known of each value in a layer's graph, and what its refusal comes of."""

import re
from typing import Any

import pytest
import torch
from conftest import CASES
from torch import nn

import ltd_fx
from ltd_fx.cli import main


class Shift(nn.Module):
    """Mixes neighbours by place, which no gathering can keep."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) + x.sin().cos()).roll(1, 1)


class Overwrite(nn.Linear):
    """Changes its input, which the layers around it share."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(super().forward(x))


class Bessel(nn.Module):
    """An operator that nothing is known of, and no attention to test it by."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)


class Sum(nn.Module):
    """Adds half of the entries of each token to those of all later ones."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, values = self.mlp(x).chunk(2, -1)
        return torch.cat((gate, values.cumsum(1)), -1)


def shifting() -> tuple[nn.Module, Any]:
    return nn.Sequential(Shift(), Shift(), Shift()), (torch.randn(2, 16, 8),)


def llama() -> tuple[nn.Module, Any]:
    return CASES["llama"].model(), CASES["llama"].inputs()


def llama_without_inputs() -> nn.Module:
    return llama()[0]


def overwriting() -> tuple[nn.Module, Any]:
    layers = [nn.Sequential(Overwrite(8, 8)) for _ in range(3)]
    return nn.Sequential(*layers), (torch.randn(2, 16, 8),)


def vouched_for() -> tuple[nn.Module, Any]:
    ltd_fx.register_pattern(Bessel, ltd_fx.LayerPattern(hidden="x", aligned={}))
    return nn.Sequential(Bessel(), Bessel(), Bessel()), (torch.randn(2, 16, 8),)


def llama_with_a_sum() -> tuple[nn.Module, Any]:
    """One layer of it cannot be routed."""
    model, inputs = llama()
    layer = model.get_submodule("model.layers.2")
    layer.mlp = Sum(layer.mlp)
    return model, inputs


def llama_with_a_hook() -> tuple[nn.Module, Any]:
    """One layer of it cannot be traced, but tested."""
    model, inputs = llama()
    model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: None)
    return model, inputs


def why(capsys: Any, model: str, layer: str, code: int = 0) -> tuple[list[str], list[str], list[str], str]:
    """Head, path and graph that ``--why`` prints, and the error; each line with single blanks."""
    assert main(["inspect", f"test_why:{model}", "--why", layer]) == code
    captured = capsys.readouterr()
    head, *path, graph = (
        [re.sub(" +", " ", line) for line in part.splitlines()] for part in captured.out.split("\n\n")
    )
    assert graph[0] == "its graph:"
    return head, path[0] if path else [], graph[1:], captured.err


def test_a_layer_is_right(capsys: Any) -> None:
    head, path, graph, err = why(capsys, "llama", "model.layers.1")
    name, test, flow = head
    assert name == "model.layers.1 (LlamaDecoderLayer): proven"
    assert test.startswith("by the numerical test right (relative error ")
    assert flow == "by token flow right: tokens meet in attention only"
    assert not path
    assert not err
    for line in (
        " hidden_states placeholder row-wise [3, tokens, 32]",
        " position_embeddings[1] placeholder row-wise [3, tokens, 8]",
        " self_attn.k_proj.weight placeholder independent of tokens [16, 32]",
        " scaled_dot_product_attention scaled_dot_product_attention row-wise [3, 2*2, tokens, 8]",
    ):
        assert line in graph


def test_says_each_line_of_code_once(capsys: Any) -> None:
    """Where it changes, by the file's name alone."""
    _, _, graph, _ = why(capsys, "llama", "model.layers.1")
    places = [line.partition("] ")[2] for line in graph]
    first = next(i for i, place in enumerate(places) if "key_states = self.k_proj(" in place)
    assert re.match(r"modeling_llama\.py:\d+ key_states", places[first])
    assert places[first + 1 : first + 3] == ["", ""]  # The view and the transposition.


def test_a_layer_is_only_tested(capsys: Any) -> None:
    assert main(["inspect", "test_why:llama_with_a_hook", "--why", "model.layers.1"]) == 0
    head, test, flow = capsys.readouterr().out.splitlines()
    assert head == "model.layers.1 (LlamaDecoderLayer): tested"
    assert test.startswith("by the numerical test right")
    assert flow.startswith("by token flow not known: it has forward hooks")


def test_a_layer_is_only_trusted(capsys: Any) -> None:
    head, path, _, err = why(capsys, "vouched_for", "1", 1)
    assert head[0] == "1 (Bessel): trusted"
    assert head[2].startswith("by token flow not known: nothing is known of this operator: special_bessel_j0, in")
    assert path[-1].startswith("-> special_bessel_j0 special_bessel_j0 not known [2, tokens, 8]")
    assert not err


def test_a_layer_is_refused(capsys: Any) -> None:
    """The path goes from the hidden states over the linear map, the shorter way, to the operator that mixes tokens."""
    head, path, graph, err = why(capsys, "shifting", "1", 2)
    assert head[0] == "1 (Shift): refused"
    assert head[2].startswith("by token flow wrong: it goes along the tokens: roll, in 'return (self.linear(x)")
    assert path[0] == "from the hidden states to there:"
    assert path[1] == " x placeholder row-wise [2, tokens, 8]"
    assert path[2].startswith(" linear linear row-wise [2, tokens, 8] test_why.py:")
    assert path[3:] == [" add add row-wise [2, tokens, 8]", "-> roll roll wrong [2, tokens, 8]"] == graph[-2:]
    assert "1 (Shift) cannot be routed: it goes along the tokens: roll" in err


def test_one_layer_of_a_model_is_refused(capsys: Any) -> None:
    """What comes of the sum is wrong, too; what does not is still known."""
    head, path, graph, _ = why(capsys, "llama_with_a_sum", "model.layers.2", 2)
    assert head[0] == "model.layers.2 (LlamaDecoderLayer): refused"
    assert [line.split()[1] for line in path[-3:-1]] == ["chunk", "getitem"]
    assert re.fullmatch(r"-> cumsum cumsum wrong \[3, tokens, 16\] test_why\.py:\d+ return torch\.cat.*", path[-1])
    halves = "row-wise [3, tokens, 16], row-wise [3, tokens, 16]"
    assert any(line.startswith(f" chunk chunk {halves}") for line in graph)
    assert re.match(r" cat_\d cat wrong \[3, tokens, 32\]", graph[-2])
    assert re.match(r" add_\d add wrong \[3, tokens, 32\] modeling_llama", graph[-1])
    assert why(capsys, "llama_with_a_sum", "model.layers.1")[0][0].endswith(": proven")


def test_a_layer_overwrites(capsys: Any) -> None:
    """The operator after which the graph is not followed further is in it."""
    _, path, graph, _ = why(capsys, "overwriting", "1", 2)
    assert path[1] == " input placeholder row-wise [2, tokens, 8]"
    assert re.fullmatch(r"-> add_ add test_why\.py:\d+ return x\.add_\(.*", path[2])
    assert graph[-1] == "-> add_ add"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["test_why:shifting", "--why", "7"], "--why 7 is none of the target layers 0, 1, 2"),
        (["test_why:llama_without_inputs", "--why", "model.layers.1"], "--why needs example inputs"),
        (["test_why:shifting", "--why", "1", "--json"], "leave out --json"),
    ],
)
def test_refuses(arguments: list[str], message: str, capsys: Any) -> None:
    assert main(["inspect", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out
