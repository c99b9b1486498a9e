"""English novels in SentencePiece tokens: the three kinds of model on the same text.

    sedd prepare --data='text:novels/{split}.txt.xz' --tokenizer=sentencepiece:2048 --out=data/novels
    sedd train --config=configs/novels.py --workdir=runs/novels_absorb

The uniform graph takes --config.graph.name=uniform, the baseline --config.graph.name=autoregressive, both
--config.network.scale_by_sigma=False.

Hardware: anything; made for 2 CPU cores, where each takes about half an hour.
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
