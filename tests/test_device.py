"""One code for every device: nothing stays behind on the processor, and half the digits give nearly the same geometry."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from gears_nb.benchmark.device import MixedDevices, OnDevice, Way, accelerated, check_stays, sampling_rate, sent, toy_run, training_rate, watched, ways
from gears_nb.core.errors import InputError
from gears_nb.models.catalogue import BUILT_IN

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a graphics card; torch finds none here")


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_a_model_stays_where_its_inputs_are(name):
    assert check_stays(name) >= 1


@pytest.mark.parametrize("mistake", [
    lambda x: x + torch.zeros(3),
    lambda x: torch.where(x > 0, x, torch.zeros(2, 3)),
    lambda x: x.sum(0) @ torch.eye(3),
    lambda x: torch.randn(3, generator=torch.Generator(), device=x.device),
    lambda x: torch.empty_like(x).normal_(generator=torch.Generator()),
])
def test_a_line_that_forgets_the_device_is_seen(mistake):
    with watched(), pytest.raises(MixedDevices):
        mistake(sent(torch.ones(2, 3)))


def test_what_torch_allows_is_allowed():
    x = sent(torch.arange(6.0).reshape(2, 3))
    with watched():
        assert (x[torch.tensor([1])] * 2 + torch.tensor(1.0)).tolist() == [[7, 9, 11]]  # indices and numbers may lie anywhere
        assert x.to("cpu").device.type == "cpu" and x.new_zeros(2).device == x.device
        x += 1
        assert float(x.sum()) == 21 and bool((x > 3).any())


def test_half_the_digits_give_nearly_the_same_distances():
    model = toy_run("plain", 48, 2)[0]
    distances = {p: sampling_rate(model, Way("cpu", p), 40, 2, 1)[1] for p in ("32-true", "bf16-mixed")}
    apart = np.sqrt(np.mean((distances["32-true"] - distances["bf16-mixed"]) ** 2))
    assert 0 < apart < 0.1
    again = sampling_rate(model, Way(), 40, 2, 1)[1]
    assert (again == distances["32-true"]).all()


def test_training_takes_the_precision_it_is_told():
    losses = {p: training_rate("plain", Way("cpu", p), 32, 2, 1)["loss"] for p in ("32-true", "bf16-mixed")}
    assert losses["32-true"] != losses["bf16-mixed"]
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.1)


def test_the_processor_is_always_the_reference_and_a_missing_card_is_named():
    assert ways(["cpu"]) == [Way("cpu", "32-true"), Way("cpu", "bf16-mixed")]
    if not torch.cuda.is_available():
        assert ways() == ways(["cpu"])
        with pytest.raises(InputError, match="use one of auto, cpu"):
            ways(["cuda"])
        with pytest.raises(InputError, match="cuda"):
            accelerated(None, Way("cuda"))


def test_a_wrapped_model_answers_in_single_precision():
    model, _, slides = toy_run("plain", 48, 2)
    found = OnDevice(model.eval(), Way("cpu", "bf16-mixed"))(torch.stack([s.H[:30] for s in slides]).float())
    assert found.X.dtype == torch.float32 and found.X.shape == (2, 30, 2)


@gpu
@pytest.mark.parametrize("precision,most", [("32-true", 0.02), ("bf16-mixed", 0.1)])
def test_a_card_gives_the_distances_of_the_processor(precision, most):
    model = toy_run("d7", 96, 2)[0]
    here, there = (sampling_rate(model, way, 96, 2, 1)[1] for way in (Way(), Way("cuda", precision)))
    assert np.sqrt(np.mean((here - there) ** 2)) < most


@gpu
def test_a_card_trains():
    here, there = (training_rate("plain", way, 32, 2, 2)["loss"] for way in (Way(), Way("cuda")))
    assert there == pytest.approx(here, rel=0.02)
