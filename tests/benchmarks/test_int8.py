import pytest
import torch
from torch import nn

import tdecomp
from benchmarks.int8 import Result, Subject, main, measure, table
from benchmarks.support.int8 import int8_by_torchao, rounded, stored_bytes


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = (nn.Conv2d(4, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(32 * 16, 64)).eval()


@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_weights_are_whole_multiples_of_a_scale_for_each_output(bits):
    model = network()
    twin, size = rounded(model, bits)
    for before, after in zip(model, twin, strict=True):
        if not hasattr(before, "kernel_size") and not isinstance(before, nn.Linear):
            continue
        weight, found = before.weight.flatten(1), after.weight.flatten(1)
        scale = weight.abs().amax(dim=1, keepdim=True) / ((2**bits - 1) / 2)
        whole = found / scale
        assert (whole - whole.round()).abs().max() < 1e-2
        assert len(found[0].unique()) <= 2**bits
        assert ((found - weight).abs() <= 0.51 * scale).all()
    weights = 32 * 4 * 9 + 64 * 32 * 16
    rest = 4 * (32 + 64) + 4 * 4 * 32 + 8  # biases; the batch norm and how often it was updated
    assert stored_bytes(model) == 4 * weights + rest
    assert size == weights * bits // 8 + 4 * (32 + 64) + rest


def test_bytes_of_torchaos_tensors_are_those_of_their_parts():
    pytest.importorskip("torchao")
    model = nn.Linear(64, 32)
    quantized = int8_by_torchao(model)
    assert quantized.weight.shape == model.weight.shape
    # Whole numbers, and for each output a scale and a zero point; the bias.
    assert stored_bytes(quantized) == 64 * 32 + (4 + 1) * 32 + 4 * 32
    assert stored_bytes(model) == 4 * (64 * 32 + 32)


def subject():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 48)).eval()
    x = torch.randn(128, 48)

    def judge(network):
        with torch.inference_mode():
            return 1.0, float((network(x) - model(x)).square().mean())

    data = tdecomp.Data(list(x.split(32)), augment=None)
    return Subject("net", model, "svd", data, "one", ".1f", judge, lambda m: rounded(m, 8))


def test_rows_between_two_lines_are_equal_in_size():
    net = subject()
    results = measure(net, (0.5,), ())
    assert [result.block for result in results] == [0, 1, 1, 2, 2, 2]
    for block in (1, 2):
        sizes = [result.size for result in results if result.block == block]
        assert max(sizes) < 1.15 * min(sizes)
    whole, int8, factors, both, int4, alone = results
    assert int8.size < 0.3 * whole.size
    assert (whole.lost, factors.measure) == (0, 1)
    assert 0 < int8.lost < int4.lost < factors.lost < alone.lost
    assert int8.lost < both.lost < alone.lost
    lines = table(net, results).splitlines()
    assert lines[0].startswith("net:")
    assert sum(set(line) <= {"-", " "} for line in lines) == 3


def test_a_share_that_no_factors_have_is_left_out(capsys):
    results = measure(subject(), (0.07,), ())
    assert [result.block for result in results] == [0, 1, 1, 2, 2]
    assert "left out" in capsys.readouterr().out


def test_original_stands_alone_in_the_table():
    assert table(subject(), [Result("float32", 1234, 0.5, 0.0)]).splitlines()[-1].split() == [
        "float32", "1,234", "1.000", "0.5", "0.0000",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_prints_a_table_of_the_transformer(capsys):
    pytest.importorskip("torchao")
    main(["--pieces", "8", "--val-pieces", "8", "--shares", "0.5", "--recover"])
    out = capsys.readouterr().out
    assert "transformer, docstrings:" in out
    assert "factors with 0.5 of the parameters, int8" in out
    assert "without recovery" in out


def test_weights_without_data_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--weights", "some.safetensors"])
    assert "--weights and --data together" in capsys.readouterr().err
