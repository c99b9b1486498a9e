"""The share of words in a run's samples that also occur in its training text: how much of what it writes is English.

    python examples/known_words.py runs/quickstart

Words are three letters or more, in lower case; the first and the last of a sample may be cut off and do not count.
Beside it stands the share for the held-out text, in pieces of the same length.
"""

import re
import sys

import sedd_jax
from sedd_jax import runs


def words(text: str) -> list[str]:
    """The words of a text but for the first and the last."""
    return [word for word in re.findall(r"[a-z]+", text.lower())[1:-1] if len(word) > 2]


def main(workdir: str, num_samples: int = 64, num_steps: int = 96) -> dict[str, float]:
    run, files = sedd_jax.open(workdir), runs.load(workdir)
    known = set(words(run.tokenizer.decode(files.split("train").tokens.read(0, files.split("train").num_tokens))))
    held_out = [run.tokenizer.decode(row) for row in files.split("valid").sequences()]
    samples = run.sample(num_samples=num_samples, num_steps=num_steps)
    shares = {}
    for name, texts in {"samples": [sample.text for sample in samples], "held-out text": held_out}.items():
        found = [word for text in texts for word in words(text)]
        shares[name] = sum(word in known for word in found) / max(1, len(found))
        print(f"{name}: {shares[name]:.3f} of {len(found):,} words occur in the training text")
    return shares


if __name__ == "__main__":
    main(*sys.argv[1:2])
