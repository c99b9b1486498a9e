"""SEDD absorb small on OpenWebText as in owt_small.py, by the recipe of novels_fast.py. Not measured at this size.

    sedd train --config=configs/owt_small_fast.py --workdir=runs/owt_small_fast

Data as for owt_small.py.
The learning rate is four times that of owt_small.py, as novels_fast.py has four times that of novels.py. Neither it
nor the number of steps was tried. The bound is the same quantity as that of owt_small.py.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "prepared:data/openwebtext", "tokenizer": "gpt2", "length": 1024},
            "optimizer": {"name": "muon", "learning_rate": 1.2e-3, "schedule": "wsd", "decay_share": 0.3},
            "training": {"num_steps": 200_000},
            "sampling": {"num_steps": 1024},
        }
    )
