"""The command line: ``vision-gates COMMAND ...``, and the same functions behind the scripts in tools/.

Each command takes the configuration or run and ``key=value`` overrides, nothing else (segment also ``--checkpoint``,
score also ``--tolerance``).
How a command ends, with which line and exit code: command_end.py.
"""

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from vision_gates.command_end import guard
from vision_gates.errors import ConfigError

__all__ = ["bench", "evaluate", "export", "folds", "gate_maps", "main", "models", "score", "segment", "train"]


def train(argv: Sequence[str]) -> int:
    """usage: train CONFIG [key=value ...]

    Train a classifier or a segmenter. CONFIG is a YAML file, key=value overrides one of its keys:
        train configs/classification/digits_vig_atto.yaml optim.lr=3e-4 trainer.run_dir=runs/digits_small_lr
    Go on with a run that was stopped: trainer.resume=true. On several GPUs: torchrun --nproc_per_node=2 in front.
    """

    def work() -> int:
        path, overrides = _path_and_overrides(argv, "CONFIG")
        from vision_gates.config import load_config
        from vision_gates.engine.trainer import train as run

        run(load_config(path, overrides), command=["vision-gates", "train", *argv])
        return 0

    return guard(work, argv, train)


def evaluate(argv: Sequence[str]) -> int:
    """usage: evaluate RUN [split=test|val|train] [key=value ...]

    Evaluate the best weights of a run on its test split (without one: validation), write RUN/evaluation/ and
    RUN/report.html. key=value overrides a key of the run's configuration, such as data.root or data.batch_size:
        evaluate runs/digits_vig_atto split=val
    """

    def work() -> int:
        path, overrides = _path_and_overrides(argv, "RUN")
        split = [text.removeprefix("split=") for text in overrides if text.startswith("split=")]
        from rich.console import Console

        from vision_gates.engine.evaluation import evaluate_run, evaluation_table
        from vision_gates.engine.volume_scores import score_table

        changes = [text for text in overrides if not text.startswith("split=")]
        evaluation = evaluate_run(path, split=split[-1] if split else _held_out(path), overrides=changes)
        console = Console(highlight=False, soft_wrap=True)
        console.print(evaluation_table(evaluation))
        if evaluation.scores is not None:
            console.print(score_table(evaluation.scores.summary, evaluation.split))
        console.print(f"tables: {evaluation.path}\nreport: {evaluation.report}", markup=False)
        return 0

    return guard(work, argv, evaluate)


def folds(argv: Sequence[str]) -> int:
    """usage: folds RUN [RUN ...] [out=folds.csv]

    Put the folds of a cross-validation together: of every label mean and standard deviation of the folds' scores, and
    mean and 95 % interval over all cases, from what each RUN has in RUN/evaluation/val_summary.json and val_cases.csv.
    The runs differ in data.fold:
        for fold in 0 1 2 3 4; do
            train configs/segmentation/auto_3d.yaml data.root=DATA data.fold=$fold trainer.run_dir=runs/fold$fold
        done
        folds runs/fold0 runs/fold1 runs/fold2 runs/fold3 runs/fold4 out=folds.csv
    Beside the CSV file a JSON file of the same name is written.
    """

    def work() -> int:
        _refuse_flags(argv)
        runs = [text for text in argv if "=" not in text or os.path.exists(text)]
        options = dict(text.split("=", 1) for text in argv if text not in runs)
        if not runs:
            raise ConfigError("a RUN is needed, found none")
        if options.keys() - {"out"}:
            raise ConfigError(f"{min(options.keys() - {'out'})}: no such option; known: out")
        from rich.console import Console

        from vision_gates.engine.volume_scores import summarise_runs

        done = summarise_runs(runs, options.get("out", "folds.csv"))
        console = Console(highlight=False, soft_wrap=True)
        over_folds = done.summary.table()
        over_folds.caption = None  # it stands below the next table
        console.print(over_folds, done.all_cases.table(), sep="\n")
        for note in done.notes:
            console.print(f"note: {note}", markup=False)
        console.print(f"tables: {done.path}", markup=False)
        return 0

    return guard(work, argv, folds)


def export(argv: Sequence[str]) -> int:
    """usage: export RUN OUT.onnx [--size H W] [--fixed] [--fp16] [--opset N]

    Write a trained network as ONNX with its whole pipeline: normalisation, spacing, orientation, windows and labels
    stand in the file and in OUT.json beside it. ONNX Runtime is compared with PyTorch on random inputs and the run's
    own, and the file appears only if they agree (to 1e-4 of the largest output, with --fp16 1e-2); else the exit code
    is 1.
    RUN is a run directory, or the name of a classifier:
        export runs/auto_3d hippocampus.onnx
        export vg_vig_tiny vig_tiny.onnx --pretrained
        segment scan.nii.gz mask.nii.gz --checkpoint hippocampus.onnx
    Options:
        --size H W            of the input, of volumes X Y Z; by default that of the run's images or windows
        --fixed               this size alone; by default any size, where the network allows
        --fp16                weights and products in float16: half the size; input and output stay float32
        --opset N             18 (default) to 23
        --pretrained          of a model by name: its published weights instead of random ones
    """

    def work() -> int:
        paths, options = _export_options(argv)
        from vision_gates.engine.exporting import export as run
        from vision_gates.export.onnx import ParityError

        try:
            done, notes = run(paths[0], paths[1], **options)
        except ParityError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        about = done.about
        for line in (*notes, *map(str, done.differences)):
            sys.stdout.write(f"{line}\n")
        axes = ", ".join(about.dynamic_axes)
        megabytes = done.path.stat().st_size / 1e6
        sys.stdout.write(
            f"{done.path}: {megabytes:.1f} MB, {done.nodes} nodes, opset {about.opset}, {about.precision}, any {axes}; "
            f"{done.seconds:.0f} s\n"
        )
        return 0

    return guard(work, argv, export)


def _export_options(argv: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The two paths, and the options."""
    paths: list[str] = []
    options: dict[str, Any] = {}
    flags = {
        "--fixed": {"dynamic": False},
        "--fp16": {"half": True},
        "--pretrained": {"pretrained": True},
    }
    texts = list(argv)
    while texts:
        text = texts.pop(0)
        name, equals, value = text.partition("=")
        if text in flags:
            options |= flags[text]
        elif name in ("--size", "--opset"):
            numbers = value.replace("x", " ").split() if equals else []
            while not equals and texts and texts[0].isdecimal():
                numbers.append(texts.pop(0))
            if not numbers or not all(number.isdecimal() for number in numbers) or (name == "--opset" and numbers[1:]):
                raise ConfigError(f"{name} {value or ' '.join(texts[:1])}: whole numbers are needed")
            options[name[2:]] = [int(n) for n in numbers] if name == "--size" else int(numbers[0])
        elif text.startswith("-"):
            raise ConfigError(f"{text}: no such option; known: {', '.join([*flags, '--size', '--opset'])}")
        else:
            paths.append(text)
    if len(paths) != 2:
        raise ConfigError(f"RUN and OUT.onnx are needed, found {' '.join(paths) or 'neither'}")
    return paths, options


def gate_maps(argv: Sequence[str]) -> int:
    """usage: gate-maps RUN IMAGE [IMAGE ...] [out=gate_maps.png] [gates=PATTERN] [key=value ...]

    Draw what the gates of a trained network do to images: each image, its prediction and the maps of its gates, from
    coarse to fine, in one PNG. A map has a value between 0 and 1 at each position: bright is open, dark is closed, and
    the headline of a row says what passes where its gates are open.

    RUN is a run directory; its best weights are used. IMAGE is an image file (of a run on volumes a volume file
    or DICOM folder), or a sample of the run's own data by split and number, such as test:0.
        out=gate_maps.png     the picture
        gates=*               only gates whose path in the network matches, such as gates='decoder.*'
    key=value overrides a key of the run's configuration, such as data.image_size:
        gate-maps runs/drive_attention_unet my_retina.png out=retina.png gates='decoder.*'
        gate-maps runs/mni152_vig_h_attention test:2 test:5
    """

    def work() -> int:
        options = dict(text.split("=", 1) for text in argv if text.startswith(("out=", "gates=")))
        rest = [text for text in argv if not text.startswith(("out=", "gates="))]
        overrides = [text for text in rest if "=" in text and not os.path.exists(text)]
        paths = [text for text in rest if text not in overrides]
        _refuse_flags(argv)
        if len(paths) < 2:
            raise ConfigError(f"a RUN and an IMAGE are needed, found {' '.join(paths) or 'none'}")
        from vision_gates.engine.gate_figure import draw_gate_maps

        out = options.get("out", "gate_maps.png")
        draw_gate_maps(paths[0], paths[1:], out, gates=options.get("gates", "*"), overrides=overrides)
        sys.stdout.write(f"gate maps: {out}\n")
        return 0

    return guard(work, argv, gate_maps)


def segment(argv: Sequence[str]) -> int:
    """usage: segment IN OUT --checkpoint RUN [key=value ...]

    Label MRI or CT volumes with a trained run. IN is a volume (NIfTI, NRRD, MetaImage), a folder with a DICOM series,
    or a folder of such cases, where CASE_0000.nii.gz, CASE_0001.nii.gz are the channels of one. OUT is the mask to
    write (.nii.gz, .nii, .nrrd, .mha; .dcm: a DICOM segmentation of a DICOM series), for a folder of cases a folder.
    Masks lie on the grid of the input. Beside them:
    volumes.csv with the millilitres of every label, report.html with pictures, segment.jsonl. The same command again
    goes on where it was stopped.
        segment scan.nii.gz mask.nii.gz --checkpoint runs/auto_3d
        segment dicom_folder/ mask.nrrd --checkpoint runs/auto_3d mirror=true
        segment imagesTs/ results/ --checkpoint runs/auto_2d
    Options:
        mirror=false          true averages the mirror images, too: 4 to 8 times the time, a little better (the
                              default of this and the next three is the run's)
        overlap=              of neighbouring windows, 0 to 1; by default as in the run
        batch_size=           windows at a time; lower it where memory runs out
        precision=            no, bf16 or fp16; by default as in the run
        device=auto           or cpu, cuda, cuda:1
        format=.nii.gz        of masks in a folder
        series=               SeriesInstanceUID, where a DICOM folder holds several
        overwrite=false       true replaces results that are there
        report=true           false writes no pictures
    """

    def work() -> int:
        arguments, run = _option(argv, "checkpoint")
        if not run:
            raise ConfigError("--checkpoint RUN is needed: the run directory of a network trained on volumes")
        _refuse_flags(arguments)
        from pydantic import ValidationError

        from vision_gates.engine.segmenting import SegmentOptions
        from vision_gates.engine.segmenting import segment as run_segment

        keys = tuple(f"{name}=" for name in SegmentOptions.model_fields)
        texts = [text for text in arguments if text.startswith(keys)]
        paths = [text for text in arguments if text not in texts]
        if len(paths) != 2:
            unknown = [text for text in paths if "=" in text and not os.path.exists(text)]
            what = f"; unknown option {unknown[0]!r}, known: {', '.join(keys)}" if unknown else ""
            raise ConfigError(f"IN and OUT are needed, found {' '.join(paths) or 'neither'}{what}")
        try:
            values = {key: value or None for key, _, value in (text.partition("=") for text in texts)}
            options = SegmentOptions.model_validate(values)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            raise ConfigError(f"{fault['loc'][0]}={fault['input']}: {fault['msg']}") from error
        run_segment(paths[0], paths[1], run, options)
        return 0

    return guard(work, argv, segment)


def score(argv: Sequence[str]) -> int:
    """usage: score PREDICTION TRUTH [names=background,NAME,...] [--tolerance MM] [out=FOLDER]

    Compare masks with the truth: two volume files, or two folders with files of the same names. Dice, HD95, normalised
    surface Dice (NSD), volume error and lesion-wise F1 of every label, with 95 % intervals over cases; misses count.
        names=                of the labels from 0 on; by default as segment named them
        --tolerance 2.0       or tolerance=: surfaces this near count as equal in the NSD, mm
        out=                  folder for cases.csv, summary.csv and summary.json
    Examples:
        score results/ labelsTs/ out=scores/
        score mask.nii.gz truth.nii.gz --tolerance 1
    """

    def work() -> int:
        arguments, given = _option(argv, "tolerance")
        options = dict(text.split("=", 1) for text in arguments if text.startswith(("names=", "out=")))
        paths = [text for text in arguments if not text.startswith(("names=", "out="))]
        _refuse_flags(arguments)
        if len(paths) != 2:
            raise ConfigError(f"PREDICTION and TRUTH are needed, found {' '.join(paths) or 'neither'}")
        try:
            tolerance = 2.0 if given is None else float(given)
        except ValueError as error:
            raise ConfigError(f"tolerance={given}: a number of millimetres is needed") from error
        from rich.console import Console

        from vision_gates.engine.progress import Display
        from vision_gates.engine.score_files import score_files

        names = [name.strip() for name in options.get("names", "").split(",") if name.strip()]
        console, out = Console(highlight=False), options.get("out")
        with Display(console=console).counting("scoring") as progress:
            summary = score_files(paths[0], paths[1], names=names, tolerance_mm=tolerance, out=out, progress=progress)
        console.print(summary.table())
        return 0

    return guard(work, argv, score)


def _option(argv: Sequence[str], name: str) -> tuple[list[str], str | None]:
    """The arguments without --NAME VALUE (or --NAME=VALUE, or NAME=VALUE), and the last VALUE."""
    rest, value = [], None
    texts = iter(argv)
    for text in texts:
        key, equals, own = text.partition("=")
        if key in (f"--{name}", name) and equals:
            value = own
        elif text == f"--{name}":
            value = next(texts, "")
        else:
            rest.append(text)
    return rest, value


def models(argv: Sequence[str]) -> int:
    """usage: models [PATTERN] [format=table|markdown|csv]

    List the models of this package with family, parameters, source and published result, and its whole segmentation
    networks:
        models 'vg_vig_*'
    """

    def work() -> int:
        from vision_gates.model_table import main as run

        return run(list(argv))

    return guard(work, argv, models)


def bench(argv: Sequence[str]) -> int:
    """usage: bench models [NAME ...] [key=value ...]
           bench ops [NAME ...] [key=value ...]

    Measure speed and memory on this machine, peers and ours in one run and one table.

    bench models times models on random images, interleaved, and compares each with the last one of the same size and
    runtime. Without names: vg_vig_tiny deit_tiny_patch16_224. A name is one of timm's; or, for segmentation, 2-D or
    3-D, network:NAME of this package or monai:NAME; or FILE.py:FUNCTION, a function that returns a network.
        family=               instead of names, a family and its peers: vig, convit, hornet, attention_unet (dims=3)
        size=224              or several: size=224,512,1024,2048
        batch=8               or auto: 128 images at 224 pixels, and as many pixels at other sizes
        mode=training         forward and backward; or inference
        dtype=float32         or bfloat16, float16: autocast in training, the weights' type in inference
        runtime=eager         or several of eager,compiled,graph: torch.compile, and that with CUDA graphs
        peer_runtime=         of the last model, where it cannot run like the others; by default the same
        rounds=10             each round times every model for about 0.05 s, at least once
        profile=false         true lists the longest kernels of one pass, too
        dims=2                images; 3: volumes of one channel
        channels_last=false   true lays out weights and input with channels last, of all that are compared
        cudnn_benchmark=false true lets cuDNN try its convolutions and take the fastest
    bench ops checks and times operators of this package, each beside its peers (fla if it is installed). An operator
    with a wrong result gets no speed. Without names: all of them.
        dtype=                float32, bfloat16, float16; by default what each operator's bench.py chooses
        seconds=0.2           about how long each number is measured
        peers=true            false leaves the peers out
        cold=false            true adds the first call of a new process, everything compiled anew
    Both:
        device=               cuda or cpu; by default the GPU if there is one
        out=                  FILE.csv, FILE.json, or a folder for rows.csv, rows.json and, of models, speed.png

    Examples:
        bench models vg_vig_tiny deit_tiny_patch16_224 batch=4
        bench models mode=inference dtype=bfloat16 size=224,512,1024,2048 batch=auto runtime=eager,graph out=speed/
        bench models family=attention_unet dims=3 size=128 batch=2 dtype=bfloat16 runtime=eager,compiled
        bench ops bidirectional_gla cold=true out=ops.csv

    ms is the median; low and high are the smallest and largest ratio of a round. Of an operator, ms counts what the
    host needs to launch kernels, graph ms does not; GB/s counts inputs and results once, beside a plain copy's.
    Exit code 1: something failed and has no number; out of memory is no failure.
    """

    def work() -> int:
        from vision_gates.benchmark.command import run

        return run(argv)

    return guard(work, argv, bench)


def main(argv: Sequence[str] | None = None) -> int:
    """usage: vision-gates train|evaluate|export|folds|segment|gate-maps|models|bench ...

    vision-gates COMMAND --help says more about a command.
    """
    if argv is None:
        _let_threads_sleep()
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "train": train,
        "evaluate": evaluate,
        "export": export,
        "folds": folds,
        "segment": segment,
        "score": score,
        "gate-maps": gate_maps,
        "models": models,
        "bench": bench,
    }
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])

    def work() -> int:
        import difflib

        if not argv:
            raise ConfigError(f"a command is needed: {', '.join(commands)}")
        near = difflib.get_close_matches(argv[0], list(commands), n=1, cutoff=0.0)[0]
        raise ConfigError(f"there is no command {argv[0]!r}; nearest: {near}; known: {', '.join(commands)}")

    return guard(work, argv, main)


def _let_threads_sleep() -> None:
    """Start the console script anew with GOMP_SPINCOUNT, which libgomp reads once, when torch is loaded.

    By default its threads spin while they wait for each other; where another process wants the same cores, that made
    training 30 times slower. The scripts in tools/ set it before they import torch; importing this module was too late.
    """
    if sys.platform == "linux" and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["GOMP_SPINCOUNT"] = "10000"
        os.execv(sys.executable, [sys.executable, *sys.argv])


def _held_out(run: str) -> str:
    """The split a run is judged on: test, or val where its data have no test images."""
    from vision_gates.engine.run_directory import RunDirectory

    try:
        return "test" if "test" in json.loads(RunDirectory(run).info.read_bytes())["images"] else "val"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "test"  # the evaluation says what is wrong with the directory


def _refuse_flags(argv: Sequence[str]) -> None:
    flags = [text for text in argv if text.startswith("-")]
    if flags:
        raise ConfigError(f"{flags[0]}: there are no flags; override a key as key=value, for example optim.lr=0.001")


def _path_and_overrides(argv: Sequence[str], what: str) -> tuple[str, list[str]]:
    """The one argument without ``=``, and the others."""
    _refuse_flags(argv)
    paths = [text for text in argv if "=" not in text]
    if len(paths) != 1:
        found = f"found {len(paths)}: {' '.join(paths)}" if paths else "found none"
        raise ConfigError(f"one {what} is needed, {found}")
    return paths[0], [text for text in argv if "=" in text]


if __name__ == "__main__":
    sys.exit(main())
