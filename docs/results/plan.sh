#!/bin/sh
# Everything that docs/results.md reports, written down before the first run: tasks, arms, seeds, lengths.
# nino_no_posw is the published checkpoint (nowcast weights), runs/previous.safetensors the one shipped before this round.
run() { # task arms seeds steps [more]
    task=$1 arms=$2 seeds=$3 steps=$4
    shift 4
    nowcast evaluate --out "${OUT:-docs/results/runs.jsonl}" --task "$task" --arms "docs/results/arms/$arms.json" \
        --seeds "$seeds" --steps "$steps" --threads 1 --report runs/report.md "$@"
}
baselines() { # everything that does not depend on our weights
    run half-16 image-adamw 5 1000
    run half-16 image-rivals 5 1000
    run half-16 image-previous 5 1000
    run half-16-bn bn-adamw 5 1000
    run half-16-bn bn-rivals 5 1000
    run gpt2-code text-adamw 3 600
    run gpt2-code text-rivals 3 600
    run gpt2-code text-previous 3 600
    run c10-16 short-adamw 1 2000
    run llama-code text-adamw 3 600
    run llama-code text-rivals 3 600
    run vit vit-adamw 3 600
    run vit vit-rivals 3 600
    run half-24 wide-adamw 3 1000
    run half-24 wide-rivals 3 1000
    run c10-16 short-rivals 1 2000
    run half-16 sweep-adamw 1 1000
    run c10-16 reproduction-nino 1 10000 --until-target
    run c10-16 reproduction-adamw 1 10000 --until-target
}
ours() {
    run half-16 image-ours 5 1000
    run half-16-bn image-ours 5 1000
    run gpt2-code text-ours 3 600
    run vit vit-ours 3 600
    run llama-code text-ours 3 600
    run c10-16 short-ours 1 2000
    run half-24 image-ours 3 1000
    run half-16 sweep-ours 1 1000
    run half-16 defaults 2 1000
}
"$1"
