"""A run as a model of lm-evaluation-harness (EleutherAI; extra `lm-eval`), on any of its tasks.

    python -m sedd_jax.harness --model sedd --model_args workdir=runs/novels --tasks hellaswag

takes the arguments of the harness's own `lm_eval`. Model arguments are `workdir`, `step`, `num_times`, `target_stderr`,
`batch_size` and `seed` (see `continuations.Budget`), and for generated text `num_steps`, `sampler` and `num_samples`.
"""

import importlib.util
import itertools
import sys
from typing import Any

import numpy as np

if __name__ == "__main__" and importlib.util.find_spec("lm_eval") is None:
    sys.exit("sedd_jax.harness: lm-evaluation-harness is missing: pip install 'sedd_jax[lm-eval]'")
from lm_eval.api import instance, model, registry  # pyrefly: ignore[missing-import]

from sedd_jax import runs
from sedd_jax.bounds import continuations
from sedd_jax.runtime import errors, storage
from sedd_jax.sampling import refill, templates

_LONGEST = 256  # tokens to write where a task does not say how many, as in the harness
_GREEDY = 1e-6  # nucleus of the likeliest token alone


@registry.register_model("sedd")
class Model(model.LM):
    """The requests of the harness, answered by a run.

    Log-likelihoods are the bounds of `continuations.estimate` (exact for an autoregressive run). The choices of a
    question share their draws. Generated text is filled in behind the context.
    """

    def __init__(
        self,
        workdir: str,
        *,
        step: int | None = None,
        num_times: int = continuations.BUDGET.num_times,
        target_stderr: float = continuations.BUDGET.target_stderr,
        batch_size: int | str | None = None,
        seed: int = 0,
        device: str | None = None,
        max_batch_size: int | None = None,
        **sampling: Any,
    ):
        super().__init__()
        del device, max_batch_size  # The harness's command line always passes them; JAX finds its devices itself.
        self._opened = runs.load(storage.directory(workdir)).restore(step)
        # The harness passes 1 where none is given.
        is_default = batch_size in (None, 1, "1") or str(batch_size).startswith("auto")
        size = continuations.BUDGET.batch_size if is_default else int(batch_size or 1)
        self._budget = continuations.Budget(
            num_times=num_times, target_stderr=target_stderr, batch_size=size, seed=seed
        )
        self._sampling = {"num_samples": size, **sampling}
        self._opened.run.sampling(**self._sampling)  # What cannot be is refused before hours of work.
        self._values_fn = continuations.make_values_fn(self._opened)

    def loglikelihood(self, requests: list[instance.Instance]) -> list[tuple[float, bool]]:
        """Lower bounds on log p(continuation | context), and whether greedy filling writes that very continuation.

        The second is found only where a context has one continuation: metrics of choices do not read it.
        """
        found: list[tuple[float, bool]] = []
        singles: dict[int, continuations.Part] = {}
        num_ranked = num_decided = 0
        question = lambda request: (request.task_name, request.doc_id, request.args[0])
        for number, (_, group) in enumerate(itertools.groupby(requests, question)):
            asked = [request.args for request in group]
            parts = self._encode(asked[0][0], [continuation for _, continuation in asked])
            bounds = self._estimate(parts, number)
            if len(parts) == 1:
                singles[len(found)] = parts[0]
            else:
                num_ranked, num_decided = num_ranked + 1, num_decided + bounds.is_decided
            found += [(-nats, False) for nats in bounds.nats]
        for place, is_greedy in zip(singles, self._are_greedy(list(singles.values())), strict=True):
            found[place] = (found[place][0], is_greedy)
        if num_ranked:
            budget = f"{self._budget.num_times} draws (num_times)"
            print(f"{num_decided} of {num_ranked} rankings decided within {budget}", file=sys.stderr)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: list[instance.Instance]) -> list[float]:
        """Lower bounds on log p of whole texts, in windows of the model's length with as much context as they hold."""
        found, numbers = [], itertools.count()
        for request in requests:
            windows = self._windows(request.args[0])
            nats = [self._estimate([window], next(numbers)).nats[0] for window in windows]
            found.append(-sum(nats))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests: list[instance.Instance]) -> list[str]:
        """Text filled in behind each context, up to the first of the task's stop strings.

        Greedy, the likeliest token at each position that is filled, unless the task asks for sampling.
        """
        found = [""] * len(requests)
        settings = lambda place: {name: value for name, value in requests[place].args[1].items() if name != "until"}
        places = sorted(range(len(requests)), key=lambda place: repr(settings(place)))
        for _, group in itertools.groupby(places, lambda place: repr(settings(place))):
            alike = list(group)
            asked = settings(alike[0])
            is_greedy = not asked.get("do_sample", False)
            drawn = self._fill([self._gap(requests[place].args[0], asked) for place in alike], asked, is_greedy)
            for place, text in zip(alike, drawn, strict=True):
                arguments: tuple[Any, ...] = requests[place].args
                until = arguments[1].get("until") or []
                for stop in [until] if isinstance(until, str) else until:
                    text = text.partition(stop)[0] if stop else text
                found[place] = text
                self.cache_hook.add_partial("generate_until", requests[place].args, text)
        return found

    def _estimate(self, parts: list[continuations.Part], number: int) -> continuations.Found:
        with self._opened.on_devices():
            return continuations.estimate(
                self._values_fn, parts, self._budget, number, is_exact=self._opened.run.is_autoregressive
            )

    def _encode(self, context: str, texts: list[str]) -> list[continuations.Part]:
        run = self._opened.run
        return continuations.encode(run.tokenizer, run.config.data.length, context, texts)[0]

    def _windows(self, text: str) -> list[continuations.Part]:
        tokenizer, length = self._opened.run.tokenizer, self._opened.run.config.data.length
        first = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        tokens = np.array([*first, *tokenizer.encode(text)], np.int32)
        # Each window but the first sees at least the token before it; the last sees all that it has room for.
        starts = [len(first), *range(length, len(tokens), max(1, length - 1))]
        ends = [*starts[1:], len(tokens)]
        return [
            continuations.Part(tokens[max(0, end - length) : end], start - max(0, end - length))
            for start, end in zip(starts, ends, strict=True)
            if end > start
        ]

    def _gap(self, context: str, asked: dict[str, Any]) -> templates.Template:
        """The context and a gap after it. A context that is too long for both loses its start.

        A task may ask for as many tokens as the model is long. The gap is then what the context leaves, at least half.
        """
        tokenizer, length = self._opened.run.tokenizer, self._opened.run.config.data.length
        first = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        given = np.array([*first, *tokenizer.encode(context)], np.int32)
        size = int(asked.get("max_gen_toks", min(_LONGEST, length // 2)))
        size = min(size, max(length - len(given), length // 2))
        given = given[max(0, len(given) + size - length) :]
        return _template(given, len(given) + size, length)

    def _fill(self, asked: list[templates.Template], settings: dict[str, Any], is_greedy: bool) -> list[str]:
        tokenizer = self._opened.run.tokenizer
        ends = refill.Ends(stop_at_eos=tokenizer.eos_id is not None)
        drawn = self._draw(
            asked, {} if is_greedy else {"temperature": settings.get("temperature", 1.0)}, is_greedy, ends
        )
        return [
            tokenizer.decode(tokens[int(template.is_given.sum()) :])
            for template, tokens in zip(asked, drawn, strict=True)
        ]

    def _are_greedy(self, parts: list[continuations.Part]) -> list[bool]:
        length = self._opened.run.config.data.length
        asked = [_template(part.tokens[: part.start], len(part.tokens), length) for part in parts]
        drawn = self._draw(asked, {}, True, refill.NO_ENDS)
        return [bool(np.array_equal(tokens, part.tokens)) for part, tokens in zip(parts, drawn, strict=True)]

    def _draw(
        self, asked: list[templates.Template], changed: dict[str, Any], is_greedy: bool, ends: refill.Ends
    ) -> list[np.ndarray]:
        if not asked:
            return []
        greedy = {"top_p": _GREEDY} if is_greedy else {}
        sampling = self._opened.run.sampling(**{**self._sampling, **changed, **greedy})
        found = {}
        with self._opened.on_devices():
            for drawn in refill.draw(self._opened, asked, sampling, seed=self._budget.seed, ends=ends):
                found[drawn.index] = drawn.tokens
        return [found[index] for index in range(len(asked))]


def _template(given: np.ndarray, num_shown: int, length: int) -> templates.Template:
    tokens, is_given = np.zeros(length, np.int32), np.arange(length) < len(given)
    tokens[: len(given)] = given
    return templates.Template(tokens=tokens, is_given=is_given, length=num_shown)


if __name__ == "__main__":
    from lm_eval import __main__ as command  # pyrefly: ignore[missing-import]

    try:
        command.cli_evaluate()
    except errors.UserError as error:
        sys.exit(f"sedd_jax.harness: {error}")
