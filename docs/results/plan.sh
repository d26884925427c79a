#!/bin/sh
# Everything that docs/results.md reports: tasks, arms, seeds, lengths. Which arms came later than the rest is told there.
# nino_no_posw is the published checkpoint (nowcast weights), runs/previous.safetensors the one shipped before this round.
# runs/refined.safetensors is the network before it was averaged with the one it was refined from.
# SEEDS caps the seeds of every line: passes with 1, 2, … finish all tasks seed by seed, and no run is made twice.
run() { # task arms seeds steps [more]
    task=$1 arms=$2 seeds=$3 steps=$4
    shift 4
    if [ "${SEEDS:-5}" -lt "$seeds" ]; then seeds=$SEEDS; fi
    nowcast evaluate --out "${OUT:-runs/runs.jsonl}" --task "$task" --arms "docs/results/arms/$arms.json" \
        --seeds "$seeds" --steps "$steps" --threads 1 --report "${REPORT:-runs/report.md}" "$@"
}
for part in "$@"; do
    case $part in # baselines, rivals: nothing of it depends on our weights
    half-16-adamw) run half-16 image-adamw 5 1000 ;;
    half-16-rivals) run half-16 image-rivals 5 1000 ;;
    half-16-previous) run half-16 image-previous 5 1000 ;;
    half-16-bn-adamw) run half-16-bn bn-adamw 5 1000 ;;
    half-16-bn-rivals) run half-16-bn bn-rivals 5 1000 ;;
    half-16-bn-previous) run half-16-bn image-previous 5 1000 ;;
    gpt2-code-adamw) run gpt2-code text-adamw 5 600 ;;
    gpt2-code-rivals) run gpt2-code text-rivals 5 600 ;;
    gpt2-code-previous) run gpt2-code text-previous 5 600 ;;
    llama-code-adamw) run llama-code text-adamw 5 600 ;;
    llama-code-rivals) run llama-code text-rivals 5 600 ;;
    llama-code-previous) run llama-code text-previous 5 600 ;;
    vit-adamw) run vit vit-adamw 5 600 ;;
    vit-rivals) run vit vit-rivals 5 600 ;;
    half-24-adamw) run half-24 wide-adamw 5 1000 ;;
    half-24-rivals) run half-24 wide-rivals 5 1000 ;;
    short-adamw) run c10-16 short-adamw 3 2000 ;;
    short-rivals) run c10-16 short-rivals 3 2000 ;;
    short-bn-adamw) run c10-16-bn short-bn-adamw 3 2000 ;;
    short-bn-rivals) run c10-16-bn short-bn-rivals 3 2000 ;;
    digits-adamw) run digits-mlp digits-adamw 5 600 ;;
    digits-rivals) run digits-mlp digits-rivals 5 600 ;;
    large-adamw) run c10-32 large-adamw 2 2000 ;;
    large-rivals) run c10-32 large-rivals 2 2000 ;;
    long-adamw) run half-16 long-adamw 2 20000 ;;
    long-rivals) run half-16 long-rivals 2 20000 ;;
    many-adamw) run half-16 many-adamw 3 4000 ;;
    many-rivals) run half-16 many-rivals 3 4000 ;;
    sweep-adamw) run half-16 sweep-adamw 3 1000 ;;
    sweep-rivals) run half-16 sweep-rivals 3 1000 ;;
    reproduction-nino) run c10-16 reproduction-nino 5 10000 --until-target ;;
    reproduction-adamw) run c10-16 reproduction-adamw 5 10000 --until-target ;;
    # ours
    half-16-ours) run half-16 image-ours 5 1000 ;;
    half-16-bn-ours) run half-16-bn image-ours 5 1000 ;;
    half-24-ours) run half-24 image-ours 5 1000 ;;
    gpt2-code-ours) run gpt2-code text-ours 5 600 ;;
    llama-code-ours) run llama-code text-ours 5 600 ;;
    vit-ours) run vit vit-ours 5 600 ;;
    short-ours) run c10-16 short-ours 3 2000 ;;
    sweep-ours) run half-16 sweep-ours 3 1000 ;;
    reproduction-ours) run c10-16 reproduction-ours 5 10000 --until-target ;;
    # the same on trial, as attach makes them
    half-16-trial) run half-16 image-trial 5 1000 ;;
    half-16-bn-trial) run half-16-bn image-trial 5 1000 ;;
    half-24-trial) run half-24 image-trial 5 1000 ;;
    gpt2-code-trial) run gpt2-code text-trial 5 600 ;;
    llama-code-trial) run llama-code text-trial 5 600 ;;
    vit-trial) run vit vit-trial 5 600 ;;
    short-trial) run c10-16 short-trial 3 2000 ;;
    short-bn-ours) run c10-16-bn short-bn-ours 3 2000 ;;
    digits-ours) run digits-mlp digits-ours 5 600 ;;
    # ours and the published weights at the other rates AdamW was tried at
    half-16-rates) run half-16 image-rates 5 1000 ;;
    half-16-bn-rates) run half-16-bn image-rates 5 1000 ;;
    half-24-rates) run half-24 image-rates 5 1000 ;;
    short-rates) run c10-16 short-rates 3 2000 ;;
    long-ours) run half-16 long-ours 2 20000 ;;
    many-ours) run half-16 many-ours 3 4000 ;;
    large-ours) run c10-32 large-ours 2 2000 ;;
    reproduction-trial) run c10-16 reproduction-trial 5 10000 --until-target ;;
    # weights 64 wide, on trial as attach makes them, with all they are compared with on the same machine:
    # OUT=docs/results/h64.jsonl
    half-16-h64) run half-16 h64-image 5 1000 ;;
    half-16-bn-h64) run half-16-bn h64-image 5 1000 ;;
    half-24-h64) run half-24 h64-image 5 1000 ;;
    gpt2-code-h64) run gpt2-code h64-text 5 600 ;;
    llama-code-h64) run llama-code h64-text 5 600 ;;
    vit-h64) run vit h64-vit 5 600 ;;
    digits-h64) run digits-mlp h64-digits 5 600 ;;
    short-h64) run c10-16 h64-short 3 2000 ;;
    short-bn-h64) run c10-16-bn h64-short-bn 3 2000 ;;
    large-h64) run c10-32 h64-large 2 2000 ;;
    many-h64) run half-16 h64-many 3 4000 ;;
    long-h64) run half-16 h64-long 2 20000 ;;
    sweep-h64) run half-16 h64-sweep 3 1000 ;;
    reproduction-h64) run c10-16 h64-reproduction 5 10000 --until-target ;;
    choose-h64)
        run choose-conv h64-choose-images 5 1000
        run choose-gpt2 h64-choose-text 5 600
        run choose-mlp h64-choose-mlp 5 600
        run choose-full h64-choose-full 2 2000
        ;;
    # settings: on the task for choosing, which is reported for nothing else
    defaults) run choose-conv defaults 5 1000 ;;
    defaults-text) run choose-gpt2 defaults-text 5 600 ;;
    lengths)
        for n in 400 1000 2000 4000; do run choose-conv "defaults-$n" 3 "$n"; done
        for n in 600 1200 2400; do run choose-gpt2 "defaults-text-$n" 3 "$n"; done
        ;;
    # the seed paper's tasks and protocol, for whoever has their data (DATA names its folder): 10,000 steps, 14,000 on WikiText; then how
    # far apart snapshots lie whatever the period, and fixed horizons against decaying ones
    paper-images)
        for t in FM-16 C10-16 FM-32 C10-32 C100-32; do
            run "$t" paper-adamw 5 10000 --data "$DATA"
            run "$t" paper-nowcasts 5 10000 --data "$DATA"
        done
        ;;
    paper-text)
        for t in LM1B/3-24 LM1B/2-32 LM1B/3-64; do
            run "$t" paper-adamw 5 10000 --data "$DATA"
            run "$t" paper-nowcasts 5 10000 --data "$DATA"
        done
        run Wiki/3-64 paper-adamw 5 14000 --data "$DATA"
        run Wiki/3-64 paper-nowcasts 5 14000 --data "$DATA"
        ;;
    paper-settings) run C10-16 paper-settings 5 10000 --data "$DATA" ;;
    *)
        echo "no part is called $part" >&2
        exit 1
        ;;
    esac
done
