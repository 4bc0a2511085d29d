"""The cost model against numbers worked out by hand, and the command that prints it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("bench", reason="bench/ is not installed; it runs from a checkout")
from bench import roofline
from bench.cost.layers import Layer, convolutions, decoder_layers, encoder_layers, head
from bench.cost.machine import CPU, MACHINES, with_ceilings
from bench.cost.ops import PARTS, floor, imagination_step, knn_in_fp32, stack_of
from bench.cost.predict import expected, kind, predictions
from bench.cost.scan import Scan, backward_step, forward_step, observe, stacked, two_scans
from bench.cost.updates import LAUNCHES, casts, features
from bench.cost.work import Work, pointwise, product, total

H100, H200, A100 = MACHINES["h100"], MACHINES["h200"], MACHINES["a100"]
FULL = {"deter": 1024, "hidden": 1024, "stoch": 32, "discrete": 32}
NARROW = {**FULL, "deter": 200, "hidden": 200}


def scan(batch: int, dtype: str = "bfloat16", action: int = 0) -> Scan:
    return Scan.of({"B": batch, "T": 50, "E": 1536, "A": action, **FULL}, dtype)


def test_recurrent_weights() -> None:
    """8.4 M weights of products, 16.8 MB; the sum of 32 rows of img_in adds a megaword."""
    weights = scan(16).weights
    assert weights == {"stoch": 1024**2, "gru": 6 * 1024**2, "obs": 1024**2, "dist": 1024**2}
    products = sum(weights.values()) - weights["stoch"]
    assert 2 * products == 16_777_216
    assert scan(16).recurrent_bytes == 18 * 1024**2
    assert scan(16, "float32").recurrent_bytes == 36 * 1024**2


def test_bytes_of_the_gru_phase() -> None:
    """Every SM reads x and h of all rows: 132 · 16 · 2048 · 2 bytes = 8.65 MB, 1.24 µs at 7 TB/s."""
    gru = forward_step(scan(16), H100)[1]
    assert (gru.flops, gru.l2, gru.shared, gru.barriers) == (2 * 16 * 6 * 1024**2, 132 * 16 * 4096, 12 * 1024**2, 1)
    assert gru.seconds(H100) == pytest.approx({"L2": 8_650_752 / 7e12, "barrier": 1.1e-6 + 0.4e-6})  # with its stores


@pytest.mark.parametrize(("batch", "low", "high"), [(16, 8, 10), (50, 13, 15)])
def test_a_step_is_what_the_specification_computed(batch: int, low: float, high: float) -> None:
    """Which left out what stores before a barrier add: 5 · 0.4 µs."""
    step = forward_step(scan(batch), H100)
    assert low <= 1e6 * total(step, replace(H100, store=0.0)).seconds <= high
    assert total(step, H100).seconds == pytest.approx(total(step, replace(H100, store=0.0)).seconds + 5 * 0.4e-6)


def test_phases_of_a_step() -> None:
    """Five each way: LayerNorm's gradient is stored before every SM reads it, ``kernels/parts/rssm_backward.py``."""
    back = backward_step(scan(16), H100)
    assert [work.name for work in forward_step(scan(16), H100)] == ["x", "gru", "gates", "obs", "dist"]
    assert [work.name for work in back] == ["dz", "dy", "dh", "norm", "dparts"]
    assert [work.barriers for work in back] == [1] * 5
    assert back[3].hbm == 16 * 3072 * (4 + 2)  # preactivations in float32, their gradient in bfloat16
    assert back[4].l2 == 132 * 16 * 3072 * 2  # which every SM reads


def test_weights_that_do_not_fit_are_streamed() -> None:
    """An H100's 132 SMs keep 259 KB each, 35 MB: all in bfloat16, all but 7 % in float32; an A100's 108 keep 195 KB."""
    assert scan(16).streamed(H100) == scan(16).streamed(A100) == 0
    assert scan(16, "float32").streamed(H100) == pytest.approx(1 - 259 * 1024 * 132 / (36 * 1024**2))
    resident, streaming = forward_step(scan(16), H100), forward_step(replace(scan(16), persistent=False), H100)
    more = sum(work.l2 for work in streaming) - sum(work.l2 for work in resident)
    assert more == 2 * 8 * 1024**2 + 16 * 32 * 1024 * 2  # the products' weights, and 32 rows of img_in for each of 16
    assert 2 < 1e6 * more / H100.l2 < 3.5  # "+3 µs a step"


def test_barriers_and_launches() -> None:
    parts = observe(scan(16), H100, backward=True)
    assert sum(part.barriers * part.times for part in parts) == 50 * (5 + 5)
    phases = observe(replace(scan(16), persistent=False), H100, backward=False)
    assert sum(part.barriers for part in phases) == 0
    outside = sum(part.launches for part in observe(scan(16), H100, backward=False))
    assert sum(part.launches * part.times for part in phases) == 50 * 5 + outside


@pytest.mark.parametrize("backward", [False, True])
def test_a_wavefront_shares_barriers(backward: bool) -> None:
    """T + 1 rounds instead of 2T, and the same arithmetic."""
    lower, upper = stack_of({"B": 16, "T": 50, "E": 1536, "A": 4, **FULL}, "bfloat16")
    wave, two = stacked(lower, upper, H100, backward=backward), two_scans(lower, upper, H100, backward=backward)
    phases = 10 if backward else 5
    assert sum(part.barriers * part.times for part in wave) == 51 * phases
    assert sum(part.barriers * part.times for part in two) == 100 * phases
    assert total(two, H100).seconds > 1.5 * total(wave, H100).seconds


def test_targets_leave_room_above_the_floor() -> None:
    """Issue 3's targets in ms: forward 0.6 and 1.0, with backward 1.8 and 3.0."""
    for batch, forward, both in ((16, 0.6, 1.8), (50, 1.0, 3.0)):
        shape = {"B": batch, "T": 50, "E": 1536, "A": 0, **FULL}
        for passed, target in (("forward", forward), ("forward_backward", both)):
            least = floor("rssm_observe", shape, "bfloat16", passed, H100)
            assert least is not None and 0.4 * target < 1e3 * least.seconds < 0.9 * target


def test_knn_is_bound_by_arithmetic() -> None:
    """2300 · 4096 · 128 · 2 = 2.4 GFLOP: 36 µs at 67 TFLOP/s, 4.9 µs as a filter at 495; then 16 rows a query again."""
    shape = {"Q": 2300, "N": 4096, "d": 128, "k": 16}
    plain = total(knn_in_fp32(shape), H100)
    assert plain.spent["fp32"] == pytest.approx(2.4117e9 / 67e12, rel=1e-4)
    assert plain.bound.startswith("fp32")
    least = floor("knn_bonus", shape, "float32", "forward", H100)
    assert least is not None
    assert least.spent["tf32"] == pytest.approx(2.4117e9 / 495e12, rel=1e-4)
    assert least.spent["L2"] == pytest.approx(2300 * 16 * 512 / 7e12)


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "passed", "megabytes"),
    [  # 30.7 M numbers of images; 13.2 M weights a model
        ("image_loss", {"B": 50, "T": 50}, "bfloat16", "forward", 92.2),
        ("image_loss", {"B": 50, "T": 50}, "float32", "forward_backward", 153.6 + 276.5),
        ("normalize_image", {"B": 50, "T": 50}, "bfloat16", "forward", 92.2),
        ("keras_adam", {"models": 1}, "float32", "forward", 13.17 * 32),
        ("kl_balance", {"B": 50, "T": 50, "S": 32, "C": 32}, "float32", "forward_backward", 6 * 10.24),
        ("lambda_return", {"H": 15, "N": 2500}, "float32", "forward_backward", 0.6 + 1.05),
        ("policy", {"B": 1, "E": 1536, "A": 4, **FULL}, "bfloat16", "forward", 40.9),
        ("rssm_step", {"B": 1, "E": 1536, "A": 4, **FULL}, "bfloat16", "forward", 2 * 13.11),
    ],
)
def test_bytes_of_the_others(op: str, shape: dict[str, int], dtype: str, passed: str, megabytes: float) -> None:
    """What crosses device memory, in megabytes."""
    parts = PARTS[op](shape, dtype, passed == "forward_backward", H100)
    assert sum(part.hbm for part in parts) / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_a_policy_reads_the_rows_that_one_hots_pick() -> None:
    """32 rows each of both img_ins, of the upper obs_out and of the actor's first layer; 4 of actions."""
    parts = PARTS["policy"]({"B": 1, "E": 512, "A": 4, **NARROW}, "float32", False, H100)
    assert sum(part.hbm for part in parts if part.name == "one-hots") == (3 * 32 * 200 + 4 * 200 + 32 * 400) * 4
    weights = 2 * (400 * 600 + 200 * 1024) + (200 + 512) * 200 + (200 + 200) * 200  # without those columns
    actor = 200 * 400 + 3 * 400 * 400 + 400 * 8
    assert sum(part.hbm for part in parts) / 4 == pytest.approx(weights + actor, rel=0.03)


def test_imagination_at_600_teraflops() -> None:
    """2500 rows through 9.4 M weights are 47 GFLOP, 79 µs a step; bytes bind the logits, the actor is extra."""
    slower = replace(H100, rates={**H100.rates, "bf16": 600e12})
    least = floor("rssm_imagine", {"B": 2500, "T": 15, "A": 4, **FULL}, "bfloat16", "forward", slower)
    assert least is not None
    assert least.spent["bf16"] == pytest.approx(15 * 2 * 2500 * (8 * 1024**2 + 4 * 1024) / 600e12)
    whole = floor("rssm_rollout", {"B": 2500, "T": 15, "A": 4, **FULL}, "bfloat16", "forward", slower)
    assert whole is not None and 90 < 1e6 * whole.seconds / 15 < 130  # launches and what gates and states move included


def test_the_cheaper_way_into_imagination() -> None:
    """32 rows of W_stoch for each of 2500 are 164 MB from L2, 23 µs; the product is 5.2 GFLOP, 5.3 µs."""
    start = Scan.of({"B": 2500, "T": 1, "E": 0, "A": 4, **FULL}, "bfloat16")
    assert imagination_step(start, H100)[0].flops == 2 * 2500 * (1024 + 4) * 1024
    few = replace(start, B=1)
    assert imagination_step(few, CPU)[0].flops == 0 and imagination_step(few, CPU)[0].l2 == 32 * 1024 * 2
    assert len(imagination_step(start, H100)) == 5 == len(imagination_step(start, CPU)) + 1  # gates ride along


def test_convolutions() -> None:
    """Multiply-adds an image at depth 48, and weights."""
    encoder, decoder = encoder_layers(48), decoder_layers(48, 2048)
    assert [layer.adds for layer in encoder] == [31**2 * 2304, 14**2 * 73728, 6**2 * 294912, 2**2 * 1179648]
    assert [layer.weights for layer in decoder] == [3145728, 7372800, 460800, 165888, 5184]
    assert decoder[3].adds == 13**2 * 165888
    assert [layer.written for layer in encoder] == [31**2 * 48, 14**2 * 96, 6**2 * 192, 2**2 * 384]
    assert [layer.written for layer in decoder] == [1536, 25 * 192, 13**2 * 96, 30**2 * 48, 64**2 * 3]
    assert [layer.read for layer in encoder[1:]] == [layer.written for layer in encoder[:-1]]
    assert [layer.read for layer in decoder[1:]] == [layer.written for layer in decoder[:-1]]
    assert [layer.dense for layer in decoder] == [True, True, False, False, False]
    assert [layer.elu for layer in decoder] == [False, True, True, True, False]


def test_what_runs_between_convolutions() -> None:
    """Bias and ELU read and write the output; back, ELU moves three and the bias's gradient reads one: 8 in all."""
    layer = Layer(adds=7, weights=11, read=5, written=100)
    rest = dict(frames=10, dtype="bfloat16", name="c", backward=True, of_input=False)
    parts = convolutions([layer, layer], machine=H100, **rest)  # type: ignore[arg-type]
    passes = [part for part in parts if not part.flops]
    assert sum(part.hbm for part in passes) == 2 * 8 * 10 * 100 * 2 and len(passes) == 2 * 4
    assert [part.times for part in parts if part.flops] == [2, 3]  # images have no gradient
    assert [part.hbm for part in parts if part.flops] == [2 * (10 * 105 + 11)] * 2
    forward = convolutions([layer], machine=H100, **(rest | {"backward": False}))  # type: ignore[arg-type]
    assert sum(part.hbm for part in forward if not part.flops) == 4 * 10 * 100 * 2
    dense = convolutions([layer._replace(dense=True, elu=False)], machine=H100, **rest)  # type: ignore[arg-type]
    assert [part.hbm for part in dense if not part.flops] == [2000]  # only the bias's gradient
    assert len(convolutions([layer, layer], machine=CPU, **rest)) == 2  # type: ignore[arg-type]


def test_what_runs_between_the_layers_of_a_head() -> None:
    for times, passes in ((1, 2), (2, 2 + 3), (3, 2 + 3 + 1)):
        parts = head("h", 100, 2048, 1, "bfloat16", H100, times=times)
        assert sum(part.hbm for part in parts if not part.flops) == 4 * passes * 100 * 400 * 2
    assert all(part.flops for part in head("h", 100, 2048, 1, "bfloat16", CPU, times=3))


def test_features_and_casts() -> None:
    """328 MB of float32 features of 40 000 states: made, rounded for 3.8 readers, two gradients back and their sum."""
    parts = features(40_000, 2048, "bfloat16", H100, readers=3.8, differentiated=2)
    assert sum(part.hbm for part in parts) / 4 / 40_000 / 2048 == pytest.approx(2 + 1.5 * 3.8 + 1.5 * 2 + 3)
    assert features(40_000, 2048, "bfloat16", CPU, readers=3.8, differentiated=2) == []
    assert sum(part.hbm for part in casts(1e6, "bfloat16", H100, copied=0)) == 12e6
    assert sum(part.hbm for part in casts(1e6, "bfloat16", H100, copied=0.7e6)) == pytest.approx(
        0.3e6 * 6 + 1.4e6 + 6e6
    )
    assert casts(1e6, "float32", H100, copied=0) == []


def test_arithmetic_of_a_finetuning_update() -> None:
    """The specification says 4.5 to 5 TFLOP; the model leaves out what is not a product."""
    shape = {"B": 50, "T": 50, "deter": 1024, "hidden": 1024, "cnn_depth": 48, "horizon": 15}
    parts = PARTS["finetune_update"](shape, "bfloat16", True, H100)
    assert 4e12 < sum(part.flops * part.times for part in parts) < 5e12
    least = floor("finetune_update", shape, "bfloat16", "forward_backward", H100)
    assert least is not None and 13.5 < 1e3 * least.seconds < 14.5
    assert sum(part.launches * part.times for part in parts) == LAUNCHES["finetune"]
    data_sheet = replace(H200, hbm=4.8e12, rates={**H200.rates, "bf16": 989e12})
    there = floor("finetune_update", shape, "bfloat16", "forward_backward", data_sheet)
    assert there is not None and 11.5 < 1e3 * there.seconds < 12  # "realistic", at rates that nobody reaches


def test_the_slowest_kind_binds() -> None:
    work = Work("w", flops=989e6, hbm=3.35e7, barriers=2, launches=1, times=3)
    assert work.seconds(H100) == pytest.approx({"HBM": 3e-5, "barrier": 9e-6, "launch": 3.6e-6})
    assert total([work], H100).bound == "HBM 70%"
    assert product("p", 10, 20, 30, "float32").hbm == 4 * (200 + 600 + 300)
    assert pointwise("p", 3, 4).hbm == 7


def test_a_cpu_keeps_in_its_cache_what_fits() -> None:
    near, far = pointwise("near", 30e6, 2e6), pointwise("far", 30e6, 10e6)
    assert near.seconds(CPU) == pytest.approx({"HBM": 32e6 / CPU.l2})
    assert far.seconds(CPU) == pytest.approx({"HBM": 40e6 / CPU.hbm})
    assert near.seconds(H100)["HBM"] == pytest.approx(32e6 / H100.hbm)


def test_image_model() -> None:
    """Of 400 frames at depth 48: the encoder's first layer has no gradient to pass on; the decoder's all have."""
    encoder, decoder = {"B": 16, "T": 25, "depth": 48}, {"B": 16, "T": 25, "depth": 48, "F": 2048}
    adds = [layer.adds for layer in encoder_layers(48)]
    least = floor("image_encoder", encoder, "float32", "forward_backward", CPU)
    assert least is not None
    assert least.seconds == pytest.approx(2 * 400 * (3 * sum(adds) - adds[0]) / CPU.rates["fp32"])
    forward, both = (floor("image_decoder", decoder, "bfloat16", p, CPU) for p in ("forward", "forward_backward"))
    assert forward is not None and both is not None
    assert both.seconds == pytest.approx(3 * forward.seconds)
    assert forward.seconds == pytest.approx(
        800 * sum(layer.adds for layer in decoder_layers(48, 2048)) / CPU.rates["bf16"]
    )


def test_measured_ceilings_replace_the_data_sheet() -> None:
    measured = with_ceilings(H100, {"barrier_us": 2.0, "copy_tb_s": 3.0, "bf16_tflop_s": 798.0, "unknown": 1.0}, "mine")
    assert (measured.name, measured.barrier, measured.hbm) == ("mine", 2e-6, 3e12)
    assert measured.rates == {"bf16": 798e12, "tf32": 495e12, "fp32": 67e12}
    assert measured.l2 == H100.l2


def test_no_model_no_floor() -> None:
    assert floor("no_op", {"B": 1}, "float32", "forward", H100) is None
    assert floor("rssm_observe", {"B": 1}, "float32", "forward", H100) is None  # sizes are missing


def test_every_question_has_a_floor(capsys: pytest.CaptureFixture[str]) -> None:
    for gpu in MACHINES:
        assert roofline.main(["--gpu", gpu]) == 0
    out = capsys.readouterr().out
    assert "H100 SXM: 132 SMs" in out and "A100 SXM 80GB: 108 SMs" in out
    assert "H200 SXM: 132 SMs" in out and "(assumed)" in out
    assert max(len(line) for line in out.splitlines()) <= 120
    for question in roofline.QUESTIONS:
        assert question.op in out


def test_measurements_are_printed_beside_their_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"B": 16, "T": 50, "E": 1536, "A": 0, **FULL}
    row = {"op": "rssm_observe", "backend": "triton", "dtype": "bfloat16", "shape": shape, "pass": "forward"}
    other = {**row, "op": "no_op", "median_ms": 1.0}
    on_cpu = {**row, "device": "cpu", "median_ms": 99.0}
    content = {
        "rows": [{**row, "device": "cuda", "median_ms": 0.866}, other, on_cpu],
        "ceilings": {"barrier_us": 1.1},
        "machine": {"GPU": "NVIDIA H100 80GB HBM3"},
    }
    path = tmp_path / "device.json"
    path.write_text(json.dumps(content))
    assert roofline.main(["--measured", str(path)]) == 0
    out = capsys.readouterr().out
    assert "NVIDIA H100 80GB HBM3: " in out and "(measured)" in out
    lines = [line for line in out.splitlines() if "triton" in line]
    assert [line.split()[-3:] for line in lines] == [["0.533", "0.866", "62%"]]


@pytest.mark.parametrize("content", ["{}", "not JSON", '{"rows": 3}'])
def test_another_file_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    assert roofline.main(["--measured", str(path)]) == 2
    assert "bench.roofline: " in capsys.readouterr().err


def test_a_prediction_is_the_floor_at_what_is_reached() -> None:
    """Each kind of work at its share of the machine's rates; a phase waits for its first operand too."""
    phase = Work("p", l2=7e6, barriers=1)
    conv = Work("c", flops=785e6, launches=1, convolution=True)
    assert [kind(part) for part in (phase, conv, product("m", 1, 1, 1, "bfloat16"), pointwise("x", 1, 1))] == [
        *("phase", "convolution", "product", "pass")
    ]
    assert expected([phase], H200) == pytest.approx(1e-6 / 0.7 + 1.1e-6 + 0.4e-6 + 0.4e-6)
    assert expected([conv], H200) == pytest.approx(1e-6 / 0.4 + 1.2e-6)
    assert expected([pointwise("x", 4.3e6, 0)], H200) == pytest.approx(1e-6 / 0.85 + 1.2e-6)


def test_every_target_has_a_prediction(capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(["--targets"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("H200 SXM") and "all below is computed, nothing measured" in out
    assert max(len(line) for line in out.splitlines()) <= 120
    rows = predictions(H200)
    assert [row.limit for row in rows] == [
        *("<= 0.6 ms", "<= 1.8 ms", ">= 1.5 x", "<= 1 ms", "<= 3 ms", ">= 1.5 x", "<= 0.08 ms", "<= 4 ms", "<= 20 ms"),
        *(">= 8 x", ">= 2 x", ">= 8 x", "<= 60 %"),
    ]
    for row in rows:
        assert row.what in out and row.predicted in out
        if row.limit.endswith("ms"):
            limit, predicted = float(row.limit.split()[1]), float(row.predicted.split()[0])
            assert row.floor is not None and 1e3 * row.floor < predicted and row.met == (predicted <= limit)
    faster = replace(H200, barrier=0.2e-6, store=0.0)
    assert [row.met for row in predictions(faster)][:2] == [True, True] and not rows[0].met
