#!/bin/bash
# Does adversarial pre-training beat fine-tuning a clean CLIP? The first table, of one seed and 100 images.
# How it works, and all the others: results/full.sh, which goes on with these runs.
cd "$(dirname "$0")/.." && . results/common.sh

tune="$tune --init runs/easyvqa/half.0"
seen="$seen --n 100"
R=runs/easyvqa J=results/quick
run $J/half.0.json "$train --eps 0 --steps 4533 --out $R/half.0 && $seen --attack none $R/half.0"
run $J/delta.0.json "$train --out $R/delta.0 && $seen $R/delta.0"
run $J/vanilla.0.json "$train --eps 0 --steps 9067 --out $R/vanilla.0 && $seen $R/vanilla.0"
after $J/half.0.json $J/tecoa.0.json "$tune --objective tecoa --steps 1942 --out $R/tecoa.0 && $seen $R/tecoa.0"
after $J/half.0.json $J/fare.0.json "$tune --objective fare --steps 1700 --out $R/fare.0 && $seen $R/fare.0"
after $J/half.0.json $J/anchored.0.json "$tune --anchor 0.2 --steps 1700 --out $R/anchored.0 && $seen $R/anchored.0"
after $J/half.0.json $J/half.0.held-out.json "$held --attack none $R/half.0"
for name in vanilla tecoa fare anchored delta; do
    after $J/$name.0.json $J/$name.0.held-out.json "$held $R/$name.0"
done
python eval.py tables results
