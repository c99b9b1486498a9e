"""Published names and layouts: parameter counts of the published sizes, round trips, and errors."""

import math
import re

import jax
import numpy as np
import pytest

from sedd_jax.conversion import torch_weights
from sedd_jax.model import networks
from tests.support import goldens


@goldens.cases("params.json")
def test_parameter_counts_are_the_published(entry):
    for published in entry.expected.values():
        config = networks.NetworkConfig(
            num_states=published["vocab"],
            hidden_size=published["hidden"],
            num_layers=published["n_blocks"],
            num_heads=published["n_heads"],
            cond_dim=published["cond_dim"],
        )
        counts = {name: math.prod(shape) for name, shape in torch_weights.shapes(config).items()}
        del counts[torch_weights.ROTARY]
        assert len(counts) == published["tensors"]
        assert sum(counts.values()) == published["total"]
        outer = sum(counts[name] for name in counts if re.match(r"vocab_embed|output_layer.linear", name))
        assert sum(counts.values()) - outer == published["without_embedding_and_output_linear"]
        for group, expected in published["groups"].items():
            names = [name for name in counts if re.sub(r"^blocks\.\d+", "blocks.*", name).startswith(f"{group}.")]
            assert sum(counts[name] for name in names) == expected, group


@pytest.mark.parametrize("name", ["absorb_a", "uniform_a"])
def test_round_trip_is_exact(name, golden):
    published = golden(f"model_{name}/model.safetensors")
    config, _, params = goldens.model(name)
    ours = torch_weights.to_torch(params, config)
    assert set(ours) == set(published)
    for tensor in published:
        if tensor == torch_weights.ROTARY:
            np.testing.assert_allclose(ours[tensor], published[tensor], rtol=1e-6)
        else:
            np.testing.assert_array_equal(ours[tensor], published[tensor])


def test_parameters_have_the_shapes_of_fresh_ones():
    config, _, params = goldens.model("absorb_a")
    fresh = jax.eval_shape(lambda: networks.init(jax.random.key(0), config))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), fresh)


def test_padding_is_zero():
    config, _, params = goldens.model("absorb_a")
    assert config.padded_states == 128
    assert not params["embedding"][config.num_states :].any()
    assert not params["head_kernel"][:, config.num_states :].any()


def test_the_published_buffer_may_be_absent(golden):
    config = goldens.model("absorb_a")[0]
    tensors = dict(golden("model_absorb_a/model.safetensors"))
    del tensors[torch_weights.ROTARY]
    torch_weights.from_torch(tensors, config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("blocks.1.norm2.weight"), "missing.*blocks.1.norm2.weight"),
        (lambda tensors: tensors.update({"blocks.7.norm1.weight": np.ones(64)}), "unknown.*blocks.7.norm1.weight"),
        (lambda tensors: tensors.update({"blocks.0.norm1.weight": np.ones(32)}), "blocks.0.norm1.weight has shape"),
        (lambda tensors: tensors.update({"blocks.0.norm1.weight": np.full(64, np.nan)}), "not finite"),
    ],
)
def test_wrong_weights_are_refused(change, message, golden):
    tensors = dict(golden("model_absorb_a/model.safetensors"))
    change(tensors)
    with pytest.raises(ValueError, match=message):
        torch_weights.from_torch(tensors, goldens.model("absorb_a")[0])
