"""Training: opens or continues a run, and loops over optimizer steps, measurements and checkpoints."""

import contextlib
import dataclasses
import errno
import functools
import io
import json
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array, Int

from sedd_jax import checkpoints, runs
from sedd_jax import config as configs
from sedd_jax.data import batches
from sedd_jax.model import train_state, work
from sedd_jax.runtime import accelerators, errors, last_words, leases, processes, sharding, storage
from sedd_jax.training import (
    initial_weights,
    interim,
    loss_curves,
    metric_writers,
    profiles,
    tracker_process,
    trackers,
    train_steps,
)

# Files that training writes in addition to checkpoints.
_WRITTEN = ("metrics.jsonl", "loss.png", "samples/*", "tensorboard/**/*", "profiles/**/*", tracker_process.FILE)


class NonFiniteLossError(errors.UserError):
    """The loss or the norm of its gradient is not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Session:
    """What stays the same from the first step of a training process to its last.

    Attributes:
        run: the run.
        mesh: the devices.
        saved: its checkpoints.
        writer: where metrics and messages go.
        profile: traces the steps that `training.profile` names.
        told_to_stop: (step just taken) -> whether SIGTERM has come.
        again: the command that resumes the run, in words.
    """

    run: runs.Run
    mesh: jax.sharding.Mesh
    saved: checkpoints.Checkpoints
    writer: metric_writers.Writer
    profile: profiles.Profile
    told_to_stop: Callable[[int], bool]
    again: str


def train(
    config: configs.Config,
    workdir: storage.Directory,
    *,
    from_step: int | None = None,
    stream: io.TextIOBase | None = None,
) -> dict[str, Any]:
    """Trains until config.training.num_steps. Resumes from the newest checkpoint if the directory has one.

    On SIGTERM to any of its processes it saves the current step and returns early.

    Args:
        config: a validated config.
        workdir: run directory, local or gs://, created if it does not exist. Every process must see it.
        from_step: step of the checkpoint to resume from, which removes newer ones; the newest if None.
        stream: where progress goes; standard error if None.

    Returns:
        The step reached and the last value of every metric written.

    Raises:
        NonFiniteLossError: names the step and the newest checkpoint.
        errors.UserError: if the config, the corpus or the directory do not allow a run; if the checkpoint is damaged;
            if the directory cannot be written any more, in which case it names the newest checkpoint.
        KeyboardInterrupt: on Ctrl-C; names the newest checkpoint.
    """
    mesh = sharding.make_mesh(config.mesh)
    train_steps.check_batch(config, mesh)
    if not storage.holds(workdir, "config.json"):
        if from_step is not None:
            problem = f"goes with a run that has checkpoints; {workdir} is not one yet"
            raise errors.UserError(problem, field="step", value=from_step, remedy="leave it out")
        if config.init_from:
            initial_weights.check(config)
    with contextlib.ExitStack() as owner:
        processes.first_then_all("start", lambda: _start(owner, workdir, config))
        if not storage.holds(workdir, "config.json"):
            raise errors.UserError(
                f"does not exist for {processes.describe()}",
                field="workdir",
                value=workdir,
                remedy="give a directory that all processes share, or gs://",
            )
        run = runs.load(workdir)
        optimizer = train_steps.make_optimizer(config)
        keep = {"keep": config.training.keep_checkpoints, "keep_every": config.training.keep_checkpoints_every}
        saved = checkpoints.Checkpoints(run.checkpoint_dir, **keep)
        again = "the same command" if from_step is None else "the same command without --step"
        try:
            # A second SIGTERM must not end a save in progress.
            with processes.told_to_stop() as told_to_stop, contextlib.closing(saved), jax.set_mesh(mesh):
                state, step, said = initial_state(run, optimizer, mesh, saved, from_step)
                step_fn: Any = train_steps.make_step_fn(run, optimizer, mesh, state)
                if profiles.is_due(run.config.training, step):
                    step_fn = train_steps.lower_step(run, mesh)[
                        1
                    ].compile()  # Its text says which module each kernel belongs to.
                with (
                    _make_writer(run, mesh, step, stream) as writer,
                    contextlib.closing(profiles.Profile(run, step_fn, writer.say)) as profile,
                ):
                    if said:
                        writer.say(said)
                    if processes.is_first():
                        # It ends with `owner`, once the last checkpoint is complete.
                        owner.enter_context(trackers.follow(run, writer.say))
                    session = _Session(
                        run=run,
                        mesh=mesh,
                        saved=saved,
                        writer=writer,
                        profile=profile,
                        told_to_stop=told_to_stop,
                        again=again,
                    )
                    return _loop(session, step_fn, state, step)
        except OSError as error:
            remedy = f"{saved.newest()}; {_amends(error, workdir)}, then {again} goes on"
            raise errors.UserError(errors.reason(error), remedy=remedy) from error
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(f"{saved.newest()} in {workdir}; {again} goes on") from interrupt


def _amends(error: OSError, workdir: storage.Directory) -> str:
    """What to do about a run directory that can no longer be written."""
    if not storage.is_remote(workdir) and not storage.holds(workdir, "config.json"):
        return f"put {workdir} back, which was moved or removed"
    if error.errno in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error):
        return f"make room for {workdir}"
    return f"make {workdir} writable"


def _start(owner: contextlib.ExitStack, workdir: storage.Directory, config: configs.Config) -> None:
    trackers.check(config)
    owner.enter_context(leases.owned(workdir, "workdir"))
    runs.start(workdir, config)


def initial_state(
    run: runs.Run,
    optimizer: optax.GradientTransformationExtraArgs,
    mesh: jax.sharding.Mesh,
    saved: checkpoints.Checkpoints,
    from_step: int | None = None,
) -> tuple[train_state.TrainState, int, str]:
    """The state of a checkpoint, or a fresh one if there is none, sharded over the mesh.

    Args:
        run: the run.
        optimizer: its optimizer.
        mesh: the devices.
        saved: its checkpoints.
        from_step: step of the checkpoint, after whose restoration newer ones are removed; the newest if None.

    Returns:
        The state, its step, and a message for the user ("" for none).
    """
    create = train_steps.make_state_fn(run, optimizer, mesh)
    step = saved.find(from_step)
    if step is None:
        state, said = create(), ""
        if run.config.init_from:
            state, said = initial_weights.take(run, state, mesh)
        return state, 0, said
    state = saved.restore(step, sharding.shapes_on(mesh, jax.eval_shape(create)))
    if from_step is not None:
        saved.remove_after(from_step)
    return state, step, ""


def _loop(session: _Session, step_fn: train_steps.StepFn, state: train_state.TrainState, step: int) -> dict[str, Any]:
    """Trains from the state of a step on; returns what `train` does."""
    run, saved, writer = session.run, session.saved, session.writer
    settings = run.config.training
    data = run.split("train")
    measured = interim.make(run, session.mesh, writer)
    plot = loss_curves.occasional_plot(run.local / "metrics.jsonl", run.local / "loss.png", _reference_entropies(run))
    written: dict[str, Any] = {"step": step}
    pending: tuple[int, train_steps.Metrics] | None = None
    leave_words = lambda: last_words.leave(lambda: f"{saved.newest()}; {session.again} goes on")
    leave_words()
    has_saved = False  # Since words were left, which lists the checkpoints, in a bucket over the network.
    if step:
        nothing = (
            "" if step < settings.num_steps else f", config.training.num_steps={settings.num_steps}: nothing to do"
        )
        writer.say(f"resumed {run.workdir} at step {step}{nothing}")
        written |= measured.make_up(step, state)
    while step < settings.num_steps:
        session.profile.begin(step, state)
        state, metrics = step_fn(state, _batch(run, data, step, session.mesh))
        step += 1
        written["step"] = step
        # Metrics of the previous step are read only now, while the device computes this step.
        if pending is not None:
            _check_finite(*pending, saved)
        pending = (step, metrics)
        stops = session.told_to_stop(step) and step < settings.num_steps
        session.profile.end(step, metrics, is_last=stops or step == settings.num_steps)
        due = functools.partial(interim.is_due, step, settings.num_steps)
        if due(settings.log_every):
            _check_finite(step, metrics, saved)
            if saved.check() and has_saved:
                leave_words()
                has_saved = False
            train_metrics = _train_metrics(run, data, metrics)
            written |= train_metrics
            writer.write(step, train_metrics)
        saves = due(settings.checkpoint_every) or stops
        if saves or measured.is_due(step):
            _check_finite(step, metrics, saved)  # It waits for the step, which is training time, before the pause.
        if not stops:
            written |= measured.measure(step, state)
        if saves:
            with writer.pause():
                if processes.is_first():
                    plot(stops or step == settings.num_steps)
                    # Before the checkpoint: a run that resumes from it needs the metrics of the steps up to it.
                    storage.upload(run.workdir, *_WRITTEN)
                saved.save(step, state)
                has_saved = True
        if stops:
            saved.wait()
            writer.say(f"stopped by SIGTERM at step {step}, which is saved in {run.workdir}: {session.again} goes on")
            break
    return written


def _batch(run: runs.Run, data: batches.PackedSplit, step: int, mesh: jax.sharding.Mesh) -> Int[Array, "B L"]:
    """The batch of a step. Each process reads only the sequences of its own devices."""
    size = train_steps.num_texts(run.config.training)
    read = lambda index: data.batch(step, batch_size=size, seed=run.config.seed, rows=index[0])
    return jax.make_array_from_callback((size, data.length), sharding.batch_sharding(mesh), read)


def _make_writer(
    run: runs.Run, mesh: jax.sharding.Mesh, step: int, stream: io.TextIOBase | None
) -> metric_writers.Writer:
    if not processes.is_first():
        return metric_writers.NoWriter()
    config, accelerator = run.config, accelerators.find(jax.devices()[0].device_kind)
    writer = metric_writers.MetricWriter(
        run.local,
        num_steps=config.training.num_steps,
        start_step=step,
        unit=run.tokenizer.unit,
        work=metric_writers.Work(
            tokens=config.training.batch_size * config.data.length,
            flops_per_token=work.of_training(
                run.network, work.head_share(run.network, run.process), 1, config.data.length
            ).needed,
            peak_flops=None if accelerator is None else accelerator.peak_flops * mesh.size,
        ),
        stream=stream,
        tensorboard=config.training.tracker == "tensorboard",
    )
    writer.write_text(step, "config", json.dumps(configs.flatten(configs.to_dict(config)), indent=2))
    return writer


def _train_metrics(run: runs.Run, data: batches.PackedSplit, metrics: train_steps.Metrics) -> dict[str, float]:
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    per_unit = data.characters_per_token if run.tokenizer.unit == "character" else 1.0
    values[f"train/bits_per_{run.tokenizer.unit}"] = values["train/loss"] / (math.log(2) * per_unit)
    return values


def _reference_entropies(run: runs.Run) -> dict[str, float]:
    """Unigram and bigram entropy of the held-out text in bits, to compare the losses of a character model with."""
    if run.tokenizer.unit != "character" or not processes.is_first():
        return {}
    valid = run.split("valid")
    measured = valid.tokens.read(0, min(valid.num_tokens, batches.MEASURED_TOKENS))
    known = batches.entropies(measured, run.graph.num_states)
    return {"unigram entropy": known.unigram, "bigram entropy": known.bigram}


def _check_finite(step: int, metrics: train_steps.Metrics, saved: checkpoints.Checkpoints) -> None:
    """Raises NonFiniteLossError if the loss or the norm of its gradient is not finite."""
    for name in ("train/loss", "train/grad_norm"):
        if not np.isfinite(metrics[name]):
            saved.wait()
            raise NonFiniteLossError(
                f"{name} is {float(metrics[name])} at step {step}",
                remedy=f"{saved.newest()}; lower the learning rate",
            )
