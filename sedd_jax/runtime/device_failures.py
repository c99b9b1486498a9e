"""What JAX and devices refuse, in one line: a setting or a platform, memory, or work without a process that died."""

import os
import re
import sys

from sedd_jax.runtime import errors, last_words

_OTHERS_DIED = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|socket closed|heartbeat|coordination|peer", re.I
)
_SETTING = re.compile(r"for (?:environment '|JAX flag )(jax_\w+)", re.I)  # what JAX says of it while it is imported
_TRAINS = (
    f"lower {errors.name('config.training.batch_size')}, raise {errors.name('config.training.num_micro_batches')}, "
    f"set {errors.name('config.network.remat')}=blocks or {errors.name('config.network.dtype')}=bfloat16, or split the "
    f"model over devices by {errors.name('config.mesh.fsdp')}"
)
# What makes each command need less; `sedd plan` says beforehand what fits.
_REMEDIES = {
    "train": f"{_TRAINS}; `sedd plan` says beforehand what fits",
    "bench": _TRAINS,
    "eval": f"lower {errors.name('batch_size')}, or {errors.name('num_samples')}; `sedd plan --sample` says what fits",
    "tune-grid": f"lower {errors.name('batch_size')}; `sedd plan --sample` says what fits",
    "sample": f"draw fewer texts at once by {errors.name('num_samples')}; `sedd plan --sample` says what fits",
    "serve": "ask for fewer samples at once; `sedd plan --sample` says what fits",
}


def explained(error: BaseException, command: str) -> errors.UserError | None:
    """The error of a command that says what the devices refused; None if `error` is of another kind."""
    said = str(error)
    if "jax" not in sys.modules and isinstance(error, ValueError) and (found := _SETTING.search(said)):
        name = found[1].upper()
        problem = f"JAX cannot be loaded where the environment has {name}={os.environ.get(name, '')!r}"
        return errors.UserError(problem, remedy="correct it, or unset it")
    if isinstance(error, RuntimeError) and said.startswith("Unable to initialize backend"):
        platforms = os.environ.get("JAX_PLATFORMS")
        why = f"with JAX_PLATFORMS={platforms} in the environment ({said})" if platforms else f"({said})"
        return errors.UserError(
            f"JAX does not start {why}", remedy="`sedd doctor` says what there is; JAX_PLATFORMS=cpu needs no device"
        )
    jax = sys.modules.get("jax")
    if jax is None or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if "RESOURCE_EXHAUSTED" in said:
        wanted = re.search(r"allocat\w* ([0-9.]+ ?[KMGT]?i?B\b|[0-9]+ bytes)", said)
        problem = "out of device memory" + (f" (another {wanted[1]} were asked for)" if wanted else "")
        return errors.UserError(problem, remedy=_REMEDIES.get(command, "choose a smaller model or batch"))
    if jax.process_count() > 1 and _OTHERS_DIED.search(said):
        return errors.UserError("another process died", remedy=last_words.remedy())
    return None
