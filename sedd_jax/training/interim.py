"""What a run measures on its way, with the moving average of its parameters: bounds on held-out text, and samples."""

import dataclasses
from collections.abc import Callable

import jax

from sedd_jax import runs
from sedd_jax.bounds import likelihoods
from sedd_jax.model import networks, train_state
from sedd_jax.runtime import processes, storage
from sedd_jax.sampling import generate, templates
from sedd_jax.training import metric_writers


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Interim:
    """Measures a run where that is due.

    Attributes:
        run: the run.
        mesh: the devices.
        writer: where metrics and samples go.
        held_out_fn: what `likelihoods.make_held_out` gives for the run.
    """

    run: runs.Run
    mesh: jax.sharding.Mesh
    writer: metric_writers.Writer
    held_out_fn: Callable[[networks.Params], dict[str, float]]

    def is_due(self, step: int) -> bool:
        """Whether `measure` does anything after a step."""
        settings = self.run.config.training
        return any(is_due(step, settings.num_steps, every) for every in (settings.eval_every, settings.sample_every))

    def measure(self, step: int, state: train_state.TrainState) -> dict[str, float]:
        """Evaluates and samples after a step if that is due. Returns the metrics of the evaluation, if any."""
        settings = self.run.config.training
        due = lambda every: is_due(step, settings.num_steps, every)
        return self._measure(step, state, evaluates=due(settings.eval_every), draws=due(settings.sample_every))

    def make_up(self, step: int, state: train_state.TrainState) -> dict[str, float]:
        """`measure` of the step at which a run goes on, as far as that is missing: SIGTERM leaves it out."""
        settings, local = self.run.config.training, self.run.local
        if step in (0, settings.num_steps):
            return {}
        lacks = lambda every, has: is_due(step, settings.num_steps, every) and not processes.agreed(has)
        has_metrics = lambda: metric_writers.holds(local / "metrics.jsonl", step, "valid/")
        return self._measure(
            step,
            state,
            evaluates=lacks(settings.eval_every, has_metrics),
            draws=lacks(settings.sample_every, (local / _samples_of(step)).exists),
        )

    def _measure(self, step: int, state: train_state.TrainState, *, evaluates: bool, draws: bool) -> dict[str, float]:
        found = {}
        if evaluates:
            with self.writer.pause():
                found = self.held_out_fn(state.ema_params)
            self.writer.write(step, found)
        if draws:
            with self.writer.pause():
                model = networks.Model(self.run.network, state.ema_params)
                opened = runs.OpenRun(run=self.run, step=step, model=model, mesh=self.mesh)
                text = _write_samples(opened)
                self.writer.say(text)
                self.writer.write_text(step, "samples", text)
        return found


def make(run: runs.Run, mesh: jax.sharding.Mesh, writer: metric_writers.Writer) -> Interim:
    """What measures a run. Reads its held-out text."""
    return Interim(run=run, mesh=mesh, writer=writer, held_out_fn=likelihoods.make_held_out(run))


def is_due(step: int, num_steps: int, every: int) -> bool:
    """Whether something that is done at multiples of `every` steps (0: never) and at the last step is due."""
    return every > 0 and (step % every == 0 or step == num_steps)


def _samples_of(step: int) -> str:
    return f"samples/{step:08d}.txt"


def _write_samples(opened: runs.OpenRun) -> str:
    run, step = opened.run, opened.step
    samples = generate.draw_samples(opened, templates.parse(run, ""), run.config.sampling, seed=step)
    text = "\n".join(f"--- sample {sample.index + 1} at step {step}\n{sample.text}" for sample in samples)
    if processes.is_first():
        path = run.local / _samples_of(step)
        path.parent.mkdir(exist_ok=True)
        storage.replace_text(path, text + "\n")
    return text
