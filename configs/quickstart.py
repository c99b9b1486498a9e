"""A small model of the English documentation that ships with CPython, for a first look on any machine.

    sedd train --config=configs/quickstart.py --workdir=runs/quickstart

Hardware: any; designed for 2 CPU cores, where it takes some 7 minutes on slow ones.
Expect a bound of about 2.28 bits per character on held-out text. The bigram entropy of its characters is 3.70.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
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
            "training": {
                "num_steps": 2000,
                "batch_size": 16,
                "log_every": 20,
                "eval_every": 200,
                "eval_sequences": 256,
                "sample_every": 1000,
                "checkpoint_every": 200,
            },
            "sampling": {"num_steps": 96, "num_samples": 2},
        }
    )
