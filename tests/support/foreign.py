"""Checkpoints as other programs write them, around networks of ours in PyTorch."""

import collections

import omegaconf
import torch
from torch import nn
from torch.nn import functional

from sedd_jax.conversion import torch_model

_SIZES = {"hidden_size": 64, "cond_dim": 32, "length": 24, "n_blocks": 2, "n_heads": 4, "dropout": 0.1}


class Plain(nn.Module):
    """The network without noise level and modulations, as RADD and autoregressive models have it."""

    def __init__(self, num_states=27, *, is_biased=False, is_causal=False):
        super().__init__()
        self.vocab_embed = torch_model.Embedding(num_states, 64)
        self.rotary_emb = torch_model.Rotary(16)
        self.blocks = nn.ModuleList(_PlainBlock(is_biased, is_causal) for _ in range(2))
        self.output_layer = nn.Module()
        self.output_layer.norm_final = _Norm(is_biased)
        self.output_layer.linear = nn.Linear(64, num_states)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, tokens):
        """Logits [B, L, V] of tokens [B, L]."""
        x, rotation = self.vocab_embed(tokens), self.rotary_emb(tokens.shape[1])
        for block in self.blocks:
            x = block(x, rotation)
        return self.output_layer.linear(self.output_layer.norm_final(x))


class _Norm(nn.Module):
    def __init__(self, is_biased):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))
        self.bias = nn.Parameter(torch.zeros(64)) if is_biased else None

    def forward(self, x):
        return functional.layer_norm(x, (64,), self.weight, self.bias)


class _PlainBlock(nn.Module):
    def __init__(self, is_biased, is_causal):
        super().__init__()
        self.is_causal = is_causal
        self.norm1 = _Norm(is_biased)
        self.attn_qkv = nn.Linear(64, 192, bias=False)
        self.attn_out = nn.Linear(64, 64, bias=False)
        self.norm2 = _Norm(is_biased)
        self.mlp = nn.Sequential(nn.Linear(64, 256), nn.GELU(approximate="tanh"), nn.Linear(256, 64))

    def forward(self, x, rotation):
        batch, length, _ = x.shape
        parts = self.attn_qkv(self.norm1(x)).view(batch, length, 3, 4, 16).permute(2, 0, 3, 1, 4)
        q, k = (torch_model.rotate(part, rotation) for part in parts[:2])
        share = q @ k.transpose(-1, -2) / 4
        if self.is_causal:
            share = share.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        mixed = (share.softmax(-1) @ parts[2]).transpose(1, 2).reshape(x.shape)
        x = x + self.attn_out(mixed)
        return x + self.mlp(self.norm2(x))


def average(model):
    """A moving average as both programs keep it: of the parameters in their order, here all of them plus 1."""
    return {"decay": 0.9999, "num_updates": 7, "shadow_params": [p.detach() + 1 for p in model.parameters()]}


def mdlm_config(**changed):
    config = {
        "backbone": "dit",
        "diffusion": "absorbing_state",
        "parameterization": "subs",
        "time_conditioning": False,
        "data": {"tokenizer_name_or_path": "gpt2"},
        "loader": {"global_batch_size": 512, "batch_size": "${loader.global_batch_size}"},
        "model": _SIZES | {"scale_by_sigma": True},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "optim": {"lr": 1e-3},
        "trainer": {"max_steps": 1000},
    }
    return omegaconf.OmegaConf.merge(config, changed)


def duo_config(name, **changed):
    config = {
        "algo": {"name": name, "backbone": "dit", "time_conditioning": name not in ("mdlm", "ar")},
        "data": {"tokenizer_name_or_path": "gpt2"},
        "loader": {"global_batch_size": 512},
        "model": _SIZES,
        "noise": {"type": "log-linear", "eps": 0},
        "optim": {"lr": 3e-4},
        "trainer": {"max_steps": 1000},
    }
    return omegaconf.OmegaConf.merge(config, changed)


def bd3lm_config(name, **changed):
    config = duo_config(name, noise={"type": "loglinear"}, block_size="${model.length}")
    return omegaconf.OmegaConf.merge(config, {"algo": {"cross_attn": name == "bd3lm"}}, changed)


def transformers_config(kind, num_states, **changed):
    """config.json of a model for transformers."""
    sizes = {"hidden_dim": 64, "cond_dim": 32, "model_length": 24, "n_blocks": 2, "n_heads": 4, "dropout": 0.1}
    return {"model_type": kind, "vocab_size": num_states, "time_conditioning": False, **sizes, **changed}


def radd_config():
    """RADD's config, in config.json and in .hydra/config.yaml."""
    sizes = {name: size for name, size in _SIZES.items() if name != "cond_dim"}
    return {
        "tokens": 26,
        "model": sizes | {"type": "ddit_wot", "use_checkpoint": False, "dtype": "float16"},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "training": {"batch_size": 512, "accum": 16, "n_iters": 1000, "ema": 0.9999},
        "optim": {"lr": 3e-4, "warmup": 2500, "grad_clip": 1.0},
    }


def write_lightning(path, model, config, **changed):
    """Writes a Lightning checkpoint of a network; `changed` are members beside the usual ones, or in their place."""
    progress = collections.defaultdict(dict, {"fit_loop": {"batches": 9}})  # Real files hold a filled one.
    saved = {
        "state_dict": collections.OrderedDict((f"backbone.{name}", x) for name, x in model.state_dict().items()),
        "hyper_parameters": {"config": config, "tokenizer": omegaconf.OmegaConf.create({"stands": "for a tokenizer"})},
        "ema": average(model),
        "global_step": 9,
        "epoch": 0,
        "loops": {"state": progress},
        "callbacks": {},
    }
    torch.save(saved | changed, path)
    return path
