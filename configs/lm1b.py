"""SEDD absorb small on One Billion Words, packed to sequences of 128 tokens (Lou et al. 2023, section 5.1).

    sedd train --config=configs/lm1b.py --workdir=runs/lm1b

The tokens are WordPiece of bert-base-uncased.
Data: sedd prepare --data=lm1b --tokenizer=wordpiece:data/bert-base-uncased.txt --out=data/lm1b. The file holds BERT's
vocabulary. Needs pip install -e '.[wordpiece]'.
Hardware: the paper used 8 A100 80 GB. Time: not measured.
Expect a test ppl_bound of at most 32.79 after 1M steps (published; 40.25 for the uniform graph).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {
                "source": "prepared:data/lm1b",
                "tokenizer": "wordpiece:data/bert-base-uncased.txt",
                "length": 128,
            },
            "training": {"num_steps": 1_000_000, "checkpoint_every": 10_000, "eval_every": 10_000},
            "sampling": {"num_steps": 128},
        }
    )
