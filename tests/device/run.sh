#!/bin/sh
# What needs a GPU, or a CPU with AMX or AVX-512, in less than eight minutes and without a network:
#
#     sh tests/device/run.sh WHEELS OUT [PYTHON]
#
# WHEELS is what wheels.sh gathered; torch with CUDA is the machine's own. Figures and logs go to OUT. Without a GPU everything up
# to what needs one is rehearsed. Exits with 1 where anything that ran has failed.
set -u
cd "$(dirname "$0")/../.."
[ $# -ge 2 ] || { echo "give the wheels and a folder for figures: sh tests/device/run.sh WHEELS OUT [PYTHON]" >&2; exit 2; }
mkdir -p "$2"
wheels=$(cd "$1" && pwd) out=$(cd "$2" && pwd) python=${3:-python3.12}
# For a rehearsal on a small machine: LAYERS, TOKENS, SHAPE and KERNEL_TOKENS.
layers=${LAYERS:-4} tokens=${TOKENS:-4096} shape=${SHAPE:-qwen3-30b-a3b} kernel_tokens=${KERNEL_TOKENS:-1,16,128,2048}
venv=$(mktemp -d)/venv
failed=0

step() { # a name, the most seconds, and the command
    name=$1 most=$2
    shift 2
    echo "== $name"
    timeout "$most" "$@" > "$out/$name.log" 2>&1 || {
        echo "FAILED with status $?"
        failed=1
    }
    tail -n 20 "$out/$name.log"
}

step venv 60 "$python" -m venv --system-site-packages "$venv"
step install 120 sh -c "'$venv/bin/python' -m pip install --quiet --no-index --no-deps --no-warn-script-location '$wheels'/*.whl"
[ "$failed" = 0 ] || exit 1
PATH=$venv/bin:$PATH
export PATH
grep -m 1 "model name" /proc/cpuinfo
kt-expert doctor
has_gpu=$(python -c "import torch; print(int(torch.cuda.is_available()))")
device=cpu
if [ "$has_gpu" = 1 ]; then
    device=cuda
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    step cuda 150 python -m pytest -q -p no:cacheprovider tests/e2e/test_cuda.py tests/unit/client/test_staging.py
else
    echo "== no GPU here: the CUDA tests are left out, and the step below has its trainer on the CPU"
fi
step step 150 kt-expert bench step --shape "$shape" --layers "$layers" --tokens "$tokens" --repeats 3 --device "$device" \
    --json "$out/step.json"
if grep -q -m 1 -E "avx512|amx_bf16" /proc/cpuinfo || [ "$has_gpu" = 0 ]; then
    step kernels 150 kt-expert bench kernels --shape "$shape" --tokens "$kernel_tokens" --rank 0,16 --repeats 3 --against torch \
        --json "$out/kernels.json"
fi
echo "== logs and figures are in $out"
exit "$failed"
