"""Convert a published checkpoint, bound the likelihood of text under it, and look at what it writes.

    python examples/evaluate_converted.py CHECKPOINT RUN TEXT

CHECKPOINT is a directory in the published layout, a .pth or a .ckpt. RUN is the run directory to make of it, which is
kept for the next time. TEXT is a source such as text:books/*.txt. `sedd convert` also takes one of the Hub.
"""

import pathlib
import sys

import sedd_jax
from sedd_jax.conversion import convert


def main(checkpoint: str, run: str, text: str, num_times: int = 4) -> None:
    if not pathlib.Path(run).exists():
        # With PyTorch installed, this also compares the logits of both networks.
        done = convert.convert(pathlib.Path(checkpoint), convert.Target(directory=pathlib.Path(run)))
        print(convert.describe(done))
    opened = sedd_jax.open(run)
    print(opened)
    bound = opened.bound(data=text, split="test", num_times=num_times)
    print(f"{bound.name}: at most {bound.nats_per_token:.3f} ± {bound.nats_per_token_stderr:.3f} nats per token")
    for sample in opened.sample(num_samples=2):
        print(f"--- {sample.nfe} network evaluations\n{sample.text}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
