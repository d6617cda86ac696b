# Brain tissue in MRI slices (the MNI152 template, shipped with nilearn) with the smallest ViG-H and mmseg's UPerHead.
#   python tools/mmseg_train.py configs/mmseg/mni152_vig_h_atto.py
custom_imports = dict(imports=["vision_gates.mmseg"])
default_scope = "mmseg"

classes = 4  # background, CSF, grey matter, white matter
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="MultiChannelPreProcessor", mean=[0.22], std=[0.33], pad_val=0, seg_pad_val=255, size=(96, 96)
    ),
    backbone=dict(type="VisionGatesBackbone", model_name="vg_vig_h_atto", in_channels=1),
    decode_head=dict(
        type="UPerHead",
        in_channels=[32, 64, 96, 128],
        in_index=[0, 1, 2, 3],
        channels=32,
        num_classes=classes,
        norm_cfg=dict(type="GN", num_groups=8),
        loss_decode=dict(type="OverlapCrossEntropyLoss", num_classes=classes),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

data = dict(type="VisionGatesDataset", data=dict(type="mni152"))
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(
        **data,
        split="train",
        pipeline=[
            dict(type="LoadSampleImage"),
            dict(type="LoadSampleLabels"),
            dict(type="RandomFlip", prob=0.5),
            dict(type="RandomResize", scale=(96, 96), ratio_range=(0.9, 1.2), keep_ratio=True),
            dict(type="RandomCrop", crop_size=(96, 96)),
            dict(type="PackSegInputs"),
        ],
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        **data,
        split="val",
        pipeline=[dict(type="LoadSampleImage"), dict(type="LoadSampleLabels"), dict(type="PackSegInputs")],
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=val_dataloader["sampler"],
    dataset=dict(val_dataloader["dataset"], split="test"),
)
val_evaluator = test_evaluator = dict(type="IoUMetric", iou_metrics=["mDice"])

iterations = 400
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=20, end=iterations),
]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=iterations, val_interval=200)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=20, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=200, save_best="mDice", max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type="SegLocalVisualizer", vis_backends=[dict(type="LocalVisBackend")])
randomness = dict(seed=0)
