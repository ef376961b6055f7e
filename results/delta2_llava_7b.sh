# Δ²LLaVA-7B on ΔCLIP-H/14 (delta_clip_h14.sh): the projector, then everything. The paper's settings, known from
# the authors' code, at ε 4; for ε 8: --eps 8 --k 5. VICUNA: a directory with Vicuna-7B v1.5.
# What it costs: python llava_adv.py --plan results/delta2_llava_7b.sh; config.json of VICUNA is enough for that.
torchrun --nproc_per_node 8 llava_adv.py --out runs/projector --init runs/delta_clip_h14 --llm VICUNA \
    --eps 4 --alpha 3 --k 3 --steps_a -1 --data_a blip_laion_cc_sbu_558k.json --image_root_a DIR --batch_a 256 \
    --lr_a 1e-3 --steps_b 0 --micro_batch 16 --checkpoint

torchrun --nproc_per_node 8 llava_adv.py --out runs/delta2_llava_7b --init runs/projector \
    --eps 4 --alpha 3 --k 3 --steps_a 0 --steps_b -1 --data llava_v1_5_mix665k.json --image_root DIR \
    --batch_size 128 --lora_r 128 --lora_alpha 256 --lr 2e-4 --lr_projector 2e-5 --lr_tower 1e-6 \
    --micro_batch 8 --checkpoint
