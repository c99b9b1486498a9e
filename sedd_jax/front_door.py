"""What a notebook does: open a run, sample from it, fill gaps, bound the likelihood of text, train."""

import io
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from sedd_jax import config as configs
from sedd_jax import config_files, runs
from sedd_jax.bounds import likelihoods, text_bounds
from sedd_jax.data import tokenizers
from sedd_jax.diffusion import forward
from sedd_jax.evaluation import perplexity
from sedd_jax.model import networks
from sedd_jax.runtime import errors, storage, terminals
from sedd_jax.sampling import generate, refill, templates
from sedd_jax.training import train as training

Path = str | os.PathLike[str]


class OpenRun:
    """A run with the weights of one checkpoint, ready to be used. `sedd_jax.open` makes it.

    What it does is quiet; `verbose=True` shows progress on standard error.
    """

    def __init__(self, workdir: Path, step: int | None = None):
        self._opened = runs.load(storage.directory(workdir)).restore(step)

    def __repr__(self) -> str:
        size = networks.num_parameters(self.model)
        kind = self.config.graph.name
        return f"<sedd_jax run {self.workdir}, step {self.step}, {kind}, {size:,} parameters>"

    @property
    def workdir(self) -> storage.Directory:
        """The run directory."""
        return self._opened.run.workdir

    @property
    def step(self) -> int:
        """Training step of the checkpoint."""
        return self._opened.step

    @property
    def config(self) -> configs.Config:
        """What the run is made of."""
        return self._opened.run.config

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        """Between text and token ids."""
        return self._opened.run.tokenizer

    @property
    def model(self) -> networks.Model:
        """The network: `model.config` and `model.params`, the moving average, for `networks.apply`."""
        return self._opened.model

    @property
    def process(self) -> forward.Process:
        """The forward process: `process.graph` and `process.noise`."""
        return self._opened.run.process

    def sample(
        self,
        template: str = "",
        *,
        prefix: str = "",
        suffix: str = "",
        seed: int = 0,
        verbose: bool = False,
        **settings: Any,
    ) -> list[generate.Sample]:
        """Draws texts, as many as `num_samples`, as `sedd sample` does.

        Args:
            template: text with gaps, such as "Hi, I am {32}."; {n} is n tokens to fill, {n:REGEX} with text that
                matches. Nothing is known where it is empty.
            prefix: in place of a template, text that the samples start with.
            suffix: text that they end with.
            seed: of everything random; the same seed draws the same texts.
            verbose: whether to show progress.
            **settings: fields of `config.SamplingConfig` that differ from the run's: sampler, num_steps, num_samples,
                draw, grid, corrector_steps, corrector, temperature, top_p, guidance.

        Raises:
            errors.UserError: names what cannot be, and the remedy.
        """
        run = self._opened.run
        changed = run.sampling(**settings)
        parsed = templates.read(run, templates.Written(template=template, prefix=prefix, suffix=suffix))
        with self._opened.on_devices():
            if not verbose:
                return generate.draw_samples(self._opened, parsed, changed, seed=seed)
            with terminals.watcher(shows_text=False) as watch:
                shown = generate.as_text(run, parsed.length, watch)
                return generate.draw_samples(self._opened, parsed, changed, seed=seed, watch=shown)

    def infill(
        self,
        texts: str | Sequence[str],
        *,
        fit: bool = False,
        stop_at_eos: bool = False,
        seed: int = 0,
        **settings: Any,
    ) -> list[str]:
        """Fills the gaps of each template once, in the order given, by continuous batching.

        Args:
            texts: a template, or many, see `sample`; `num_samples` of them are drawn at once.
            fit: whether a sequence ends with its template, instead of going on to the model's length unseen.
            stop_at_eos: whether a text ends before the first end of text that is drawn.
            seed: of everything random.
            **settings: see `sample`.
        """
        run = self._opened.run
        asked = [templates.parse(run, text) for text in ([texts] if isinstance(texts, str) else texts)]
        changed = run.sampling(**{"num_samples": min(max(1, len(asked)), run.config.sampling.num_samples), **settings})
        ends = refill.Ends(fit=fit, stop_at_eos=stop_at_eos)
        found = {}
        with self._opened.on_devices():
            for drawn in refill.draw(self._opened, asked, changed, seed=seed, ends=ends):
                found[drawn.index] = run.tokenizer.decode(drawn.tokens)
        return [found[index] for index in range(len(asked))]

    def bound(
        self,
        text: str | None = None,
        *,
        data: str | None = None,
        split: str | None = None,
        num_times: int | None = None,
        seed: int = 0,
        verbose: bool = False,
    ) -> text_bounds.Bound:
        """Bounds the negative log-likelihood of a text, or of held-out text as `sedd eval` does.

        Args:
            text: the text; None for that of `data` and `split`.
            data: prepared:DIR or another source; the run's own text if None.
            split: train, valid or test; valid of the run's own text, test of another.
            num_times: draws of time and noise for each sequence; of a text 128, of `data` as many as a standard error
                of 0.01 nats per token takes.
            seed: of times and noise.
            verbose: whether to show progress.
        """
        if text is not None:
            if data is not None or split is not None:
                given = errors.name("data" if data is not None else "split")
                raise errors.UserError(f"goes without {given}", field="text", remedy=f"give a text, or {given}")
            num_times = 128 if num_times is None else num_times
            return text_bounds.bound_text(self._opened, text, num_times=num_times, seed=seed)
        settings = perplexity.Settings(num_times=num_times, seed=seed)
        with terminals.shown(verbose):
            result = perplexity.evaluate(self.workdir, data=data, split=split, step=self.step, settings=settings)
        name = [name for name in likelihoods.BOUNDS if name in result][-1]
        num_tokens, stderr = result["num_sequences"] * result["length"], result[name]["nats_per_token_stderr"]
        return text_bounds.Bound(
            name=name,
            nats_per_token=result[name]["nats_per_token"],
            nats_per_token_stderr=math.inf if stderr is None else stderr,
            num_tokens=num_tokens,
            num_characters=round(num_tokens * result["characters_per_token"]),
        )


def train(config: configs.Config | configs.Nested | Path, workdir: Path, *, verbose: bool = False) -> OpenRun:
    """Trains a run, or goes on with it from its newest checkpoint, and opens it.

    Args:
        config: a `config.Config`, a packaged config such as "quickstart", the path of such a file, or the fields that
            differ from the defaults, nested as in such a file.
        workdir: run directory, made if it does not exist.
        verbose: whether to show progress on standard error. `workdir/metrics.jsonl` has the curves either way.

    Raises:
        errors.UserError: where config, corpus or directory do not allow a run.
    """
    if isinstance(config, str | os.PathLike):
        config = config_files.read_python(config)
    if not isinstance(config, configs.Config):
        config = configs.parse(configs.merge(config))
    stream: Any = sys.stderr if verbose else io.StringIO()
    with terminals.shown(verbose):
        training.train(config, storage.directory(workdir), stream=stream)
    return OpenRun(workdir)
