"""English novels as in novels.py, by a recipe that needs half the steps: Muon, and a learning rate that decays to zero.

    sedd prepare --data='text:novels/{split}.txt.xz' --tokenizer=sentencepiece:2048 --out=data/novels
    sedd train --config=configs/novels_fast.py --workdir=runs/novels_fast

For the uniform graph add --config.graph.name=uniform --config.network.scale_by_sigma=False
--config.network.normalize=True. Without the last one it learns nothing but the frequencies of tokens in so few steps.

Hardware: any; designed for 2 CPU cores, where it trains for about a quarter of an hour.
Expect at most 2.12 to 2.18 bits per character on held-out books (three seeds), where novels.py has 2.20 after 3000, and
at most 2.38 for the uniform graph (one seed), where novels.py has 2.55 after 3000.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "prepared:data/novels", "tokenizer": "sentencepiece:2048", "length": 128},
            "network": {"hidden_size": 192, "num_layers": 4, "num_heads": 3, "dropout": 0.0, "dtype": "float32"},
            "optimizer": {
                "name": "muon",
                "learning_rate": 4e-3,
                "schedule": "wsd",
                "decay_share": 0.3,
                "warmup_steps": 100,
                "beta2": 0.99,
                "ema_decay": 0.99,
            },
            "training": {
                "num_steps": 1500,
                "batch_size": 16,
                "log_every": 25,
                "eval_every": 250,
                "eval_sequences": 256,
                "sample_every": 750,
                "checkpoint_every": 500,
            },
            "sampling": {"num_steps": 128, "num_samples": 4},
        }
    )
