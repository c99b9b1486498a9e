"""SEDD absorb small on OpenWebText, 12 x 768, GPT-2 tokens (Lou et al. 2023, section 5.2).

    sedd train --config=configs/owt_small.py --workdir=runs/owt_small

Data: sedd prepare --data=openwebtext --tokenizer=gpt2 --out=data/openwebtext (needs pip install -e '.[hf]').
Hardware: the paper used 8 A100 80 GB. Time: not measured; 400k steps are 210 billion tokens.
Expect a ppl_bound of about 24.1 on held-out OpenWebText (measured for the published recipe by MDLM's authors).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "data": {"source": "prepared:data/openwebtext", "tokenizer": "gpt2", "length": 1024},
            "training": {"num_steps": 400_000},
            "sampling": {"num_steps": 1024},
        }
    )
