"""SEDD absorb on Python source: the standard library that ships with CPython, in SentencePiece tokens.

    sedd train --config=configs/stdlib_code.py --workdir=runs/stdlib_code
    sedd eval --workdir=runs/stdlib_code --code

Hardware: any; designed for 2 CPU cores, where it takes about half an hour.
Expect a bound of about 1.90 bits per character (5.66 per token) on held-out modules. Few of its samples parse: 0.02 ±
0.02 of 64. Of 64 windows of held-out code that parse, 0.33 ± 0.06 still parse after an eighth is refilled.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "python:stdlib", "tokenizer": "sentencepiece:2048", "length": 192},
            "network": {"hidden_size": 192, "num_layers": 3, "num_heads": 3, "dropout": 0.0, "dtype": "float32"},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 50, "beta2": 0.99, "ema_decay": 0.999},
            "training": {
                "num_steps": 3000,
                "batch_size": 16,
                "log_every": 20,
                "eval_every": 500,
                "eval_sequences": 128,
                "sample_every": 1000,
                "checkpoint_every": 500,
            },
            "sampling": {"num_steps": 128, "num_samples": 2},
        }
    )
