# ΔCLIP-H/14: 84 → 224 → 336 px. What it costs: python clip_adv.py --plan results/delta_clip_h14.sh
#
# Known of ΔCLIP-H/14: the model, DataComp-1B and Recap-DataComp-1B, mean, std and tokenizer, ε 4, training at
# low resolution first. Its schedule is not public. Assumed: sizes, text tokens, batch sizes, learning rates,
# samples and the first warm-up are CLIPA H/14's (the same authors', clean), AdamW's β₂ and weight decay too;
# K and α are AdvXL's. Our guesses: the number of shards, the mixture of captions, ε's ramp, the warm-ups of
# phases 2 and 3, 512 GPUs.
#
# Every node runs each command, with --rdzv_backend c10d --rdzv_endpoint HOST:PORT added (README). With fewer
# GPUs, add --micro_batch: the same gradient from as many samples at a time as fit.

# 1. 12.8 billion samples at 84 px, 36 patches and 8 text tokens; warm-up 3200 of 195,312 updates. In the first
# 2 % ε ramps up (assumed: from nothing, a model learns faster than it is fooled). One step of α = ε.
torchrun --nnodes 64 --nproc_per_node 8 clip_adv.py --out runs/delta_clip_h14_84 \
    --arch results/delta_clip_h14.json --tokenizer vocab.txt --size 84 --context 8 \
    --data 'DATACOMP/{00000..12895}.tar' --caption_key 'txt:0.2,re_caption:0.8' --workers 8 \
    --samples 12.8e9 --batch_size 65536 --lr 2.048e-3 --warmup 0.016384 --beta2 0.95 --wd 0.2 \
    --eps 4 --alpha 4 --k 1 --eps_from 0 --eps_to 0.02 --k_from 0 --save_every 1000

# 2. 0.5 billion at 224 px, 256 patches and 32 text tokens; full strength from the first update.
torchrun --nnodes 64 --nproc_per_node 8 clip_adv.py --out runs/delta_clip_h14_224 \
    --init runs/delta_clip_h14_84 --size 224 --context 32 \
    --data 'DATACOMP/{00000..12895}.tar' --caption_key 'txt:0.2,re_caption:0.8' --workers 8 \
    --samples 0.5e9 --batch_size 32768 --lr 5.12e-5 --warmup 0.05 --beta2 0.95 --wd 0.2 \
    --eps 4 --alpha 3 --k 3 --eps_from 0 --eps_to 0 --k_from 0

# 3. 0.13 billion at 336 px, 576 patches.
torchrun --nnodes 64 --nproc_per_node 8 clip_adv.py --out runs/delta_clip_h14 \
    --init runs/delta_clip_h14_224 --size 336 \
    --data 'DATACOMP/{00000..12895}.tar' --caption_key 'txt:0.2,re_caption:0.8' --workers 8 \
    --samples 0.13e9 --batch_size 16384 --lr 6.4e-6 --warmup 0.05 --beta2 0.95 --wd 0.2 \
    --eps 4 --alpha 3 --k 3 --eps_from 0 --eps_to 0 --k_from 0
