#!/usr/bin/env bash
# Everything that only a GPU can show, in one command: the GPU tests first, then the benches. Offline, under 9 minutes.
#
#   bench/gpu.sh [OUT]      OUT (or $OUT): folder for the results, bench/results when not given
#   PYTHON=python3          the Python to use: any that has torch and sees the GPU; nothing is downloaded into it
#
# Writes OUT/<gpu>/<date>.json (every figure, with the machine), .md (the tables), the pictures where matplotlib is
# installed, and -tests.txt (what the tests said).
set -u
cd "$(dirname "$0")/.." || exit 1
python=${PYTHON:-python3}
out=${1:-${OUT:-bench/results}}
limit=530      # seconds for all of it
test_limit=240 # of these, at most so many for the tests

if ! gpu=$("$python" -c '
import re, torch
assert torch.cuda.is_available()
print(re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()))' 2>/dev/null); then
  echo "bench/gpu.sh: no NVIDIA GPU that the torch of $python can see; nothing was tested or measured."
  exit 0
fi
folder=$out/$gpu
stem=$(date -u +%Y-%m-%d-%H%M)
mkdir -p "$folder" || exit 1

if ! "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation -e . 2>/dev/null; then
  echo "==> pip cannot install the checkout here; using it where it stands"
fi
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
unset TRITON_INTERPRET FASTPEFT_BACKEND FASTPEFT_PRODUCT

echo "==> GPU tests on $gpu, at most $test_limit s"
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 6 --dist worksteal); fi # compiling kernels is CPU work
timeout "$test_limit" "$python" -m pytest -m gpu -q --continue-on-collection-errors "${workers[@]}" >"$folder/$stem-tests.txt" 2>&1
tests=$?
tail -n 15 "$folder/$stem-tests.txt"
if [ "$tests" -ne 0 ]; then echo "==> the GPU tests ended with status $tests (124: out of time); measuring all the same"; fi

echo "==> benches, $((limit - SECONDS)) s left"
"$python" bench/gpu.py --out "$folder" --stem "$stem" --deadline $((limit - 40 - SECONDS))
benches=$?
echo "==> $SECONDS s; results in $folder/$stem.json"
[ "$tests" -eq 0 ] && [ "$benches" -eq 0 ]
