# How full.sh and quick.sh run a line, `run FILE COMMANDS`: the result FILE is written last, and a line whose FILE
# is there is skipped, as is one that another of these scripts is running. `after FILE`: not before that is there.
mkdir -p runs results/easyvqa results/ablation results/models results/quick
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
run() { [ -e "$1" ] || flock -n "runs/$(basename "$1").lock" bash -c "$2 --json $1"; }
after() { [ -e "$1" ] && run "${@:2}"; }

train="python clip_adv.py --resume --holdout 'red circle,blue triangle,green rectangle,yellow circle'"
tune="$train --lr 3e-3"
seen="python eval.py zeroshot --subset seen"
held="python eval.py zeroshot --subset held-out --n 100"
