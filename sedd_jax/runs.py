"""Run directories: config.json, tokenizer.json, data/, checkpoints/, metrics.jsonl and samples/ of one run."""

import contextlib
import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax

from sedd_jax import checkpoints, config_files
from sedd_jax import config as configs
from sedd_jax.data import alphabets, batches, corpora, prepare, shards, tokenizers
from sedd_jax.diffusion import forward, graphs
from sedd_jax.model import autoregression, networks, sampling_config, train_state
from sedd_jax.reverse import samplers
from sedd_jax.runtime import errors, sharding, storage

_REPAIR = "copy it again from where it was written"
TIME_GRID = "time_grid.json"
_PREPARED = "prepared:"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """An opened run directory.

    Attributes:
        workdir: the directory, local or in a bucket.
        config: config of the run.
        tokenizer: tokenizer of the run.
    """

    workdir: storage.Directory
    config: configs.Config
    tokenizer: tokenizers.Tokenizer

    @functools.cached_property
    def process(self) -> forward.Process:
        """The forward process."""
        return configs.make_process(self.config, self.tokenizer.vocab_size, self.tokenizer.mask_id)

    @property
    def graph(self) -> graphs.Graph:
        """The graph of the forward process."""
        return self.process.graph

    @property
    def network(self) -> networks.NetworkConfig:
        """Sizes of the network, with the number of states and the attention mask that follow from the graph."""
        return dataclasses.replace(self.config.network, num_states=self.graph.num_states, causal=self.is_autoregressive)

    @property
    def is_autoregressive(self) -> bool:
        """Whether the run is the autoregressive baseline."""
        return not configs.is_diffusion(self.config)

    def sampling(self, **changed: Any) -> configs.SamplingConfig:
        """The run's sampling settings, with some fields changed. The grid "tuned" becomes the times of `tuned_grid`.

        Raises:
            errors.UserError: names the field that is unknown, or cannot have its value.
        """
        known = [field.name for field in dataclasses.fields(configs.SamplingConfig)]
        if unknown := [name for name in changed if name not in known]:
            raise errors.UserError("is no setting", field=unknown[0], remedy=f"give some of {', '.join(known)}")
        if changed.get("grid") == "tuned":
            changed["grid"] = self.tuned_grid()
        sampling = dataclasses.replace(self.config.sampling, **changed)
        configs.validate(dataclasses.replace(self.config, sampling=sampling))
        return sampling

    def sampler(self, settings: configs.SamplingConfig) -> samplers.Sampler:
        """The sampler that the settings describe; the autoregressive baseline has its own."""
        if self.is_autoregressive:
            return autoregression.LeftToRight(length=self.config.data.length)
        return sampling_config.make_sampler(settings)

    def tuned_grid(self) -> str:
        """The time grid that `sedd tune-grid` found for this run, as a list of times such as "1,0.8,0.3,0".

        Raises:
            errors.UserError: where there is none.
        """
        storage.download(self.workdir, TIME_GRID)
        if not (self.local / TIME_GRID).exists():
            raise errors.UserError(
                f"{self.workdir} has no tuned grid",
                remedy=f"`sedd tune-grid --workdir={self.workdir} --num_steps=N` makes one",
            )
        times = read_json(self.local / TIME_GRID).get("times")
        if not isinstance(times, list) or not all(isinstance(t, float | int) for t in times):
            raise errors.UserError(f"{self.local / TIME_GRID} is damaged (it holds no times)", remedy=_REPAIR)
        return ",".join(f"{t:.7g}" for t in times)

    @property
    def local(self) -> pathlib.Path:
        """The local directory in which this process reads and writes everything but checkpoints."""
        return storage.local_copy(self.workdir)

    @property
    def checkpoint_dir(self) -> storage.Directory:
        return self.workdir / storage.CHECKPOINTS

    def split(self, name: str) -> batches.PackedSplit:
        """One split, "train" or "valid", of the run's packed text.

        Raises:
            errors.UserError: where the run has no text, or its text is damaged.
        """
        storage.download(self.workdir, "data")
        directory = self.local / "data"
        if not directory.exists():
            raise errors.UserError(
                f"{self.workdir} has no text of its own, like any converted checkpoint",
                remedy=f"give {errors.name('data')}, or sample",
            )
        return batches.open_split(directory, name, self.config.data.length, tokenizer=self.tokenizer)

    def restore(self, step: int | None = None, *, weights: str = "ema_params") -> "OpenRun":
        """The run with the weights of a checkpoint, on the mesh of all devices.

        Args:
            step: training step of the checkpoint; the newest if None.
            weights: "ema_params" (the moving average of the parameters) or "params".

        Raises:
            errors.UserError: as `params` does.
        """
        mesh = sharding.make_mesh(sharding.MeshConfig())
        found, params = self.params(weights, mesh, step)
        return OpenRun(run=self, step=found, model=networks.Model(self.network, params), mesh=mesh)

    def params(
        self, name: str, mesh: jax.sharding.Mesh | None = None, step: int | None = None
    ) -> tuple[int, networks.Params]:
        """Step and parameters of a checkpoint.

        Args:
            name: "ema_params" (the moving average of the parameters) or "params".
            mesh: devices to restore to; one device if None.
            step: training step of the checkpoint; the newest if None.

        Raises:
            errors.UserError: where there is no such checkpoint, or it is damaged.
        """
        mesh = sharding.make_mesh(sharding.MeshConfig(), jax.local_devices()[:1]) if mesh is None else mesh
        if not self.checkpoint_dir.exists():
            raise errors.UserError(
                f"{self.workdir} has no checkpoint yet",
                remedy=f"train longer than {errors.name('config.training.checkpoint_every')}",
            )
        with contextlib.closing(checkpoints.Checkpoints(self.checkpoint_dir)) as saved:
            found = saved.find(step)
            if found is None:
                raise errors.UserError(f"{self.workdir} has no complete checkpoint", remedy="train longer")
            shapes = jax.eval_shape(lambda: networks.init(jax.random.key(0), self.network))
            return found, saved.restore_params(found, sharding.shapes_on(mesh, shapes), name)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class OpenRun:
    """A run with the weights of one checkpoint on the devices.

    Attributes:
        run: the run.
        step: training step of the checkpoint.
        model: network and parameters, usually the moving average of the parameters.
        mesh: the mesh of devices that holds the parameters.
    """

    run: Run
    step: int
    model: networks.Model
    mesh: jax.sharding.Mesh

    @functools.cached_property
    def checksum(self) -> int:
        """`checkpoints.checksum` of the weights. Another training may make other weights of the same step."""
        return checkpoints.checksum(self.model.params)

    def on_devices(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which compiled functions run on the mesh."""
        return jax.set_mesh(self.mesh)


def start(workdir: storage.Directory, config: configs.Config) -> None:
    """Prepares the run in `workdir` to continue; or creates a new run, with its tokenizer and packed text.

    A new directory appears complete or not at all; in a bucket, config.json is written last.

    Raises:
        errors.UserError: where the directory is not a run directory, its config differs in a field that may not change,
            or its text is damaged.
    """
    local = storage.local_copy(workdir)
    if storage.holds(workdir, "config.json"):
        storage.download(workdir, "tokenizer.json", *tokenizers.FILES.values())
        tokenizers.put_file_back(local / "tokenizer.json", config.data.tokenizer)
        storage.upload(workdir, *tokenizers.FILES.values())
        run = load(workdir)
        changed = configs.changes(_moved(run, config.data), config)
        if changed:
            raise errors.UserError(
                f"was started with another config: {'; '.join(changed)}",
                field="workdir",
                value=workdir,
                remedy="give another",
            )
        storage.download(workdir, "data", "metrics.jsonl", "samples", "tensorboard", "tracker.json")
        if (local / "data").exists():
            _follow(local / "data", run.config.data.source, config.data.source)
            shards.verify(local / "data")
        write_json(local / "config.json", configs.to_dict(config))
        storage.upload(workdir, "config.json", "data/header.json")
        return
    # In a bucket, where files appear one by one, a start that was killed may have left these.
    ours = ("data", "tokenizer.json", *tokenizers.FILES.values()) if storage.is_remote(workdir) else ()
    if not storage.is_free(workdir, *ours):
        raise errors.UserError(
            "exists and is not a run directory", field="workdir", value=workdir, remedy="give another"
        )
    storage.clear(workdir)
    with storage.new_directory(local) as partial:
        tokenizer = _fill(partial / "data", config.data)
        for split in ("train", "valid"):
            batches.open_split(partial / "data", split, config.data.length)
        _describe(partial, config, tokenizer)
    storage.upload(workdir)


def _moved(run: Run, data: configs.DataConfig) -> configs.Config:
    """The run's config. Where `data` names another place of prepared text, or of the same tokenizer, it is that."""
    here, there = run.config.data, data
    if here.source.startswith(_PREPARED) and there.source.startswith(_PREPARED):
        here = dataclasses.replace(here, source=there.source)
    if here.tokenizer != there.tokenizer and not tokenizers.is_learned(there.tokenizer):
        is_same = tokenizers.fingerprint(there.tokenizer) == run.tokenizer.fingerprint()
        here = dataclasses.replace(here, tokenizer=there.tokenizer if is_same else here.tokenizer)
    return dataclasses.replace(run.config, data=here)


def _follow(link: pathlib.Path, before: str, now: str) -> None:
    """Links a run's text to where its prepared text is now, if it is the same.

    Args:
        link: the run's data directory.
        before: the source that the run had.
        now: the source that its config names now.
    """
    if not now.startswith(_PREPARED) or (now == before and shards.is_whole_link(link)):
        return
    place = storage.directory(now.removeprefix(_PREPARED))
    if now == before and not (shards.is_packed(place) and shards.is_same(place, link)):
        return  # Opening the link says what is wrong.
    if not shards.is_same(place, link):
        raise errors.UserError(
            f"{place} holds other text than this run began with",
            remedy=f"name the same text in {errors.name('config.data.source')}, or begin another run",
        )
    shards.link(link, place)


def _fill(directory: pathlib.Path, config: configs.DataConfig) -> tokenizers.Tokenizer:
    """Packs a run's text into a directory, or links to prepared text; returns its tokenizer."""
    if not config.source.startswith(_PREPARED):
        tokenizers.check(config.tokenizer)
        corpus = corpora.find(config.source)
        tokenizer = tokenizers.build(config.tokenizer, corpus.texts)
        directory.mkdir(parents=True)
        shards.pack(corpus, tokenizer, directory, source=config.source, tokenizer_spec=config.tokenizer)
        return tokenizer
    prepared = storage.directory(config.source.removeprefix(_PREPARED))
    tokenizer = prepare.read_tokenizer(prepared, config.tokenizer, field="config.data.tokenizer")
    shards.verify(prepared)
    shards.link(directory, prepared)
    return tokenizer


def fill(
    directory: pathlib.Path, config: configs.Config, tokenizer: tokenizers.Tokenizer, state: train_state.TrainState
) -> Run:
    """Makes a new directory a run directory with the given train state as its only checkpoint, and without data."""
    _describe(directory, config, tokenizer)
    with contextlib.closing(checkpoints.Checkpoints(directory / storage.CHECKPOINTS, keep=1)) as saved:
        saved.save(int(state.step), state)
    return load(directory)


def unsaved(config: configs.Config, vocab_size: int) -> Run:
    """A run without a directory and tokenizer, for compiling its steps or timing them on random tokens."""
    return Run(workdir=pathlib.Path(), config=config, tokenizer=alphabets.Ids(vocab_size=vocab_size))


def load(workdir: storage.Directory | str, *, field: str = "workdir") -> Run:
    """Opens a run directory. Errors call it by the name of the input, `field`.

    Raises:
        errors.UserError: where `workdir` is not a run directory, or its files are damaged.
    """
    workdir = storage.directory(workdir)
    if not storage.holds(workdir, "config.json"):
        raise errors.UserError(
            "is not a run directory, it has no config.json",
            field=field,
            value=workdir,
            remedy="give that of a training run",
        )
    storage.download(workdir, "config.json", "tokenizer.json", *tokenizers.FILES.values())
    local = storage.local_copy(workdir)
    saved = read_json(local / "config.json")
    try:
        config = config_files.read_saved(saved)
    except errors.UserError as error:
        raise error.at(f"{local / 'config.json'}, which another version may have written") from error
    tokenizer = tokenizers.read(local / "tokenizer.json")
    return Run(workdir=workdir, config=config, tokenizer=tokenizer)


def _describe(directory: pathlib.Path, config: configs.Config, tokenizer: tokenizers.Tokenizer) -> None:
    write_json(directory / "config.json", configs.to_dict(config))
    tokenizers.write(tokenizer, directory / "tokenizer.json")


def write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    """Writes a JSON file atomically: it appears complete or not at all."""
    storage.replace_text(path, json.dumps(content, indent=2) + "\n")


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The content of a file that `write_json` wrote.

    Raises:
        errors.UserError: where the file is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise errors.UserError(f"{path} is damaged ({error})", remedy=_REPAIR) from error
    if not isinstance(found, dict):
        raise errors.UserError(f"{path} is damaged (it holds no object)", remedy=_REPAIR)
    return found
