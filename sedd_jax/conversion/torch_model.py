"""A converted model in PyTorch (Lou et al. 2023, sections 4 and 5.1). It needs only this file and torch.

    model = SEDD.from_pretrained("sedd-mine").to("cuda")
    tokens = model.sample(4, num_steps=128, seed=0)  # [4, L] token ids
    log_score = model(tokens, sigma)  # [B, L, V]

For infilling call `model.sample(num_steps=128, given=tokens, is_given=known)`. Modules have the names of the published
program, so its checkpoints load too. Sampling noise is float64, which avoids the truncated Gumbel noise of float32
(Zheng et al. 2024, arXiv 2409.02908).

Shapes: B batch, L length, V states, D features, H heads, K head size, C width of the noise embedding, R positions that
may change in a step.
"""

import itertools
import json
import math
import pathlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

T_END = 1e-5
_ROWS = 1024  # Positions whose scores are in memory at once.
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Network(nn.Module):
    """The score network with its graph, noise schedule and sampler; `build` makes its layers.

    `SEDD` is the network for torch alone, and modeling_sedd.py makes it a model for transformers.
    """

    def build(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        """Makes the layers with new weights.

        Args:
            config: the content of config.json: tokens, graph, noise, model.
            dtype: of the matrix products between embedding and scores. Weights and scores are float32.
        """
        self.noise, self.product_dtype = config["noise"], dtype
        kind, _, suffix = config["graph"]["type"].partition("_")
        self.is_absorbing, self.is_normalized = kind == "absorb", suffix == "normalized"
        self.vocab_size = config["tokens"]
        self.num_states = self.vocab_size + self.is_absorbing
        sizes = config["model"]
        self.length, self.scale_by_sigma = sizes["length"], not self.is_normalized and sizes["scale_by_sigma"]
        hidden, heads, cond = sizes["hidden_size"], sizes["n_heads"], sizes["cond_dim"]
        self.vocab_embed = Embedding(self.num_states, hidden)
        self.sigma_map = SigmaEmbedding(cond)
        self.rotary_emb = Rotary(hidden // heads)
        self.blocks = nn.ModuleList(Block(hidden, heads, cond, sizes["dropout"]) for _ in range(sizes["n_blocks"]))
        self.output_layer = Head(hidden, self.num_states, cond)

    def features(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Features [B, L, D] for the head's last linear layer, from tokens [B, L] and their total noise sigma [B]."""
        x = self.vocab_embed(tokens)
        condition = functional.silu(self.sigma_map(sigma))
        rotation = self.rotary_emb(tokens.shape[1])
        with torch.autocast(x.device.type, self.product_dtype, enabled=self.product_dtype != torch.float32):
            for block in self.blocks:
                x = block(x, condition, rotation)
            return self.output_layer.features(x, condition)

    def forward(self, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Log score of every state, [B, L, V], with 0 at the current token; tokens [B, L], sigma [B]."""
        return self.log_score(self.features(tokens, sigma), tokens, sigma[:, None])

    def log_score(self, features: Tensor, tokens: Tensor, sigma: Tensor) -> Tensor:
        """Log scores [..., V] from features [..., D] at tokens [...]; sigma broadcasts over the tokens."""
        with torch.autocast(features.device.type, self.product_dtype, enabled=self.product_dtype != torch.float32):
            z = self.output_layer.linear(features)
        z, tokens, log_noise = z.float(), tokens[..., None], torch.log(torch.expm1(sigma))[..., None]
        if self.is_normalized and self.is_absorbing:  # The softmax, divided by e^sigma - 1, is the score.
            z = z.scatter(-1, tokens, -math.inf).log_softmax(-1) - log_noise
        elif self.is_normalized:  # Scores are ratios of 1 + N r / (e^sigma - 1) for the softmax r.
            mixed = functional.softplus(z.log_softmax(-1) + math.log(self.num_states) - log_noise)
            z = mixed - mixed.gather(-1, tokens)
        elif self.scale_by_sigma:
            z = z - (log_noise + math.log(self.num_states - 1))
        return z.scatter(-1, tokens, 0.0)

    def sigma(self, t: Tensor) -> Tensor:
        """Total noise at times t in [0, 1]."""
        noise = self.noise
        if noise["type"] == "loglinear":
            return -torch.log1p(-(1 - noise.get("eps", 1e-3)) * t)
        return noise["sigma_min"] ** (1 - t) * noise["sigma_max"] ** t

    def dsigma_dt(self, t: Tensor) -> Tensor:
        """Rate of noise at times t."""
        noise = self.noise
        if noise["type"] == "loglinear":
            return (1 - noise.get("eps", 1e-3)) / (1 - (1 - noise.get("eps", 1e-3)) * t)
        return self.sigma(t) * math.log(noise["sigma_max"] / noise["sigma_min"])

    @torch.inference_mode()
    def sample(
        self,
        num_samples: int = 1,
        *,
        num_steps: int = 128,
        sampler: str = "tweedie",
        given: Tensor | None = None,
        is_given: Tensor | None = None,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples token ids [B, L]. It takes `num_steps` network evaluations, and one more to denoise.

        Args:
            num_samples: number of sequences B; if `given` is passed, B is its number of sequences.
            num_steps: steps, evenly spaced in t.
            sampler: tweedie (equations 19 and 20; published as "analytic"), euler (equation 17) or tau_leaping.
            given: known tokens [B, L]; values at unknown positions do not matter.
            is_given: whether a token is known, a bool [B, L].
            seed: seed of all randomness; the same one gives the same tokens on the same device.
            generator: source of all randomness, on the model's device, in place of a seed.
        """
        device = self.vocab_embed.embedding.device
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler={sampler!r} is unknown: choose one of {', '.join(SAMPLERS)}")
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps} is no number of steps: give at least 1")
        if seed is not None:
            if generator is not None:
                raise ValueError("seed and generator are both given: pass one of them")
            generator = torch.Generator(device).manual_seed(seed)
        given, is_given = self._checked(num_samples, given, is_given)
        if self.is_absorbing:
            xt = torch.full_like(given, self.vocab_size)
        else:
            xt = torch.randint(self.num_states, given.shape, device=device, generator=generator)
        times = torch.linspace(1, T_END, num_steps + 1, device=device)
        sigmas = [*self.sigma(times), torch.zeros((), device=device)]
        for number, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
            rate = self.dsigma_dt(times[number]) * (1 - T_END) / num_steps
            step = Step(sampler, sigma, sigma - after, rate, number == num_steps)
            xt = torch.where(is_given, given, xt)
            is_movable = xt == self.vocab_size if self.is_absorbing else ~is_given
            xt[is_movable] = self._move(xt, step, is_movable, generator)
        return xt

    def _checked(self, num_samples: int, given: Tensor | None, is_given: Tensor | None) -> tuple[Tensor, Tensor]:
        """Known tokens, and where they are known, on the model's device; nothing is known if both are None."""
        device = self.vocab_embed.embedding.device
        if (given is None) != (is_given is None):
            raise ValueError("given and is_given go together: pass the known tokens, and where they are known")
        if given is None or is_given is None:
            given = torch.zeros(num_samples, self.length, dtype=torch.int64, device=device)
            is_given = torch.zeros_like(given, dtype=torch.bool)
        if given.ndim != 2 or given.shape != is_given.shape or is_given.dtype != torch.bool:
            raise ValueError(
                f"given {tuple(given.shape)} and is_given {tuple(is_given.shape)} ({is_given.dtype}) must both be "
                "[B, L], is_given a bool"
            )
        return given.to(device, torch.int64), is_given.to(device)

    def _move(self, xt: Tensor, step: "Step", is_movable: Tensor, generator: torch.Generator | None) -> Tensor:
        """Samples the next states [R] of those positions of xt that may change."""
        features = self.features(xt, step.sigma.expand(len(xt)))[is_movable]
        moved = []
        for rows, tokens in zip(features.split(_ROWS), xt[is_movable].split(_ROWS), strict=True):
            score = self.log_score(rows, tokens, step.sigma).exp().scatter(-1, tokens[:, None], 0.0)
            total = score.sum(-1, keepdim=True)
            if step.sampler in _BY_RATE and not step.is_last:
                # Q(xt, y) is 1 out of the mask, and 1/N on the uniform graph.
                rate = step.rate if self.is_absorbing else step.rate / self.num_states
                jump = _BY_RATE[step.sampler](total, rate)
            elif self.is_absorbing:
                jump = absorbing_jump(total, step.delta_sigma, is_last=step.is_last)
            else:
                jump = uniform_jump(total, step.delta_sigma, self.num_states)
            moved.append(draw(score, tokens, jump, generator))
        return torch.cat(moved) if moved else xt[is_movable]


class SEDD(Network):
    """The network for torch alone, as config.json describes it."""

    def __init__(self, config: dict[str, Any], *, dtype: torch.dtype = torch.float32):
        """Makes a network with new weights. Arguments are those of `build`."""
        super().__init__()
        self.build(config, dtype)

    @classmethod
    def from_pretrained(cls, directory: str | pathlib.Path, *, dtype: torch.dtype = torch.float32) -> "SEDD":
        """Loads a model from a directory with config.json and model.safetensors, in evaluation mode.

        Raises:
            OSError: if a file is missing.
            RuntimeError: names tensors that are missing, unknown or of another shape.
        """
        directory = pathlib.Path(directory)
        model = cls(json.loads((directory / "config.json").read_text(encoding="utf-8")), dtype=dtype)
        model.load_state_dict(read_safetensors(directory / "model.safetensors"))
        return model.eval()


class Step(NamedTuple):
    """A step of a sampler: total noise before it, noise that it removes, length times rate of noise, whether last."""

    sampler: str
    sigma: Tensor
    delta_sigma: Tensor
    rate: Tensor
    is_last: bool


class Jump(NamedTuple):
    """A step's unnormalized distribution: `stay` for the current token, else max(0, slope score_y + offset) for y."""

    stay: Tensor
    slope: Tensor
    offset: Tensor


def absorbing_jump(total: Tensor, delta_sigma: Tensor, *, is_last: bool) -> Jump:
    """The step's distribution at a mask (equation 19): (e^d - 1) score_y for a token y, the rest of 1 for the mask.

    Args:
        total: sum of the score over all y != xt, [R, 1].
        delta_sigma: noise d removed by the step.
        is_last: whether this is the denoising step, in which the mask gets 0 (theorem 4.1).
    """
    growth = torch.expm1(delta_sigma).expand(total.shape)
    stay = torch.zeros_like(total) if is_last else 1 - growth * total
    return Jump(stay, growth, torch.zeros_like(total))


def uniform_jump(total: Tensor, delta_sigma: Tensor, num_states: int) -> Jump:
    """The step's distribution at any token: [e^d s_y + (1 - e^d)/N sum s] [e^-d delta(xt, y) + (1 - e^-d)/N].

    Arguments are as in `absorbing_jump`, and N is `num_states`.
    """
    grown, share = torch.exp(delta_sigma), -torch.expm1(-delta_sigma) / num_states
    taken = torch.expm1(delta_sigma) * (total + 1) / num_states
    return Jump((grown - taken) * (1 / grown + share), (grown * share).expand(total.shape), -taken * share)


def euler_jump(total: Tensor, rate: Tensor) -> Jump:
    """An Euler step: rate score_y for a token y, the rest of 1 for the current one; `rate` includes Q(xt, y)."""
    return Jump(1 - rate * total, rate.expand(total.shape), torch.zeros_like(total))


def leap_jump(total: Tensor, rate: Tensor) -> Jump:
    """A tau-leap: a token stays with probability exp(-rate sum s), else jumps in proportion to the score."""
    jumps = rate * total
    return Jump(torch.exp(-jumps), -torch.expm1(-jumps) / total.clamp(min=1e-30), torch.zeros_like(total))


_BY_RATE = {"euler": euler_jump, "tau_leaping": leap_jump}
SAMPLERS = ("tweedie", *_BY_RATE)


def draw(score: Tensor, tokens: Tensor, jump: Jump, generator: torch.Generator | None) -> Tensor:
    """Samples the next state of every position, [R]: first whether it changes, then to what, both in float64.

    Args:
        score: score of every state, 0 at the current one, [R, V].
        tokens: current states [R].
        jump: the step's distribution, arrays [R, 1].
        generator: source of randomness.
    """
    weights = (jump.slope * score + jump.offset).clamp(min=0).scatter(-1, tokens[:, None], 0.0)
    leave, stay = weights.sum(-1, dtype=torch.float64), jump.stay[:, 0].clamp(min=0)
    uniform = torch.rand(leave.shape, dtype=torch.float64, device=leave.device, generator=generator)
    moves = uniform * (leave + stay) < leave
    after = tokens.clone()
    if moves.any():
        after[moves] = torch.multinomial(weights[moves].double(), 1, generator=generator)[:, 0]
    return after


class Embedding(nn.Module):
    """A learned vector for every state."""

    def __init__(self, num_states: int, hidden: int):
        super().__init__()
        bound = 1 / math.sqrt(hidden)
        self.embedding = nn.Parameter(torch.empty(num_states, hidden).uniform_(-bound, bound))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding[tokens]


class SigmaEmbedding(nn.Module):
    """Embedding of the noise level, [B] to [B, C]: 256 sinusoids, cosines first, and a two-layer MLP."""

    def __init__(self, cond: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))

    def forward(self, sigma: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float32, device=sigma.device) / 128)
        angles = sigma[:, None] * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class Rotary(nn.Module):
    """Cosines and sines of the rotary position embedding (Su et al. 2021), base 10000: two arrays [L, K/2]."""

    def __init__(self, head_size: int):
        super().__init__()
        self.register_buffer("inv_freq", 1 / 10_000 ** (torch.arange(0, head_size, 2).float() / head_size))

    def forward(self, length: int) -> tuple[Tensor, Tensor]:
        angles = torch.arange(length, device=self.inv_freq.device).float()[:, None] * self.inv_freq.float()
        return angles.cos(), angles.sin()


class LayerNorm(nn.Module):
    """LayerNorm over features in float32, with a scale and no bias."""

    def __init__(self, hidden: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), self.weight.shape) * self.weight


def modulation(chunks: int, cond: int, hidden: int) -> nn.Linear:
    """A linear layer from the noise embedding to shifts, scales and gates, initialized to 0."""
    linear = nn.Linear(cond, chunks * hidden)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class Block(nn.Module):
    """A transformer block: attention and MLP, each with adaptive LayerNorm and a gate set by the noise level."""

    def __init__(self, hidden: int, heads: int, cond: int, dropout: float):
        super().__init__()
        self.heads, self.dropout, self.is_causal = heads, dropout, False
        self.norm1 = LayerNorm(hidden)
        self.attn_qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.attn_out = nn.Linear(hidden, hidden, bias=False)
        self.norm2 = LayerNorm(hidden)
        self.mlp = nn.Sequential(
            nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden)
        )
        self.adaLN_modulation = modulation(6, cond, hidden)

    def forward(self, x: Tensor, condition: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        attended = self.attend(self.norm1(x) * (1 + scale1) + shift1, rotation)
        x = x + gate1 * functional.dropout(attended, self.dropout, self.training)
        mixed = self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x + gate2 * functional.dropout(mixed, self.dropout, self.training)

    def attend(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Attention, in both directions unless `is_causal`, with rotary position embedding of queries and keys."""
        batch, length, hidden = x.shape
        q, k, v = self.attn_qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        out = functional.scaled_dot_product_attention(
            rotate(q, rotation), rotate(k, rotation), v, is_causal=self.is_causal
        )
        return self.attn_out(out.transpose(1, 2).reshape(batch, length, hidden))


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pair of features j and j + K/2 by the angle of its position; x [B, H, L, K]."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Head(nn.Module):
    """The output layer: a modulated LayerNorm and a linear layer to the states."""

    def __init__(self, hidden: int, num_states: int, cond: int):
        super().__init__()
        self.norm_final = LayerNorm(hidden)
        self.linear = nn.Linear(hidden, num_states)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.adaLN_modulation = modulation(2, cond, hidden)

    def features(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.norm_final(x) * (1 + scale) + shift


def read_safetensors(path: pathlib.Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file: eight bytes with the header's size, the header in JSON, then the data."""
    tensors = {}
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            file.seek(8 + size + start)
            numbers = torch.frombuffer(bytearray(file.read(stop - start)), dtype=_DTYPES[entry["dtype"]])
            tensors[name] = numbers.reshape(entry["shape"])
    return tensors
