"""Score entropy discrete diffusion (Lou, Meng, Ermon 2023, arXiv 2310.16834) in JAX.

Symbols, one meaning each:

| name | meaning |
|---|---|
| `vocab_size` N | real tokens; `num_states` is N + 1 for the absorbing graph (the mask), N for the uniform one |
| `x0`, `xt` | clean and noised tokens, int `[B, L]` |
| `t` | time in [0, 1] |
| `sigma`, `dsigma_dt` | total noise, and its rate |
| `delta_sigma` | sigma(t) - sigma(t - dt), the noise one reverse step removes |
| `a` | e^sigma - 1 |
| `z` | the network's raw output; `log_score` what it means; `score` = exp(log_score); `ratio` the true conditional
ratio |
| `nelbo`, `ppl_bound` | a bound on negative log-likelihood, and exp of it per token |
| `nfe` | number of network evaluations |

Dimensions: B batch, L length, V states, P states padded for the hardware, D model, H heads, K head size, C condition,
N layers.

From the command line to the loss: `cli` -> `train.train` -> `train.train_step` -> `losses.denoising_score_entropy` ->
`graphs.Absorbing.score_entropy`.
"""
