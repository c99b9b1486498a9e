"""Checkpoints as MDLM's program writes them, around a network of ours in PyTorch."""

import collections

import omegaconf
import torch


def average(model):
    """A moving average as both programs keep it: of the parameters in their order, here all of them plus 1."""
    return {"decay": 0.9999, "num_updates": 7, "shadow_params": [p.detach() + 1 for p in model.parameters()]}


def mdlm_config(**changed):
    sizes = {"hidden_size": 64, "cond_dim": 32, "length": 24, "n_blocks": 2, "n_heads": 4, "scale_by_sigma": True}
    config = {
        "backbone": "dit",
        "diffusion": "absorbing_state",
        "parameterization": "subs",
        "time_conditioning": False,
        "data": {"tokenizer_name_or_path": "gpt2"},
        "loader": {"global_batch_size": 512, "batch_size": "${loader.global_batch_size}"},
        "model": sizes | {"dropout": 0.1},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "optim": {"lr": 1e-3},
        "trainer": {"max_steps": 1000},
    }
    return omegaconf.OmegaConf.merge(config, changed)


def write_lightning(path, model, config, **changed):
    saved = {
        "state_dict": collections.OrderedDict((f"backbone.{name}", x) for name, x in model.state_dict().items()),
        "hyper_parameters": {"config": config, "tokenizer": omegaconf.OmegaConf.create({"stands": "for a tokenizer"})},
        "ema": average(model),
        "global_step": 9,
        "epoch": 0,
        "loops": {},
        "callbacks": {},
    }
    torch.save(saved | changed, path)
    return path
