"""Train a small model on the English inside CPython, then fill gaps in a sentence.

    python examples/train_and_infill.py [RUN]

Takes some 7 minutes on two slow cores. RUN (runs/example if not given) goes on where it was stopped.
"""

import sys

import sedd_jax

TEMPLATE = "The {5} method returns {8} object."


def main(workdir: str, **training: int) -> None:
    config = {
        "data": {"source": "python:docs", "tokenizer": "sentencepiece:2048", "length": 96},
        "network": {"hidden_size": 128, "num_layers": 3, "num_heads": 4, "dropout": 0.0, "dtype": "float32"},
        "optimizer": {
            "name": "muon",
            "learning_rate": 4e-3,
            "schedule": "wsd",
            "decay_share": 0.3,
            "warmup_steps": 20,
            "beta2": 0.99,
            "ema_decay": 0.99,
        },
        "training": {"num_steps": 2000, "batch_size": 16, "sample_every": 0, "checkpoint_every": 200, **training},
        "sampling": {"num_steps": 96},
    }
    run = sedd_jax.train(config, workdir, verbose=True)
    for text in run.infill([TEMPLATE] * 4, seed=0):
        print(text)
    bound = run.bound(TEMPLATE.replace("{5}", "returned").replace("{8}", "a new"))
    print(f"at most {bound.bits_per_character:.2f} ± {bound.bits_per_character_stderr:.2f} bits per character")


if __name__ == "__main__":
    main(*sys.argv[1:2] or ["runs/example"])
