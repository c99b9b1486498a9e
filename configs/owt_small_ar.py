"""The autoregressive baseline of owt_small.py: 12 x 768, causal, GPT-2 tokens, the same data and optimizer.

    sedd train --config=configs/owt_small_ar.py --workdir=runs/owt_small_ar

Data and hardware as there. Time: not measured here.
Expect a perplexity of about 17.5 on held-out OpenWebText (as MDLM's authors measured such a baseline).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "prepared:data/openwebtext", "tokenizer": "gpt2", "length": 1024},
            "graph": {"name": "autoregressive"},
            "network": {"scale_by_sigma": False},
            "training": {"num_steps": 400_000},
        }
    )
