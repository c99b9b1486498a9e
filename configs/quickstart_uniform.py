"""The quick start on the uniform graph, where every token may turn into every other.

    sedd train --config=configs/quickstart_uniform.py --workdir=runs/quickstart_uniform

As quickstart.py, with network.normalize, without which novels_fast.py learns little more than the frequencies of
tokens on this graph.

Hardware: any; designed for 2 CPU cores, where it takes some 10 minutes on slow ones.
Expect a bound of about 2.43 bits per character on held-out text (absorbing: 2.28).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "python:docs", "tokenizer": "sentencepiece:2048", "length": 96},
            "graph": {"name": "uniform"},
            "network": {
                "hidden_size": 128,
                "num_layers": 3,
                "num_heads": 4,
                "dropout": 0.0,
                "dtype": "float32",
                "scale_by_sigma": False,
                "normalize": True,
            },
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
