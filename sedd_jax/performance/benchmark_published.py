"""Runs steps of the published PyTorch program, from a user's checkout DIR of it, for `sedd bench --reference=DIR`.

    python benchmark_published.py DIR [--compile]

The interpreter needs torch; nothing of sedd_jax is imported. The protocol with `benchmark.Worker` is that of
`benchmark_ours`. With --compile the network runs under torch.compile.
"""

import json
import os
import resource
import sys
import time
import types


def main() -> None:
    channel, sys.stdout = sys.stdout, sys.stderr
    # Some modules of the two programs share names, and Python puts this file's directory first.
    sys.path[0] = sys.argv[1]
    is_compiled = "--compile" in sys.argv
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    # TorchScript's fuser fails on GPUs ("vector::_M_range_check", torch 2.11), and torch.compile does its work. Whether
    # it is on is decided when torch is imported, so this process begins again, before it has read its job.
    if (device == "cuda" or is_compiled) and "PYTORCH_JIT" not in os.environ:
        os.environ["PYTORCH_JIT"] = "0"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    job = json.loads(sys.stdin.readline()) | {"is_compiled": is_compiled}
    attention = stand_in_for_flash_attention()
    want = "bfloat16" if device == "cuda" else "float32"
    if job["dtype"] != want:
        sys.exit(f"the published program computes in {want} on {device}: set --config.network.dtype={want}")
    torch.manual_seed(0)
    # Matrix products that autocast leaves in float32 do not use TF32, as in our program.
    torch.backends.cuda.matmul.allow_tf32 = False
    step = {"train": train_step, "sample": sampling_step}[job["kind"]](job, device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    started = time.perf_counter()
    step()
    wait()
    ready = {
        "compile_seconds": time.perf_counter() - started,
        "versions": f"torch {torch.__version__}, Python {sys.version.split()[0]}, {way(is_compiled)}",
        "attention": attention,
    }
    print(json.dumps(ready), file=channel, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        for _ in range(int(line)):
            step()
        wait()
        seconds = time.perf_counter() - started
        # Linux counts in KiB, macOS in bytes.
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), file=channel, flush=True)


def way(is_compiled):
    """How the program runs, in words."""
    if is_compiled:
        return "torch.compile"
    return "eager, TorchScript off" if os.environ.get("PYTORCH_JIT") == "0" else "eager, TorchScript on"


def stand_in_for_flash_attention() -> str:
    """Provides a substitute for flash_attn if that is not installed; returns the name of the attention that runs."""
    try:
        import flash_attn

        return f"flash_attn {flash_attn.__version__}"
    except ImportError:
        pass

    def attend(qkv, cu_seqlens, max_seqlen, dropout_p=0.0, causal=False):
        """Attention from [B L, 3, H, K] to [B L, H, K]. All sequences of the benchmark have the same length."""
        import torch

        heads = qkv.shape[2]
        q, k, v = qkv.view(-1, max_seqlen, 3, heads, qkv.shape[3]).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(-1, heads, qkv.shape[3])

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface.flash_attn_varlen_qkvpacked_func = attend
    package = types.ModuleType("flash_attn")
    package.flash_attn_interface = interface
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}
    return "torch's scaled_dot_product_attention in place of flash_attn, which is not installed"


def make_model(job, device):
    """The published program's config, network, graph and noise schedule for a job."""
    import graph_lib
    import noise_lib
    from model import SEDD
    from omegaconf import OmegaConf

    config = OmegaConf.create(
        {
            "tokens": job["vocab_size"],
            "graph": {"type": job["graph"], "file": "", "report_all": False},
            "noise": {"type": job["noise"], "sigma_min": job["sigma_min"], "sigma_max": job["sigma_max"]},
            "model": {
                "hidden_size": job["hidden_size"],
                "cond_dim": job["cond_dim"],
                "length": job["length"],
                "n_blocks": job["num_layers"],
                "n_heads": job["num_heads"],
                "scale_by_sigma": job["scale_by_sigma"],
                "dropout": job["dropout"],
            },
            "optim": {
                "optimizer": "AdamW",
                "lr": job["learning_rate"],
                "beta1": job["beta1"],
                "beta2": job["beta2"],
                "eps": job["eps"],
                "weight_decay": job["weight_decay"],
                "warmup": job["warmup_steps"],
                "grad_clip": job["clip_norm"],
            },
        }
    )
    import torch

    model = SEDD(config).to(device)
    if job["is_compiled"]:
        model = torch.compile(model)
    return config, model, graph_lib.get_graph(config, device), noise_lib.get_noise(config).to(device)


def train_step(job, device):
    """A function that runs one optimizer step, as run_train.py does on one device."""
    import losses
    import torch
    from model.ema import ExponentialMovingAverage

    config, model, graph, noise = make_model(job, device)
    state = {
        "model": model,
        "ema": ExponentialMovingAverage(model.parameters(), decay=job["ema_decay"]),
        "optimizer": losses.get_optimizer(config, model.parameters()),
        "scaler": torch.amp.GradScaler(device, enabled=device == "cuda"),
        "step": 0,
    }
    step_fn = losses.get_step_fn(noise, graph, True, losses.optimization_manager(config), accum=1)
    shape = (job["batch_size"], job["length"])
    batch = torch.randint(job["vocab_size"], shape, generator=torch.Generator().manual_seed(0)).to(device)
    return lambda: step_fn(state, batch)


def sampling_step(job, device):
    """A function that runs the sampling step at t = 1/2, with half of the tokens noise, as sampling.py does."""
    import sampling
    import torch
    from model import utils

    _, model, graph, noise = make_model(job, device)
    predictor = sampling.get_predictor({"tweedie": "analytic", "euler": "euler"}[job["sampler"]])(graph, noise)
    shape = (job["batch_size"], job["length"])
    tokens = torch.randint(job["vocab_size"], shape, generator=torch.Generator().manual_seed(0)).to(device)
    limit = graph.sample_limit(*shape).to(device)
    is_noise = torch.arange(job["length"], device=device) % 2 == 0
    xt = torch.where(is_noise, limit, tokens)
    t = torch.full((job["batch_size"], 1), 0.5, device=device)

    @torch.no_grad()
    def step():
        score_fn = utils.get_score_fn(model, train=False, sampling=True)
        return predictor.update_fn(score_fn, xt, t, 1 / job["num_steps"])

    return step


if __name__ == "__main__":
    main()
