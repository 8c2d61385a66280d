#!/usr/bin/env bash
# Everything that needs a GPU, in one command of at most ten minutes, on a machine with nothing but Python, a C++
# compiler, nvcc and a driver:
#
#     bash benchmarks/gpu.sh [FOLDER]
#
# FOLDER (default benchmarks/results/<date>-<card>) gets fourteen files: log.txt, summary.md, and the CSV, page and plot
# of each benchmark. Without FOLDER, but with $OUT in the environment, $OUT gets three: log.txt, summary.md, and
# results.tar.gz, which holds the others, for a machine that gives back few files. A section that fails or runs out of
# time leaves the others alone, but without kernels that run there is nothing to measure. The sections that others could
# stand in for come last. The status is the number of sections that failed.
#
# Environment: PYTHON (default python3), BUDGET (seconds for everything, default 570), WORK (default build/gpu).
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

ROOT=$PWD
PYTHON=${PYTHON:-python3}
BUDGET=${BUDGET:-570}
WORK=${WORK:-$ROOT/build/gpu}
START=$SECONDS
failed=0

PACK=
[[ -z ${1:-} && -n ${OUT:-} ]] && PACK=$OUT/results.tar.gz
card=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr -c 'A-Za-z0-9\n' '-')
OUT=${1:-${OUT:-$ROOT/benchmarks/results/$(date +%F)-${card:-no-card}}}
mkdir -p "$OUT" "$WORK" || exit 1
RESULTS=$OUT
[[ -n $PACK ]] && RESULTS=$WORK/results && rm -rf "$RESULTS" && mkdir -p "$RESULTS"
LOG=$OUT/log.txt
SUMMARY=$OUT/summary.md
: >"$LOG"
{
    echo "# GPU run, $(date -u '+%F %H:%M UTC')"
    echo
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>/dev/null | sed 's/^/- GPU: /'
    echo "- processor: $(sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores"
    echo "- commit: $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo
    echo '| section | status | seconds | last line |'
    echo '|---|---|---|---|'
} >"$SUMMARY"

# section NAME LIMIT COMMAND...: at most LIMIT seconds, and never past the budget.
section() {
    local name=$1 limit=$2 left=$((BUDGET - SECONDS + START)) began=$SECONDS status word file
    shift 2
    file=$WORK/$(echo "$name" | tr -c 'a-z0-9\n' '-').log
    if ((left < 5)); then
        echo "| $name | no time left | 0 | |" >>"$SUMMARY"
        failed=$((failed + 1))
        return 1
    fi
    ((limit > left)) && limit=$left
    echo "== $name: $*" | tee -a "$LOG"
    timeout --kill-after=5 "$limit" "$@" >"$file" 2>&1
    status=$?
    cat "$file" >>"$LOG"
    [[ -n $PACK ]] && tar -C "$RESULTS" -czf "$WORK/results.tar.gz" . && mv "$WORK/results.tar.gz" "$PACK"
    case $status in
        0) word=passed ;;
        124 | 137) word="stopped after $limit s" ;;
        *) word="failed ($status)" ;;
    esac
    ((status != 0)) && failed=$((failed + 1)) && tail -n 15 "$file"
    echo "| $name | $word | $((SECONDS - began)) | $(grep -v '^[[:space:]]*$' "$file" | tail -n 1 | cut -c1-150 | tr '|' '/') |" >>"$SUMMARY"
    return $status
}

# An interpreter that can see the GPU is taken as it is; else a virtual environment is made, with PyTorch from PyPI.
ready() {
    "$1" - <<'PYTHON' 2>&1 | tail -n 1
import shutil, sys
from pathlib import Path
import click, hypothesis, matplotlib, numpy, pybind11, pytest, rich, safetensors, setuptools, torch, transformers, yaml
assert torch.version.cuda, "this PyTorch has no CUDA"
for tool in ("cmake", "ninja"):
    assert shutil.which(tool, path=str(Path(sys.executable).parent)) or shutil.which(tool), tool + " is missing"
PYTHON
    return "${PIPESTATUS[0]}"
}
if ! ready "$PYTHON"; then
    if ! ready "$WORK/venv/bin/python"; then
        section "environment" 240 bash -c "
            '$PYTHON' -m venv '$WORK/venv' &&
            '$WORK/venv/bin/python' -m pip install --quiet 'torch>=2.10' 'transformers>=5.14' 'accelerate>=1.0' 'safetensors>=0.4.3' numpy click rich \
                pyyaml pytest pytest-benchmark hypothesis psutil matplotlib 'setuptools>=77' wheel cmake ninja pybind11" ||
            { cat "$SUMMARY" && exit 1; }
    fi
    PYTHON=$WORK/venv/bin/python
fi
PYTHON=$(command -v "$PYTHON")
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 COLUMNS=160

arch=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>/dev/null || echo 90)
[[ $arch == 90 ]] && arch=90a
give_up() {
    cat "$SUMMARY"
    exit 1
}
section "build" 150 env PYPRUNE_CUDA=ON PYPRUNE_CUDA_ARCHS="$arch-real" MAX_JOBS="$(nproc)" \
    "$PYTHON" setup.py build_ext --inplace || give_up
section "kernels usable" 60 "$PYTHON" -c 'from pyprune import ops; info = ops.backend_info(); print(info); assert info["cuda_usable"]' ||
    give_up

# A kernel that hangs or fails here would take the time of all that follows, which the other one can do.
real='test_a_layer_of_a_real_size or test_infinity'
if [[ $arch == 90a ]] && ! section "products of four warps" 60 "$PYTHON" -m pytest -q -x -m cuda -p no:cacheprovider \
    tests/cuda/test_on_a_gpu.py -k "$real"; then
    export PYPRUNE_WGMMA=0
    echo '| | off from here on: PYPRUNE_WGMMA=0 | | |' >>"$SUMMARY"
fi

section "tests" 150 "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider tests/cuda tests/ops

kernels=()
for what in salience many slice moments activations; do kernels+=(--what "$what"); done
section "bench llama-7b" 170 "$PYTHON" -m pyprune bench --device cuda --shapes llama-7b "${kernels[@]}" \
    --output "$RESULTS/llama-7b"
whole=
section "whole prune" 60 "$PYTHON" benchmarks/whole_prune.py --shapes llama-7b --device cuda --dtype bfloat16 &&
    whole=$WORK/whole-prune.log
section "bench scoring" 90 "$PYTHON" -m pyprune bench --device cuda --shapes llama-7b --what scoring \
    --output "$RESULTS/llama-7b-scoring"
[[ ${PYPRUNE_WGMMA:-1} != 0 ]] && section "bench llama-7b, products of one warp" 60 env PYPRUNE_WGMMA=0 "$PYTHON" \
    -m pyprune bench --device cuda --shapes llama-7b --what activations --no_compile --rounds 5 --output "$RESULTS/llama-7b-one-warp"
section "line" 90 "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider tests/device

sanitizer=$(command -v compute-sanitizer)
for found in /usr/local/cuda*/bin/compute-sanitizer; do
    [[ -z $sanitizer && -x $found ]] && sanitizer=$found
done
sanitize() {
    # Every tensor is an allocation of its own there, or the checker sees PyTorch's pools of megabytes only.
    local options=(--tool "$1" --kernel-name kernel_substring=pyprune --error-exitcode 9)
    [[ $1 == memcheck ]] && options+=(--report-api-errors no) # those of PyTorch's own probing
    if [[ -z $sanitizer ]]; then
        echo "| $1 | compute-sanitizer is not installed | 0 | |" >>"$SUMMARY"
    else
        section "$1" 90 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" "${options[@]}" "$PYTHON" tests/cuda/small_calls.py
    fi
}
sanitize memcheck
section "bench llama-3-8b" 60 "$PYTHON" -m pyprune bench --device cuda --shapes llama-3-8b "${kernels[@]}" --no_compile \
    --rounds 5 --output "$RESULTS/llama-3-8b"
sanitize racecheck

{
    for part in "$RESULTS/llama-7b/results.md" "$RESULTS/llama-7b-one-warp/results.md" "$RESULTS/llama-7b-scoring/results.md" "$whole" \
        "$RESULTS/llama-3-8b/results.md"; do
        [[ -f $part ]] && echo && sed 's/^# /## /' "$part"
    done
    echo
    echo "$((SECONDS - START)) seconds, $failed sections failed."
} >>"$SUMMARY"
cat "$SUMMARY"
exit "$failed"
