"""The main job: its data loaders, its refusals, resuming and Ctrl-C."""

import gzip
import json
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from benchmarks.accuracy import seeds
from examples.training import data, train

ROOT = Path(__file__).parents[2]
TINY = [
    "--width=16",
    "--depth=2",
    "--batch=128",
    "--epochs=4",
    "--lr=0.01",
    "--threads=1",
    "--dropout=0.1",
]


# Data


def idx(array):
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


def images_and_labels(rows):
    random = np.random.RandomState(rows)
    return random.randint(0, 256, (rows, 28, 28), np.uint8), random.randint(0, 10, rows, np.uint8)


def write_idx(folder, zipped=False):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = (*images_and_labels(12), *images_and_labels(5))
    for stem, array in zip(data.IDX_MD5["mnist"], arrays, strict=True):
        content = idx(array)
        name, content = (stem + ".gz", gzip.compress(content)) if zipped else (stem, content)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", [".", "MNIST/raw"])
def test_idx_files(tmp_path, zipped, folder):
    write_idx(tmp_path / folder, zipped)
    loaded = data.load("mnist", tmp_path, check_md5=False)
    images, labels = images_and_labels(12)
    assert loaded.train_x.shape == (12, 1, 28, 28) and loaded.shape == (1, 28, 28)
    assert loaded.train_y.tolist() == labels.tolist()
    standardised = (images - images.mean()) / images.std()
    assert torch.allclose(loaded.train_x, torch.tensor(standardised)[:, None].float())


def test_checksum_of_idx(tmp_path):
    write_idx(tmp_path)
    with pytest.raises(data.DataError, match=r"wrong checksum, MD5 .* where 6bbc9ace"):
        data.load("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found in"),
        (b"", "not an idx file"),
        (b"\0\0\x08\x03\0\0", "truncated in its header"),
        (b"\0\0\x0d\x03" + bytes(20), "magic 00000d03, expected 00000803"),
        (idx(images_and_labels(12)[0])[:-1], "truncated or damaged, 9,423 bytes"),
        (idx(images_and_labels(12)[0]) + b"\0", "truncated or damaged, 9,425 bytes"),
        (idx(np.zeros((12, 20, 28), np.uint8)), "expected images of 28x28"),
        (idx(images_and_labels(11)[0]), "one label for each"),
    ],
)
def test_bad_idx(tmp_path, content, message):
    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as error:
        data.load("mnist", tmp_path, check_md5=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [10, 200, -4])
def test_truncated_gzip(tmp_path, cut):
    write_idx(tmp_path, zipped=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(data.DataError, match="truncated or damaged"):
        data.load("mnist", tmp_path, check_md5=False)


def cifar_arrays(rows):
    random = np.random.RandomState(rows)
    return random.randint(0, 256, (rows, 3072), np.uint8), random.randint(0, 10, rows).tolist()


def write_cifar(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i, stem in enumerate(data.CIFAR_MD5):
        images, labels = cifar_arrays(i + 1)
        batch = {b"data": images, b"labels": labels}
        (folder / stem).write_bytes(pickle.dumps(batch, protocol=2))


def test_cifar_batches_and_npz_agree(tmp_path):
    write_cifar(tmp_path / "cifar-10-batches-py")
    parts = [cifar_arrays(i + 1) for i in range(6)]
    train_x = np.concatenate([x for x, _ in parts[:5]])
    hwc = [x.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for x in (train_x, parts[5][0])]
    (tmp_path / "npz").mkdir()
    labels = np.concatenate([y for _, y in parts[:5]]), np.array(parts[5][1])
    np.savez(
        tmp_path / "npz" / "cifar10.npz",
        x_train=hwc[0],
        y_train=labels[0],
        x_test=hwc[1],
        y_test=labels[1],
    )
    a = data.load("cifar10", tmp_path, check_md5=False)
    b = data.load("cifar10", tmp_path / "npz")
    assert a.train_x.shape == (15, 3, 32, 32) and a.test_x.shape == (6, 3, 32, 32)
    for name in ("train_x", "train_y", "test_x", "test_y"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_bad_cifar(tmp_path):
    with pytest.raises(data.DataError, match=r"neither .*cifar-10-python.tar.gz"):
        data.load("cifar10", tmp_path)
    write_cifar(tmp_path)
    with pytest.raises(data.DataError, match=r"wrong checksum, MD5 .* where c99cafc1"):
        data.load("cifar10", tmp_path)
    path = tmp_path / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(data.DataError, match="data_batch_3: truncated"):
        data.load("cifar10", tmp_path, check_md5=False)
    path.write_bytes(pickle.dumps({b"data": os.getcwd}))
    with pytest.raises(data.DataError, match=r"it asks for posix.getcwd"):
        data.load("cifar10", tmp_path, check_md5=False)


def test_bad_npz(tmp_path):
    path = tmp_path / "cifar10.npz"
    images, labels = np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.uint8)
    np.savez(path, x_train=images, y_train=labels, x_test=images)
    with pytest.raises(data.DataError, match=r"incomplete .*y_test"):
        data.load("cifar10", tmp_path)
    np.savez(path, x_train=images, y_train=labels, x_test=images[:, :31], y_test=labels)
    with pytest.raises(data.DataError, match=r"expected images \[N, 32, 32, 3\]"):
        data.load("cifar10", tmp_path)
    np.savez(path, x_train=images, y_train=labels, x_test=images, y_test=labels + 10)
    with pytest.raises(data.DataError, match="labels 0 to 9"):
        data.load("cifar10", tmp_path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(data.DataError, match="truncated"):
        data.load("cifar10", tmp_path)


def write_text(folder, characters=4000):
    letters = np.random.RandomState(0).randint(0, 7, characters)
    (folder / "input.txt").write_text("".join("abcdefg"[i] for i in letters))


def test_text(tmp_path):
    write_text(tmp_path)
    loaded = data.load("shakespeare", tmp_path)
    text = (tmp_path / "input.txt").read_text()
    assert loaded.classes == 7 and loaded.shape == (data.CONTEXT,)
    assert "".join("abcdefg"[i] for i in loaded.train_x.flatten()[:200]) == text[:200]
    assert "".join("abcdefg"[i] for i in loaded.train_y.flatten()[:200]) == text[1:201]
    assert "abcdefg"[loaded.test_x[0, 0]] == text[3600]  # the last tenth
    (tmp_path / "input.txt").write_text("short")
    with pytest.raises(data.DataError, match="at least 1280 characters, got 5"):
        data.load("shakespeare", tmp_path)


def write_graph(folder):
    """Four nodes of five features, the edges 0-1 and 1-2."""
    np.savez(
        folder / "cora.npz",
        x_data=np.array([1, 1, 2], np.float32),
        x_indices=np.array([0, 3, 1]),
        x_indptr=np.array([0, 2, 3, 3, 3]),
        x_shape=np.array([4, 5]),
        y=np.array([2, 0, 1, 1]),
        edges=np.array([[0, 1], [1, 2]]),
        train_idx=np.array([0, 1]),
        val_idx=np.array([2]),
        test_idx=np.array([3]),
    )


def test_graph(tmp_path):
    write_graph(tmp_path)
    loaded = data.load("cora", tmp_path)
    assert loaded.classes == 3 and loaded.train_x.shape == (1, 4, 5)
    assert loaded.train_x[0, :2].tolist() == [[0.5, 0, 0, 0.5, 0], [0, 1, 0, 0, 0]]
    ignored = data.IGNORED
    assert loaded.train_y.tolist() == [[2, 0, ignored, ignored]]
    assert loaded.test_y.tolist() == [[ignored, ignored, ignored, 1]]
    validation = data.load("cora", tmp_path, validate=True)
    assert validation.train_y.tolist() == loaded.train_y.tolist()
    assert validation.test_y.tolist() == [[ignored, ignored, 1, ignored]]
    a, b = 6**-0.5, 1 / 3  # degrees with the loops: 2, 3, 2, 1
    expected = [[0.5, a, 0, 0], [a, b, a, 0], [0, a, 0.5, 0], [0, 0, 0, 1]]
    assert torch.allclose(loaded.adjacency.to_dense(), torch.tensor(expected))
    (tmp_path / "cora.npz").write_bytes(b"no zip")
    with pytest.raises(data.DataError, match="truncated, damaged or incomplete"):
        data.load("cora", tmp_path)


def test_what_is_held_out_for_validation():
    whole, held_out = (data.load("digits", validate=validate) for validate in (False, True))
    assert len(held_out.test_x) == len(held_out.test_y) == len(whole.train_x) // 10
    for kind in "xy":
        parts = [getattr(held_out, f"{part}_{kind}") for part in ("train", "test")]
        assert torch.equal(torch.cat(parts), getattr(whole, f"train_{kind}"))


# The command


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--no-such-option", "unrecognized arguments: --no-such-option"),
        ("--dataset imagenet", "invalid choice: 'imagenet'"),
        ("--width 0", "must be at least 1 and below inf, got 0"),
        ("--width wide", "invalid int value: 'wide'"),
        ("--lr 0", "must be above 0"),
        ("--lr nan", "must be above 0"),
        ("--dropout 1", "must be at least 0 and below 1"),
        ("--methods dfa,magic", "'magic' is none of dfa, bp, top, block"),
        ("--model gcn --dataset mnist", "--model gcn takes cora, got mnist"),
        ("--model cnn --norm batch", "--norm is for --model mlp, got --model cnn"),
        ("--model transformer", "shakespeare needs --data DIR: download input.txt from https"),
        ("--device tpu9", "'tpu9' cannot be used"),
        ("--device hpu", "'hpu' cannot be used"),
        ("--dataset mnist", "mnist needs --data DIR: download the four idx files from https"),
        ("--dataset mnist --data nowhere", "no such directory"),
        ("--width 1000000", "cannot make this network: "),
        ("--out /dev/null/runs", "Not a directory: '/dev/null/runs"),
        ("--resume nowhere", "no checkpoint.pt in it"),
        ("--resume runs --seed 1", "it must stand alone"),
    ],
)
def test_usage_errors(tmp_path, monkeypatch, capfd, line, message):
    monkeypatch.chdir(tmp_path)
    assert train.main(line.split()) == 2
    out, error = capfd.readouterr()
    assert out == "" and message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_existing_folders(tmp_path, capfd):
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits-2").mkdir()
    assert train.options(["--out", str(tmp_path)])[1] == tmp_path / "digits-3"
    assert train.main(["--out", str(tmp_path), "--name", "digits"]) == 2
    assert "exists: choose another --name" in capfd.readouterr().err
    assert train.main(["--resume", str(tmp_path / "digits")]) == 2
    (tmp_path / "digits" / "checkpoint.pt").write_bytes(b"no checkpoint")
    assert train.main(["--resume", str(tmp_path / "digits")]) == 2
    assert "not a checkpoint of this program" in capfd.readouterr().err


def run(folder, *more):
    return train.main([*TINY, "--out", str(folder.parent), "--name", folder.name, *more])


def weights(folder):
    learners = torch.load(folder / "checkpoint.pt", weights_only=True)["learners"]
    return {(m, k): v for m, s in learners.items() for k, v in s["model"].items()}


def without_times(folder):
    history = json.loads((folder / "results.json").read_text())["history"]
    return [
        {k: v for k, v in epoch[m].items() if k not in ("step_ms", "train_seconds")}
        for epoch in history
        for m in ("dfa", "bp")
    ]


def test_a_run_and_what_it_leaves(tmp_path, capsys):
    assert run(tmp_path / "a") == 0
    output = capsys.readouterr().out
    for words in ("test accuracy", "time a step", "speed against backprop", "layer 2"):
        assert words in output
    assert {p.name for p in (tmp_path / "a").iterdir()} == {
        "results.json",
        "curves.png",
        "checkpoint.pt",
    }
    assert (tmp_path / "a" / "curves.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "a" / "results.json").read_text())
    assert results["status"] == "complete" and len(results["history"]) == 5
    start, end = results["history"][0], results["history"][-1]
    assert start["dfa"]["test_loss"] == start["bp"]["test_loss"]  # the same initial weights
    assert all(end[m]["test_accuracy"] > start[m]["test_accuracy"] + 0.2 for m in ("dfa", "bp"))
    assert len(end["dfa"]["alignment"]) == 2


def test_alignment_against_a_plain_network():
    config, *_ = train.options([*TINY, "--dropout=0", "--input-dropout=0", "--dtype=float64"])
    loaded = train.on_device(data.load("digits"), config)
    dfa, plain = (train.Learner(method, config, loaded) for method in ("dfa", "bp"))
    x, y = loaded.train_x[: train.PROBE_ROWS], loaded.train_y[: train.PROBE_ROWS]
    for learner in (dfa, plain):
        learner.loss(x, y).backward()
    gradients = [
        [p.grad.flatten() for p in learner.model.parameters() if p.ndim == 2][:-1]
        for learner in (dfa, plain)
    ]
    cosines = [(a @ b / a.norm() / b.norm()).item() for a, b in zip(*gradients, strict=True)]
    assert dfa.alignment() == pytest.approx(cosines, abs=1e-9)


def test_resume_is_exact(tmp_path, monkeypatch):
    assert run(tmp_path / "whole") == 0
    step, calls = train.Learner.step, []

    def interrupted_step(self, x, y):
        calls.append(self.method)
        if len(calls) == 77:  # in the third of four epochs, 12 steps of each of three methods
            signal.raise_signal(signal.SIGINT)
        return step(self, x, y)

    with monkeypatch.context() as patch:
        patch.setattr(train.Learner, "step", interrupted_step)
        assert run(tmp_path / "parts") == 130
    results = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert results["status"] == "interrupted" and len(results["history"]) == 3
    assert train.main(["--resume", str(tmp_path / "parts")]) == 0
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "parts")


def test_divergence_keeps_the_epochs_before(tmp_path, capsys):
    assert run(tmp_path / "a", "--optimizer", "sgd", "--lr", "1e30", "--activation", "relu") == 1
    assert "no longer finite" in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "results.json").read_text())["status"] == "diverged"


SMALL = {
    "cnn": ["--dataset=digits", "--width=16", "--depth=2", "--dropout=0"],
    "resnet20": ["--dataset=digits", "--width=2"],
    "transformer": ["--width=32", "--depth=2", "--batch=16"],
    "gcn": ["--width=4"],
    "spiking": ["--dataset=digits", "--width=16"],
    "mlp": ["--dataset=digits", "--width=16", "--norm=batch", "--activation=relu"],
}


@pytest.mark.parametrize("model", SMALL)
def test_models(tmp_path, model, capsys):
    """Each starts from the same weights for every method, is cut, and learns."""
    write_text(tmp_path)
    write_graph(tmp_path)
    line = ["--model", model, "--data", str(tmp_path), *SMALL[model], "--methods=dfa,bp,top,block"]
    line += ["--out", str(tmp_path), "--name=run", "--threads=1", "--epochs=2"]
    assert train.main(line) == 0, capsys.readouterr().err
    history = json.loads((tmp_path / "run" / "results.json").read_text())["history"]
    start, end = history[0], history[-1]
    assert start["dfa"]["test_loss"] == start["bp"]["test_loss"] == start["top"]["test_loss"]
    assert len({end[m]["test_loss"] for m in ("dfa", "bp", "top")}) == 3
    assert start["dfa"]["alignment"][0] < 0.999  # of the first weights: they do not see backprop


TOPS = {
    "cnn": (["9"], ["11"]),
    "resnet20": (["20"], ["24"]),
    "transformer": (["blocks.1"], ["head"]),
    "spiking": (["4"], ["7"]),
    "mlp": (["4"], ["5"]),
}


@pytest.mark.parametrize("model", TOPS)
def test_what_is_trained_on_top(tmp_path, model):
    """`top` trains the head alone, `block` also what is below it; all else stays as it was."""
    write_text(tmp_path)
    line = ["--model", model, "--data", str(tmp_path), *SMALL[model], "--threads=1"]
    config, *_ = train.options(line)
    loaded = data.load(config.dataset, tmp_path)
    block, head = TOPS[model]
    for method, parts in (("top", head), ("block", block + head)):
        learner = train.Learner(method, config, loaded)
        named = list(learner.model.named_parameters())
        before = [p.clone() for _, p in named]
        learner.step(loaded.train_x[:16], loaded.train_y[:16])
        for (name, after), was in zip(named, before, strict=True):
            on_top = any(name.startswith(part + ".") for part in parts)
            assert on_top != torch.equal(after, was), (method, name)


def test_feedback_scale():
    line = [*TINY, "--feedback=tinydfa", "--feedback-scale=0.5"]
    learner = train.Learner("dfa", train.options(line)[0], data.load("digits"))
    learner.step(learner.data.train_x[:8], learner.data.train_y[:8])
    largest = learner.model.feedback_matrix("4").abs().max().item()
    assert largest == pytest.approx(0.5 * 3**0.5, rel=0.05)  # uniform, of deviation 0.5


def test_feedback_reaches_the_neighbours(tmp_path):
    """In the GCN the first layer receives A^T e B: the gradient, but for B in the place of W."""
    write_graph(tmp_path)
    line = ["--model=gcn", f"--data={tmp_path}", "--width=4", "--dropout=0", "--dtype=float64"]
    config, *_ = train.options([*line, "--activation=tanh"])
    loaded = train.on_device(data.load("cora", tmp_path), config)
    learner = train.Learner("dfa", config, loaded)
    learner.loss(loaded.train_x, loaded.train_y).backward()
    first, last = learner.model.module.layers
    a, x = loaded.adjacency.to_dense().double(), loaded.train_x[0]
    h = torch.tanh(a @ first(x[None])[0])
    logits = last((a @ h)[None])[0].detach().requires_grad_()
    train.cross_entropy(logits[None], loaded.train_y).backward()
    fed = a.T @ logits.grad @ learner.model.feedback_matrix("layers.1")
    expected = (a.T @ (fed * (1 - h**2))).T @ x
    assert torch.allclose(first.weight.grad, expected)


def potentials(current):
    """Of leaky integrate-and-fire neurons, less the threshold of 1, and their spikes."""
    u, found = torch.zeros_like(current[:, 0]), []
    for t in range(current.shape[1]):
        u = 0.9 * u + current[:, t]
        found.append((u - 1, (u > 1).double()))
        u = u - found[-1][1]
    return [torch.stack(each, 1) for each in zip(*found, strict=True)]


def through_time(fed, v):
    """The gradients of the currents, from those of the spikes: back along the leak."""
    delta, later = torch.zeros_like(v), 0
    for t in reversed(range(v.shape[1])):
        later = delta[:, t] = fed[:, t] / (1 + 2 * v[:, t].abs()) ** 2 + 0.9 * later
    return delta


def test_spiking_by_the_formulas():
    """Augmented DFA between the layers, through time inside each."""
    config, *_ = train.options(["--model=spiking", "--dtype=float64", "--width=12"])
    loaded = train.on_device(data.load("digits"), config)
    learner = train.Learner("dfa", config, loaded)
    x, y = loaded.train_x[:7], loaded.train_y[:7]
    learner.loss(x, y).backward()
    first, second, head = (learner.model.module[i] for i in (1, 4, 7))
    h = x.flatten(1)
    v1, s1 = potentials((h @ first.weight.T + first.bias)[:, None].expand(-1, 10, -1).detach())
    v2, s2 = potentials((s1 @ second.weight.T + second.bias).detach())
    assert 0 < s1.mean() < 1 and 0 < s2.mean() < 1
    rates = s2.mean(1)
    logits = (rates @ head.weight.T + head.bias).detach().requires_grad_()
    train.cross_entropy(logits, y).backward()
    e = logits.grad
    fed1 = (e @ learner.model.feedback_matrix("3") / 10**0.5)[:, None].expand_as(s1)
    fed2 = (e @ learner.model.feedback_matrix("7") / 10)[:, None].expand_as(s2)
    d1, d2 = through_time(fed1, v1), through_time(fed2, v2)
    assert torch.allclose(first.weight.grad, d1.sum(1).T @ h)
    assert torch.allclose(second.weight.grad, d2.flatten(0, 1).T @ s1.flatten(0, 1))
    assert torch.allclose(head.weight.grad, e.T @ rates)


def test_seeds(tmp_path, capsys):
    line = [*TINY, "--methods=dfa", "--epochs=1", "--out", str(tmp_path), "--name=many"]
    assert seeds.main(["2", *line]) == 0
    found = json.loads((tmp_path / "many.json").read_text())
    assert [run["seed"] for run in found["runs"]] == [0, 1]
    assert len({run["methods"]["dfa"]["test_loss"] for run in found["runs"]}) == 2
    assert seeds.main(["2", *line]) == 2  # the folders exist
    assert seeds.main(["two"]) == 2
    assert "seeds: error: invalid literal" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_dtypes_and_single_methods(tmp_path, dtype):
    assert run(tmp_path / "a", "--dtype", dtype, "--methods", "dfa", "--feedback", "tinydfa") == 0
    assert run(tmp_path / "b", "--dtype", dtype, "--methods", "bp") == 0


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_from_outside(tmp_path):
    command = [
        sys.executable,
        "-m",
        "examples.training.train",
        *TINY,
        "--epochs",
        "100000",
        "--out",
        tmp_path,
    ]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    folder, deadline = tmp_path / "digits", time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert f"to go on: {sys.executable} -m examples.training.train --resume {folder}" in output
    assert json.loads((folder / "results.json").read_text())["status"] == "interrupted"
    assert {p.name for p in folder.iterdir()} == {"results.json", "curves.png", "checkpoint.pt"}
