# ConViT-S with UPerNet on ADE20K.
#   torchrun --nproc_per_node=8 tools/mmseg_train.py configs/mmseg/convit_small_upernet_ade20k.py --launcher pytorch
# The paper (arXiv 2103.10697) has no segmentation. ConViT is DeiT with gated positional attention, so these are the
# numbers of DeiT-S in mmsegmentation (configs/vit/vit_deit-s16_mln_upernet_8xb2-160k_ade20k-512x512.py): AdamW 6e-5,
# weight decay 0.01, drop path 0.1, levels from blocks 3, 6, 9 and 12 brought to strides 4 to 32.
_base_ = "./_base_/upernet_ade20k_160k.py"

width = 432
model = dict(
    # The position embedding is learned on a grid of 32 x 32 patches, resized from the classifier's 14 x 14.
    backbone=dict(
        model_name="vg_convit_small", img_size=512, out_indices=(2, 5, 8, 11), drop_path_rate=0.1, out_norm=False
    ),
    neck=dict(type="MultiLevelNeck", in_channels=[width] * 4, out_channels=width, scales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[width] * 4),
    auxiliary_head=dict(in_channels=width, in_index=3),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    constructor="GroupMatcherLayerDecay",
    paramwise_cfg=dict(decay_rate=1.0),  # no layer decay; leaves norms, biases and positions without weight decay
)
