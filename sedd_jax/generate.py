"""Sampling text from a run: from nothing, or around given text."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from sedd_jax import (
    autoregression,
    first_hitting,
    networks,
    runs,
    samplers,
    score_draws,
    second_order,
    sharding,
    storage,
    terminals,
)
from sedd_jax import config as configs

# (steps taken, all of them, the tokens so far)
WatchTokens = Callable[[int, int, Int[Array, "B L"]], None]
_GAP = re.compile(r"\{\{|\}\}|\{(\d+)\}|\{[^{}]*\}?|\}")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Template:
    """Known tokens and gaps, padded with one last gap to the length the model was trained on.

    Attributes:
        tokens: known tokens, 0 in gaps.
        is_given: where they are known.
        length: tokens that are shown; what follows is generated too, since the model knows only its full length, and
            cut.
    """

    tokens: Int[np.ndarray, "L"]
    is_given: Bool[np.ndarray, "L"]
    length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One drawn text and how it was drawn."""

    text: str
    tokens: list[int]
    seed: int
    index: int
    step: int
    sampler: str
    num_steps: int
    nfe: int
    draw: str


def parse_template(run: runs.Run, template: str) -> Template:
    """Reads "Hi, my name is {32} and": {n} is a gap of n tokens, {{ and }} are braces; "" is one gap of full length.

    Raises:
        ValueError: where a brace is neither, the template is longer than the model, or text is outside its vocabulary.
    """
    parts: list[Int[np.ndarray, "..."] | int] = []
    text, position = "", 0
    for match in _GAP.finditer(template):
        text += template[position : match.start()]
        position = match.end()
        if match.group() in ("{{", "}}"):
            text += match.group()[0]
        elif match.group(1) is None:
            raise ValueError(
                f"--template has {match.group()!r} at position {match.start()}: a gap is {{n}} with n tokens to "
                "fill, a brace itself is {{ or }}"
            )
        else:
            parts += [run.tokenizer.encode(text), int(match.group(1))]
            text = ""
    parts.append(run.tokenizer.encode(text + template[position:]))
    return assemble(run, parts, None if template else run.config.data.length)


def around(run: runs.Run, prefix: str, suffix: str) -> Template:
    """Text at the start and at the end of the model's full length, one gap between.

    Raises:
        ValueError: where both together leave no gap, or are outside the vocabulary.
    """
    start, end = run.tokenizer.encode(prefix), run.tokenizer.encode(suffix)
    gap = run.config.data.length - len(start) - len(end)
    if gap <= 0:
        raise ValueError(
            f"--prefix and --suffix take {len(start)} + {len(end)} tokens of the model's {run.config.data.length} and "
            "leave no gap: shorten them"
        )
    return assemble(run, [start, gap, end])


def assemble(run: runs.Run, parts: list[Int[np.ndarray, "..."] | int], shown: int | None = None) -> Template:
    """Known tokens and gaps, given by their lengths, one after another; `shown` tokens of them, or all.

    Raises:
        ValueError: where they are longer than the model.
    """
    length = run.config.data.length
    total = sum(part if isinstance(part, int) else len(part) for part in parts)
    if total > length:
        raise ValueError(f"the template is {total} tokens long, the model's length is {length}: shorten it or its gaps")
    tokens, is_given = np.zeros(length, np.int32), np.zeros(length, bool)
    position = 0
    for part in parts:
        if not isinstance(part, int):
            tokens[position : position + len(part)] = part
            is_given[position : position + len(part)] = True
        position += part if isinstance(part, int) else len(part)
    return Template(tokens=tokens, is_given=is_given, length=total if shown is None else shown)


def check_order(run: runs.Run, is_given: Bool[np.ndarray, "*B L"]) -> None:
    """Raises ValueError where a token is given after a gap and the run predicts each token from those before."""
    if run.is_autoregressive and (np.diff(is_given.astype(np.int8), axis=-1) > 0).any():
        raise ValueError(
            "an autoregressive run sees no text after a gap: give text at the start only, as --prefix does"
        )


def draw_samples(
    run: runs.Run,
    params: networks.Params,
    template: Template,
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
            watch(taken, total, functools.partial(_texts, run, tokens, template.length))

    watch_tokens = watch_tokens or (None if watch is None else show)
    tokens = draw_tokens(run, params, given, settings, seed=seed, watch=watch_tokens)
    rows, num_gaps = tokens[:, : template.length], int((~template.is_given).sum())
    return [
        Sample(
            text=run.tokenizer.decode(row),
            tokens=row.tolist(),
            seed=seed,
            index=index,
            step=step,
            sampler="autoregressive" if run.is_autoregressive else settings.sampler,
            num_steps=_num_steps(run, settings, num_gaps),
            nfe=num_evaluations(run, settings, num_gaps),
            draw=settings.draw,
        )
        for index, row in enumerate(rows)
    ]


def sampling_of(run: runs.Run, **changed: Any) -> configs.SamplingConfig:
    """The run's settings with some fields changed.

    Raises:
        ValueError: names the field that cannot be.
    """
    sampling = dataclasses.replace(run.config.sampling, **changed)
    configs.validate(dataclasses.replace(run.config, sampling=sampling))
    return sampling


def num_evaluations(run: runs.Run, settings: configs.SamplingConfig, num_gaps: int | None = None) -> int:
    """nfe of a sequence with so many tokens to fill, or all: one for each step, or two, and one after the last."""
    per_step = 2 if settings.sampler == second_order.NAME and not run.is_autoregressive else 1
    return per_step * _num_steps(run, settings, num_gaps) + 1


def _num_steps(run: runs.Run, settings: configs.SamplingConfig, num_gaps: int | None) -> int:
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
    watch: WatchTokens | None = None,
) -> Int[np.ndarray, "B L"]:
    """Draws sequences that agree with what is known of each, as one batch.

    Args:
        run: the run.
        params: parameters, usually the moving average.
        given: known tokens of each sequence.
        settings: how, see `num_evaluations`.
        seed: of everything random; the same seed draws the same tokens.
        watch: called some 64 times, with the steps taken, all steps, and the tokens so far.
    """
    check_order(run, np.asarray(given.is_given))
    num_gaps = int((~np.asarray(given.is_given)).sum(1).max())
    num_steps = _num_steps(run, settings, num_gaps)
    key_limit, key_steps, key_denoise = jax.random.split(jax.random.key(seed), 3)
    xt = given.clamp(run.graph.sample_limit(key_limit, given.tokens.shape))
    reverse_steps, denoise = make_sampling_fns(
        run.network, run.graph, run.noise, sampler=settings.sampler, draw=settings.draw
    )
    # A trajectory that is watched is taken in parts; keys depend on the step alone, so the text is the same.
    stride = max(1, num_steps // 64) if watch else num_steps
    for start in range(0, num_steps, stride):
        stop = min(start + stride, num_steps)
        xt = reverse_steps(params, key_steps, given, xt, start, stop, num_steps)
        if watch:
            watch(stop, num_steps + 1, given.clamp(jax.block_until_ready(xt)))
    # The clocks of first_hitting go on from the steps before.
    key_last = key_steps if settings.sampler == first_hitting.NAME else key_denoise
    tokens = denoise(params, key_last, given, xt)
    if watch:
        watch(num_steps + 1, num_steps + 1, tokens)
    return np.asarray(tokens)


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
        prefix: see `around`.
        suffix: see `around`.
        template: see `parse_template`.
        seed: see `draw_samples`.
        watch: see `draw_samples`.
        **settings: fields of `config.SamplingConfig` that differ from the run's.
    """
    run = runs.load(workdir)
    changed = sampling_of(run, **settings)
    if template and (prefix or suffix):
        raise ValueError("--template cannot be combined with --prefix or --suffix: write them into the template")
    parsed = around(run, prefix, suffix) if prefix or suffix else parse_template(run, template)
    mesh = sharding.make_mesh(sharding.MeshConfig())
    step, params = run.ema_params(mesh, step)
    with jax.set_mesh(mesh):
        return draw_samples(run, params, parsed, changed, seed=seed, step=step, watch=watch)


def as_dict(sample: Sample) -> dict[str, Any]:
    """A sample's fields, for JSON."""
    return dataclasses.asdict(sample)


def write_jsonl(samples: list[Sample], path: pathlib.Path) -> None:
    """Writes one JSON object a line: text, token ids, and how they were drawn."""
    lines = [json.dumps(as_dict(sample), ensure_ascii=False) + "\n" for sample in samples]
    path.write_text("".join(lines), encoding="utf-8")


@functools.cache
def make_sampling_fns(
    network: networks.NetworkConfig, graph: Any, noise: Any, *, sampler: str, draw: str
) -> tuple[Any, Any]:
    """`reverse_steps(params, key, given, xt, start, stop, num_steps)` and `denoise(params, key, given, xt)`, jitted.

    Step numbers and keys are traced and do not recompile. Every process holds all tokens that they return. Those of a
    causal network draw a token a step, from the first to the last but one, and the last.
    """

    def move_fn(params: networks.Params) -> samplers.MoveFn:
        def move(key, xt, sigma, is_movable, jump_fn):
            features = networks.apply(network, params, xt, sigma)
            return score_draws.DRAWS[draw](key, network, params, features, xt, sigma, is_movable, jump_fn)

        return move

    def reverse_steps(params, key, given, xt, start, stop, num_steps):
        fn = move_fn(params)
        xt = samplers.reverse_steps(key, fn, graph, noise, given, xt, start, stop, num_steps, sampler=sampler)
        return sharding.replicate(xt)

    def denoise(params, key, given, xt):
        return sharding.replicate(samplers.denoise(key, move_fn(params), graph, noise, given, xt))

    def trapezoids(params, key, given, xt, start, stop, num_steps):
        evaluate = functools.partial(networks.apply, network, params)
        leap = lambda key, rates, xt, is_movable: score_draws.leap(
            key, network, params, rates, xt, is_movable, draw=draw
        )
        xt = second_order.reverse_steps(key, evaluate, leap, graph, noise, given, xt, start, stop, num_steps)
        return sharding.replicate(xt)

    def hits(params, key, given, xt, start, stop, num_steps):
        xt = first_hitting.reverse_steps(key, move_fn(params), graph, noise, given, xt, start, stop, num_steps)
        return sharding.replicate(xt)

    def last_hits(params, key, given, xt):
        return sharding.replicate(first_hitting.finish(key, move_fn(params), graph, noise, given, xt))

    def draw_positions(params, key, given, x, start, stop):
        def draw_fn(key, inputs, masks, sigma, is_next, jump_fn):
            features = networks.apply(network, params, inputs, sigma)
            return score_draws.DRAWS[draw](key, network, params, features, masks, sigma, is_next, jump_fn)

        return sharding.replicate(autoregression.draw(key, draw_fn, graph, given, x, start, stop))

    if network.causal:
        next_tokens = lambda params, key, given, x, start, stop, _: draw_positions(params, key, given, x, start, stop)
        last_token = lambda params, key, given, x: draw_positions(params, key, given, x, x.shape[1] - 1, x.shape[1])
        return jax.jit(next_tokens), jax.jit(last_token)
    if sampler == first_hitting.NAME:
        return jax.jit(hits), jax.jit(last_hits)
    if sampler == second_order.NAME:
        return jax.jit(trapezoids), jax.jit(denoise)
    return jax.jit(reverse_steps), jax.jit(denoise)


def _texts(run: runs.Run, tokens: Int[Array, "B L"], length: int) -> list[str]:
    return ["".join(_pieces(run, row)) for row in np.asarray(tokens)[:, :length]]


def _pieces(run: runs.Run, row: Int[np.ndarray, "L"]) -> Iterator[str]:
    """Text of a row, each stretch of masks as as many `░`."""
    masked = row == run.graph.mask_id if hasattr(run.graph, "mask_id") else np.zeros(len(row), bool)
    borders = np.flatnonzero(np.diff(masked)) + 1
    for stretch in np.split(np.arange(len(row)), borders):
        if len(stretch):
            yield "░" * len(stretch) if masked[stretch[0]] else run.tokenizer.decode(row[stretch])
