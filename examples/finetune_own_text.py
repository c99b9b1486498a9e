"""Fine-tune a run on text of your own, and compare the bounds on your held-out text before and after.

    python examples/finetune_own_text.py RUN 'text:mine/*.txt' [NEW]

RUN is a trained run, or a published model that `sedd convert` made one. NEW (runs/finetuned if not given) is the run
to make; it goes on where it was stopped. A tokenizer that depends on the text, such as characters, begins afresh.
"""

import sys

import sedd_jax
from sedd_jax import config as configs


def main(run: str, text: str, new: str = "runs/finetuned", **training: int) -> None:
    base = sedd_jax.open(run)
    config = configs.to_dict(base.config)
    config["init_from"] = run
    config["data"]["source"] = text
    # A tenth of the learning rate, and few steps: the network knows most of it.
    config["optimizer"] |= {"learning_rate": base.config.optimizer.learning_rate / 10, "warmup_steps": 20}
    config["training"] |= {"num_steps": 500, "checkpoint_every": 100, **training}
    tuned = sedd_jax.train(config, new, verbose=True)
    for name, opened in (("before", base), ("after", tuned)):
        bound = opened.bound(data=text, split="valid", num_times=4)
        print(f"{name:<7}at most {bound.bits_per_character:.3f} ± {bound.bits_per_character_stderr:.3f} bits/character")
    print(tuned.sample(num_samples=1)[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:4])
