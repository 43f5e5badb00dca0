"""What only training shows of how a model calls its layers: learnt from a forward in training mode, or refused."""

import copy
from typing import Any

import pytest
import torch
from attend import Attention, check_routed, tables
from torch import Tensor, nn

import ltd_fx
from ltd_fx import LTDError, LTDScheduler

D, S, KEPT = 16, 16, 12


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(D)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        return x + self.attention(x, None, rope)


class PatchDropping(nn.Module):
    """In training each sample keeps tokens of its own, and has tables of its own ``[B, S, D]``; else one for all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])
        if self.training:
            positions = torch.rand(x.shape[:2]).argsort(1)[:, : x.shape[1] * KEPT // S].sort(1).values
            x = x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))
        rope = tables(positions, D // 2)
        for layer in self.layers:
            x = layer(x, rope)
        return x


def test_tables_per_sample_in_training_only() -> None:
    model = PatchDropping().eval()
    output, _, _ = check_routed(model, {"x": torch.randn(3, S, D)}, 5)
    assert output.shape == (3, KEPT, D)
    assert ltd_fx.verify(model, {"x": torch.randn(3, S, D)}).ok
    plain = PatchDropping().eval()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(3, S, D)
    assert torch.equal(model.eval()(x), plain(x))


@pytest.mark.parametrize("lazy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_timms_patch_dropout_with_rotary_tables(lazy: bool) -> None:
    timm = pytest.importorskip("timm")
    sizes: dict[str, Any] = {"img_size": 56, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 5}
    model = timm.create_model("eva02_tiny_patch14_224", patch_drop_rate=0.4, **sizes).train()
    plain = copy.deepcopy(model)
    images = torch.randn(2, 3, 56, 56)
    ltd_fx.transform(model, LTDScheduler(5, 10, 9), protect=1, example_inputs=None if lazy else (images,))
    calls: list[Any] = []
    handle = model.blocks[1].register_forward_hook(
        lambda _, args, kwargs, out: calls.append((args[0], kwargs["rope"], out)), with_kwargs=True
    )
    model(images)
    handle.remove()
    ((hidden, rope, ours),) = calls
    assert rope.shape[:3] == (2, 1, 9)  # after the class token, of the patches that are left
    kept = ltd_fx.sampled_indices(model)["blocks.1"]
    assert kept[:, 0].eq(0).all()
    mask = torch.zeros(2, 10, dtype=torch.bool).scatter(1, kept, True)
    theirs = plain.blocks[1].eval()(hidden, rope=rope, attn_mask=mask[:, None, None])
    torch.testing.assert_close(ours[mask], theirs[mask], rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[~mask], hidden[~mask])


class Skipping(PatchDropping):
    """Leaves out a layer by chance, in training."""

    def forward(self, x: Tensor) -> Tensor:
        rope = tables(torch.arange(x.shape[1]), D // 2)
        for i, layer in enumerate(self.layers):
            if not (self.training and i == 1):
                x = layer(x, rope)
        return x


def test_layers_left_out_in_training_are_learnt_in_eval() -> None:
    model = ltd_fx.transform(Skipping().train(), example_inputs=(torch.randn(3, S, D),))
    assert [site.name for site in ltd_fx.summary(model).sites if site.routed] == ["layers.1"]
    assert ltd_fx.verify(model, (torch.randn(3, S, D),)).ok


class SkippingAndDropping(PatchDropping):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.layers = nn.ModuleList([*self.layers[:1], *self.layers[2:]])
        return super().forward(x)


def test_layers_that_no_mode_shows_are_refused() -> None:
    model = SkippingAndDropping().train()
    with pytest.raises(LTDError, match=r"training layers\.0 .* other arguments .* layers\.1 may be skipped"):
        ltd_fx.transform(model, example_inputs=(torch.randn(3, S, D),), skip_first=0, skip_last=0)
    assert len(model.layers) == 3


class NeedsTargets(PatchDropping):
    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        rope = tables(torch.arange(x.shape[1]), D // 2)
        for layer in self.layers:
            x = layer(x, rope)
        if self.training:
            assert targets is not None
            return (x - targets).square().mean()
        return x


def test_a_forward_that_fails_in_training_is_learnt_in_eval() -> None:
    x = torch.randn(3, S, D)
    model = ltd_fx.transform(NeedsTargets().train(), example_inputs=(x,))
    model(x, torch.zeros_like(x)).backward()
    assert {rows.shape for rows in ltd_fx.sampled_indices(model).values()} == {(3, S // 2)}


class Extra(PatchDropping):
    """Calls a last layer in training only, as heads that predict further tokens are."""

    def forward(self, x: Tensor) -> Tensor:
        rope = tables(torch.arange(x.shape[1]), D // 2)
        for layer in self.layers if self.training else self.layers[:-1]:
            x = layer(x, rope)
        return x


def test_layers_of_training_only_are_learnt() -> None:
    model, x = Extra().train(), torch.randn(3, S, D)
    ltd_fx.transform(model, example_inputs=(x,), skip_last=0)
    model(x)
    assert ltd_fx.sampled_indices(model).keys() == {"layers.1", "layers.2"}
    assert ltd_fx.verify(model, (x,)).ok
