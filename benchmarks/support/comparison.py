"""Decompose one model in several ways and measure what each way costs and keeps."""

import copy
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import tdecomp
from benchmarks.support.data import Dataset
from benchmarks.support.output_error import output_errors
from benchmarks.support.settings import GROUPS, LINEAR_METHOD, Setting, parse_rank
from benchmarks.support.timing import Latency, interleaved_latencies
from benchmarks.support.training import accuracy, fine_tune
from tdecomp.torch_state import no_fast_path

ORIGINAL = "original"
JUDGED_IMAGES = 512  # for the output errors, of those that the accuracy is measured on
LAYER_FIELDS = (
    "name",
    "method",
    "reason",
    "rank",
    "params_before",
    "params_after",
    "macs_before",
    "macs_after",
    "weight_error",
    "output_error",
    "fit_seconds",
)


@dataclass(frozen=True)
class Protocol:
    """How each network is measured, the same for all of them."""

    min_channels: int
    finetune: int
    batch_size: int
    seed: int
    rounds: int
    data_images: int = 0
    progress: bool = True


@dataclass
class Measurement:
    """One line of the table; what needs data is None without, the rest where it does not apply."""

    label: str
    method: str | None
    rank: str | None
    params: int
    macs: int
    params_ratio: float = 1.0
    macs_ratio: float = 1.0
    data: bool = False
    refit: bool = False
    latency: Latency | None = None
    layers_changed: int | None = None
    layers_total: int | None = None
    ranks: str = ""
    linear_ranks: str = ""
    decompose_seconds: float | None = None
    weight_error: float | None = None
    output_error: float | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The method, and what its factors were fitted to if not to the weights."""
        if self.method is None or self.rank is None:
            return self.label
        return self.method + Setting(self.method, self.rank, self.data, self.refit).suffix

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Comparison:
    """The original, the decomposed networks, and the settings that did not apply, with reasons."""

    measurements: list[Measurement]
    refused: dict[str, str]
    calibration_seconds: float | None = None


@dataclass(frozen=True)
class Seen:
    """Unlabelled images, what the layers saw of them, and the seconds that this took."""

    batches: list[Tensor]
    moments: tdecomp.Moments
    seconds: float


def compare(
    model: nn.Module,
    settings: Iterable[Setting],
    example: Tensor,
    batch: Tensor,
    data: Dataset | None,
    protocol: Protocol,
) -> Comparison:
    """Measure the model and what each setting makes of it.

    `example` is the input whose MACs are counted, `batch` the one whose latency is measured. The
    given model is not changed: its fine-tuning, too, happens on a copy. A ValueError tells why if
    no setting applies.
    """
    quiet = None if protocol.progress else True  # None: only where there is no terminal
    params, macs = count_params(model), count_macs(model, example)
    measurements = {ORIGINAL: Measurement(ORIGINAL, None, None, params, macs)}
    networks = {ORIGINAL: copy.deepcopy(model)}
    refused = {}
    settings = list(settings)
    seen = None
    if data is not None and any(setting.data for setting in settings):
        seen = _calibrate(model, data, protocol)
    for setting in tqdm(settings, "decomposing", leave=False, disable=quiet):
        try:
            network, measurement = _decompose(model, setting, example, protocol.min_channels, seen)
        except ValueError as error:  # such as VBMF on CP; the other settings still stand
            refused[setting.label] = str(error)
            continue
        measurement.params_ratio = measurement.params / params
        measurement.macs_ratio = measurement.macs / macs
        networks[setting.label], measurements[setting.label] = network, measurement
    if refused and len(networks) == 1:
        raise ValueError("nothing to compare:\n" + "\n".join(refused.values()))
    latencies = interleaved_latencies(
        networks, batch, rounds=protocol.rounds, progress=protocol.progress
    )
    for label, network in networks.items():
        measurements[label].latency = latencies[label]
        if data is not None:
            _measure_output_error(model, network, measurements[label], data)
            _measure_accuracy(network, measurements[label], data, protocol)
    seconds = None if seen is None else seen.seconds
    return Comparison(list(measurements.values()), refused, seconds)


def _calibrate(model: nn.Module, data: Dataset, protocol: Protocol) -> Seen:
    batches = data.train.unlabelled(protocol.data_images, protocol.batch_size, protocol.seed)
    start = time.perf_counter()
    moments = tdecomp.calibrate(model, batches, progress=False)
    return Seen(batches, moments, time.perf_counter() - start)


def _decompose(
    model: nn.Module, setting: Setting, example: Tensor, min_channels: int, seen: Seen | None
) -> tuple[nn.Module, Measurement]:
    start = time.perf_counter()
    result = tdecomp.decompose(
        model,
        setting.methods,
        rank=parse_rank(setting.rank),
        example_inputs=example,
        where=tdecomp.at_least(channels=min_channels, features=min_channels),
        data=seen.moments if seen is not None and setting.data else None,
        progress=False,
    )
    if seen is not None and setting.refit:
        tdecomp.refit(result.model, model, seen.batches, inplace=True, progress=False)
    seconds = time.perf_counter() - start
    rows = list(result.report)
    ranks = [(row.method, row.rank) for row in rows if row.rank is not None]
    linear = [rank for method, rank in ranks if method == LINEAR_METHOD != setting.method]
    errors = [row.weight_error for row in rows if row.weight_error is not None]
    return result.model, Measurement(
        setting.label,
        setting.method,
        setting.rank,
        params=count_params(result.model),
        macs=count_macs(result.model, example),
        data=setting.data,
        refit=setting.refit,
        layers_changed=len(ranks),
        layers_total=len(rows),
        ranks=_convolutions(setting, ranks),
        linear_ranks=summarise_ranks(linear),
        decompose_seconds=seconds,
        weight_error=sum(errors) / len(errors) if errors and not setting.refit else None,
        layers=[_layer(row) for row in rows],
    )


def _convolutions(setting: Setting, ranks: Sequence[tuple[str | None, Any]]) -> str:
    """The ranks of a method, or of a group of methods on how many layers each one is."""
    if setting.method not in GROUPS:
        return summarise_ranks([rank for method, rank in ranks if method == setting.method])
    counts = Counter(method for method, _ in ranks if method != LINEAR_METHOD)
    return ", ".join(f"{count} {method}" for method, count in counts.most_common())


def _layer(row: Any) -> dict[str, Any]:
    return {name: getattr(row, name) for name in LAYER_FIELDS}


def _measure_output_error(
    model: nn.Module, network: nn.Module, measurement: Measurement, data: Dataset
) -> None:
    """In place of what the fits say of themselves, what comes out for images they did not see."""
    changed = [layer for layer in measurement.layers if layer["method"] is not None]
    batches = data.val.unlabelled(JUDGED_IMAGES, batch_size=64, seed=0)
    errors = output_errors(model, network, [layer["name"] for layer in changed], batches)
    for layer in changed:
        layer["output_error"] = errors[layer["name"]]
    if errors:
        measurement.output_error = sum(errors.values()) / len(errors)


def _measure_accuracy(
    network: nn.Module, measurement: Measurement, data: Dataset, protocol: Protocol
) -> None:
    measurement.accuracy_before = accuracy(network, data.val)
    if protocol.finetune:
        fine_tune(
            network,
            data.train,
            steps=protocol.finetune,
            batch_size=protocol.batch_size,
            seed=protocol.seed,
            title=f"fine-tuning {measurement.label}",
            progress=protocol.progress,
        )
        measurement.accuracy_after = accuracy(network, data.val)


def count_params(model: nn.Module) -> int:
    """Every parameter once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(model: nn.Module, x: Tensor) -> int:
    """MACs of one forward pass in eval mode: half of torch's FLOPs, by kernels that it sees."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), no_fast_path(), sdpa_kernel(SDPBackend.MATH), counter:
        model(x)
    return int(counter.get_total_flops()) // 2


def summarise_ranks(ranks: Sequence[int | tuple[int, ...]]) -> str:
    """Up to three ranks in the order of the layers; of more, the smallest and the largest."""
    if len(ranks) <= 3:
        return ", ".join(_join([rank] if isinstance(rank, int) else rank) for rank in ranks)
    columns = list(
        zip(*((rank,) if isinstance(rank, int) else rank for rank in ranks), strict=True)
    )
    lows, highs = [min(column) for column in columns], [max(column) for column in columns]
    return _join(lows) if lows == highs else f"{_join(lows)}–{_join(highs)}"


def _join(rank: Sequence[int]) -> str:
    return "/".join(map(str, rank))
