"""English novels in SentencePiece tokens, for all three kinds of model.

    sedd prepare --data='text:novels/{split}.txt.xz' --tokenizer=sentencepiece:2048 --out=data/novels
    sedd train --config=configs/novels.py --workdir=runs/novels_absorb

For the uniform graph add --config.graph.name=uniform, for the baseline --config.graph.name=autoregressive. Both also
need --config.network.scale_by_sigma=False.

Hardware: any; designed for 2 CPU cores, where each model trains for about half an hour.
Expect at most 2.20 bits per character on held-out books (absorbing), at most 2.55 (uniform), and 1.69 (autoregressive).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "prepared:data/novels", "tokenizer": "sentencepiece:2048", "length": 128},
            "network": {"hidden_size": 192, "num_layers": 4, "num_heads": 3, "dropout": 0.0, "dtype": "float32"},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 100, "beta2": 0.99, "ema_decay": 0.999},
            "training": {
                "num_steps": 3000,
                "batch_size": 16,
                "log_every": 25,
                "eval_every": 500,
                "eval_sequences": 256,
                "sample_every": 1500,
                "checkpoint_every": 500,
            },
            "sampling": {"num_steps": 128, "num_samples": 4},
        }
    )
