#!/usr/bin/env bash
# Everything that needs a GPU, in one call of under eight minutes on one H100: build here, check
# every kernel against its reference, run the benches, leave JSON.
#
#   bench/gpu.sh              results in $OUT if set, else in bench/results
#   bench/gpu.sh --rehearse   the same steps on the CPU at tiny shapes: does the script itself work?
#
# Needs no network: Python with torch, triton, transformers, pybind11, cmake, ninja and
# pytest-benchmark; nvcc. A step that fails does not stop the others; the exit status is 1 if one
# did, and the last lines say which. A step gets the time that is left of SECONDS_IN_ALL (460), at
# most its own.
set -u
cd "$(dirname "$0")/.."
root=$PWD
python=$(command -v "${PYTHON:-python3}") || { echo "no ${PYTHON:-python3}" >&2; exit 2; }
[[ $python = /* ]] || python=$root/$python  # commands run elsewhere
out=${OUT:-$root/bench/results}
mkdir -p "$out"
log=$out/gpu.log
: > "$log"
failed=()
began=$(date +%s)
deadline=$((began + ${SECONDS_IN_ALL:-460}))

if [ "${1:-}" = --rehearse ]; then
  device=cpu shapes=1m ops=swiglu scales=check
  sizes=(--seconds 8 --height 112 --pairs 1 --prefill 32 --max-tokens 2 --repeats 1)
  trees="float32/140/3" tree=(--shape 1m --members 2)
  frames=(--frames 2 --size 112 196 --resized 56 84 --runs 1)
else
  device=cuda shapes="7b 3b" ops= scales=check,bench
  sizes=() frames=()
  trees="float32/1000/64 bfloat16/4000/64" tree=(--shape 3b --checkpointing)
fi

# step NAME LIMIT_SECONDS COMMAND...: run, log, time; remember a failure.
step() {
  local name=$1 limit=$2 start status left
  shift 2
  start=$(date +%s)
  left=$((deadline - start))
  if [ "$left" -lt 5 ]; then
    echo "== $name: no time left" | tee -a "$log"
    failed+=("$name")
    return
  fi
  [ "$left" -gt "$limit" ] || limit=$left
  echo "== $name: $*" >> "$log"
  timeout --kill-after=10 "$limit" "$@" >> "$log" 2>&1
  status=$?
  echo "== $name: $(($(date +%s) - start)) s, exit $status" | tee -a "$log"
  [ "$status" -eq 0 ] || failed+=("$name")
}

# Modules and strings run outside of the checkout, or its kernels/ would stand in for a package of
# that name.
if [ "$device" = cuda ]; then
  # For this card only: compiling for three takes three times as long.
  arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
  step build 240 env VTTS_RT_BUILD=cuda VTTS_RT_CUDA_ARCHS="$arch" "$python" -m pip install \
    --quiet --no-build-isolation --no-deps --editable "$root"
fi
card=$(cd / && "$python" -c 'from vtts_rt.bench.setting import results_name
print(results_name("").strip("_").removesuffix(".json"))')
step env 60 env -C / "$python" -m vtts_rt.cli env

[ -n "$ops" ] || ops=$(cd / && "$python" -c 'import vtts_rt.ops
print(*vtts_rt.ops.dispatch.registry, sep=",")')
step errors 150 "$python" "$root/bench/bench_errors.py" --op "$ops" --device "$device" \
  --scale "$scales" --jobs 4 --timeout-seconds 60 --threads 2 --result-dir "$out"
step ops 150 env -C / "$python" -m vtts_rt.cli bench ops --op "$ops" --device "$device" \
  --runs 11 --timeout-seconds 40 --result-dir "$out"
step processor 60 "$python" "$root/bench/bench_processor.py" --device "$device" \
  --result-dir "$out" "${frames[@]}"
step ipc 60 "$python" "$root/bench/check_ipc.py" --device "$device"
step nvdec 60 "$python" "$root/bench/bench_nvdec.py" --result-dir "$out"
for shape in $shapes; do
  if [ "$device" = cuda ]; then
    step "decode $shape" 90 "$python" "$root/bench/bench_decode.py" --device cuda \
      --shape "$shape" --output "$out/decode${shape}_$card.json"
  fi
  step "device $shape" 150 "$python" "$root/bench/bench_device.py" --device "$device" \
    --shape "$shape" --result-dir "$out" "${sizes[@]}"
done
# A gradient step by FlexAttention; float32 is judged, every log-prob and gradient against full rows.
for case in $trees; do
  step "tree $case" 75 "$python" "$root/bench/bench_tree_step.py" --device "$device" --runs 1 \
    --dtype "${case%%/*}" --case "${case#*/}" "${tree[@]}" \
    --output-json "$out/treestep${case%%/*}_$card.json"
done
# Last, as nothing is judged by it but memory: it makes kernels 10 to 100 times slower.
if [ "$device" = cuda ] && ! command -v compute-sanitizer > /dev/null; then
  echo "== memcheck: no compute-sanitizer on PATH" | tee -a "$log"
  failed+=(memcheck)
elif [ "$device" = cuda ]; then
  for op in patchify patch_embed; do
    step "memcheck $op" 60 compute-sanitizer --error-exitcode 9 "$python" \
      "$root/bench/check_op.py" "$op" --device cuda --backend cuda --most 12
  done
fi

echo "== all: $(($(date +%s) - began)) s" | tee -a "$log"
if [ "${#failed[@]}" -gt 0 ]; then
  printf '== FAILED: %s\n' "${failed[@]}" | tee -a "$log"
  exit 1
fi
