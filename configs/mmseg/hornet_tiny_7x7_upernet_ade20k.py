# HorNet-T (7x7) with UPerNet on ADE20K: 48.1 mIoU at one scale in the paper (arXiv 2207.14284) and its repository.
#   torchrun --nproc_per_node=8 tools/mmseg_train.py configs/mmseg/hornet_tiny_7x7_upernet_ade20k.py --launcher pytorch
# The numbers are those of semantic_segmentation/configs/hornet/upernet_hornet_tiny_7x7_512_160k_ade20k.py in
# https://github.com/raoyongming/HorNet: AdamW 1e-4, weight decay 0.05, drop path 0.4, stage-wise decay 0.9, windows of
# 512 at steps of 341. One detail differs: there the convolutions between stages decay as much as the stem, here as the
# stage that they lead to.
_base_ = "./_base_/upernet_ade20k_160k.py"

channels = [64, 128, 256, 512]
model = dict(
    backbone=dict(model_name="vg_hornet_tiny_7x7", drop_path_rate=0.4),
    decode_head=dict(in_channels=channels),
    auxiliary_head=dict(in_channels=channels[2]),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor="GroupMatcherLayerDecay",
    paramwise_cfg=dict(decay_rate=0.9, decay_type="stage_wise", num_layers=8),
)
