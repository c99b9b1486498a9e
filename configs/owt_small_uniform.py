"""SEDD uniform small on OpenWebText, 12 x 768, GPT-2 tokens, geometric noise (Lou et al. 2023, section 5.2).

    sedd train --config=configs/owt_small_uniform.py --workdir=runs/owt_small_uniform

Data as for owt_small.py.
Hardware: the paper used 8 A100 80 GB. Time: not measured.
Expect a ppl_bound of about 29.7 on held-out OpenWebText (measured for the published recipe by later papers).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "prepared:data/openwebtext", "tokenizer": "gpt2", "length": 1024},
            "graph": {"name": "uniform"},
            "noise": {"name": "geometric", "sigma_min": 1e-5, "sigma_max": 20.0},
            "network": {"scale_by_sigma": False},
            "training": {"num_steps": 400_000},
            "sampling": {"num_steps": 1024},
        }
    )
