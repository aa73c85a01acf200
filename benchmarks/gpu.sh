#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes on a bare machine with PyTorch 2.11 or later and no network.
#
#   benchmarks/gpu.sh WHEELS OUT
#
# WHEELS is a folder of wheels of what else mtl_dist needs, of pytest, hypothesis and transformers, and of deepspeed where
# ZeRO is to be tried (`pip download -d WHEELS ...` on a machine with a network, without torch), or - where all is
# installed; OUT an empty folder for what comes of it: results.json, table.md, and the log of each part. A part that fails,
# or takes longer than its limit, does not keep the others. On a CPU the same script runs with small sizes and three
# times the limits, and measures nothing worth knowing; exactness is then that of two processes over gloo.
set -uo pipefail
wheels=${1:?usage: benchmarks/gpu.sh WHEELS OUT} out=${2:?usage: benchmarks/gpu.sh WHEELS OUT}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd)
if [ "$wheels" != - ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$out/site" "$wheels"/*.whl || exit
fi
cd "$(dirname "$0")/.." || exit
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
if [ -d "$out/site" ]; then PYTHONPATH=$PYTHONPATH:$out/site; fi

number=0
part() { # NAME LIMIT COMMAND...: its output in NUMBER-NAME.log, its exit code and seconds in NUMBER-NAME.rc
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    number=$((number + 1))
    local file=$out/$number-$name
    timeout --kill-after=5 $((limit * slow)) "$@" >"$file.log" 2>&1
    code=$?
    echo "$code $((SECONDS - start))" >"$file.rc"
    echo "$name: exit code $code, $((SECONDS - start)) s"
}

if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    encoder=(--shape base --repetitions 5) price=(--shape base --bf16 --rows 256)
    demo=(precision=bf16) exactness=(--cuda) slow=1
else
    encoder=(--shape minilm --sentences 4 --repetitions 1) price=(--rows 4 --rounds 1)
    demo=(steps=20 evaluate.every_steps=20) exactness=(--worlds 2) slow=3
    export OMP_NUM_THREADS=1 # threads that other work on the cores holds up wait for each other
fi
"$python" -c 'import deepspeed' 2>"$out/deepspeed.log" || exactness+=(--only DDP FSDP2)

part mfu 50 "$python" -m benchmarks.gpu mfu
part surgery 60 "$python" -m benchmarks.price "${price[@]}"
part attention 40 "$python" -m benchmarks.gpu attention
part adamw 30 "$python" -m benchmarks.gpu adamw
part fp16 40 "$python" -m benchmarks.gpu fp16
part encoder 50 "$python" -m benchmarks.encoder "${encoder[@]}"
part corpus 15 "$python" -m mtl_dist corpus "$out/demo"
part demo 60 "$python" -m mtl_dist train configs/demo.yaml data_dir="$out/demo" encoder.tokenizer="$out/demo" \
    cache_dir="$out/cache" output_dir="$out/run" --profile 5 "${demo[@]}"
part exactness 185 "$python" -m benchmarks.exactness "${exactness[@]}"
"$python" -m benchmarks.gpu table "$out"
