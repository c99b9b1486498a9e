"""text8, characters: the first 100 MB of Wikipedia in a-z and space (Lou et al. 2023, section 5.1).

    sedd train --config=configs/text8.py --workdir=runs/text8

Data: sedd prepare --data=text8 --tokenizer=text8 --out=data/text8
Hardware: the paper used 8 A100s. Time: not measured.
Expect at most 1.39 bits per character on test after 1M steps (published; 1.47 for the uniform graph).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "prepared:data/text8", "tokenizer": "text8", "length": 256},
            "training": {"num_steps": 1_000_000, "checkpoint_every": 10_000, "eval_every": 10_000},
            "sampling": {"num_steps": 256},
        }
    )
