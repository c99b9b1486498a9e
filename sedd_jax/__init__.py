"""Score entropy discrete diffusion (Lou, Meng, Ermon 2023, arXiv 2310.16834) in JAX.

    import sedd_jax

    run = sedd_jax.open("runs/quickstart")
    print(run.sample(template="Hi {32}", num_samples=2)[0].text)

Wings, each above those that it imports:

| folder | what |
|---|---|
| `cli/` | the command line |
| `front_door` | the same for Python: `open`, `train` |
| `harness` | the same for lm-evaluation-harness |
| `performance/` | benchmarks, plans for devices that are not here, and the examination of this machine |
| `training/` | the training loop and what it writes |
| `conversion/` | checkpoints to and from PyTorch and StableHLO, and their cards |
| `comparison` | several runs side by side |
| `evaluation/` | measurements that are kept and shown: likelihood, quality of samples, infilling, code |
| `bounds/` | bounds on the likelihood of sequences and texts, and their errors |
| `serving/` | the page of `sedd serve` |
| `sampling/` | text from a run: templates, patterns, prompts, and the one engine that fills them |
| `runs`, `config`, `config_files`, `checkpoints` | a run directory and what is in it |
| `model/` | the network, its streamed head, what is drawn from it, the training objective |
| `programs/` | problems to solve by code, and the sandbox that tries solutions |
| `data/` | text, tokenizers, batches |
| `reverse/` | the reverse process: steps, samplers, correctors, time grids, as pure functions of arrays |
| `diffusion/` | the paper: forward process, graphs, noise and loss, likewise |
| `runtime/` | devices, processes, storage, errors |

From the command line to the loss: `cli.main` -> `training.train` -> `training.train_steps` -> `model.objectives` ->
`diffusion.losses` -> `diffusion.graphs`.

Symbols, one meaning each:

| name | meaning |
|---|---|
| `vocab_size` N | real tokens; `num_states` is N + 1 for the absorbing graph (the mask), N for the uniform one |
| `x0`, `xt` | clean and noised tokens, int `[B, L]` |
| `t` | time in [0, 1] |
| `sigma`, `dsigma_dt` | total noise, and its rate |
| `delta_sigma` | sigma(t) - sigma(t - dt), the noise one reverse step removes |
| `a` | e^sigma - 1 |
| `z` | the network's raw output; `log_score` what it means; `score` = exp(log_score); `ratio` the true conditional
ratio |
| `nelbo`, `ppl_bound` | a bound on negative log-likelihood, and exp of it per token |
| `nfe` | number of network evaluations |
| `step`, `iteration` | a reverse step; a step or one of its repetitions by a corrector |

Dimensions: B batch, L length, V states, P states padded for the hardware, D model, H heads, K head size, C condition,
N layers, E evaluations of the network.
"""

import os as _os
from typing import TYPE_CHECKING, Any

from sedd_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from sedd_jax import front_door

__all__ = ("UserError", "open", "train")


def open(workdir: "str | _os.PathLike[str]", *, step: int | None = None) -> "front_door.OpenRun":
    """Opens a run directory, to sample, fill gaps and bound the likelihood of text.

    Args:
        workdir: the run directory: text, a Path, or gs://BUCKET/RUN.
        step: training step of the checkpoint; the newest if None.

    Raises:
        UserError: names what is wrong with the directory, and what to do.
    """
    from sedd_jax import front_door

    return front_door.OpenRun(workdir, step)


def train(config: Any, workdir: "str | _os.PathLike[str]", *, verbose: bool = False) -> "front_door.OpenRun":
    """Trains a run, or goes on with it from its newest checkpoint, and opens it.

    Args:
        config: a packaged config such as "quickstart", the path of such a file, a `config.Config`, or the fields that
            differ from the defaults, nested as in such a file.
        workdir: run directory, made if it does not exist.
        verbose: whether to show progress.

    Raises:
        UserError: names what is wrong, and what to do.
    """
    from sedd_jax import front_door

    return front_door.train(config, workdir, verbose=verbose)
