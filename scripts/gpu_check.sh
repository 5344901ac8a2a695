#!/usr/bin/env bash
# One command for a machine with a CUDA GPU: the tests marked `gpu`, then the bench at the shapes of
# GPT-2 XL and LLaMA-3 8B in bfloat16, with random weights. It downloads nothing, and takes at most
# 10 minutes, as a step is stopped after 45 seconds. It has not run on a GPU yet.
# Results: <FOLDER>/<measurement>-<shape>-<card>.json.
#
#   scripts/gpu_check.sh [FOLDER]                                default: benchmarks/results
#   PYTHON=python3 scripts/gpu_check.sh                          another Python; .venv's otherwise
#   DEVICE=cpu SHAPES=tiny-gpt2 DTYPE=float32 scripts/gpu_check.sh OUT    tries the script itself
#
# Exit code: the number of steps that failed. A step has 45 seconds; its message stands above.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
device=${DEVICE:-cuda}
shapes=${SHAPES:-"gpt2-xl llama3-8b"}
dtype=${DTYPE:-bfloat16}
folder=${1:-benchmarks/results}
failed=0
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

card=$($python -c "
import torch
name = torch.cuda.get_device_name() if '$device' == 'cuda' else '$device'
print('-'.join(name.lower().split()))") || exit 1
echo "card: $card"

step() { # what it is, then the command
  echo "== $1"
  shift
  timeout 45 "$@" || { echo "failed ($?): $*"; failed=$((failed + 1)); }
}

[ "$device" = cpu ] || step "tests" "$python" -m pytest -q -m gpu tests
for shape in $shapes; do
  for name in rome memit d4s alphaedit moments editing; do
    step "$name $shape" "$python" -m editkit bench "$name" --shape="$shape" --device="$device" \
      --dtype="$dtype" --repeats=1 --folder="$scratch"
    result="$scratch/$name-$shape.json"
    if [ -f "$result" ]; then
      mkdir -p "$folder" && mv "$result" "$folder/$name-$shape-$card.json"
    fi
  done
done
echo "steps that failed: $failed; results in $folder"
exit "$failed"
