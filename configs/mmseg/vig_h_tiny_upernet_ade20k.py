# ViG-H-T with UPerNet on ADE20K.
#   torchrun --nproc_per_node=8 tools/mmseg_train.py configs/mmseg/vig_h_tiny_upernet_ade20k.py --launcher pytorch
# The paper (arXiv 2405.18425) scores ViG with UPerNet on ADE20K; its repository has no code for it. The numbers are
# the customary ones, Swin-T's (arXiv 2103.14030, section 4.3): AdamW 6e-5, weight decay 0.01 but on norms and biases,
# 1,500 iterations of warm-up, then linearly to zero. Stochastic depth is that of the classifier's training, none for
# the tiny model.
_base_ = "./_base_/upernet_ade20k_160k.py"

channels = [96, 192, 384, 768]
model = dict(
    backbone=dict(model_name="vg_vig_h_tiny", drop_path_rate=0.0),
    decode_head=dict(in_channels=channels),
    auxiliary_head=dict(in_channels=channels[2]),
)
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    constructor="GroupMatcherLayerDecay",
    paramwise_cfg=dict(decay_rate=1.0),  # no layer decay; leaves norms and biases without weight decay
)
