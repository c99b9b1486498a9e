"""The network in PyTorch: recorded scores and steps, exact distributions of samples, and no import but torch."""

import ast
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is missing: pip install -e '.[test-all]'")


from sedd_jax.conversion import torch_model, torch_weights
from sedd_jax.diffusion import graphs, noise_schedules
from tests.support import goldens, oracles, places

GOLDEN = places.GOLDEN
MODELS = ("absorb_a", "uniform_a")
P0 = np.random.default_rng(0).dirichlet(np.full(25, 0.5)).reshape(5, 5) * 0.95 + 0.05 / 25
NOISES = {"absorb": ("loglinear", noise_schedules.LogLinear()), "uniform": ("geometric", noise_schedules.Geometric())}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    return torch_model.SEDD.from_pretrained(GOLDEN / f"model_{name}")


def test_it_imports_torch_alone():
    tree = ast.parse(pathlib.Path(torch_model.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name if isinstance(node, ast.Import) else node.module for node in imports for alias in node.names}
    assert {name.partition(".")[0] for name in names} == {"itertools", "json", "math", "pathlib", "torch", "typing"}


def test_recorded_scores(model, name, golden):
    recorded = golden(f"model_{name}_io.npz")
    with torch.inference_mode():
        log_score = model(torch.from_numpy(recorded["x"]).long(), torch.from_numpy(recorded["sigma"]))
    np.testing.assert_allclose(log_score, recorded["log_score"], rtol=1e-5, atol=5e-6)


def test_parameters_have_the_published_order(model):
    names = [parameter for parameter, _ in model.named_parameters()]
    assert names == torch_weights.parameter_names(len(model.blocks))
    assert names == [name for name in model.state_dict() if name != torch_weights.ROTARY]


def test_fresh_weights_have_the_published_zeros():
    config = goldens.load("model_absorb_a/config.json")
    fresh = torch_model.SEDD(config).state_dict()
    zero = {name for name, tensor in fresh.items() if not tensor.any()}
    assert zero == {name for name in fresh if "adaLN" in name or name.startswith("output_layer.linear")}


def test_bfloat16_is_near(model, name, golden):
    recorded = golden(f"model_{name}_io.npz")
    narrow = torch_model.SEDD.from_pretrained(GOLDEN / f"model_{name}", dtype=torch.bfloat16)
    with torch.inference_mode():
        log_score = narrow(torch.from_numpy(recorded["x"]).long(), torch.from_numpy(recorded["sigma"]))
    assert log_score.dtype == torch.float32
    error = np.abs(log_score.numpy() - recorded["log_score"]).max()
    assert 1e-4 < error < 0.1


@goldens.cases("sampler.npz", r"^given\..*\.(analytic|denoise|euler)_dist$")
def test_recorded_distributions_of_a_step(entry, golden):
    _, kind, noise, quantity = entry.name.split(".")
    case = entry.name.rsplit(".", 1)[0]
    xt, t, dt, score = (torch.from_numpy(golden("sampler.npz")[f"{case}.{part}"]) for part in ("x", "t", "dt", "score"))
    schedule = goldens.NOISES[noise]
    sigma, after = (torch.from_numpy(np.array(schedule.sigma(jnp.asarray(x)))) for x in (t, t - dt))
    is_last = quantity.startswith("denoise")
    xt, score = xt.long()[..., None], score.double()
    others = score.scatter(-1, xt, 0.0)
    delta = (sigma if is_last else sigma - after)[..., None].double()
    masked = xt == 9
    if quantity.startswith("euler"):
        rate = (dt * torch.from_numpy(np.array(schedule.dsigma_dt(jnp.asarray(t)))))[..., None].double()
        rate = torch.where(masked, rate, 0.0) if kind == "absorb" else rate / 9
        jump = torch_model.euler_jump(others.sum(-1, keepdim=True), rate)
    elif kind == "absorb":
        # A token other than the mask stays; the model calls this only for masks.
        jump = torch_model.absorbing_jump(others.sum(-1, keepdim=True), delta, is_last=is_last)
        jump = torch_model.Jump(torch.where(masked, jump.stay, 1.0), jump.slope * masked, jump.offset)
    else:
        jump = torch_model.uniform_jump(others.sum(-1, keepdim=True), delta, 9)
    weights = (jump.slope * others + jump.offset).scatter(-1, xt, jump.stay).clamp(min=0).numpy()
    weights = weights[..., : entry.expected.shape[-1]]
    entry.check(weights / weights.sum(-1, keepdims=True))


def test_samples_follow_the_distribution_at_tiny_probabilities():
    """Positions that change with tiny probability, which float32 noise would never do, and rare new tokens."""
    rows = 2_000_000
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(rows, dtype=torch.int64)
    column = torch.ones(rows, 1)
    score = torch.tensor([[0.0, 1e-5, 1e-5]]).expand(rows, 3)
    few = torch_model.draw(score, tokens, torch_model.Jump(column, column, 0 * column), generator)
    assert abs(int((few != 0).sum()) - 40) < 5 * 40**0.5
    score = torch.tensor([[0.0, 1.0, 1e-5]]).expand(rows, 3)
    rare = torch_model.draw(score, tokens, torch_model.Jump(0 * column, column, 0 * column), generator)
    assert (rare != 0).all()
    assert abs(int((rare == 2).sum()) - 20) < 5 * 20**0.5


def test_draws_are_made_in_float64(monkeypatch):
    drawn = []

    rand, multinomial = torch.rand, torch.multinomial
    monkeypatch.setattr(torch, "rand", lambda *args, **kw: drawn.append(rand(*args, **kw)) or drawn[-1])
    monkeypatch.setattr(torch, "multinomial", lambda x, *args, **kw: drawn.append(x) or multinomial(x, *args, **kw))
    column = torch.ones(1000, 1)
    score = torch.tensor([[0.0, 1.0]]).expand(1000, 2)
    torch_model.draw(score, torch.zeros(1000, dtype=torch.int64), torch_model.Jump(column, column, 0 * column), None)
    assert [tensor.dtype for tensor in drawn] == [torch.float64] * 2


class Exact(torch_model.SEDD):
    """A model with the exact score of a distribution over two tokens; features are sequence and position indices."""

    def __init__(self, kind):
        noise, schedule = NOISES[kind]
        sizes = {"length": 2, "scale_by_sigma": False, "hidden_size": 4, "n_heads": 1, "cond_dim": 4}
        super().__init__(
            {
                "tokens": 5,
                "graph": {"type": kind},
                "noise": {"type": noise, "sigma_min": 1e-4, "sigma_max": 6.0},
                "model": {**sizes, "n_blocks": 0, "dropout": 0.0},
            }
        )
        self.graph = graphs.Absorbing(vocab_size=5, mask_id=5) if kind == "absorb" else graphs.Uniform(vocab_size=5)
        self.schedule = noise_schedules.Geometric(sigma_max=6.0) if kind == "uniform" else schedule
        self.evaluations = 0

    def features(self, tokens, sigma):
        self.evaluations += 1
        self.state = tokens.numpy().copy()
        places = torch.arange(2).expand(len(tokens), 2)
        return torch.stack([torch.arange(len(tokens))[:, None].expand(-1, 2), places], -1).float()

    def log_score(self, features, tokens, sigma):
        table = oracles.exact_scores(self.graph, P0, float(sigma)).reshape(*[self.num_states] * 2, 2, self.num_states)
        row, place = features.long().numpy().T
        return torch.from_numpy(np.log(np.maximum(table[(*self.state[row].T, place)], 1e-30))).float()


@pytest.mark.parametrize("sampler", torch_model.SAMPLERS)
@pytest.mark.parametrize("kind", sorted(NOISES))
def test_samples_follow_the_exact_distribution(kind, sampler):
    model = Exact(kind)
    tokens = model.sample(20_000, num_steps=4, sampler=sampler, seed=1).numpy()
    assert model.evaluations == 5
    expected = oracles.sampler_distribution(model.graph, model.schedule, P0, sampler, 4).reshape(
        *[model.num_states] * 2
    )
    counts = np.bincount(tokens @ [5, 1], minlength=25)
    assert oracles.chi_square_p(counts, expected[:5, :5].ravel()) > 1e-4


def test_infilling_follows_the_conditional_distribution():
    model = Exact("absorb")
    given = torch.full((20_000, 2), 3)
    is_given = torch.tensor([[False, True]]).expand(20_000, 2)
    tokens = model.sample(num_steps=8, given=given, is_given=is_given, generator=torch.Generator().manual_seed(2))
    assert (tokens[:, 1] == 3).all()
    conditional = P0[:, 3] / P0[:, 3].sum()
    assert oracles.chi_square_p(np.bincount(tokens[:, 0], minlength=5), conditional) > 1e-4


def test_given_tokens_never_change(model):
    generator = torch.Generator().manual_seed(3)
    given = torch.randint(26, (3, 24), generator=generator)
    is_given = torch.rand(3, 24, generator=generator) < 0.5
    # With this bias masks tend to stay until the last step, and tokens tend to change.
    model.output_layer.linear.bias.data += -5 if model.is_absorbing else 5
    tokens = model.sample(num_steps=5, given=given, is_given=is_given, generator=generator)
    assert (tokens[is_given] == given[is_given]).all()
    assert (tokens < model.vocab_size).all()
    everything = model.sample(num_steps=2, given=given, is_given=torch.ones_like(is_given))
    assert (everything == given).all()


def test_the_same_seed_gives_the_same_text(model):
    first, second = (model.sample(2, num_steps=4, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    assert first.shape == (2, 24)
    assert torch.equal(first, second)
    assert torch.equal(first, model.sample(2, num_steps=4, seed=4))
    assert not torch.equal(first, model.sample(2, num_steps=4, seed=5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "analytic"}, "sampler='analytic' is unknown: choose one of tweedie, euler, tau_leaping"),
        ({"num_steps": 0}, "num_steps=0 is no number of steps: give at least 1"),
        ({"seed": 0, "generator": torch.Generator()}, "seed and generator are both given: pass one of them"),
    ],
)
def test_impossible_settings_are_refused(model, settings, message):
    with pytest.raises(ValueError, match=message):
        model.sample(**settings)


@pytest.mark.parametrize(
    ("given", "is_given"),
    [
        (torch.zeros(1, 24, dtype=torch.int64), None),
        (torch.zeros(24, dtype=torch.int64), torch.zeros(24, dtype=torch.bool)),
        (torch.zeros(1, 24, dtype=torch.int64), torch.zeros(1, 23, dtype=torch.bool)),
        (torch.zeros(1, 24, dtype=torch.int64), torch.zeros(1, 24)),
    ],
)
def test_impossible_templates_are_refused(given, is_given):
    model = torch_model.SEDD.from_pretrained(GOLDEN / "model_absorb_a")
    with pytest.raises(ValueError, match="is_given"):
        model.sample(given=given, is_given=is_given)
