#!/usr/bin/env bash
# Measures what needs a GPU: bash benchmarks/gpu.sh [PART ...]
#
# Each part has a time limit of its own, at most 3 minutes, and prints at once; what it prints
# is kept in $OUT (runs/gpu). PUBLISHED names a checkout of the published PyTorch program, PYTHON a Python that has this
# package, and torch for the comparison. docs/performance.md is where the figures belong.
set -u
cd "$(dirname "$0")/.." || exit
OUT=${OUT:-runs/gpu} PYTHON=${PYTHON:-python3} PUBLISHED=${PUBLISHED:-}
mkdir -p "$OUT/autotuned"
OUT=$(cd "$OUT" && pwd)
# Processes share the choice of kernels, so that each compiles faster than the one before.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_per_fusion_autotune_cache_dir=$OUT/autotuned"
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONUNBUFFERED=1
SMALL=(--config=configs/owt_small.py --config.training.batch_size=32 --config.sampling.num_samples=16)

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

bench() { $PYTHON -m sedd_jax bench --repeats=3 "$@"; }

PARTS=("${@:-}")
[[ -n ${PARTS[0]} ]] || PARTS=(machine compiled eager convert checks batch64 uniform medium)
export -f convert bench
export PYTHON OUT
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
