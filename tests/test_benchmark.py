"""The benchmark's bookkeeping: complete rows, readable tables, mistakes named, no speed for what is wrong.

Nothing here asserts how fast something is; clocks are replaced where a number matters.
"""

import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch import nn

from vision_gates import cli
from vision_gates.benchmark import (
    auto_batch,
    bench_models,
    bench_ops,
    models,
    ops,
    rows_table,
    speed_figure,
    write_rows,
)
from vision_gates.benchmark.contenders import FAMILIES, check_name, create
from vision_gates.benchmark.models import ModelSettings
from vision_gates.errors import ConfigError
from vision_gates.kernels import bidirectional_gla as gla
from vision_gates.kernels import timing
from vision_gates.kernels.bidirectional_gla import bench as gla_bench
from vision_gates.kernels.bidirectional_gla.reference import bidirectional_gla_definition, bidirectional_gla_reference

NAMES = ["vg_vig_atto", "test_resnet"]
TINY = (2, 20, 1, 4, 8)


@pytest.fixture(scope="module")
def rows():
    return bench_models(NAMES, size=(32, 64), batch=2, mode="inference", rounds=3, device="cpu")


@pytest.fixture
def clock(monkeypatch):
    """Passes run, and seem to take what the test says: the next of ``seconds``, or one second."""
    calls = []

    def seconds_a_pass(run, device, passes=1):
        run()
        calls.append(passes)
        return seconds_a_pass.seconds.pop(0) if seconds_a_pass.seconds else 1.0

    seconds_a_pass.calls, seconds_a_pass.seconds = calls, []
    monkeypatch.setattr(models, "_seconds_a_pass", seconds_a_pass)
    return seconds_a_pass


@pytest.fixture
def tiny_operator(monkeypatch):
    """bidirectional_gla alone, at a shape that takes no time."""
    monkeypatch.setattr(gla_bench, "CPU_SHAPES", (TINY,))
    monkeypatch.setattr(ops, "operators", lambda: ["bidirectional_gla"])
    monkeypatch.setattr(ops, "copy_gb_per_second", lambda device: 10.0)
    monkeypatch.setattr(timing, "copy_gb_per_second", lambda device: 10.0)


def shown(table, width=80):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


# ------------------------------------------------------------------------------------------------------------- models


def test_rows_carry_what_a_comparison_needs(rows):
    assert [(row["model"], row["size"]) for row in rows] == [(name, size) for size in (32, 64) for name in NAMES]
    assert [row["parameters"] for row in rows[::2]] == [840_904, 842_056]  # one position embedding for each size
    for row in rows:
        assert row["milliseconds"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        assert row["images_per_second"] == pytest.approx(2000 / row["milliseconds"])
        assert all(row[key] for key in ("device", "torch", "timm", "triton", "commit", "date", "peer", "dtype"))
        assert row["runtime"] == "eager" and row["compile_seconds"] is None and row["problem"] is None
    assert rows[1]["ratio"] == rows[3]["ratio"] == 1.0, "the peer is compared with itself"


def test_numbers_are_medians_over_interleaved_rounds(clock):
    #                first passes, estimates; then three rounds of (ours, peer)
    clock.seconds = [1.0, 0.01, 1.0, 0.02, 0.2, 0.4, 0.1, 0.4, 0.4, 0.4]
    ours, peer = bench_models(NAMES, size=32, batch=2, mode="inference", rounds=3, device="cpu")
    assert ours["milliseconds"] == pytest.approx(200) and ours["images_per_second"] == pytest.approx(10)
    assert (ours["ratio_low"], ours["ratio"], ours["ratio_high"]) == pytest.approx((1, 2, 4))
    assert peer["images_per_second"] == pytest.approx(5)
    assert clock.calls == [1] * 4 + [5, 2] * 3, "a round of either takes about 0.05 s"


def test_training_runs_a_backward_pass_too(clock, monkeypatch):
    made, create = [], models.create
    counts = dict.fromkeys(("forward", "backward"), 0)

    def count(which):
        counts[which] += 1

    def watch(*arguments):
        model = create(*arguments)
        model.register_forward_hook(lambda *_: count("forward"))
        next(model.parameters()).register_hook(lambda _: count("backward"))
        made.append(model)
        return model

    monkeypatch.setattr(models, "create", watch)
    (row,) = bench_models(["vg_vig_atto"], size=32, batch=1, rounds=1, device="cpu", dtype="bfloat16")
    assert row["mode"] == "training" and row["dtype"] == "bfloat16"
    assert counts["forward"] == counts["backward"] == 3
    assert all(parameter.grad is None for parameter in made[0].parameters()), "a pass frees its gradients"
    assert made[0].training and next(made[0].parameters()).dtype == torch.float32


def test_inference_has_weights_in_its_dtype(clock, monkeypatch):
    made, create = [], models.create
    monkeypatch.setattr(models, "create", lambda *arguments: made.append(create(*arguments)) or made[-1])
    bench_models(["test_resnet"], size=32, batch=1, mode="inference", rounds=1, device="cpu", dtype="bfloat16")
    assert not made[0].training and next(made[0].parameters()).dtype == torch.bfloat16


def test_runtimes_are_compiled_apart_and_compared_within(clock, monkeypatch):
    compiled = []

    def compile(model, **options):
        compiled.append(options)
        return model

    monkeypatch.setattr(torch, "compile", compile)
    runtimes = ("eager", "compiled", "eager")
    rows = bench_models(NAMES, size=32, batch=2, mode="training", rounds=1, runtime=runtimes, device="cpu")
    assert [row["runtime"] for row in rows] == ["eager"] * 2 + ["compiled"] * 2, "each runtime once"
    assert compiled == [{"dynamic": False, "mode": "default"}] * 2
    assert [row["compile_seconds"] for row in rows] == [None, None, 1.0, 1.0]

    steps = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    models._with_runtime(lambda images: images, "graph")(torch.zeros(1))
    assert compiled[-1] == {"dynamic": False, "mode": "reduce-overhead"} and steps == [1]


def test_auto_batch():
    assert [auto_batch(size) for size in (224, 512, 1024, 2048, 4096)] == [128, 24, 8, 2, 1]
    sizes = [auto_batch(size) for size in range(32, 3000, 8)]
    assert sizes == sorted(sizes, reverse=True)
    assert ModelSettings(batch="auto").batch_at(512) == 24 and ModelSettings(batch=3).batch_at(512) == 3


class Broken(nn.Module):
    """Fails in the pass of that number."""

    def __init__(self, error, number):
        super().__init__()
        self.error, self.left = error, number

    def forward(self, images):
        self.left -= 1
        if self.left <= 0:
            raise self.error
        return images


@pytest.fixture
def breaking(monkeypatch, clock):
    """Replace a model by one that fails."""
    create = models.create

    def replace(name, error, number=1):
        monkeypatch.setattr(models, "create", lambda n, *more: Broken(error, number) if n == name else create(n, *more))

    return replace


@pytest.mark.parametrize("number", [1, 4], ids=["first pass", "second round"])
def test_out_of_memory_is_a_row_and_the_others_go_on(breaking, number, capfd):
    breaking("vg_vig_atto", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB"), number)
    assert cli.bench(["models", *NAMES, "size=32", "batch=1", "rounds=3", "mode=inference", "device=cpu"]) == 0
    out, err = capfd.readouterr()
    (line,) = (line for line in out.splitlines() if "vg_vig_atto" in line)
    assert "out of memory" in line and not err
    broken, fine = bench_models(NAMES, size=32, batch=1, rounds=3, mode="inference", device="cpu")
    assert broken["problem"] == "out of memory" and fine["images_per_second"] == 1.0
    assert all(broken[key] is None for key in ("images_per_second", "milliseconds", "ratio", "peak_extra_mib"))


def test_a_peer_may_have_a_runtime_of_its_own(clock, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    settings = dict(size=32, batch=1, rounds=1, mode="inference", device="cpu")
    rows = bench_models(NAMES, runtime="compiled", peer_runtime="eager", **settings)
    assert [row["runtime"] for row in rows] == ["compiled", "eager"] and rows[0]["ratio"] is not None
    with pytest.raises(ConfigError, match="peer_runtime must be one of"):
        bench_models(NAMES, peer_runtime="fast", **settings)


def test_others_are_warmed_up_anew_after_a_failure(breaking, monkeypatch):
    prepared, prepare = [], models._Candidate.prepare
    monkeypatch.setattr(models._Candidate, "prepare", lambda self: prepared.append(self.name) or prepare(self))
    breaking("test_resnet", RuntimeError("a graph of it was overwritten"))
    ours, _ = bench_models(["vg_vig_atto", "test_resnet"], size=32, batch=1, rounds=1, mode="inference", device="cpu")
    assert prepared == ["vg_vig_atto", "test_resnet", "vg_vig_atto"] and ours["images_per_second"] == 1.0


def test_without_the_peer_there_is_no_ratio(breaking):
    breaking("test_resnet", torch.OutOfMemoryError("CUDA out of memory"))
    ours, peer = bench_models(NAMES, size=32, batch=1, rounds=2, mode="inference", device="cpu")
    assert ours["images_per_second"] == 1.0 and ours["ratio"] is None and peer["problem"] == "out of memory"


def test_a_failure_is_named_and_ends_in_exit_code_1(breaking, capfd):
    breaking("vg_vig_atto", RuntimeError("no such\nshape"))
    assert cli.bench(["models", *NAMES, "size=32", "batch=2", "rounds=1", "device=cpu"]) == 1
    out, err = capfd.readouterr()
    assert err == "error: vg_vig_atto 32 eager: RuntimeError: no such shape\n"
    assert "failed" in out and "test_resnet" in out


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mode": "test"}, "mode must be one of training, inference, got 'test'"),
        ({"dtype": "int8"}, "dtype must be"),
        ({"runtime": "fast"}, "runtime must be one of eager, compiled, graph, got 'fast'"),
        ({"runtime": "graph", "mode": "inference", "device": "cpu"}, "needs a GPU"),
        ({"runtime": "graph", "mode": "training", "device": "cpu"}, "needs a GPU"),
        ({"rounds": 0}, "at least 1, got 0"),
        ({"size": (224, 0)}, "size must be at least 1, got 0"),
        ({"batch": 0}, "batch must be auto or at least 1, got 0"),
        ({"device": "tpu0x"}, "device must be cuda or cpu"),
        ({"dims": 4}, r"dims must be 2 \(images\) or 3 \(volumes\), got 4"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ConfigError, match=message):
        bench_models(["vg_vig_atto"], **change)


@pytest.mark.parametrize(
    "name, dims, message",
    [
        ("vg_vig_attto", 2, "no model 'vg_vig_attto'; nearest: vg_vig_atto"),
        ("vg_vig_atto", 3, "vg_vig_atto: timm's models take images; dims=3 is for network:NAME"),
        ("network:attention_net", 2, "no network 'attention_net'; nearest: attention_unet"),
        ("monai:AttentionUNet", 3, "no network of MONAI 'AttentionUNet'; nearest: AttentionUnet"),
        ("nowhere.py:net", 2, "there is no file nowhere.py; code in a file is named FILE.py:FUNCTION"),
    ],
)
def test_unknown_model(name, dims, message):
    with pytest.raises(ConfigError, match=message):
        bench_models([name], dims=dims)


def test_volumes_and_code_in_a_file(tmp_path):
    code = "from torch import nn\ndef net():\n    return nn.Conv3d(1, 2, 3, padding=1)\n"
    (tmp_path / "somebodys.py").write_text(code)
    own, peer = f"{tmp_path}/somebodys.py:net", "network:attention_unet"
    settings = dict(size=16, batch=1, dims=3, rounds=1, device="cpu", channels_last=True)
    before = torch.backends.cudnn.benchmark
    rows = bench_models([own, peer], mode="inference", cudnn_benchmark=True, **settings)
    assert torch.backends.cudnn.benchmark == before
    assert [row["model"] for row in rows] == [own, peer] and rows[0]["parameters"] == 27 * 2 + 2
    assert all(row["images_per_second"] > 0 and row["size"] == 16 for row in rows)


def test_contenders_of_equal_widths():
    pytest.importorskip("monai", reason="the [volumes] extra is not installed")
    with torch.device("meta"):
        own, peer = (create(name, 64, 3) for name in FAMILIES["attention_unet"][0])
    widths = [[m.out_channels for m in net.modules() if isinstance(m, nn.Conv3d)] for net in (own, peer)]
    assert max(widths[0]) == max(widths[1]) == 512 and {32, 64, 128, 256} <= set(widths[0]) & set(widths[1])


def test_families_are_known():
    for groups in FAMILIES.values():
        for name in (name for group in groups for name in group):
            check_name(name, 3 if ":" in name else 2)


# ---------------------------------------------------------------------------------------------------------- operators


def test_measure_counts_each_byte_once():
    x, y = torch.randn(1000, requires_grad=True), torch.randn(1000)
    columns = timing.measure(lambda x, y: x * y, [x, y], torch.ones(1000), min_seconds=0.001)
    for name, tensors in (("forward", 3), ("forward_backward", 5)):  # x, y, xy; then also the gradients of xy and x
        assert columns[f"gb_per_second_{name}"] * columns[f"ms_{name}"] == pytest.approx(tensors * 4000 / 1e6)
        rate = 100 * columns[f"gb_per_second_{name}"] / timing.copy_gb_per_second(torch.device("cpu"))
        assert columns[f"copy_percent_{name}"] == pytest.approx(rate)
        assert columns[f"ms_{name}_graph"] is None and columns[f"peak_extra_mib_{name}"] is None
    assert timing.copy_gb_per_second(torch.device("cpu")) > 0.01


def test_a_slow_call_is_made_a_few_times():
    calls = []
    timing._cpu_milliseconds(lambda inputs, upstream: calls.append(1), (), torch.zeros(1), min_seconds=0.0)
    assert len(calls) == 3


def test_operator_rows(tiny_operator):
    rows = bench_ops(device="cpu", seconds=0.001)
    assert [(row["op"], row["backend"]) for row in rows] == [
        ("bidirectional_gla", "reference"),
        ("scaled_dot_product_attention", "torch"),
    ]
    assert 0 < rows[0]["worst_error"] < 1e-5 and rows[0]["copy_gb_per_second"] == 10.0
    for row in rows:
        assert row["ms_forward"] > 0 and row["ms_forward_backward"] > 0 and row["commit"]
    assert len(bench_ops(["bidirectional_gla"], device="cpu", seconds=0.001, peers=False)) == 1


def test_a_wrong_operator_is_not_timed_and_the_others_are(tiny_operator, monkeypatch, capfd):
    def faulty(*tensors, **options):
        return 1.001 * bidirectional_gla_reference(*tensors, **options)

    monkeypatch.setattr(gla, "bidirectional_gla_reference", faulty)
    timed = []
    monkeypatch.setattr(gla_bench, "measure", lambda *arguments, **options: timed.append(1) or {"ms_forward": 1.0})
    right = SimpleNamespace(rows=lambda device, *, min_seconds: [{"op": "right", "ms_forward": 1000 * min_seconds}])
    monkeypatch.setitem(sys.modules, "vision_gates.kernels.right.bench", right)
    monkeypatch.setattr(ops, "operators", lambda: ["bidirectional_gla", "right"])
    assert cli.bench(["ops", "seconds=0.125", "device=cpu"]) == 1
    out, err = capfd.readouterr()
    assert not timed, "neither it nor its peers"
    assert err.startswith("error: bidirectional_gla: RuntimeError: reference backend") and "1.0e-03" in err
    (wrong,) = (line for line in out.splitlines() if line.strip().startswith("bidirectional_gla"))
    assert "failed" in wrong and not any(letter.isdigit() for letter in wrong)
    assert any("right" in line and "125" in line for line in out.splitlines())


def test_an_operator_is_asked_for_its_dtype(monkeypatch, tiny_operator):
    fake = SimpleNamespace(rows=lambda device, *, dtype=None: [{"op": "fake", "dtype": str(dtype)}])
    monkeypatch.setitem(sys.modules, "vision_gates.kernels.fake.bench", fake)
    monkeypatch.setattr(ops, "operators", lambda: ["fake"])
    assert bench_ops(device="cpu", dtype="float16")[0]["dtype"] == "torch.float16"
    fake.rows = lambda device: [{"op": "fake"}]
    assert "dtype" in bench_ops(device="cpu", dtype="float16")[0]["problem"], "not silently in another one"


def test_unknown_operator():
    with pytest.raises(ConfigError, match="no operator 'bidirectional'; nearest: bidirectional_gla"):
        bench_ops(["bidirectional"])


def test_operators_are_found():
    assert "bidirectional_gla" in ops.operators() and "timing" not in ops.operators()


def causal(q, k, v, g, *, scale):
    """What fla's chunk_gla computes."""
    state, outputs = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None, :]), []
    for t in range(q.shape[1]):
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * (state * q[:, t, :, :, None]).sum(-2))
    return torch.stack(outputs, 1), None


def test_a_causal_peer_is_run_both_ways_and_checked():
    device = torch.device("cpu")
    inputs, upstream = gla_bench._inputs(TINY, device, torch.float32)
    exact = gla_bench._exact(inputs, upstream)
    torch.testing.assert_close(gla_bench._both_ways(causal)(*inputs), bidirectional_gla_definition(*inputs))
    columns = gla_bench._fla_columns(causal, (inputs, upstream), exact, inputs, upstream, 0.001)
    assert columns["ms_forward_backward"] > 0 and columns["worst_error"] < 1e-6

    def wrong(*tensors, scale):
        return causal(*tensors, scale=2 * scale)

    columns = gla_bench._fla_columns(wrong, (inputs, upstream), exact, inputs, upstream, 0.001)
    assert "not timed" in columns["problem"] and not any(key.startswith("ms_") for key in columns)


def test_the_exact_result_of_a_long_sequence(monkeypatch):
    inputs, upstream = gla_bench._inputs(TINY, torch.device("cpu"), torch.float32)
    definition = gla_bench._exact(inputs, upstream)
    monkeypatch.setattr(gla_bench, "_DEFINITION_TOKENS", 8)
    for got, wanted in zip(gla_bench._exact(inputs, upstream), definition, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(gla_bench, "bidirectional_gla_reference", lambda *tensors, path: bidirectional_gla_reference(
        *tensors, path=path, scale=0.5001))  # fmt: skip
    with pytest.raises(RuntimeError, match="misses the definition"):
        gla_bench._exact(inputs, upstream)


def test_cold_process(tiny_operator):
    rows = bench_ops(device="cpu", seconds=0.001, peers=False, cold=True)
    assert [row["backend"] for row in rows] == ["reference", "cold process"]
    assert rows[1]["cold_seconds"] > 0 and rows[1]["shape"] == [8, 196, 3, 32], "a process of its own: not TINY"


# -------------------------------------------------------------------------------------------- tables, files, command


def test_table_fits_a_terminal(rows):
    text = shown(
        rows_table([row | {"model": row["model"].replace("test_resnet", "deit_tiny_patch16_224")} for row in rows])
    )
    assert "deit_tiny_patch16_224" in text and "vg_vig_atto" in text and "840,904" in text and "…" not in text
    with pytest.raises(ValueError, match="nothing to show"):
        rows_table([])


def test_forward_and_backward_are_two_lines_of_a_table():
    row = {"op": "x", "shape": (2, 3), "ms_forward": 1.5, "ms_forward_backward": 4.5, "ms_forward_graph": 1.25}
    text = shown(rows_table([row, {"op": "y", "problem": "wrong"}]))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "op shape pass ms graph ms" in lines and "x 2,3 forward 1.5 1.25" in lines
    assert "x 2,3 fwd+bwd 4.5 -" in lines and "y - - failed -" in lines


def test_rows_are_written(rows, tmp_path):
    write_rows(rows, tmp_path / "new" / "rows.csv")
    with (tmp_path / "new" / "rows.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == NAMES * 2
    write_rows(rows, tmp_path / "rows.json")
    assert json.loads((tmp_path / "rows.json").read_text())[0]["parameters"] == 840_904
    with pytest.raises(TypeError):
        write_rows([{"model": object()}], tmp_path / "rows.json")
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 4, "what was there stays whole"
    with pytest.raises(ConfigError, match="csv or .json"):
        write_rows(rows, tmp_path / "rows.txt")


def test_figure_shows_every_model_and_what_is_missing(rows):
    measured = [row | {"peak_extra_mib": 10.0 * row["size"]} for row in rows]
    lost = measured[2] | dict.fromkeys(("images_per_second", "peak_extra_mib")) | {"problem": "out of memory"}
    figure = speed_figure([*measured[:2], lost, measured[3]])
    speed, memory = figure.axes
    ours, peer = speed.get_lines()
    assert list(peer.get_xdata()) == [32, 64] and list(ours.get_xdata()) == [32]
    assert list(peer.get_ydata()) == [row["images_per_second"] for row in measured[1::2]]
    assert list(memory.get_lines()[1].get_ydata()) == [160.0, 320.0], "of one of two images"
    assert {speed.get_xscale(), speed.get_yscale(), memory.get_yscale()} == {"log"}
    (caption,) = figure.texts
    for text in (
        "2 at 32, 2 at 64",
        rows[0]["commit"],
        rows[0]["device"],
        "memory or failed): vg_vig_atto eager at 64",
    ):
        assert text in caption.get_text()
    assert len(speed_figure(rows).axes) == 1, "no memory on a CPU"


def test_command_writes_a_folder(tmp_path, capfd, clock):
    argv = ["models", *NAMES, "size=32,64", "batch=1", "rounds=1", "mode=inference", "device=cpu", "profile=true"]
    assert cli.bench([*argv, f"out={tmp_path}/speed/"]) == 0
    out, err = capfd.readouterr()
    assert "mode inference" in out and "vg_vig_atto, 64 px, eager: one pass" in out and "\x1b" not in out
    assert len(json.loads((tmp_path / "speed" / "rows.json").read_text())) == 4
    assert len((tmp_path / "speed" / "rows.csv").read_text().splitlines()) == 5
    assert (tmp_path / "speed" / "speed.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "speed" / "profile_vg_vig_atto_32_eager.csv").open() as file:
        kernels = list(csv.DictReader(file))
    assert "aten::mkldnn_convolution" in {row["name"] for row in kernels}
    microseconds = [float(row["total_us"]) for row in kernels]
    assert microseconds == sorted(microseconds, reverse=True)
    assert sum(float(row["percent"]) for row in kernels) == pytest.approx(100)
    assert not list(tmp_path.rglob("*.partial"))

    assert cli.bench([*argv, f"out={tmp_path}/one.csv"]) == 0
    assert {path.name for path in tmp_path.glob("one*64*")} == {f"one_profile_{name}_64_eager.csv" for name in NAMES}


@pytest.mark.parametrize(
    "argv, message",
    [
        (["models", "--size=3"], "there are no flags"),
        (["models", "size=224,big"], "size=224,big: a whole number is needed, or several such as 224,1024"),
        (["models", "batch=many"], "batch=many: a whole number is needed, or auto"),
        (["models", "profile=yes"], "profile=yes: true or false"),
        (["models", "sizes=3"], "sizes=3: no such setting; nearest: size; known: size, batch"),
        (["models", "mode=test"], "mode must be"),
        (["models", "family=vit"], "family=vit: one of vig, convit, hornet, attention_unet is needed"),
        (["models", "vg_vig_atto", "family=vig"], "vg_vig_atto: family= says what is compared; give names or a family"),
        (["models", "out=rows.txt"], "out=rows.txt: the suffix must be .csv or .json, or end it with / for a folder"),
        (["ops", "seconds=0"], "seconds=0: seconds are needed"),
        (["ops", "dtype=int8"], "dtype must be one of"),
        (["ops", "nothing_like_it"], "no operator 'nothing_like_it'; nearest: "),
    ],
)
def test_wrong_arguments(capfd, argv, message):
    assert cli.bench(argv) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: ") and message in err and err.count("\n") == 1


def test_help_teaches(capfd):
    assert cli.bench(["--help"]) == 0
    out = capfd.readouterr().out
    from vision_gates.benchmark.command import _SETTINGS

    for settings in _SETTINGS.values():
        for key in settings:
            assert f"    {key}=" in out, f"{key} is not explained"
    assert "Examples:" in out and max(map(len, out.splitlines())) <= 120


# ---------------------------------------------------------------------------------------------------------------- GPU

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@needs_gpu
def test_measure_on_a_gpu():
    x = torch.randn(2**22, device="cuda", requires_grad=True)
    columns = timing.measure(lambda x: x.exp(), [x], torch.ones_like(x).detach(), min_seconds=0.02)
    assert 0 < columns["ms_forward_graph"] <= 1.5 * columns["ms_forward"]
    assert columns["ms_forward_backward_graph"] > 0 and 5 < columns["copy_percent_forward"] < 150
    assert columns["peak_extra_mib_forward"] < 0.01, "nothing beyond input and output"
    columns = timing.measure(lambda x: (x + 1).exp(), [x], torch.ones_like(x).detach(), min_seconds=0.02)
    assert columns["peak_extra_mib_forward"] == pytest.approx(16, abs=0.1), "x + 1"
    assert columns["peak_extra_percent_forward"] == pytest.approx(50, abs=1)


@pytest.mark.gpu
@needs_gpu
def test_what_cannot_be_captured_has_no_graph_time():
    x = torch.randn(1000, device="cuda", requires_grad=True)
    columns = timing.measure(lambda x: x * float(x.detach().sum()), [x], torch.ones_like(x).detach(), min_seconds=0.01)
    assert columns["ms_forward"] > 0 and columns["ms_forward_graph"] is None
    assert timing.measure(lambda x: 2 * x, [x], torch.ones_like(x).detach(), min_seconds=0.01)["ms_forward_graph"] > 0


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_models_on_a_gpu(mode):
    settings = ModelSettings(
        size=(64,), batch=4, mode=mode, dtype="bfloat16", runtime=("eager", "compiled", "graph"), rounds=2, profile=True
    )
    groups = list(models.model_groups(["vg_vig_atto", "test_vit"], settings))
    assert len(groups) == 3
    for group in groups:
        for row in group.rows:
            assert row["problem"] is None and row["images_per_second"] > 0
            assert 0.1 < row["peak_extra_mib"] < 500, row
            assert sum(kernel["percent"] for kernel in group.kernels[row["model"]]) == pytest.approx(100)
    held = torch.cuda.memory_allocated()
    del groups
    assert held < 2**26, "models are freed between groups"


@pytest.mark.gpu
@needs_gpu
def test_out_of_memory_on_a_gpu():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 2**29) / total)
    try:
        large, _ = bench_models(["vg_vig_atto", "test_vit"], size=224, batch=128, rounds=1, device="cuda")
        small, _ = bench_models(["vg_vig_atto", "test_vit"], size=32, batch=2, rounds=1, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert large["problem"] == "out of memory" and large["images_per_second"] is None
    assert small["problem"] is None and small["images_per_second"] > 0, "what failed was freed"
