"""Decompose one model in several ways and measure what each way costs and keeps."""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import tdecomp
from benchmarks.support.costs import count_macs, count_params
from benchmarks.support.machine import describe_machine, describe_versions
from benchmarks.support.output_error import lost_share
from benchmarks.support.rows import NO_RECOVERY, ORIGINAL, Found, Row, Run
from benchmarks.support.settings import BUDGET, Setting, plan_of
from benchmarks.support.subject import Subject
from benchmarks.support.timing import Latency, interleaved_latencies
from benchmarks.support.today import TODAY, decomposed
from benchmarks.support.training import LEARNING_RATE, fine_tune

STEPS = ("refit", "reconstruct", "recalibrate_batchnorm", "distill")
_VAL_BATCH = 256


@dataclass(frozen=True)
class Protocol:
    """What is run, the same for all methods."""

    settings: Sequence[Setting]
    recovers: Sequence[str] = (NO_RECOVERY,)
    finetunes: Sequence[int] = (0,)
    learning_rate: float = LEARNING_RATE
    seeds: Sequence[int] = (0,)
    images: int = 0  # without labels, for fits and recovery
    val_images: int = 0
    batch_size: int = 64
    min_channels: int = 16
    rounds: int = 15


def runs_of(subject: Subject, protocol: Protocol) -> list[Run]:
    """All runs, those of one decomposition side by side, the original's first."""
    bare = Run(
        subject.name, subject.weights, subject.title, ORIGINAL, val_images=protocol.val_images,
        batch_size=protocol.batch_size, min_channels=protocol.min_channels,
    )  # fmt: skip
    runs = []
    for seed in protocol.seeds:
        first = replace(bare, seed=seed)
        starts = [first]
        for setting in protocol.settings:
            for recover in protocol.recovers if setting.method not in TODAY else (NO_RECOVERY,):
                with_data = setting.fitted == "data" or recover != NO_RECOVERY
                images = protocol.images if with_data else 0
                starts.append(replace(first, **vars(setting), recover=recover, images=images))
        for start in starts:
            for steps in protocol.finetunes:
                rate = protocol.learning_rate if steps else 0.0
                runs.append(replace(start, finetune=steps, learning_rate=rate))
    return list(dict.fromkeys(runs))


def compare(subject: Subject, protocol: Protocol, runs: Sequence[Run]) -> Iterator[Row]:
    """Measure these runs, one after the other; one that fails is a row with a reason."""
    clock = _Clock(subject, protocol)
    made_on = {name: str(value) for name, value in describe_machine().items()}
    made_on |= describe_versions()
    for seed in protocol.seeds:
        mine = [run for run in runs if run.seed == seed]
        bench = _Bench(subject, protocol, seed, clock) if mine else None
        for run in mine:
            assert bench is not None
            try:
                found = bench.measured(run)
            except Exception as error:  # the other runs still stand
                found = Found(reason=f"{type(error).__name__}: {error}".splitlines()[0])
            yield Row(run, found, made_on)


class _Clock:
    """Measured times beside the original; networks that are built alike are timed once."""

    def __init__(self, subject: Subject, protocol: Protocol) -> None:
        self._model = subject.model
        self.batch = subject.inputs(protocol.batch_size)
        self._rounds = protocol.rounds
        self._known: dict[str, Latency] = {}
        self._profile: tdecomp.Profile | None = None

    def latency(self, network: nn.Module) -> Latency:
        built = repr(network)
        if built not in self._known:
            both = {repr(self._model): self._model, built: network}
            self._known |= interleaved_latencies(both, self.batch, rounds=self._rounds)
        return self._known[built]

    def profile(self, methods: Any) -> tdecomp.Profile:
        """Times of layers and chains; what was timed before is not timed again."""
        self._profile = tdecomp.profile(
            self._model, self.batch, methods, cache=self._profile, progress=False
        )
        return self._profile


class _Bench:
    """Everything that is measured with the data of one seed."""

    def __init__(self, subject: Subject, protocol: Protocol, seed: int, clock: _Clock) -> None:
        self.subject, self.protocol, self.seed, self.clock = subject, protocol, seed, clock
        self.data = None if subject.data is None else subject.data(seed)
        self.example = subject.inputs(1)
        self.wanted = self._outputs(subject.model)
        self.macs = count_macs(subject.model, self.example)
        self.params = count_params(subject.model)
        self._batches: list[Tensor] | None = None
        self._moments: tdecomp.Moments | None = None
        self._last: dict[Run, tuple[nn.Module, float]] = {}

    def measured(self, run: Run) -> Found:
        network, seconds = self._recovered(run)
        network = copy.deepcopy(network)
        latency = self.clock.latency(network)
        if run.finetune:
            assert self.data is not None
            fine_tune(
                network, self.data.train, steps=run.finetune, batch_size=run.batch_size,
                seed=self.seed, learning_rate=run.learning_rate, loss=self.subject.loss,
                title=f"fine-tuning {run.method}",
            )  # fmt: skip
        params, macs = count_params(network), count_macs(network, self.example)
        return Found(
            layers=_changed(self.subject.model, network),
            params=params,
            macs=macs,
            params_share=params / self.params,
            macs_share=macs / self.macs,
            time_ms=1e3 * latency.median,
            time_share=latency.ratio,
            time_low=latency.ratio_quartiles[0],
            time_high=latency.ratio_quartiles[1],
            seconds=seconds,
            **self._judged(network),
        )

    def _recovered(self, run: Run) -> tuple[nn.Module, float]:
        """The network before fine-tuning, and what it took; that of the last run is kept."""
        stage = replace(run, finetune=0, learning_rate=0.0)
        start = replace(stage, recover=NO_RECOVERY, images=0)
        if start not in self._last:
            self._last = {start: self._decomposed(run)}
        if run.recover != NO_RECOVERY and stage not in self._last:
            network, seconds = self._last[start]
            network, begin = copy.deepcopy(network), time.perf_counter()
            for name in run.recover.split("+"):
                self._recover(network, name)
            seconds += time.perf_counter() - begin
            self._last = {start: self._last[start], stage: (network, seconds)}
        return self._last[start if run.recover == NO_RECOVERY else stage]

    def _decomposed(self, run: Run) -> tuple[nn.Module, float]:
        if run.method == ORIGINAL:
            return self.subject.model, 0.0
        setting = Setting(run.method, run.share, run.fitted, run.ranks, run.equal)
        missing = TODAY[run.method].missing() if run.method in TODAY else None
        if missing:
            raise ModuleNotFoundError(missing)
        timed = run.equal == "time"
        data = self._seen() if run.fitted == "data" else None
        begin = time.perf_counter()
        plan = plan_of(
            self.subject.model,
            setting,
            self.clock.batch if timed else self.example,
            min_channels=run.min_channels,
            profile=self.clock.profile(setting.methods) if timed else None,
            data=data if run.ranks == BUDGET else None,
        )
        if run.ranks != BUDGET:  # the search for equal shares is no part of a method
            begin = time.perf_counter()
        if run.method in TODAY:
            network = decomposed(self.subject.model, plan, TODAY[run.method])
        else:
            network = tdecomp.apply(self.subject.model, plan, data=data, progress=False).model
        return network, time.perf_counter() - begin

    def _recover(self, network: nn.Module, name: str) -> None:
        options: dict[str, Any] = {"inplace": True, "seed": self.seed, "progress": False}
        original, batches = self.subject.model, self._unlabelled()
        if name == "recalibrate_batchnorm":
            tdecomp.recalibrate_batchnorm(network, batches, original=original, **options)
        else:
            step = getattr(tdecomp, name)
            step(network, original, batches, augment=self.subject.augment, **options)

    def _unlabelled(self) -> list[Tensor]:
        assert self.data is not None
        if self._batches is None:
            protocol = self.protocol
            self._batches = self.data.train.unlabelled(
                protocol.images, protocol.batch_size, self.seed
            )
        return self._batches

    def _seen(self) -> tdecomp.Moments:
        """What the layers see; one pass for all methods, which is in nobody's seconds."""
        if self._moments is None:
            self._moments = tdecomp.calibrate(
                self.subject.model, self._unlabelled(), augment=self.subject.augment,
                seed=self.seed, progress=False,
            )  # fmt: skip
        return self._moments

    def _judged(self, network: nn.Module) -> dict[str, Any]:
        if self.data is None or self.wanted is None:
            return {}
        outputs = self._outputs(network)
        assert outputs is not None
        if not outputs.isfinite().all():
            raise ValueError("its outputs are not finite, so that there is nothing to judge")
        if self.subject.metric is not None:
            quality = float(self.subject.metric(network))
            if not math.isfinite(quality):
                raise ValueError(f"metric(model) gave {quality}; expected a finite number")
        else:
            right = outputs.argmax(dim=1) == self.data.val.labels
            quality = 100 * float(right.double().mean())
        error = lost_share(self.wanted, outputs)
        return {"measure": self.subject.measure, "quality": quality, "output_error": error}

    @torch.inference_mode()
    def _outputs(self, network: nn.Module) -> Tensor | None:
        if self.data is None:
            return None
        batches = self.data.val.in_order(_VAL_BATCH)
        return torch.cat([network(x) for x, _ in batches]).double()


def _changed(original: nn.Module, network: nn.Module) -> int:
    """How many layers were replaced."""
    kinds = {name: type(module) for name, module in original.named_modules()}
    return sum(
        name in kinds and type(module) is not kinds[name]
        for name, module in network.named_modules()
    )
