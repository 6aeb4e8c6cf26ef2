"""oneDNN multiplies large layers in training too: the same gradients, and a run keeps to one library."""

import argparse
import json

import pytest
import torch
from test_training import dataset, flags, history, interrupt_at, same_weights  # noqa: F401 (a fixture)

import linear
import runs
import train
from common import read_json


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_by_onednn_are_those_of_torch(bias, frozen):
    torch.manual_seed(0)
    layer = torch.nn.Linear(600, 300, bias=bias).requires_grad_(not frozen)
    whole = torch.randn(2, 7, 600, requires_grad=True)

    def gradients():
        whole.grad = None
        layer.zero_grad()
        layer(whole[:, 2:]).pow(2).sum().backward()  # a slice, as the head gets it
        return [whole.grad, *(weight.grad for weight in layer.parameters())]

    expected = gradients()
    with linear.products_by("oneDNN", layer):
        assert "forward" in vars(layer)
        found = gradients()
    assert "forward" not in vars(layer)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_a_training_that_goes_on_multiplies_as_it_began(dataset, tmp_path, monkeypatch):  # noqa: F811
    """Its weights are those of an uninterrupted run, whatever is the faster way when it goes on."""
    for name in ("LARGE", "WIDE"):
        monkeypatch.setattr(linear, name, 1)  # the demo's layers are small
    calls, real = [], linear.onednn_linear
    monkeypatch.setattr(linear, "onednn_linear", lambda *given: calls.append(1) or real(*given))

    def measured(gain):
        monkeypatch.setattr(linear, "onednn_gain", lambda *way: gain)

    short = ("--eval-questions", 2)
    measured(2.0)
    assert train.main(flags(dataset, tmp_path / "whole", *short)) == 0
    interrupt_at(6, train, flags(dataset, tmp_path / "run", *short), monkeypatch)
    measured(0.0)
    calls.clear()
    assert train.main(flags(dataset, tmp_path / "run", *short, "--resume")) == 0
    assert calls and same_weights(tmp_path / "whole", tmp_path / "run")
    assert [segment["products"] for segment in read_json(tmp_path / "run" / runs.RECORD)["segments"]] == ["oneDNN"] * 2
    calls.clear()
    assert train.main(flags(dataset, tmp_path / "torch", *short)) == 0
    assert not calls
    losses, others = (history(tmp_path / name, "eval_loss") for name in ("whole", "torch"))
    assert losses == pytest.approx(others, rel=1e-4)


def test_a_training_made_before_goes_on_with_torchs_products(tmp_path, monkeypatch):
    model = torch.nn.Linear(600, 300)
    monkeypatch.setattr(linear, "onednn_gain", lambda *way: 2.0)
    args = argparse.Namespace(dtype="fp32", resume=False, output_dir=tmp_path)
    assert train.choose_products(args, model) == "oneDNN"
    (tmp_path / runs.RECORD).write_text(json.dumps({"segments": [{"seconds": 1.0}]}))
    assert train.choose_products(args, model) == "oneDNN"  # --overwrite: begun anew
    args.resume = True
    assert train.choose_products(args, model) == "torch"
    args.resume, args.dtype = False, "bf16"
    assert train.choose_products(args, model) == "torch"


def test_an_evaluation_within_a_training_has_packed_weights_and_leaves_the_training_as_it_was(monkeypatch):
    monkeypatch.setattr(linear, "onednn_gain", lambda *way: 2.0)
    packed, real = [], linear.packed
    monkeypatch.setattr(linear, "packed", lambda weight: packed.append(1) or real(weight))
    layer = torch.nn.Linear(600, 300)
    model = torch.nn.Sequential(layer)
    model.device, model.dtype = torch.device("cpu"), torch.float32
    inputs = torch.randn(5, 600)
    with linear.products_by("oneDNN", model):
        trained = layer.forward
        with linear.faster_linear(model, str), torch.inference_mode():
            torch.testing.assert_close(layer(inputs), inputs @ layer.weight.T + layer.bias, rtol=1e-4, atol=1e-4)
        assert len(packed) == 1 and layer.forward is trained
        layer(inputs).sum().backward()
    assert layer.weight.grad is not None and "forward" not in vars(layer)
    layer.forward = len  # another library's
    with linear.faster_linear(model, str):
        assert layer.forward is len
