#!/usr/bin/env bash
# Measure on a GPU what a CPU cannot show, in under nine minutes. Raw results go to benchmarks/results/ (or $OUT),
# named by device and date, with versions and the command line beside them.
#
#   benchmarks/gpu.sh [folder with JPEGs in train/<class>/ and val/<class>/; default: the demo photographs]
#   ONLY="model decoding" benchmarks/gpu.sh     # only these lines, such as those that a first run skipped
#   STEPS=2 benchmarks/gpu.sh                   # without a GPU: every line runs, the figures mean nothing
#
# On a machine without a package index, install from wheels that were made elsewhere with the same Python:
#
#   python3 -m pip wheel --no-deps -r requirements.lock -w wheels
#   python3 -m pip install --no-index --no-deps --target site wheels/*.whl      # there
#   PYTHONPATH=$PWD/site benchmarks/gpu.sh
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # where cmtrain is not installed
export COLUMNS=160  # width of the tables of cmtrain bench, which go to a file
data=${1:-demo:photos}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
steps=${STEPS:-30}
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu")') || exit
gpu=$([ "$device" = cpu ] || echo yes)
out=${OUT:-benchmarks/results}/$device-$(date +%Y%m%d-%H%M)
mkdir -p "$out"
failed=() skipped=()

{
  date -u; echo "command: ${ONLY:+ONLY=\"$ONLY\" }$0 $*"; [ -z "$gpu" ] || nvidia-smi | head -15
  for package in torch timm accelerate nvidia.dali; do
    "$python" -c "import importlib; print('$package', importlib.import_module('$package').__version__)" || failed+=("$package")
  done
} > "$out/environment.txt" 2>&1
cat "$out/environment.txt"

# measure SECONDS NAME COMMAND...: keep its stdout and stderr; a failure does not stop the others
measure() {
  local limit=$1 name=$2 left=$((530 - SECONDS)); shift 2
  [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $name "* ]] || return 0
  if [ "$left" -lt 20 ]; then skipped+=("$name"); return 0; fi
  echo "== $name"
  timeout "$((left < limit ? left : limit))" "$@" > "$out/$name.txt" 2> "$out/$name.log" || failed+=("$name")
  tail -n 25 "$out/$name.txt" "$out/$name.log"
}

# bench SECONDS NAME ARGUMENTS...: one JSON file per measurement
bench() {
  local limit=$1 name=$2; shift 2
  measure "$limit" "$name" "$python" -m cmtrain bench --config configs/full_in1k.yaml --data.root "$data" --steps "$steps" \
    --json "$out/$name.json" "$@"
}

batch=512
fp16=fp16 bf16=bf16 mixed=mixed compile=true graphs=reduce-overhead
model=(--batch "$batch" --small-batch 128 --steps "$steps" --seconds 140)
# Without a GPU the same lines run with small batches, in the precision and with the decoder of a CPU.
if [ -z "$gpu" ]; then
  batch=8 fp16=fp32 bf16=fp32 mixed=cpu compile=false graphs=default
  model=(--batch 2 --small-batch 2 --steps 1 --seconds 20)
  export OMP_NUM_THREADS=1
fi
one_gpu=(--train.global_batch_size "$batch" --train.max_batch_per_gpu "$batch" --augment.repeats 1)
alone=(--what model --rounds 2 --beside "" --train.precision "$fp16")
few=(--train.global_batch_size "$((batch / 8))" --augment.repeats 1)

# The most wanted first: lines without time left are skipped and reported.
measure 150 tests "$python" -m pytest -q -s tests/gpu tests/models/test_fused_ffn.py -m "not slow" -k "not compiled_for"
# The model alone: eager, fused, compiled, folded for inference, fp16 and bf16, beside timm's; attention at both head sizes.
measure 170 model "$python" benchmarks/model_gpu.py "${model[@]}" --json "$out/model.jsonl"
# From files to updates; the loader alone with many threads, with RandAugment and without, at loads of the JPEG engine.
bench 60 train                --what all "${one_gpu[@]}" --train.precision "$fp16"
measure 90 decoding "$python" benchmarks/decoding.py "$data" --batch "$batch" --batches "$((steps / 2))" --decode "$mixed" --json "$out/decoding.json"
bench 60 guard                --what guard "${one_gpu[@]}" --train.precision "$fp16"
# The time that a step of few images loses to launching kernels, and that CUDA graphs give back.
bench 40 few_images           "${alone[@]}" "${few[@]}"
bench 90 few_images_graphs    "${alone[@]}" "${few[@]}" --train.compile "$compile" --train.compile_mode "$graphs"
bench 120 loader_beside_timm  --what loader "${one_gpu[@]}" --train.precision "$fp16" --data.decode "$mixed" --steps "$((steps / 6 + 1))" --rounds 3
# The step with its optimizer, as in the trainer.
bench 90 step                 --what model "${one_gpu[@]}" --train.precision "$fp16" --rounds 2
bench 40 step_bf16            "${alone[@]}" "${one_gpu[@]}" --train.precision "$bf16"
bench 40 step_eager           "${alone[@]}" "${one_gpu[@]}" --model.ffn_kernel eager
bench 90 step_compiled        "${alone[@]}" "${one_gpu[@]}" --train.compile "$compile"
bench 40 latency              --what latency "${one_gpu[@]}" --train.precision "$fp16" --rounds 2

echo "results in $out${skipped[*]:+; no time left for: ${skipped[*]}}${failed[*]:+; failed: ${failed[*]}}"
[ ${#failed[@]} -eq 0 ]
