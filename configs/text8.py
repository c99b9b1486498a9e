"""text8, characters: the first 100 MB of Wikipedia in a-z and space (Lou et al. 2023, section 5.1).

    sedd train --config=configs/text8.py --workdir=runs/text8

Put text8's first 90M, next 5M and last 5M characters into data/text8/train.txt, valid.txt and test.txt.
Hardware: the paper used 8 A100s. Time: not measured here.
Expect at most 1.39 bits per character on test after 1M steps (published, absorbing graph; 1.47 for the uniform one).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "text:data/text8/{split}.txt", "tokenizer": "text8", "length": 256},
            "training": {"num_steps": 1_000_000, "checkpoint_every": 10_000, "eval_every": 10_000},
            "sampling": {"num_steps": 256},
        }
    )
