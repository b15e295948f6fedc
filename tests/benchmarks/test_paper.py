"""benchmarks/paper: its runs are what the table says, and go on where they were stopped."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.networks import assert_close
from torch import nn

import fastdfa

pytest.importorskip("rich")

from benchmarks.paper import command, records, report, training
from benchmarks.paper.cost import published_way
from benchmarks.paper.data import Data, Split, augmented, split
from benchmarks.paper.networks import build, hidden_layers, mask, prealign
from benchmarks.paper.progress import Bar
from benchmarks.paper.table import BOTTLENECKS, PUBLISHED, RUNS, Config
from examples.training.measure import machine


@pytest.fixture(scope="module")
def data():
    """Images in which the label can be seen, as many as two batches of 32 and a part of one."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(80) % 10
    x = torch.randn(80, 3, 32, 32, generator=generator)
    for image, label in zip(x, y, strict=True):
        image[:, 3 * label : 3 * label + 3] += 1.0
    return Data(Split(x, y), Split(x[:40], y[:40]))


SMALL = Config("fc", "baselines", width=16, batch=32, epochs=3, lr=0.01)


def one_step(config, data, seed=0):
    run = training.Run(config, seed, data, quick=False)
    run.model.train()
    torch.manual_seed(1)
    x, y = run._batch(torch.arange(config.batch))
    F.cross_entropy(run.model(x), y).backward()
    return run, x, y


def test_the_table_has_what_the_issue_asks_for():
    assert len({config.name for config in RUNS.values()}) == len(RUNS)
    assert PUBLISHED.keys() <= RUNS.keys()
    for b in BOTTLENECKS:
        assert RUNS[f"bottleneck-{b}-published"].bottleneck == b
    for b in BOTTLENECKS[:-1]:  # all 800 weights are trained in `fc`
        assert RUNS[f"bottleneck-{b}"].bottleneck == b
    recipe = RUNS["fc"]
    assert (recipe.lr, recipe.batch, recipe.epochs, recipe.error) == (5e-4, 128, 50, "sum")
    for activation in ("relu", "leaky-0.5", "leaky-0.1", "leaky-0.01"):
        assert {f"fc-{activation}", f"fc-{activation}-bp", f"cnn-{activation}"} <= RUNS.keys()


@pytest.mark.parametrize("name", RUNS)
def test_every_run_trains_what_it_should(name, data):
    config = replace(RUNS[name], batch=8, width=24, held_out=0)
    if config.bottleneck:
        config = replace(config, bottleneck=12)
    run, _, _ = one_step(config, data)
    trained = {n for n, p in run.model.named_parameters() if p.grad is not None and p.grad.any()}
    every = {n for n, _ in run.model.named_parameters()}
    assert trained == (
        {n for n in every if n.startswith("head")} if config.method == "top" else every
    )
    layers = 4 if config.network == "cnn" else 3
    assert len(hidden_layers(run.model)) == layers
    if config.method == "dfa":
        assert isinstance(run.model, fastdfa.DFA)
        assert len(run.model.feedback_points) == layers - config.published_cuts
        assert (run.model.feedback.error, run.model.feedback.shared) == (
            config.error,
            config.shared,
        )


@pytest.mark.parametrize("method", ["dfa", "bp"])
@pytest.mark.parametrize(("network", "norm"), [("fc", nn.BatchNorm1d), ("cnn", nn.BatchNorm2d)])
def test_normalisation_is_before_or_after_the_activation(method, network, norm):
    config = replace(SMALL, method=method, network=network)

    def first_layer(place):
        model = build(replace(config, batch_norm=place, activation="relu"), seed=0)
        network = model.module if method == "dfa" else model
        return [type(m) for n, m in network.named_children() if n[4:].startswith("1")]

    assert first_layer("before")[1:3] == [norm, nn.ReLU]
    after = first_layer("after")
    assert after[1 if method == "dfa" else 2] == norm and after.count(norm) == 1
    assert norm not in first_layer(None)


@pytest.mark.parametrize("network", ["fc", "cnn"])
def test_methods_start_alike(network):
    config = replace(SMALL, network=network)
    dfa, backprop = (build(replace(config, method=m), seed=3) for m in ("dfa", "bp"))
    pairs = zip(dfa.module.parameters(), backprop.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    x = torch.randn(8, 3, 32, 32) if network == "cnn" else torch.randn(8, 3072)
    torch.testing.assert_close(dfa(x), backprop(x))


def by_hand(weights, biases, x, y, B):
    """What a batch teaches with the summed error, as formulas: a_l, h_l, e and the feedback."""
    h, outputs = x.double(), []
    for W, b in zip(weights, biases, strict=True):
        a = h @ W.double().T + b.double()
        h = torch.tanh(a)
        outputs.append(h)
    e = torch.softmax(a, 1) - F.one_hot(y, 10)
    return outputs, e, e @ B.double()


def test_where_the_cut_is_missing_layer_1_learns_by_backprop_from_layer_2(data):
    config = replace(SMALL, published_cuts=True)
    run, x, y = one_step(config, data)
    linears = [m for m in run.model.module if isinstance(m, nn.Linear)]
    weights, biases = [m.weight.detach() for m in linears], [m.bias.detach() for m in linears]
    B = run.model.feedback_matrix(run.model.feedback_points[0])
    (h1, h2, h3, _), e, fed = by_hand(weights, biases, x, y, B)
    delta3, delta2 = fed * (1 - h3**2), fed * (1 - h2**2)
    delta1 = (delta2 @ weights[1].double()) * (1 - h1**2)
    expected = [delta1.T @ x.double(), delta2.T @ h1, delta3.T @ h2, e.T @ h3 / len(x)]
    for layer, gradient in zip(linears, expected, strict=True):
        assert_close(layer.weight.grad, gradient, 1e-4)


def test_the_mask_of_the_bottleneck(data):
    config = replace(SMALL, bottleneck=4)
    run, _, _ = one_step(config, data)
    full, _, _ = one_step(replace(config, bottleneck=None), data)
    masked = [p.grad for p in run.model.parameters()]
    plain = [p.grad for p in full.model.parameters()]
    for k, (a, b) in enumerate(zip(masked, plain, strict=True)):
        if k == 2:  # the weights of layer 2
            kept = a != 0
            assert 0.15 < kept.float().mean() < 0.35
            torch.testing.assert_close(a[kept], b[kept])
        elif k != 3:
            torch.testing.assert_close(a, b)
    again, _, _ = one_step(config, data)
    assert torch.equal(again.model.module[1].weight.grad != 0, kept)


def test_masks_move_with_the_layer():
    layer = nn.Linear(40, 4)
    mask(layer, 0.25, replace(SMALL, batch=16, published_cuts=True))
    assert set(layer.state_dict()) == {"weight", "bias"}  # drawn by the seed, not kept
    assert len(list(layer.to("meta").buffers())) == 3
    assert all(buffer.is_meta for buffer in layer.buffers())
    layer = nn.Linear(40, 4)
    mask(layer, 0.25, SMALL)
    layer.kept_weight.zero_()  # what moves is what masks
    layer(torch.ones(2, 40)).sum().backward()
    assert not layer.weight.grad.any()


def test_where_the_cut_is_missing_the_mask_covers_what_goes_on():
    layer, x = nn.Linear(40, 4), torch.randn(16, 40, requires_grad=True)
    mask(layer, 0.25, replace(SMALL, batch=16, published_cuts=True))
    layer(x).sum().backward()
    kept = x.grad != 0
    assert 0.15 < kept.float().mean() < 0.35
    torch.testing.assert_close(x.grad[kept], layer.weight.sum(0).detach().expand(16, 40)[kept])
    x = x.detach().requires_grad_()  # without the hook of that pass
    layer.eval()(x).sum().backward()
    assert (x.grad != 0).all()


def test_prealigned_weights_make_feedback_the_true_gradient(data):
    """With 10 classes delta of the head has rank 9, as e has: all that e B holds can be matched."""
    model = build(SMALL, seed=0)
    x, y = data.train.x[:32].flatten(1), data.train.y[:32]
    first = model.module[0].weight.clone()
    prealign(model, SMALL, x, y)
    linears = [m for m in model.module if isinstance(m, nn.Linear)]
    assert torch.equal(linears[0].weight, first)
    for layer in linears[1:]:
        assert layer.weight.norm().item() == pytest.approx(1, abs=1e-5)
    report = fastdfa.alignment(model, F.cross_entropy, x, y)
    assert report.points[-1].mean > 0.999


def test_augmentation():
    x = torch.randn(64, 3, 32, 32)
    torch.manual_seed(0)
    flipped = augmented(x, ("flip",))
    kinds = [torch.equal(a, b) for a, b in zip(flipped, x, strict=True)]
    assert 16 < sum(kinds) < 48
    for same, a, b in zip(kinds, flipped, x, strict=True):
        assert same or torch.equal(a, b.flip(2))
    shifted, padded, offsets = augmented(x, ("shift",)), F.pad(x, (4, 4, 4, 4)), set()
    for image, source in zip(shifted, padded, strict=True):
        found = [
            (i, j)
            for i in range(9)
            for j in range(9)
            if torch.equal(image, source[:, i : i + 32, j : j + 32])
        ]
        assert len(found) == 1
        offsets |= set(found)
    assert len(offsets) > 30
    assert augmented(x, ()) is x
    assert augmented(x.to("meta"), ("flip", "shift")).is_meta  # all of it on one device


@pytest.mark.parametrize(
    ("table", "seed", "curve"), [("best", 0, True), ("best", 1, False), ("dropout", 0, False)]
)
def test_only_curves_are_scored_every_epoch(table, seed, curve, data):
    run = training.Run(replace(SMALL, table=table), seed, data, quick=False)
    for _ in run.epoch():
        pass
    assert ("test" in run.history[0]) is curve


def test_held_out_images_are_not_trained_on(data):
    splits = split(data, replace(SMALL, held_out=16), quick=False)
    assert [len(splits[name].y) for name in ("train", "held_out", "test")] == [64, 16, 40]
    assert torch.equal(splits["held_out"].x, data.train.x[64:])
    assert "held_out" not in split(data, SMALL, quick=False)


class Interrupted(Exception):
    pass


class StoppingBar(Bar):
    """Stops in the middle of an epoch, as a `kill` would."""

    def __init__(self, runs, epoch):
        super().__init__(runs)
        self.stop = epoch

    def step(self, steps):
        super().step(steps)
        if self.number == self.stop:
            raise Interrupted


@pytest.mark.parametrize("config", [
    SMALL,
    replace(SMALL, optimizer="adam", schedule="cosine", augment=("flip", "shift"),
            dropout=(0.1, 0.1), batch_norm="after", held_out=16, lr=1e-3),
    replace(SMALL, bottleneck=4, published_cuts=True),
], ids=["plain", "random", "masked"])  # fmt: skip
def test_a_stopped_run_goes_on_as_if_it_had_not_been(config, data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    runs = [(config, 0)]
    records.train(config, 0, data, whole, False, Bar(runs))
    for epoch in (1, 2):
        with pytest.raises(Interrupted):
            records.train(config, 0, data, parts, False, StoppingBar(runs, epoch))
    records.train(config, 0, data, parts, False, Bar(runs))
    a, b = (json.loads((folder / "fc-seed0.json").read_text()) for folder in (whole, parts))
    for record in (a, b):
        assert record["status"] == "complete" and len(record["history"].pop("seconds")) == 3
    assert a["history"] == b["history"] and a["cosines"] == b["cosines"]
    assert a["accuracy"] == b["accuracy"] and len(a["cosines"]) == 3
    assert not list(parts.glob("*.pt"))
    assert records.finished(parts / "fc-seed0.json", config)
    assert not records.finished(parts / "fc-seed0.json", replace(config, lr=1.0))


# What `--device cuda` adds can only compute where there is a GPU; the parts that can be checked
# without one are in the tests of masks, augmentation and precision.
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU")
@pytest.mark.parametrize("name", ["fc", "fc-prealigned", "bottleneck-5-published", "search", "cnn"])
def test_a_run_on_a_gpu(name, data, tmp_path, monkeypatch):
    """The gradients are those of the CPU, and a whole run with all that is random ends."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions' default
    config = replace(RUNS[name], width=24, batch=32, augment=(), held_out=0, precision="float32")
    there = Data(*(Split(x.cuda(), y.cuda()) for x, y in data))
    expected, got = (one_step(config, of)[0].model for of in (data, there))
    for a, b in zip(expected.parameters(), got.parameters(), strict=True):
        # Of the 230,000 windows pooled, rounding moves the maximum of one or two: 3e-3 each.
        assert_close(b.grad.cpu(), a.grad, 2e-2 if name == "cnn" else 1e-3)
    config = replace(config, augment=("flip", "shift"), precision="fast", epochs=2)
    records.train(config, 0, there, tmp_path, False, Bar([(config, 0)]))
    record = json.loads((tmp_path / f"{name}-seed0.json").read_text())
    assert record["status"] == "complete" and record["machine"]["gpu"]


def test_a_record_names_the_device_it_ran_on(monkeypatch):
    assert machine("cpu").keys() == machine(torch.device("meta")).keys()
    gpus = {f"cuda:{i}": f"GPU {i}" for i in range(2)}
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda device: SimpleNamespace(
            name=gpus[str(device)], major=9, minor=0, multi_processor_count=1, total_memory=1
        ),
    )
    for device, name in gpus.items():
        assert machine(torch.device(device))["gpu"] == name


def test_the_precision_is_what_the_processor_multiplies_fast(monkeypatch):
    cpu = torch.device("cpu")
    for fast, expected in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(fastdfa, "build_info", lambda fast=fast: {"bfloat16_products": fast})
        assert training.precision(SMALL, cpu) == expected
        assert training.precision(replace(SMALL, precision="float32"), cpu) == "float32"
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda fast=fast, **_: fast)
        monkeypatch.setattr(
            fastdfa, "build_info", lambda fast=fast: {"bfloat16_products": not fast}
        )
        assert training.precision(SMALL, torch.device("cuda")) == expected


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_the_precision_is_that_of_training_alone(precision, data):
    run, seen = training.Run(replace(SMALL, precision=precision), 0, data, quick=False), []
    layer = run.model.module[0]
    layer.register_forward_hook(lambda layer, args, y: seen.append((layer.training, y.dtype)))
    for _ in run.epoch():
        pass
    run.cosines()
    trained, measured = (
        {dtype for training, dtype in seen if training == t} for t in (True, False)
    )
    assert trained == {getattr(torch, precision)} and measured == {torch.float32}
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in run.model.parameters())


def test_it_learns(data, tmp_path):
    config = replace(SMALL, width=64, lr=2e-3, epochs=100)  # the head learns 32 times slower
    records.train(config, 0, data, tmp_path, False, Bar([(config, 0)]))
    record = json.loads((tmp_path / "fc-seed0.json").read_text())
    assert record["accuracy"]["train"] > 0.4 > 0.2 > record["history"]["train"][0]


def test_a_run_that_diverges_is_recorded_as_such(data, tmp_path):
    config = replace(SMALL, method="bp", activation="relu", lr=1e30)
    records.train(config, 0, data, tmp_path, False, Bar([(config, 0)]))
    record = json.loads((tmp_path / "fc-seed0.json").read_text())
    assert record["status"] == "diverged" and record["cosines"] is None


def test_two_processes_do_not_take_one_run(tmp_path):
    with (
        records.claimed(tmp_path / "run.claim") as first,
        records.claimed(tmp_path / "run.claim") as two,
    ):
        assert first and not two
    with records.claimed(tmp_path / "run.claim") as again:
        assert again


def test_cosines_are_those_of_the_layers(data):
    """Where no point is, between what backprop brings there from the next one and the truth."""
    run, _, _ = one_step(replace(SMALL, published_cuts=True), data)
    cosines = run.cosines()
    assert list(cosines) == ["1", "2", "3"]
    x, y = run._shaped(run.splits["test"].x), run.splits["test"].y
    linears = [m for m in run.model.module if isinstance(m, nn.Linear)]
    weights, biases = [m.weight.detach() for m in linears], [m.bias.detach() for m in linears]
    B = run.model.feedback_matrix(run.model.feedback_points[0])
    (h1, h2, h3, _), e, fed = by_hand(weights, biases, x, y, B)
    true3 = e @ weights[3].double()
    true2 = (true3 * (1 - h3**2)) @ weights[2].double()
    true1, fed1 = (((g * (1 - h2**2)) @ weights[1].double()) for g in (true2, fed))
    for layer, true, received in (("1", true1, fed1), ("2", true2, fed), ("3", true3, fed)):
        expected = F.cosine_similarity(true, received)
        assert cosines[layer]["mean"] == pytest.approx(expected.mean().item(), abs=1e-4)
        assert cosines[layer]["std"] == pytest.approx(expected.std(correction=0).item(), abs=1e-4)
    assert h1.shape == (40, 16)


def test_the_published_way_makes_the_same_gradients(data):
    run, x, y = one_step(SMALL, data)
    expected = [p.grad.clone() for p in run.model.parameters()]
    published_way(run.model, x, y)()
    for p, gradient in zip(run.model.parameters(), expected, strict=True):
        assert_close(p.grad, gradient, 1e-4)


def test_results_are_collected_and_shown(data, tmp_path):
    for seed in (0, 1):
        records.train(SMALL, seed, data, tmp_path, False, Bar([(SMALL, seed)]))
    out = tmp_path / "out"
    out.mkdir()
    for _ in range(2):
        records.collect(tmp_path, out / "paper.json")
    found = report.results(out)
    assert [run["seed"] for run in found["fc"]] == [0, 1]
    assert ["test" in run["history"] for run in found["fc"]] == [True, False]
    assert {run["precision"] for run in found["fc"]} == {
        training.precision(SMALL, torch.device("cpu"))
    }
    first, *others = report.table("baselines", found).splitlines()[2:]
    tests = [100 * run["accuracy"]["test"] for run in found["fc"]]
    assert f"{sum(tests) / 2:.1f} ± " in first and "`fc` (2 seeds, 3 epochs)" in first
    assert all(report.NOT_YET in line for line in others)
    left = 2 * len(BOTTLENECKS) - 1  # `fc` is b = 800 with all cuts
    assert report.bottleneck(found).count(report.NOT_YET) == left
    pytest.importorskip("matplotlib")
    report.draw(out)
    assert (out / "paper-curves.png").exists() and not (out / "paper-bottleneck.png").exists()


def test_the_command(data, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command, "read", lambda directory, quick, device: data)
    monkeypatch.setitem(RUNS, "fc", replace(RUNS["fc"], width=16, batch=32))
    line = ["--data", "there", "--only", "fc", "--seeds", "2", "--epochs", "1"]
    line += ["--runs", str(tmp_path / "runs"), "--out", str(tmp_path)]
    assert command.main(line) == 0
    names = {path.name for path in (tmp_path / "runs").glob("*.json")}
    assert names == {"fc-seed0.json", "fc-seed1.json"}
    assert len(json.loads((tmp_path / "paper.json").read_text())["runs"]) == 2
    monkeypatch.setattr(command, "train", lambda *args: pytest.fail("a finished run was trained"))
    assert command.main(line) == 0
    (tmp_path / "runs" / "fc-seed0.json").unlink()
    assert command.main([*line, "--missing"]) == 0  # the results have it all the same
    capsys.readouterr()
    assert command.main([*line, "--missing", "--seeds", "3", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["fc-seed2"]
    with pytest.raises(SystemExit, match="matches none of"):
        command.main(["--only", "nothing"])
    with pytest.raises(SystemExit, match="--data DIR is needed"):
        command.main(["--only", "fc"])
    with pytest.raises(SystemExit):
        command.main([*line, "--device", "nothing"])
    assert "'nothing' cannot be used" in capsys.readouterr().err
