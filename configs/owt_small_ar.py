"""The autoregressive baseline of owt_small.py: causal, 12 x 768, GPT-2 tokens, same data and optimizer.

    sedd train --config=configs/owt_small_ar.py --workdir=runs/owt_small_ar

Data and hardware as for owt_small.py. Time: not measured.
Expect a perplexity of about 17.5 on held-out OpenWebText (measured for such a baseline by MDLM's authors).
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
