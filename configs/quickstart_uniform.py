"""A character model of quickstart.py's text on the uniform graph, where every token may turn into every other.

    sedd train --config=configs/quickstart_uniform.py --workdir=runs/quickstart_uniform

Hardware: any; designed for 2 CPU cores, where it takes 10 minutes.
Expect a bound of about 3.37 bits per character on held-out text. Its bigram entropy is 3.70.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "python:docs", "tokenizer": "characters", "length": 96},
            "graph": {"name": "uniform"},
            "network": {
                "hidden_size": 128,
                "num_layers": 3,
                "num_heads": 4,
                "dropout": 0.0,
                "dtype": "float32",
                "scale_by_sigma": False,
            },
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 20, "beta2": 0.99, "ema_decay": 0.99},
            "training": {
                "num_steps": 3000,
                "batch_size": 32,
                "log_every": 20,
                "eval_every": 200,
                "eval_sequences": 256,
                "sample_every": 600,
                "checkpoint_every": 200,
            },
            "sampling": {"num_steps": 96, "num_samples": 2},
        }
    )
