#!/usr/bin/env bash
# Measure on a GPU what a CPU cannot show, in one call of nine minutes, the most wanted figures first.
#
#   benchmarks/gpu.sh [folder with JPEGs in train/<class>/ and val/<class>/; default: demo:jpegs]
#   PLAN=1 benchmarks/gpu.sh                    # print the lines and their limits in seconds; run nothing
#   ONLY="model decoding" benchmarks/gpu.sh     # only these lines, such as those that a first call skipped
#   MINUTES=20 benchmarks/gpu.sh                # another time for all; limits grow and shrink with it
#   STEPS=1 benchmarks/gpu.sh                   # without a GPU: every line runs, the figures mean nothing
#
# Every figure is on disk as soon as it is known. README.md beside this script lists the files, and what a
# host without a package index needs.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}  # where cmtrain is not installed
export PYTHONUNBUFFERED=1 COLUMNS=160  # width of the tables of cmtrain bench, which go to a file
data=${1:-demo:jpegs}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
steps=${STEPS:-20}
minutes=${MINUTES:-9}
scratch=$(mktemp -d) || exit
trap 'rm -rf "$scratch"; kill $(jobs -p) 2> /dev/null' EXIT
names=()
declare -A state why seconds

scaled() { echo $(($1 * minutes / 9)); }

# Results of all lines, rewritten whenever one changes: what has not been reached is in it from the start.
note() {
  local name=$1
  state[$name]=$2 why[$name]=$3 seconds[$name]=$4
  for name in "${names[@]}"; do
    printf '{"name": "%s", "state": "%s", "seconds": %d, "why": "%s"}\n' \
      "$name" "${state[$name]}" "${seconds[$name]}" "${why[$name]}"
  done > "$out/.summary" && mv "$out/.summary" "$out/summary.jsonl"
}

# line SECONDS NAME COMMAND...: run it, keep its stdout and stderr. It is killed when its seconds are over,
# and those that the lines before it have saved. A failure does not stop the others.
line() {
  local limit name=$2 rc left begin=$SECONDS
  limit=$(scaled "$1"); shift 2
  [ -z "${ONLY:-}" ] || [[ " $ONLY " == *" $name "* ]] || return 0
  case $pass in
    print) printf '%4d  %-18s %s\n' "$limit" "$name" "$*"; return ;;
    list) names+=("$name"); state[$name]=skipped why[$name]="not reached" seconds[$name]=0; return ;;
  esac
  if [ -z "$dali" ] && [[ " $dali_lines " == *" $name "* ]]; then
    note "$name" skipped "needs DALI" 0; return
  fi
  due=$((due + limit < total ? due + limit : total)) left=$((due - SECONDS))
  if [ "$left" -lt "$(scaled 15)" ] || [ "$left" -lt 1 ]; then
    note "$name" skipped "no time left" 0; return
  fi
  echo "== $name, $left s at most"
  note "$name" killed "ended with the script" 0  # true if the script never comes to the next line
  timeout -k 5 "$left" "$@" > "$out/$name.txt" 2> "$out/$name.log" &
  wait $!; rc=$?  # so that ending the script ends the line
  case $rc in
    0) note "$name" "done" "" $((SECONDS - begin)) ;;
    124 | 137) note "$name" killed "after $left s" $((SECONDS - begin)) ;;
    *) note "$name" failed "exit code $rc" $((SECONDS - begin)) ;;
  esac
  tail -q -n 12 "$out/$name.txt" "$out/$name.log"
}

# bench SECONDS NAME ARGUMENTS...: a line of cmtrain bench, with the recipe for ImageNet
bench() {
  local limit=$1 name=$2; shift 2
  line "$limit" "$name" "$python" -m cmtrain bench --config configs/full_in1k.yaml "${small[@]}" \
    --data.root "$data" --steps "$steps" --json "$out/$name.json" "$@"
}

# is_broken WAY: whether the first line found a fault in this way to decode
is_broken() { grep -qs "\"decode\": \"$1\",.*\"fault\": \"[^\"]" "$out/decoder_probe.jsonl"; }

device=gpu dali='' out=OUT
if [ -z "${PLAN:-}" ]; then
  found=$("$python" -c '
import importlib, sys, torch
print("device", torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu")
print("python", sys.version.split()[0])
for name in ("torch", "triton", "timm", "accelerate", "pydantic", "nvidia.dali"):
    try:
        print(name, importlib.import_module(name).__version__, flush=True)
    except Exception as error:
        print(name, "cannot be imported:", error, flush=True)
')
  device=$(awk '$1 == "device" {print $2}' <<< "$found")
  [ -n "$device" ] || exit 1
  [[ $found =~ nvidia.dali\ [0-9] ]] && dali=yes
  out=${OUT:-benchmarks/results}/$device-$(date +%Y%m%d-%H%M%S)
  mkdir -p "$out" || exit
  {
    date -u
    echo "command: ${ONLY:+ONLY=\"$ONLY\" }$0 $*"
    echo "$found"
    [ "$device" = cpu ] || nvidia-smi | head -15
  } 2>&1 | tee "$out/environment.txt"
fi

batch=512 few_images=64 rounds=2
fp16=fp16 bf16=bf16 decode=mixed compile=true graphs=reduce-overhead
model=(--batch "$batch" --small-batch 128 --steps "$steps")
tests=(tests/gpu tests/models/test_fused_ffn.py tests/models/test_layer_norm.py -k "not compiled_for")
small=()
# Without a GPU the same lines run with a small model and batch, with a CPU's precision and decoder.
if [ "$device" = cpu ]; then
  batch=8 few_images=2 rounds=1 fp16=fp32 bf16=fp32 decode=cpu compile=false graphs=default
  model=(--batch 2 --small-batch 2 --steps 1 --image-px 64 --seconds "$(scaled 15)")
  small=(--model.name cmt_micro --data.image_px 64 --data.eval_resize_px 72)
  tests=(tests/gpu tests/models/test_fused_ffn.py -k "not compiled_for and (gpu or maps_of_any_shape)")
  export OMP_NUM_THREADS=1
fi
one_gpu=(--train.global_batch_size "$batch" --train.max_batch_per_gpu "$batch" --augment.repeats 1)
alone=(--what model --rounds "$rounds" --beside "")
few=(--train.global_batch_size "$few_images" --augment.repeats 1)
two=(--train.global_batch_size 2 --train.max_batch_per_gpu 2 --augment.repeats 1)
fp16=(--train.precision "$fp16") bf16=(--train.precision "$bf16")
case $data in
  demo:*) folder=${XDG_CACHE_HOME:-$HOME/.cache}/cmtrain/demo-${data#demo:} ;;
  *) folder=$data ;;
esac
dali_lines="decoder_probe decoding train pack train_packed loader_beside_timm"

plan() {
  # Whether the GPU's decoder can be trusted: crashes, hangs and wrong pixels, in a process of its own
  line 40 decoder_probe "$python" benchmarks/decoder_probe.py --json "$out/decoder_probe.jsonl"
  if is_broken mixed; then decode=mixed_whole; fi
  if is_broken mixed && is_broken mixed_whole; then decode=cpu; fi
  # The model alone: eager, fused, folded for inference, beside timm's; the dearest kernels of a step
  line 85 model "$python" benchmarks/model_gpu.py --seconds "$(scaled 65)" "${model[@]}" \
    --json "$out/model.jsonl"
  # The step with its optimizer, as in the trainer
  bench 50 step          "${alone[@]}" "${one_gpu[@]}" "${fp16[@]}"
  bench 25 step_eager    "${alone[@]}" "${one_gpu[@]}" "${fp16[@]}" --model.ffn_kernel eager
  bench 85 step_compiled "${alone[@]}" "${one_gpu[@]}" "${fp16[@]}" --train.compile "$compile"
  line 25 guard "$python" benchmarks/guard.py --config configs/full_in1k.yaml "${small[@]}" --rounds 3 \
    --steps "$steps" --json "$out/guard.json" "${one_gpu[@]}" "${fp16[@]}"
  line 75 tests "$python" -m pytest -v --timeout 60 --continue-on-collection-errors -p no:cacheprovider \
    -m "not slow" "${tests[@]}"
  # The loader alone, by threads and by share of the JPEG engine; then from files and from shards to updates
  line 40 decoding "$python" benchmarks/decoding.py "$data" --batch "$batch" --batches "$((steps / 2 + 1))" \
    --decode "$decode" --json "$out/decoding.jsonl"
  bench 40 train         --what all "${one_gpu[@]}" "${fp16[@]}" --data.decode "$decode"
  line 15 pack "$python" -m cmtrain data pack "$folder" "$scratch/packed" --resize-shorter 256
  bench 35 train_packed  --what all "${one_gpu[@]}" "${fp16[@]}" --data.decode "$decode" \
    --data.root "$scratch/packed"

  # With the time that is left: what a step of few images loses to launches, and CUDA graphs give back
  bench 40 few_images        "${alone[@]}" "${few[@]}" "${fp16[@]}"
  bench 90 few_images_graphs "${alone[@]}" "${few[@]}" "${fp16[@]}" --train.compile "$compile" \
    --train.compile_mode "$graphs"
  bench 40 step_bf16         "${alone[@]}" "${one_gpu[@]}" "${bf16[@]}"
  bench 50 two_images        --what model --rounds "$rounds" "${two[@]}" "${fp16[@]}"
  line 90 loader_beside_timm "$python" benchmarks/loader_beside_timm.py --config configs/full_in1k.yaml \
    "${small[@]}" --data.root "$data" --data.decode "$decode" "${fp16[@]}" --rounds "$rounds" \
    --steps "$((steps / 6 + 1))" --json "$out/loader_beside_timm.json"
  line 120 model_compiled "$python" benchmarks/model_gpu.py --seconds "$(scaled 90)" "${model[@]}" \
    --compiled --json "$out/model_compiled.jsonl"
}

if [ -n "${PLAN:-}" ]; then pass=print; plan; exit; fi
# The demo images are written while the first lines run.
if [[ $data == demo:* ]]; then
  "$python" -c 'import pathlib, sys
from pipelines.files.demo_images import demo_folder
demo_folder(sys.argv[1], pathlib.Path(sys.argv[2]))' "${data#demo:}" "${folder%/*}" > "$out/images.log" 2>&1 &
fi
pass=list; plan
total=$(scaled 530) due=$SECONDS pass=run
plan

echo "== results in $out"
cat "$out/summary.jsonl"
code=0
for name in "${names[@]}"; do
  case ${state[$name]} in
    failed | killed) code=1 ;;
    done) continue ;;
  esac
  echo "${state[$name]}: $name (${why[$name]})"
done
exit $code
