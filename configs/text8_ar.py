"""The autoregressive baseline of text8.py: the same network, causal, with the same data and optimizer.

    sedd train --config=configs/text8_ar.py --workdir=runs/text8_ar

Data and hardware as for text8.py. Time: not measured.
Expect about 1.23 bits per character on test after 1M steps (published, for a baseline of this size).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "prepared:data/text8", "tokenizer": "text8", "length": 256},
            "graph": {"name": "autoregressive"},
            "network": {"scale_by_sigma": False},
            "training": {"num_steps": 1_000_000, "checkpoint_every": 10_000, "eval_every": 10_000},
        }
    )
