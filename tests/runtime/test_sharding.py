"""The mesh and the table of rules; results on any mesh equal those on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from sedd_jax.diffusion import forward, graphs, losses, noise_schedules
from sedd_jax.model import networks, objectives, optimizers, train_state
from sedd_jax.runtime import errors, sharding
from tests.support import slow

CONFIG = networks.NetworkConfig(
    num_states=27, hidden_size=32, num_layers=2, num_heads=4, cond_dim=16, dropout=0.0, dtype="float32"
)
PROCESS = forward.Process(graphs.Absorbing(vocab_size=26, mask_id=26), noise_schedules.LogLinear())
MESHES = {
    "one": sharding.MeshConfig(data=1),
    "data 8": sharding.MeshConfig(data=8),
    "data 2 fsdp 4": sharding.MeshConfig(data=2, fsdp=4),
    "data 2 fsdp 2 tensor 2": sharding.MeshConfig(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(scope="module")
def state():
    optimizer = optimizers.make_optimizer(optimizers.OptimizerConfig(), num_steps=100)
    state = jax.jit(lambda key: train_state.create(key, CONFIG, optimizer))(jax.random.key(0))
    rng = np.random.default_rng(0)
    shift = lambda leaf: jnp.asarray(np.asarray(leaf) + 0.2 * rng.normal(size=leaf.shape), leaf.dtype)
    return state.replace(params=jax.tree.map(shift, state.params))


@pytest.fixture(scope="module")
def batch():
    x0 = jax.random.randint(jax.random.key(2), (8, 12), 0, 26)
    t = jnp.linspace(0.1, 1.0, 8)
    return x0, PROCESS.graph.sample_transition(jax.random.key(3), x0, PROCESS.noise.sigma(t)), t


def loss(params, x0, xt, t):
    summary_fn = objectives.summary_fn(networks.Model(CONFIG, params), PROCESS)
    return losses.bounds(summary_fn, PROCESS, x0, xt, t).score_entropy.mean()


@pytest.fixture(scope="module")
def unsharded(state, batch):
    return jax.jit(jax.value_and_grad(loss))(state.params, *batch)


@pytest.mark.parametrize("name", slow.all_but(["data 2 fsdp 2 tensor 2"], MESHES))
def test_loss_and_gradients_are_those_of_one_device(name, state, batch, unsharded):
    config = MESHES[name]
    mesh = sharding.make_mesh(config, jax.devices()[:1] if name == "one" else None)
    shardings = sharding.tree_shardings(mesh, state.params)
    batch_sharding = sharding.batch_sharding(mesh)
    params, inputs = jax.device_put(state.params, shardings), jax.device_put(batch, batch_sharding)
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(loss), in_shardings=(shardings, *(batch_sharding,) * 3), out_shardings=(None, shardings)
        )
        value, gradient = step(params, *inputs)
    np.testing.assert_allclose(value, unsharded[0], rtol=1e-5)
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * (np.abs(b).max() + 1e-3))
    jax.tree.map(close, gradient, unsharded[1])
    spread = gradient["blocks"]["mlp_in"]["kernel"].addressable_shards[0].data.size
    assert spread * config.fsdp * config.tensor == gradient["blocks"]["mlp_in"]["kernel"].size


def test_every_leaf_of_a_train_state_matches_a_rule(state):
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    shardings = sharding.tree_shardings(mesh, state)
    assert jax.tree.structure(shardings) == jax.tree.structure(state)
    jax.tree.map(lambda leaf, spread: spread.shard_shape(leaf.shape), state, shardings)
    # The EMA and both Adam moments are sharded like the parameters.
    moments = [
        x for x in jax.tree.leaves(shardings.opt_state, is_leaf=lambda x: isinstance(x, dict)) if isinstance(x, dict)
    ]
    assert len(moments) == 2
    for tree in (shardings.ema_params, *moments):
        assert tree == shardings.params
    assert shardings.params["embedding"].spec == PartitionSpec("tensor", "fsdp")
    assert shardings.params["blocks"]["qkv"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")
    assert shardings.params["blocks"]["mlp_in"]["bias"].spec == PartitionSpec(None, "tensor")
    assert shardings.params["head_bias"].spec == PartitionSpec("tensor")
    assert shardings.step.spec == PartitionSpec()


def test_the_large_arrays_are_split(state):
    """No array of the size of a matrix is replicated on all devices."""
    mesh = sharding.make_mesh(sharding.MeshConfig(data=1, fsdp=4, tensor=2))
    for leaf, spread in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(sharding.tree_shardings(mesh, state.params)), strict=True
    ):
        assert leaf.size < 1000 or spread.shard_shape(leaf.shape) != leaf.shape


def test_an_unknown_leaf_is_refused():
    mesh = sharding.make_mesh(sharding.MeshConfig())
    with pytest.raises(ValueError, match="no sharding rule matches the parameter 'blocks/gadget'"):
        sharding.tree_shardings(mesh, {"blocks": {"gadget": jnp.zeros(3)}})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((3, 1, 1), "does not fill 8 devices: set config.mesh.data=-1"),
        ((-1, 3, 1), "does not fill 8 devices"),
        ((-1, -1, 1), "config.mesh.data=-1 must be positive, or -1 for at most one axis"),
        ((0, 1, 1), "config.mesh.data=0 must be positive"),
        ((1, -2, 1), "config.mesh.fsdp=-2 must be positive"),
    ],
)
def test_wrong_meshes_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(sharding.MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2]))


def test_data_takes_what_the_others_leave():
    assert sharding.make_mesh(sharding.MeshConfig(fsdp=2, tensor=2)).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    assert sharding.make_mesh(sharding.MeshConfig()).shape == {"data": 8, "fsdp": 1, "tensor": 1}


def test_batches_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    assert sharding.batch_sharding(mesh).shard_shape((8, 12)) == (2, 12)
    assert sharding.batch_sharding(mesh, batch_axis=1).shard_shape((3, 8, 12)) == (3, 2, 12)
    assert sharding.num_batch_devices() == 1
    with jax.set_mesh(mesh):
        assert sharding.num_batch_devices() == 4


def test_constraints_are_nothing_without_a_mesh():
    x = jnp.ones((2, 3))
    assert sharding.constrain(x, "batch", None) is x
    assert sharding.replicate(x) is x


@pytest.mark.parametrize(
    ("axis", "shape", "name", "size"),
    [
        ("fsdp", (36, 96), "params/blocks/qkv/kernel", 36),
        ("tensor", (32, 100), "params/blocks/mlp_in/kernel", 100),
        ("fsdp", (32, 36), "params/embedding", 36),
    ],
)
def test_an_axis_that_does_not_divide_an_array_is_named(axis, shape, name, size):
    mesh = sharding.make_mesh(sharding.MeshConfig(**{"data": 1, axis: 8}))
    tree = jax.ShapeDtypeStruct(shape, "float32")
    for part in reversed(name.split("/")):
        tree = {part: tree}
    with pytest.raises(
        errors.UserError, match=rf"config.mesh.{axis}=8 does not divide a size of {size} in {name}: give"
    ):
        sharding.tree_shardings(mesh, tree)
