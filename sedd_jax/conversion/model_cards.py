"""The model card (README.md) of a converted model: what it is, where it comes from and how to use it."""

from typing import Any

from sedd_jax import runs
from sedd_jax.conversion import measured
from sedd_jax.data import alphabets, subwords
from sedd_jax.evaluation import tables

STABLEHLO_EXAMPLE = """\
# pip install jax flatbuffers safetensors
import jax.export
import numpy as np
from safetensors.numpy import load_file

score = jax.export.deserialize(bytearray(open("score.stablehlo", "rb").read()))
tensors = load_file("model.safetensors")
tokens = np.zeros((2, score.in_avals[-2].shape[1]), np.int32)
log_score = score.call(tensors, tokens, np.float32([0.5, 2.0]))  # sigma, the total noise of each sequence
print(log_score.shape, np.asarray(log_score)[0, 0, :5])
"""
_DECODE = {
    alphabets.Characters: (
        "import json\n\n",
        'alphabet = json.load(open("sedd_tokenizer.json"))["alphabet"]\n'
        'print("".join(alphabet[token] for token in tokens[0]))',
    ),
    alphabets.Bytes: ("", 'print(bytes(tokens[0].tolist()).decode("utf-8", "replace"))'),
    alphabets.Ids: ("", "print(tokens[0])"),
    subwords.GPT2: (
        "import tiktoken  # pip install tiktoken\n",
        'print(tiktoken.get_encoding("gpt2").decode(tokens[0].tolist()))',
    ),
    subwords.WordPiece: (
        "",
        'pieces = open("vocab.txt", encoding="utf-8").read().split("\\n")\n'
        'print(" ".join(pieces[token] for token in tokens[0]))',
    ),
    subwords.SentencePiece: (
        "import sentencepiece  # pip install sentencepiece\n",
        'pieces = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model")\n'
        "print(pieces.decode(tokens[0].tolist()))",
    ),
}


def card(
    run: runs.Run,
    origin: dict[str, Any],
    num_parameters: int,
    dtype: str,
    found: measured.Measured,
    *,
    with_stablehlo: bool,
) -> str:
    """The model card as Markdown, with the front matter that the Hugging Face Hub reads.

    Args:
        run: the model's config and tokenizer.
        origin: facts about the source.
        num_parameters: number of parameters.
        dtype: of the written tensors.
        found: what was measured of the checkpoint.
        with_stablehlo: whether the score function is written as well.
    """
    config, network = run.config, run.network
    noise = config.noise
    schedule = (
        f"eps {noise.eps:g}" if noise.name == "loglinear" else f"sigma {noise.sigma_min:g} to {noise.sigma_max:g}"
    )
    facts = {
        "graph": f"{config.graph.name}: {run.graph.meaning}",
        "noise": f"{noise.name}, {schedule}",
        "network": f"{network.num_layers} layers, {network.hidden_size} wide, {network.num_heads} heads, "
        f"{num_parameters:,} parameters in {dtype}",
        "length": f"{config.data.length} tokens",
        "tokenizer": f"{run.tokenizer.to_json()['kind']}, {run.graph.vocab_size} tokens",
        "trained on": config.data.source or "unknown",
        **{name: str(value) for name, value in origin.items() if value is not None},
    }
    facts = measured.without_directories(facts)
    table = "\n".join(f"| {name} | {tables.literal(value)} |" for name, value in facts.items())
    imports, decode = _DECODE[type(run.tokenizer)]
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags:
- sedd
- sedd_jax
- score-entropy
- discrete-diffusion
---

# A score entropy discrete diffusion model

It generates text from noise and fills gaps anywhere in a text (Lou, Meng, Ermon 2023, arXiv 2310.16834). It was
converted by sedd_jax.

| | |
|---|---|
{table}

{found.text}
## In transformers

You need only torch and transformers. `.` is this directory; on the Hub it is OWNER/NAME:

```python
from transformers import AutoModel

model = AutoModel.from_pretrained(".", trust_remote_code=True)  # .to("cuda")
tokens = model.sample(2, num_steps=128, seed=0)
print(model.decode(tokens)[0])
```

## In PyTorch

You need only torch and `torch_model.py`, which is in this directory. Run here:

```python
{imports}import torch

from torch_model import SEDD

model = SEDD.from_pretrained(".")  # .to("cuda")
tokens = model.sample(2, num_steps=128)
{decode}

# Infilling: keep the first and last four tokens, and sample the others again.
is_given = torch.zeros_like(tokens, dtype=torch.bool)
is_given[:, :4] = is_given[:, -4:] = True
tokens = model.sample(num_steps=128, given=tokens, is_given=is_given)
```

{_NORMALIZED if network.normalize else _PUBLISHED}
{_STABLEHLO if with_stablehlo else ""}
## In JAX

```
sedd convert --from=DIR --to=RUN
sedd sample --workdir=RUN
```
"""


_PUBLISHED = "The published SEDD program also loads this directory: `SEDD.from_pretrained(DIR)`."
_NORMALIZED = """\
The softmax of this network is a distribution of the clean token, and scores follow from it. The published SEDD program
has no such network and refuses this directory. Only `torch_model.py` and `modeling_sedd.py` beside it, and sedd_jax,
read it."""
_STABLEHLO = f"""
## As StableHLO

`score.stablehlo` is the score function for any batch size, on CPU, CUDA and TPU. It needs no model code. This example
is also in `example.py`:

```python
{STABLEHLO_EXAMPLE}```
"""
