#!/usr/bin/env bash
# Measures what needs a GPU: bash benchmarks/gpu.sh [PART ...]
#
# Each part has a time limit of its own, at most 3 minutes, and prints at once; what it prints
# is kept in $OUT (runs/gpu). PUBLISHED names a checkout of the published PyTorch program, PYTHON a Python that has this
# package, and torch for the comparison. TEXT is the text that parts train on, such as 'text:novels/{split}.txt.xz'; the
# English inside CPython if empty. TINY=1 takes tiny networks, to try this script on a CPU. docs/performance.md is where
# the figures belong.
#
# Parts that are run only when they are named: profile, determinism, flags; and learn, judge and entropy, in this order.
set -u
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python3} PUBLISHED=${PUBLISHED:-} TEXT=${TEXT:-python:docs} TINY=${TINY:-}
[[ -z $TINY ]] || TINY=$(printf -- '--config.%s ' network.{hidden_size=32,num_layers=1,num_heads=2,dtype=float32} \
    data.length=32 training.batch_size=4 sampling.num_samples=2)
LEARNING=$([[ -z $TINY ]] && echo 160 || echo 20) # seconds
mkdir -p "$OUT/autotuned"
OUT=$(cd "$OUT" && pwd)
# Processes share the choice of kernels, so that each compiles faster than the one before.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_per_fusion_autotune_cache_dir=$OUT/autotuned"
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
SMALL=(--config=configs/owt_small.py --config.training.batch_size=32 --config.sampling.num_samples=16)
# Flags that NVIDIA or XLA's documentation recommends (sedd_jax/runtime/accelerator_flags.txt); the first is none.
CANDIDATES=(
    ""
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CONDITIONAL,WHILE"
    "--xla_gpu_enable_command_buffer=FUSION,CUSTOM_CALL"
    --xla_gpu_enable_command_buffer=
    JAX_OPTIMIZATION_LEVEL=O1
    --xla_gpu_enable_triton_gemm=false
    --xla_gpu_triton_gemm_any=true
    --xla_gpu_cudnn_gemm_fusion_level=2
    --xla_gpu_enable_latency_hiding_scheduler=false
    ""
)

part() { # NAME SECONDS COMMAND...: runs the command if its part was asked for
    local name=$1 limit=$2
    shift 2
    [[ " ${PARTS[*]} " == *" $name "* ]] || return 0
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | grep -v -E '^[WIE][0-9]{4} ' | tee -a "$OUT/$name.txt"
    local status=${PIPESTATUS[0]}
    [[ $status == 0 ]] || echo "$name: ended with status $status (124: after $limit s)" | tee -a "$OUT/$name.txt"
}

convert() {
    rm -rf "$OUT/run" "$OUT/torch"
    $PYTHON -m sedd_jax train --config=configs/quickstart.py --workdir="$OUT/run" --config.training.num_steps=20 &&
        $PYTHON -m sedd_jax convert --from="$OUT/run" --to="$OUT/torch"
}

bench() { $PYTHON -m sedd_jax bench --repeats=3 "$@" $TINY; } # TINY is words

profiled() {
    rm -rf "$OUT/profile"
    run_on_text profile "$@" --config.training.num_steps=12 --config.training.profile=6:3
}

with_flag() { # FLAG ARGUMENT...: milliseconds of both steps, in processes with this flag
    echo "-- ${1:-none}"
    local name=XLA_FLAGS value="$XLA_FLAGS $1"
    [[ $1 != JAX_* ]] || name=${1%%=*} value=${1#*=}
    export "$name=$value"
    if JAX_PLATFORMS=cpu $PYTHON -c 'import jax; jax.numpy.zeros(1)' 2>/dev/null; then
        bench "${@:2}" | grep -E '^(train|sample) '
    else
        echo "this XLA does not know it"
    fi
}

run_on_text() { # NAME ARGUMENT...: trains $OUT/NAME on TEXT until it ends or is stopped
    local tokenizer=sentencepiece:2048
    [[ -d $OUT/text ]] || $PYTHON -m sedd_jax prepare --data="$TEXT" --tokenizer=$tokenizer --out="$OUT/text" || return
    exec $PYTHON -m sedd_jax train --workdir="$OUT/$1" "${@:2}" --config.data.source="prepared:$OUT/text" \
        --config.data.tokenizer=$tokenizer --config.training.eval_every=0 --config.training.sample_every=0 $TINY
}

trained() { # NAME STEP... -- ARGUMENT...: trains anew, with stops, and tells speed and a hash of the parameters
    rm -rf "${OUT:?}/$1"
    local name=$1 steps=()
    while [[ $2 != -- ]]; do steps+=("$2") && shift; done
    export XLA_FLAGS='' JAX_ENABLE_COMPILATION_CACHE=false # Nothing kept may choose the kernels.
    for step in "${steps[@]}"; do
        (run_on_text "$name" "${@:3}" --config.training.num_steps="$step") || return
    done
    JAX_PLATFORMS=cpu $PYTHON - "$OUT/$name" <<'END'
import hashlib, json, pathlib, sys
import jax, numpy as np
from sedd_jax import runs

workdir = pathlib.Path(sys.argv[1])
run, last = runs.load(workdir), json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
step, params = run.params("params")
found = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params))).hexdigest()[:16]
speed = next(value for name, value in last.items() if "tokens_per_second" in name)
tokens = run.config.training.batch_size * run.config.data.length
print(f"{workdir.name}: step {step}, parameters {found}, {1e3 * tokens / speed:.4g} ms a step")
END
}

entropy() { # NUM_STEPS: of samples of the model that `learn` trained, read by that of `judge`
    $PYTHON -m sedd_jax eval --workdir="$OUT/learn" --generate --judge="$OUT/judge" --num_steps="$1" --num_samples=32
}

PARTS=("${@:-}")
[[ -n ${PARTS[0]} ]] || PARTS=(machine compiled eager convert checks batch64 uniform medium)
export -f convert bench profiled with_flag run_on_text trained entropy
export PYTHON OUT TEXT TINY
part machine 20 nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.max.sm --format=csv,noheader
if [[ -n $PUBLISHED ]]; then
    part compiled 170 bash -c 'bench "$@"' - "${SMALL[@]}" --reference="$PUBLISHED" --reference_compile
    part eager 100 bash -c 'bench "$@"' - "${SMALL[@]}" --reference="$PUBLISHED"
else
    part eager 100 bash -c 'bench "$@"' - "${SMALL[@]}"
fi
part convert 100 bash -c convert
part checks 170 "$PYTHON" benchmarks/gpu_checks.py
part batch64 120 bash -c 'bench "$@"' - "${SMALL[@]}" --config.training.batch_size=64 --config.sampling.num_samples=64
part uniform 120 bash -c 'bench "$@"' - --config=configs/owt_small_uniform.py --config.training.batch_size=64 --config.sampling.num_samples=16
part medium 150 bash -c 'bench "$@"' - --config=configs/owt_medium.py --config.training.batch_size=16 --config.sampling.num_samples=16
part profile 170 bash -c 'profiled "$@"' - "${SMALL[@]}"
for flag in "${CANDIDATES[@]}"; do
    part flags 150 bash -c 'with_flag "$@"' - "$flag" "${SMALL[@]}" --config.network.layer_loop=rolled
done
TRAINED=(--config=configs/owt_small.py --config.training.batch_size=8 --config.training.log_every=10)
TRAINED+=(--config.network.layer_loop=rolled)
ALIKE=(--config.training.deterministic=true)
part determinism 120 bash -c 'trained "$@"' - deterministic 30 -- "${TRAINED[@]}" "${ALIKE[@]}"
# Stopped and resumed, which must not show.
part determinism 170 bash -c 'trained "$@"' - deterministic_resumed 15 30 -- "${TRAINED[@]}" "${ALIKE[@]}"
part determinism 120 bash -c 'trained "$@"' - fastest 30 -- "${TRAINED[@]}"
part determinism 120 bash -c 'trained "$@"' - fastest_again 30 -- "${TRAINED[@]}"
# Both train until they are told to stop, and save (status 124).
LEARNED=(--config=configs/novels.py --config.training.num_steps=1000000 --config.training.log_every=500)
LEARNED+=(--config.training.batch_size=64)
part learn "$LEARNING" bash -c 'run_on_text learn "$@"' - "${LEARNED[@]}"
LEARNED+=(--config.graph.name=autoregressive --config.network.scale_by_sigma=False)
part judge "$LEARNING" bash -c 'run_on_text judge "$@"' - "${LEARNED[@]}"
for steps in 32 64 128 1024; do
    part entropy 170 bash -c 'entropy "$@"' - "$steps"
done
