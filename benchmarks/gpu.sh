#!/usr/bin/env bash
# Everything a GPU can show and a CPU cannot, in one command of under ten minutes. Raw results go to benchmarks/results/
# (or $OUT), named by device and date, with versions and the command line in every file.
#
#   benchmarks/gpu.sh [folder with JPEGs in train/<class>/ and val/<class>/; the demo photographs if left out]
set -uo pipefail
cd "$(dirname "$0")/.."
data=${1:-demo:photos}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
device=$($python -c 'import torch; print(torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu")')
out=${OUT:-benchmarks/results}/$device-$(date +%Y%m%d-%H%M)
mkdir -p "$out"
steps=${STEPS:-30}

{
  date -u; echo "command: $0 $*"; nvidia-smi 2>&1 | head -15
  $python -c 'import torch, timm, accelerate; print("torch", torch.__version__, "timm", timm.__version__, "accelerate", accelerate.__version__)'
  $python -c 'import nvidia.dali as d; print("dali", d.__version__)'
} > "$out/environment.txt" 2>&1

echo "== tests/gpu"; timeout 150 $python -m pytest -q tests/gpu 2>&1 | tee "$out/tests_gpu.txt" | tail -5

# bench NAME ARGUMENTS...: one JSON file a measurement; a failing one does not stop the others
bench() {
  name=$1; shift
  echo "== $name"
  timeout 120 $python -m cmtrain bench --config configs/full_in1k.yaml --data.root "$data" --steps "$steps" --json "$out/$name.json" "$@" \
    2> "$out/$name.log" | tail -c 400 || tail -3 "$out/$name.log"
}
one_gpu=(--train.global_batch_size 512 --train.max_batch_per_gpu 512)
bench train_fp16          --what all   "${one_gpu[@]}"
bench model_bf16          --what model "${one_gpu[@]}" --train.precision bf16
bench model_fp16_compiled --what model "${one_gpu[@]}" --train.compile true
bench model_fp16_resnet50 --what model "${one_gpu[@]}" --model.name resnet50
for threads in 4 8 16; do
  bench "loader_mixed_threads$threads"         --what loader "${one_gpu[@]}" --data.decode mixed --data.threads "$threads"
  bench "loader_mixed_threads${threads}_plain" --what loader "${one_gpu[@]}" --data.decode mixed --data.threads "$threads" --augment.rand_augment null --augment.color_jitter null
done
echo "results in $out"
