#!/bin/bash
# Does adversarial pre-training beat fine-tuning a clean CLIP? All that results/tables.md shows.
#
# A line is one result, skipped where its file is there. To repeat a row delete its file and its run, and those
# of `half` (or `vanilla`) if it is a fine-tuning. Two of this script, each on a core, share the work: a line
# that is being run is left to the other. Stopped, or run again, it goes on where it was. What was chosen on
# validation images, and how widely was searched: results/README.md.
cd "$(dirname "$0")/.." && . results/common.sh

# ----------------------------------------------------------------------------------------------- easy-VQA
# The budget of the default ΔCLIP: 870,000 images through the image tower, counted as passes: forward 1, to
# the pixels 1, to the weights 1. Half of it is 4533 clean updates; then 1942 of TeCoA (7 passes), 1700 of the
# others (one more, of the frozen tower). A tenth of the vanilla run is 388 and 340 updates on top of it.
seen="$seen --n 200"
R=runs/easyvqa J=results/easyvqa
for seed in 0 1 2; do
    run $J/half.$seed.json "$train --eps 0 --steps 4533 --seed $seed --out $R/half.$seed && $seen --attack none $R/half.$seed"
    run $J/vanilla.$seed.json "$train --eps 0 --steps 9067 --seed $seed --out $R/vanilla.$seed && $seen $R/vanilla.$seed"
    run $J/delta.$seed.json "$train --seed $seed --out $R/delta.$seed && $seen $R/delta.$seed"
    after $J/half.$seed.json $J/tecoa.$seed.json "$tune --objective tecoa --init $R/half.$seed --steps 1942 --seed $seed --out $R/tecoa.$seed && $seen $R/tecoa.$seed"
    after $J/half.$seed.json $J/fare.$seed.json "$tune --objective fare --init $R/half.$seed --steps 1700 --seed $seed --out $R/fare.$seed && $seen $R/fare.$seed"
    after $J/half.$seed.json $J/anchored.$seed.json "$tune --anchor 0.2 --init $R/half.$seed --steps 1700 --seed $seed --out $R/anchored.$seed && $seen $R/anchored.$seed"
    after $J/half.$seed.json $J/half.$seed.held-out.json "$held --attack none $R/half.$seed"
    for name in vanilla delta tecoa fare anchored; do
        after $J/$name.$seed.json $J/$name.$seed.held-out.json "$held $R/$name.$seed"
    done
    after $J/vanilla.$seed.json $J/tecoa_tenth.$seed.json "$tune --lr 1e-3 --objective tecoa --init $R/vanilla.$seed --steps 388 --seed $seed --out $R/tecoa_tenth.$seed && $seen $R/tecoa_tenth.$seed"
    after $J/vanilla.$seed.json $J/fare_tenth.$seed.json "$tune --lr 1e-3 --objective fare --init $R/vanilla.$seed --steps 340 --seed $seed --out $R/fare_tenth.$seed && $seen $R/fare_tenth.$seed"
    after $J/vanilla.$seed.json $J/anchored_tenth.$seed.json "$tune --lr 1e-3 --anchor 0.2 --init $R/vanilla.$seed --steps 340 --seed $seed --out $R/anchored_tenth.$seed && $seen $R/anchored_tenth.$seed"
done

# Attacks made on each model against all, and are they what they seem? (audit ends with 1 where a check fails)
five=$(echo $R/{vanilla,tecoa,fare,anchored,delta}.0)
run results/models/transfer.json "python eval.py transfer $five --n 200"
run results/models/audit.json "python eval.py audit $five --split val"
run results/models/defence.json "python eval.py audit $R/vanilla.0 --defence counterattack --eps 6 --split val --queries 1000"

# ----------------------------------------------------------------------------------- what makes ΔCLIP work
R=runs/ablation J=results/ablation
seen="$seen --eps 8"
for seed in 0 1; do
    after results/easyvqa/delta.$seed.json $J/delta.$seed.json "$seen runs/easyvqa/delta.$seed"
    run $J/k1.$seed.json "$train --k 1 --alpha 17.5 --seed $seed --out $R/k1.$seed && $seen $R/k1.$seed"
    run $J/k3.$seed.json "$train --k 3 --seed $seed --out $R/k3.$seed && $seen $R/k3.$seed"
    run $J/eps8.$seed.json "$train --eps 8 --seed $seed --out $R/eps8.$seed && $seen $R/eps8.$seed"
    run $J/eps20.$seed.json "$train --eps 20 --seed $seed --out $R/eps20.$seed && $seen $R/eps20.$seed"
    run $J/no_clean_start.$seed.json "$train --eps_from 0 --eps_to 0 --seed $seed --out $R/no_clean_start.$seed && $seen $R/no_clean_start.$seed"
    run $J/half_size.$seed.json "$train --size 16 --steps 2500 --seed $seed --out $R/small.$seed && $train --init $R/small.$seed --size 32 --eps_from 0 --eps_to 0 --k_from 0 --steps 2500 --seed $seed --out $R/half_size.$seed && $seen $R/half_size.$seed"
    run $J/groups.$seed.json "$train --negatives 8 --seed $seed --out $R/groups.$seed && $seen $R/groups.$seed"
    run $J/drop.$seed.json "$train --drop 0.5 --seed $seed --out $R/drop.$seed && $seen $R/drop.$seed"
done

python eval.py tables results
