"""Sampling text from a run: from nothing, or around given text."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sedd_jax import config as configs
from sedd_jax import runs
from sedd_jax.diffusion import first_hitting, samplers, trapezoidal
from sedd_jax.evaluation import tune_grid
from sedd_jax.model import autoregression, networks
from sedd_jax.runtime import sharding, storage, terminals
from sedd_jax.sampling import moves, templates

# (steps taken, all of them, the tokens so far)
WatchTokens = Callable[[int, int, Int[Array, "B L"]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One drawn text and how it was drawn; `prompt` is the line of a file of prompts that it is for."""

    text: str
    tokens: list[int]
    seed: int
    index: int
    step: int
    sampler: str
    num_steps: int
    nfe: int
    draw: str
    grid: str
    corrector_steps: int
    temperature: float
    top_p: float
    guidance: float
    fit: bool = False
    stop_at_eos: bool = False
    prompt: dict[str, str] | None = None


def draw_samples(
    run: runs.Run,
    params: networks.Params,
    template: templates.Template,
    settings: configs.SamplingConfig,
    *,
    seed: int,
    step: int,
    watch: terminals.Watch | None = None,
    watch_tokens: WatchTokens | None = None,
) -> list[Sample]:
    """Draws texts that agree with the template, as one batch.

    Args:
        run: the run.
        params: parameters, usually the moving average.
        template: what is known.
        settings: how many, and how.
        seed: of everything random; the same seed draws the same texts.
        step: checkpoint step, only recorded.
        watch: called some 64 times, with the steps taken, all steps, and a function that makes the texts so far, masks
            shown as `░`.
        watch_tokens: called in place of `watch`, with the tokens so far.
    """
    shape = (settings.num_samples, len(template.tokens))
    given = samplers.Given(
        jnp.broadcast_to(jnp.asarray(template.tokens, jnp.int32), shape), jnp.broadcast_to(template.is_given, shape)
    )

    def show(taken: int, total: int, tokens: Int[Array, "B L"]) -> None:
        if watch is not None:
            watch(taken, total, functools.partial(texts, run, tokens, template.length))

    matched = templates.compile_patterns(run, [template] * settings.num_samples)
    watch_tokens = watch_tokens or (None if watch is None else show)
    tokens = draw_tokens(run, params, given, settings, seed=seed, matched=matched, watch=watch_tokens)
    rows, num_gaps = tokens[:, : template.length], int((~template.is_given).sum())
    return [
        Sample(
            text=run.tokenizer.decode(row),
            tokens=row.tolist(),
            seed=seed,
            index=index,
            step=step,
            nfe=num_evaluations(run, settings, num_gaps),
            **circumstances(run, settings, num_gaps),
        )
        for index, row in enumerate(rows)
    ]


def circumstances(run: runs.Run, settings: configs.SamplingConfig, num_gaps: int) -> dict[str, Any]:
    """The fields of a `Sample` that say how one with so many tokens to fill is drawn."""
    return {
        "sampler": "autoregressive" if run.is_autoregressive else settings.sampler,
        "num_steps": num_steps_of(run, settings, num_gaps),
        "draw": settings.draw,
        **{name: getattr(settings, name) for name in configs.REFINEMENTS},
    }


def sampling_of(run: runs.Run, **changed: Any) -> configs.SamplingConfig:
    """The run's settings with some fields changed; the grid "tuned" becomes the times that `tune_grid` found.

    Raises:
        ValueError: names the field that cannot be.
    """
    if changed.get("grid") == "tuned":
        changed["grid"] = tune_grid.read(run)
    sampling = dataclasses.replace(run.config.sampling, **changed)
    configs.validate(dataclasses.replace(run.config, sampling=sampling))
    return sampling


def num_evaluations(run: runs.Run, settings: configs.SamplingConfig, num_gaps: int | None = None) -> int:
    """nfe of a sequence with so many tokens to fill, or all: one for each turn, or two, and one after the last.

    With guidance each counts twice.
    """
    if run.is_autoregressive:
        return run.config.data.length
    before_last = per_step(run, settings) * num_steps_of(run, settings, num_gaps)
    return before_last + (1 if settings.guidance == 1 else 2)


def per_step(run: runs.Run, settings: configs.SamplingConfig) -> int:
    """Evaluations of a step but the last: of all its turns, or the one that gives the baseline a token."""
    return 1 if run.is_autoregressive else per_turn(settings) * (1 + settings.corrector_steps)


def per_turn(settings: configs.SamplingConfig) -> int:
    """Evaluations of a diffusion's turn but the last: two for the second-order sampler, and twice with guidance."""
    return (2 if settings.sampler == trapezoidal.NAME else 1) * (1 if settings.guidance == 1 else 2)


def num_steps_of(run: runs.Run, settings: configs.SamplingConfig, num_gaps: int | None) -> int:
    """Steps before the last: one less than tokens for the autoregressive baseline, no more for first_hitting."""
    if run.is_autoregressive:
        return run.config.data.length - 1
    if settings.sampler == first_hitting.NAME:
        return min(settings.num_steps, max(0, (run.config.data.length if num_gaps is None else num_gaps) - 1))
    return settings.num_steps


def draw_tokens(
    run: runs.Run,
    params: networks.Params,
    given: samplers.Given,
    settings: configs.SamplingConfig,
    *,
    seed: int,
    matched: moves.Patterns | None = None,
    watch: WatchTokens | None = None,
) -> Int[np.ndarray, "B L"]:
    """Draws sequences that agree with what is known of each, as one batch.

    Args:
        run: the run.
        params: parameters, usually the moving average.
        given: known tokens of each sequence.
        settings: how, see `num_evaluations`.
        seed: of everything random; the same seed draws the same tokens.
        matched: what the text of gaps is to match.
        watch: called some 64 times, with the steps taken, all steps, and the tokens so far.
    """
    if run.is_autoregressive:
        autoregression.refuse_text_after_gaps(np.asarray(given.is_given))
    refuse_patterns(settings, matched)
    num_gaps = int((~np.asarray(given.is_given)).sum(1).max())
    num_steps = num_steps_of(run, settings, num_gaps)
    key_limit, key_steps, key_denoise = jax.random.split(jax.random.key(seed), 3)
    xt = given.clamp(run.graph.sample_limit(key_limit, given.tokens.shape))
    reverse_steps, denoise = make_sampling_fns(run.network, run.graph, run.noise, settings)
    # A trajectory that is watched is taken in parts; keys depend on the step alone, so the text is the same.
    stride = max(1, num_steps // 64 if watch else num_steps)
    for start in range(0, num_steps, stride):
        stop = min(start + stride, num_steps)
        xt = reverse_steps(params, key_steps, given, xt, start, stop, num_steps, matched)
        if watch:
            watch(stop, num_steps + 1, given.clamp(jax.block_until_ready(xt)))
    # The clocks of first_hitting go on from the steps before.
    key_last = key_steps if settings.sampler == first_hitting.NAME else key_denoise
    tokens = denoise(params, key_last, given, xt, matched)
    if watch:
        watch(num_steps + 1, num_steps + 1, tokens)
    return np.asarray(tokens)


def draw_batches(
    run: runs.Run,
    params: networks.Params,
    tokens: Int[np.ndarray, "S L"],
    is_given: Bool[np.ndarray, "S L"],
    settings: configs.SamplingConfig,
    *,
    seed: int,
) -> Iterator[Int[np.ndarray, "B L"]]:
    """Sequences that agree with what is given of each, `settings.num_samples` at once; see `draw_tokens`."""
    size = settings.num_samples
    for number, start in enumerate(range(0, len(tokens), size)):
        # The last batch is filled up, so that no other shape is compiled.
        rows = np.arange(start, start + size) % len(tokens)
        (own,) = np.random.SeedSequence([seed, number]).generate_state(1).tolist()
        given = samplers.Given(jnp.asarray(tokens[rows]), jnp.asarray(is_given[rows]))
        yield draw_tokens(run, params, given, settings, seed=own)[: len(tokens) - start]


def refuse_patterns(settings: configs.SamplingConfig, matched: moves.Patterns | None) -> None:
    """Raises ValueError where the draws asked for know nothing of patterns."""
    if matched is not None and settings.draw != "precise":
        raise ValueError(f"draw={settings.draw} takes no patterns: set draw=precise")


def generate(
    workdir: storage.Directory,
    *,
    step: int | None = None,
    prefix: str = "",
    suffix: str = "",
    template: str = "",
    seed: int = 0,
    watch: terminals.Watch | None = None,
    **settings: Any,
) -> list[Sample]:
    """Draws texts from a checkpoint (its moving average) of a run.

    Args:
        workdir: the run directory.
        step: the checkpoint; the newest if None.
        prefix: see `templates.around`.
        suffix: see `templates.around`.
        template: see `templates.parse`.
        seed: see `draw_samples`.
        watch: see `draw_samples`.
        **settings: fields of `config.SamplingConfig` that differ from the run's.
    """
    run = runs.load(workdir)
    changed = sampling_of(run, **settings)
    parsed = templates.choose(run, prefix=prefix, suffix=suffix, template=template)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    step, params = run.ema_params(mesh, step)
    with jax.set_mesh(mesh):
        return draw_samples(run, params, parsed, changed, seed=seed, step=step, watch=watch)


def annealing(sample: Sample) -> str:
    """What lowers the entropy of a sample on purpose, in words."""
    names = ("temperature", "top_p")
    return ", ".join(f"{name}={getattr(sample, name)}" for name in names if getattr(sample, name) < 1)


def as_dict(sample: Sample) -> dict[str, Any]:
    """A sample's fields, for JSON."""
    return dataclasses.asdict(sample)


def to_line(sample: Sample) -> str:
    """A sample as one line of JSON: text, token ids, and how they were drawn."""
    return json.dumps(as_dict(sample), ensure_ascii=False) + "\n"


def write_jsonl(samples: list[Sample], path: pathlib.Path) -> None:
    """Writes one `to_line` after another."""
    path.write_text("".join(map(to_line, samples)), encoding="utf-8")


def make_sampling_fns(
    network: networks.NetworkConfig, graph: Any, noise: Any, settings: configs.SamplingConfig
) -> tuple[Any, Any]:
    """`reverse_steps(params, key, given, xt, start, stop, num_steps)` and `denoise(params, key, given, xt)`, jitted.

    Step numbers and keys are traced and do not recompile. Every process holds all tokens that they return. Those of a
    causal network draw a token a step, from the first to the last but one, and the last.
    """
    # Programs do not depend on these two.
    return _make_sampling_fns(network, graph, noise, dataclasses.replace(settings, num_steps=1, num_samples=1))


@functools.lru_cache(maxsize=32)
def _make_sampling_fns(
    network: networks.NetworkConfig, graph: Any, noise: Any, settings: configs.SamplingConfig
) -> tuple[Any, Any]:
    control = configs.make_control(settings)
    course = {"grid": settings.grid, "corrector_steps": settings.corrector_steps}
    mover = lambda params, given, patterns: moves.Mover(network, params, graph, given, patterns, control, settings.draw)

    def reverse_steps(params, key, given, xt, start, stop, num_steps, patterns=None):
        own = mover(params, given, patterns)
        if settings.sampler == trapezoidal.NAME:
            predict = trapezoidal.predictor(own.evaluate, own.leap, graph, noise, given)
        else:
            predict = samplers.predictor(own.move, graph, noise, given, sampler=settings.sampler)
        xt = samplers.reverse_steps(key, predict, graph, noise, given, xt, start, stop, num_steps, **course)
        return sharding.replicate(xt)

    def denoise(params, key, given, xt, patterns=None):
        return sharding.replicate(samplers.denoise(key, mover(params, given, patterns).move, graph, noise, given, xt))

    def hits(params, key, given, xt, start, stop, num_steps, patterns=None):
        move, again = mover(params, given, patterns).move, settings.corrector_steps
        return sharding.replicate(
            first_hitting.reverse_steps(
                key, move, graph, noise, given, xt, start, stop, num_steps, corrector_steps=again
            )
        )

    def last_hits(params, key, given, xt, patterns=None):
        return sharding.replicate(
            first_hitting.finish(key, mover(params, given, patterns).move, graph, noise, given, xt)
        )

    def draw_positions(params, key, given, x, start, stop):
        def draw_fn(key, inputs, masks, sigma, is_next, jump_fn):
            return mover(params, given, None).move(key, inputs, sigma, is_next, jump_fn, at=masks)

        return sharding.replicate(autoregression.draw(key, draw_fn, graph, given, x, start, stop))

    if network.causal:
        next_tokens = lambda params, key, given, x, start, stop, *_: draw_positions(params, key, given, x, start, stop)
        last_token = lambda params, key, given, x, *_: draw_positions(params, key, given, x, x.shape[1] - 1, x.shape[1])
        return jax.jit(next_tokens), jax.jit(last_token)
    if settings.sampler == first_hitting.NAME:
        return jax.jit(hits), jax.jit(last_hits)
    return jax.jit(reverse_steps), jax.jit(denoise)


def texts(run: runs.Run, tokens: Int[Array | np.ndarray, "B L"], length: int) -> list[str]:
    """The first `length` tokens of each sequence as text, masks shown as `░`."""
    return ["".join(_pieces(run, row)) for row in np.asarray(tokens)[:, :length]]


def _pieces(run: runs.Run, row: Int[np.ndarray, "L"]) -> Iterator[str]:
    """Text of a row, each stretch of masks as as many `░`."""
    masked = row == run.graph.mask_id if hasattr(run.graph, "mask_id") else np.zeros(len(row), bool)
    borders = np.flatnonzero(np.diff(masked)) + 1
    for stretch in np.split(np.arange(len(row)), borders):
        if len(stretch):
            yield "░" * len(stretch) if masked[stretch[0]] else run.tokenizer.decode(row[stretch])
