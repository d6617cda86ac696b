"""Every mistake in a configuration ends in one line that names file or override, the key and the nearest valid key."""

import copy
from pathlib import Path

import pytest
import yaml

import vision_gates
from vision_gates.config import (
    MONITORS,
    RunConfig,
    dump_config,
    find_config,
    load_config,
    parse_config,
    save_config,
)
from vision_gates.datasets.base import DataConfig
from vision_gates.engine.building import RunInfo, build_model
from vision_gates.errors import ConfigError
from vision_gates.metrics import DEFAULT_MONITOR

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "configs").glob("*/*.yaml"))
BASE = {
    "task": {"type": "classification"},
    "data": {"type": "digits", "image_size": 32},
    "model": {"name": "test_convnext"},
}


def parse(*overrides: str, **sections) -> RunConfig:
    return parse_config(copy.deepcopy(BASE) | sections, overrides, source="configs/a.yaml")


# (overrides, what the message has to say, literally)
MISTAKES = [
    (["optim.learning_rate=3"], "override 'optim.learning_rate=3': optim.learning_rate: unknown key", "optim.lr"),
    (["optim.weight_deacy=3"], "optim.weight_deacy: unknown key", "nearest valid key: optim.weight_decay"),
    (["trainer.epochs=3"], "trainer.epochs: unknown key", "nearest valid key: schedule.epochs"),
    (["trainr.resume=true"], "trainr: unknown key; nearest valid key: trainer", ""),
    (["data.imagesize=3"], "data.imagesize: unknown key", "nearest valid key: data.image_size"),
    (["task.dice_weight=1"], "task.dice_weight: unknown key", ""),
    (["schedule.epochs=ten"], "schedule.epochs: should be a valid integer", "found 'ten'"),
    (["schedule.epochs='10'"], "schedule.epochs: should be a valid integer", "found '10'"),
    (["schedule.epochs=true"], "schedule.epochs: should be a valid integer", "found True"),
    (["schedule.epochs=0"], "schedule.epochs: should be greater than or equal to 1", "found 0"),
    (["data.workers=true"], "data.workers: a number is needed, found True", ""),
    (["seed=-1"], "seed: should be greater than or equal to 0, found -1", ""),
    (["optim.lr=.nan"], "optim.lr: should be a finite number", ""),
    (["trainer.precision=fp8"], "trainer.precision: should be 'no', 'bf16' or 'fp16', found 'fp8'", ""),
    (["task.class_weights=even"], "task.class_weights: should be 'balanced' or should be a list, found 'even'", ""),
    (["task.class_weights=[1, a]"], "task.class_weights.1: should be a valid number, found 'a'", ""),
    (["task.class_weights=[0, 0]"], "task.class_weights: numbers >= 0, not all 0", ""),
    (["model.name=test_convnex"], "model.name: no model 'test_convnex'; nearest: test_convnext", ""),
    (["model.decoder={type: pyramid}"], "model.decoder: a decoder belongs to task.type segmentation", ""),
    (["model.options={in_chans: 1}"], "model.options: in_chans and num_classes come from the data", ""),
    (["data.type=digit"], "data.type: there is no data set 'digit'; did you mean 'digits'?", ""),
    (["data.type=3"], "data.type: one of ", "found 3"),
    (["task.type=segment"], "task.type: unknown task 'segment'; nearest: segmentation", ""),
    (["task=3"], "task.type: required key is missing; one of classification, segmentation", ""),
    (["optim.name=adamv"], "optim.name: no optimiser 'adamv'; nearest: ada", ""),
    (["optim.name=sgd", "optim.betas=[0.9, 0.9]"], "optim.betas: sgd has no betas", ""),
    (["schedule.warmup_epochs=99"], "schedule.warmup_epochs: longer than schedule.epochs = 20", ""),
    (["optim.lr=1e-7"], "schedule.min_lr: above optim.lr = 1e-07", ""),
    (["trainer.monitor=dice"], "trainer.monitor: no metric 'dice' in classification; one of accuracy", ""),
    (["augment.mixup=0.2", "data.batch_size=3"], "data.batch_size: mixup needs an even batch size, found 3", ""),
    (["augment.train=[HorizontalFlip]"], "augment.train.0: should be a mapping of keys to values", ""),
    (["augment.train=[{HorizontlFlip: {}}]"], "augment.train.0.HorizontlFlip: ", "nearest: HorizontalFlip"),
    (["augment.train=[{HorizontalFlip: {pp: 1}}]"], "HorizontalFlip.pp: unknown argument; nearest: p", ""),
    (["augment.eval=[{Affine: {scale: big}}]"], "augment.eval.0.Affine.scale: should be a valid tuple", ""),
    (["augment.train=[{OneOf: {transforms: [{Blur: {q: 1}}]}}]"], "augment.train.0.OneOf.transforms.0.Blur.q: ", "p"),
    (["augment.train=[{Blur: {}, Affine: {}}]"], "augment.train.0: one transform as ", ""),
    (["augment.train.0=1"], "augment.train: should be a list", ""),
    (["optim.lr"], "override 'optim.lr': key.sub=value is needed", ""),
    (["seed=1", "seed.a=1"], "override 'seed.a=1': seed is a int and has no keys", ""),
    (["optim.lr=[1"], "override 'optim.lr=[1': line 1", "not valid YAML"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message", "also"), MISTAKES, ids=lambda v: "" if isinstance(v, str) else v[-1])
def test_mistakes(overrides, message, also):
    with pytest.raises(ConfigError) as error:
        parse(*overrides)
    text = str(error.value)
    assert "\n" not in text and message in text and also in text
    assert text.startswith(("override '", "configs/a.yaml: "))


def test_segmentation_mistakes():
    with pytest.raises(ConfigError, match="augment.cutmix: cutmix is for classification"):
        parse("task.type=segmentation", "augment.cutmix=1")


def test_steps_for_batches_of_volumes():
    with pytest.raises(ConfigError, match="augment.batch: is for data.type volumes; use augment.train"):
        parse("augment.batch=[{Noise: {}}]")
    with pytest.raises(ConfigError, match="augment.batch: there is no 'Nose'; did you mean Noise"):
        load_config("segmentation/auto_2d.yaml", ["data.root=x", "augment.batch=[{Nose: {}}]"])
    with pytest.raises(ConfigError, match="model.decoder.chanels: unknown key; nearest valid key: channels"):
        parse("task.type=segmentation", "model.decoder={type: pyramid, chanels: 3}")
    with pytest.raises(ConfigError, match="model.decoder.type: no decoder 'piramid'; nearest: pyramid"):
        parse("task.type=segmentation", "model.decoder={type: piramid}")
    assert parse("task.type=segmentation").model.decoder == {"type": "pyramid", "channels": 64}


def test_whole_networks():
    """They need no decoder, and say which of the model's keys are not for them."""

    def segment(*overrides: str) -> RunConfig:
        return parse("task.type=segmentation", "model.name=agunet", *overrides)

    config = segment("model.options={widths: [4, 8]}", "task.deep_supervision_weights=[1]")
    assert config.model.decoder is None and config.task.deep_supervision_weights == (1.0,)
    assert build_model(config, RunInfo(("a", "b"), 3, None, None, None, {}, {})).in_channels == 3
    for overrides, message in (
        (
            ["model.decoder={type: pyramid}"],
            "model.decoder: a decoder belongs to an encoder of timm, agunet is a whole",
        ),
        (["model.pretrained=true"], "model.pretrained: agunet has no pretrained weights"),
        (["model.drop_path_rate=0.1"], "model.drop_path_rate: agunet has no stochastic depth"),
        (["model.options={width: [4]}"], "model.options.width: unknown key; nearest valid key: widths"),
        (["model.options={in_channels: 3}"], "model.options: in_chans and num_classes come from the data"),
        (["model.name=agunt"], "model.name: no model 'agunt'; nearest: agunet"),
        (["task.type=classification"], "model.name: agunet is a network for segmentation, not for task.type classif"),
        (["task.deep_supervision_weights=[0, 0]"], "task.deep_supervision_weights: numbers >= 0, not all 0"),
        (["task.deep_supervision_weights=[1, -1]"], "task.deep_supervision_weights: numbers >= 0, not all 0"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            segment(*overrides)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="model: agunet cannot be built with options .*: widths must be two or more"):
        build_model(segment("model.options={widths: [4]}"), RunInfo(("a", "b"), 3, None, None, None, {}, {}))
    # What the encoder of a network takes is passed on.
    ear = segment("model.name=ear_unet", "model.pretrained=true")
    assert ear.model.pretrained and ear.model.decoder is None


def test_mistakes_in_a_file_name_the_file():
    with pytest.raises(ConfigError, match=r"^configs/a.yaml: optim.lrr: unknown key.*nearest valid key: optim.lr$"):
        parse(optim={"lrr": 1})
    with pytest.raises(ConfigError, match="^configs/a.yaml: model.name: required key is missing"):
        parse(model={})
    with pytest.raises(ConfigError, match="^configs/a.yaml: data.type: required key is missing; one of .*digits"):
        parse(data={"image_size": 3})
    with pytest.raises(ConfigError, match="^configs/a.yaml: data.image_size: required key is missing"):
        parse(data={"type": "digits"})
    with pytest.raises(ConfigError, match="and 1 more in this section"):
        parse(optim={"a": 1, "b": 2})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [1", "line 1, column 9 not valid YAML"),
        ("seed: 1\nseed: 2", "key 'seed' is given twice"),
        ("- 1", "sections as `key: value` are needed, found a list"),
        ("", "task.type: required key is missing"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, message):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(str(path)) and message in str(error.value) and "\n" not in str(error.value)


def test_missing_file_names_the_nearest_recipe(tmp_path):
    with pytest.raises(ConfigError, match="no such .*nearest recipe: configs/classification/digits_vig_atto.yaml"):
        load_config("configs/classification/digit_vig_ato.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)
    binary = tmp_path / "x.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(binary)


def test_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/classification/digits_vig_atto.yaml").is_file()
    assert find_config("classification/digits_vig_atto.yaml").is_file()
    # An installed wheel holds them inside the package.
    package = tmp_path / "site" / "vision_gates"
    (package / "configs" / "classification").mkdir(parents=True)
    (package / "configs" / "classification" / "only_here.yaml").write_text("seed: 1\n")
    monkeypatch.setattr(vision_gates, "__file__", str(package / "__init__.py"))
    assert find_config("configs/classification/only_here.yaml") == (
        package / "configs" / "classification" / "only_here.yaml"
    )


def test_overrides_are_yaml_1_2():
    config = parse("optim.lr=3e-4", "trainer.precision=no", "optim.betas=[0.9, 0.99]", "data.image_size=[16, 24]")
    assert config.optim.lr == 3e-4 and config.trainer.precision == "no"
    assert config.optim.betas == (0.9, 0.99) and config.data.image_size == (16, 24)
    assert parse("optim.lr=1", "optim.lr=2").optim.lr == 2.0
    assert parse("optim=null").optim == parse().optim


def test_saved_copy_is_complete_and_equal(tmp_path):
    config = parse("augment.train=[{HorizontalFlip: }, {Affine: {rotate: [-5, 5]}}]", "trainer.run_dir=runs/x")
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    saved = yaml.safe_load(dump_config(config))
    assert saved["optim"]["name"] == "adamw" and saved["trainer"]["monitor"] == "accuracy"
    assert list(tmp_path.iterdir()) == [tmp_path / "config.yaml"]
    assert parse().trainer.run_dir == "runs/a"


def test_configuration_is_frozen():
    config = parse()
    with pytest.raises(ValueError, match="frozen"):
        config.optim.lr = 1.0


def test_every_key_is_described():
    missing = []

    def look(model, prefix):
        for name, info in model.model_fields.items():
            if not info.description and not issubclass(model, DataConfig):
                missing.append(f"{prefix}{name}")
            if isinstance(info.annotation, type) and hasattr(info.annotation, "model_fields"):
                look(info.annotation, f"{prefix}{name}.")

    look(RunConfig, "")
    assert not missing


def test_monitors_are_the_metrics():
    import torch

    from vision_gates.metrics import create_metrics

    for task, shape in (("classification", (2, 2)), ("segmentation", (2, 2, 4, 4))):
        metrics = create_metrics(task, ["a", "b"])
        target = torch.tensor([0, 1]).reshape(2, *[1] * (len(shape) - 2)).expand(2, *shape[2:])
        metrics.update(torch.randn(shape), target, ["x", "y"])
        assert set(MONITORS[task]) == {*metrics.compute().metrics, "loss"}
        assert DEFAULT_MONITOR[task] in MONITORS[task]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_model_builds(recipe):
    # Recipes for volumes leave open where these are; test_volume_configs.py builds the networks of the general ones.
    data = yaml.safe_load(recipe.read_text())["data"]
    overrides = ["data.root=anywhere"] if data["type"] == "volumes" and "root" not in data else []
    config = load_config(recipe.relative_to(ROOT), overrides)
    assert config.trainer.run_dir == f"runs/{recipe.stem}"
    names = ("a", "b", "c")
    model = build_model(config, RunInfo(names, 1, None, None, None, {}, {}))
    assert sum(parameter.numel() for parameter in model.parameters()) > 100_000
    first = recipe.read_text().splitlines()[1]
    assert first.startswith("#   python tools/train.py configs/") and recipe.name in first
    assert config.task.type == recipe.parent.name


def test_recipes_are_there():
    names = {path.stem for path in RECIPES}
    assert {"digits_vig_atto", "pneumoniamnist_vig_atto", "image_folder"} <= names
    assert {"mni152_vig_h_atto", "image_mask_folder"} <= names
    assert Path(vision_gates.__file__).resolve().parents[1] == ROOT
