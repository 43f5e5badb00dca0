"""State dicts of models wrapped by DeepSpeed's names, cleaned key by key."""

import pytest

from ltd_fx import LTDError
from ltd_fx.deepspeed import remove_random_ltd_state_dict


@pytest.mark.parametrize(
    ("key", "clean"),
    [
        ("layers.0.random_ltd_layer.qkv.weight", "layers.0.qkv.weight"),
        ("random_ltd_layer.w", "w"),
        ("a.random_ltd_layer.random_ltd_layer.w", "a.w"),
        ("a.random_ltd_layer_norm.w", "a.random_ltd_layer_norm.w"),
        ("a.not_random_ltd_layer.w", "a.not_random_ltd_layer.w"),
        ("module._orig_mod.w", "module._orig_mod.w"),
    ],
)
def test_only_the_whole_component_is_removed(key, clean):
    assert remove_random_ltd_state_dict({key: 1, "other": 2}) == {clean: 1, "other": 2}


def test_colliding_keys():
    with pytest.raises(LTDError, match=r"'a\.random_ltd_layer\.w' and 'a\.w' both become 'a\.w'"):
        remove_random_ltd_state_dict({"a.random_ltd_layer.w": 1, "a.w": 2})
