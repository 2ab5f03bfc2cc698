#!/usr/bin/env bash
# Everything that needs a GPU: builds, imports, tests and measures, on a machine with CUDA 13,
# python3 with torch 2.11, triton 3.6, numpy, pytest, cmake and ninja, and no network.
#
#   bench/gpu_run.sh              all stages
#   bench/gpu_run.sh ops e2e      these alone
#
# Each stage takes at most eight minutes. A stage that fails is recorded and the rest go on; one
# that has succeeded for this commit is skipped, so after an interruption run the same again.
# Results go to $OUT, by default bench/results: <gpu>/gpu_run.json says how each stage ended.
#
#   FORCE=1          run stages again that have succeeded
#   PYTHON=...       another interpreter than python3
#   FASTAST_COMMIT   names the commit where the tree is a copy without git
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-bench/results}" PYTHONUNBUFFERED=1 FASTAST_GPU_KERNELS="${FASTAST_GPU_KERNELS:-all}"
PYTHON="${PYTHON:-python3}"
SECONDS_PER_STAGE=480
ALL=(build import tests ops e2e memory sanitizer profile launches)

# For this machine's GPU alone: all architectures take six times as long.
build() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
    FASTAST_CUDA_ARCHS="${capability//./}" "$PYTHON" setup.py build_ext --inplace
}

# The files that have GPU tests; others may import packages that such a machine lacks. Most of their
# time is the compiler's, so with pytest-xdist they share the cores; each worker holds a context on
# the GPU, so there are no more than twelve.
gpu_tests() {
    local files workers=()
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
    ((${#files[@]})) || return 5
    if "$PYTHON" -c 'import xdist' 2>/dev/null; then
        workers=(-n "$(($(nproc) < 12 ? $(nproc) : 12))")
    fi
    "$PYTHON" -m pytest -q -m gpu "${workers[@]}" "${files[@]}"
}

# Some machines have no compute-sanitizer, others a driver that refuses it: a small program shows.
sanitizer() {
    local tool
    tool=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
    if ! timeout 120 "$tool" --error-exitcode 9 "$PYTHON" -m bench.sanitize --probe; then
        echo "compute-sanitizer does not run here: $tool"
        return 5
    fi
    # Without its cache every tensor is an allocation, whose ends are known to the sanitizer.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        "$tool" --tool memcheck --error-exitcode 9 "$PYTHON" -m bench.sanitize
}

# What limits each kernel, by the hardware's counters, where the machine lets them be read.
profile() {
    local folder report tool
    tool=$(command -v ncu || echo /usr/local/cuda/bin/ncu)
    report=$(mktemp -d)/report
    if ! timeout 300 "$tool" --clock-control none --profile-from-start off --set full \
        --kernel-name 'regex:forward|backward|pool_|fold_|_kernel' -o "$report" \
        "$PYTHON" -m bench.profile || [[ ! -f $report.ncu-rep ]]; then
        echo "ncu does not run here: $tool"
        return 5
    fi
    folder=$(dirname "$("$PYTHON" -m bench.stages path)")
    mkdir -p "$folder"
    "$tool" --import "$report.ncu-rep" --page details > "$folder/profile.txt"
    grep -E '^  [a-z_]+.*\(|Duration|DRAM Throughput|Compute \(SM\) Throughput|Achieved Occupancy' \
        "$folder/profile.txt"
}

run_stage() {
    case $1 in
        build) build ;;
        import) "$PYTHON" -c 'import fastast; print(fastast.__version__, *fastast.list_models())' ;;
        tests) gpu_tests ;;
        launches) "$PYTHON" -m bench.launches --out "$OUT" ;;
        sanitizer) sanitizer ;;
        profile) profile ;;
        # A clean commit's finished cases are kept, so a stage that ran out of time goes on.
        ops | e2e | memory) "$PYTHON" -m bench "$1" --device cuda --out "$OUT" --missing ;;
    esac
}

# `timeout` starts a program, not a function: it starts this script again with a stage to run.
if [[ ${1:-} == --run ]]; then
    run_stage "$2"
    exit
fi

(($#)) || set -- "${ALL[@]}"
for stage in "$@"; do
    if [[ " ${ALL[*]} " != *" $stage "* ]]; then
        echo "unknown stage: $stage; there are ${ALL[*]}" >&2
        exit 2
    fi
done

for stage in "$@"; do
    if [[ -z ${FORCE:-} ]] && "$PYTHON" -m bench.stages done "$stage"; then
        echo "== $stage: done for this commit"
        continue
    fi
    echo "== $stage"
    log=$(mktemp)
    begin=$SECONDS
    timeout --kill-after=10 "$SECONDS_PER_STAGE" bash bench/gpu_run.sh --run "$stage" 2>&1 |
        tee "$log"
    code=${PIPESTATUS[0]}
    "$PYTHON" -m bench.stages record "$stage" "$code" "$((SECONDS - begin))" "$log"
    rm -f "$log"
done

echo "== summary"
"$PYTHON" -m bench.stages summary
