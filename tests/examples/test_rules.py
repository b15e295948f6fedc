"""`train.py --rules`: rules of feedback beside each other, and the table of the README."""

import json

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

import fastdfa
from benchmarks.harness.figures.training import ANCHORED, anchored, family
from examples.training import rules, train

TINY = ["--width=16", "--depth=2", "--batch=128", "--threads=1", "--lr=0.01"]


def run(folder, *more):
    assert train.main([*TINY, "--out", str(folder), "--name", "run", *more]) == 0
    return json.loads((folder / "run" / "results.json").read_text())


@pytest.mark.parametrize("model, fed", [("mlp", 2), ("cnn", 3)])
def test_all_rules(model, fed, tmp_path):
    options = [f"--model={model}", "--dataset=digits", "--rules=all", "--epochs=1"]
    summary = run(tmp_path, *options)["summary"]["methods"]
    assert list(summary) == ["bp", "top", "dfa", *rules.RULES]
    for name in rules.RULES:
        assert summary[name]["to_dfa"] > 0 and summary[name]["peak_mib"] > 0
        assert len(summary[name]["alignment"]) == fed
        assert summary[name]["train_loss"] != summary["dfa"]["train_loss"], name
    assert (tmp_path / "run" / "curves.png").stat().st_size > 0


def test_the_widest_point_may_be_an_image():
    layers = [fastdfa.Conv2d(1, 4, 3), fastdfa.Conv2d(4, 2, 3), torch.nn.Flatten()]
    network = torch.nn.Sequential(*layers, fastdfa.Linear(32, 3))
    assert rules.widest(network, torch.zeros(2, 1, 8, 8)) == 4 * 6 * 6


def test_some_rules_go_on_after_an_interruption(tmp_path):
    """What learns B has its own optimizer, whose state is in the checkpoint as well."""
    names = "target,kolen-pollack,forward-gradient,fa"
    whole = run(tmp_path / "whole", f"--rules={names}", "--epochs=2")
    folder = tmp_path / "parts"
    asked = iter([False] * 40)

    class Stop(train.CtrlC):
        @property
        def asked(self):
            return next(asked, True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "CtrlC", Stop)
        arguments = [*TINY, "--out", str(folder), "--name", "run", f"--rules={names}", "--epochs=2"]
        assert train.main(arguments) == 130
    assert train.main(["--resume", str(folder / "run")]) == 0
    parts = json.loads((folder / "run" / "results.json").read_text())
    for name in names.split(","):
        ours, theirs = (r["summary"]["methods"][name] for r in (parts, whole))
        assert ours["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-5)


@pytest.mark.parametrize("options, message", [
    (["--rules=hebb"], "argument --rules: 'hebb' is none of all, anchored"),
    (["--rules=all", "--methods=dfa"], "--rules goes with --model mlp or cnn, and without"),
    (["--rules=all", "--model=gcn"], "--rules goes with --model mlp or cnn"),
])  # fmt: skip
def test_what_cannot_be_compared(options, message, capsys, tmp_path):
    assert train.main([*options, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_what_is_trained():
    """By Kolen-Pollack B is updated with the weights, by an average on its own."""
    x = torch.randn(4, 5)

    def made(name):
        layers = [fastdfa.Linear(5, 6, activation="tanh"), fastdfa.Linear(6, 3)]
        network = torch.nn.Sequential(*layers)
        return rules.Learning(rules.RULES[name], network, fastdfa.Feedback(seed=1), x)

    assert len(made("sign").trained()) == 4 and made("sign").optimizer is None
    assert len(made("kolen-pollack").trained()) == 5
    average = made("forward-gradient")
    assert len(average.trained()) == 4 and average.optimizer.param_groups[0]["lr"] == 0.05
    (B,) = average.optimizer.param_groups[0]["params"]
    before = B.detach().clone()
    average.update(x)
    assert not torch.equal(B, before) and B.grad is None


def test_the_table_has_every_rule():
    text = family("rules-mnist")
    for name in rules.RULES.keys() - {"anchored"}:
        assert rules.RULES[name].label in text
    for network in ANCHORED.values():  # a table of its own
        assert network in anchored()
