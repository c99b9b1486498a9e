"""SEDD absorb medium on OpenWebText, 24 x 1024, GPT-2 tokens (Lou et al. 2023, section 5.2).

    sedd train --config=configs/owt_medium.py --workdir=runs/owt_medium

Data as for owt_small.py.
Hardware: the paper used 8 A100 80 GB. The backward pass recomputes blocks (remat), which needs less memory. Time: not
measured.
Expect zero-shot ppl_bounds of the published checkpoint: LAMBADA 42.77, WikiText2 31.04, PTB 87.12, WikiText103 29.98,
1BW 61.19.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "prepared:data/openwebtext", "tokenizer": "gpt2", "length": 1024},
            "network": {"hidden_size": 1024, "num_layers": 24, "num_heads": 16, "remat": "blocks"},
            "training": {"num_steps": 400_000},
            "sampling": {"num_steps": 1024},
        }
    )
