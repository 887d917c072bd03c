"""What is set for a while is put back: after errors, at any moment of Ctrl-C, among threads."""

import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial

import pytest
import torch
from torch import nn

import tdecomp
from tdecomp.runtime.scope import interrupts_deferred
from tdecomp.runtime.torch_state import (
    evaluating,
    exact_passes,
    frozen,
    full_precision,
    hooks,
    no_fast_path,
    no_inference_mode,
    restoring,
)
from tests.injections import AtLine, press
from tests.unchanged import all_unchanged, global_state, unchanged

CPU = torch.device("cpu")


class Net(nn.Module):
    """Of everything that a forward pass changes or that has a state: some."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.register_buffer("calls", torch.zeros(()))
        self.norm.eval()

    def forward(self, x):
        self.calls.add_(1)
        y = self.drop(self.norm(self.conv(x)).relu()).mean((2, 3))
        return self.encoder(self.fc(y)[:, None])[:, 0] + 0 * torch.rand(())


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 8, 8, generator=generator) for _ in range(4)]


@pytest.fixture
def medium():
    """As trainers set it."""
    torch.set_float32_matmul_precision("medium")
    yield
    assert torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")


# One by one --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("medium")
def test_undisturbed_in_every_surrounding():
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.device("meta"),
    ):
        before = global_state()
        with full_precision(CPU):
            product = torch.randn(2, 2) @ torch.randn(2, 2)
            assert product.dtype == torch.float32
            assert product.device == CPU
            assert not product.is_inference()
            assert not torch.is_grad_enabled()
            assert torch.get_float32_matmul_precision() == "highest"
        torch.set_rng_state(
            torch.tensor(list(before["random state"]), dtype=torch.uint8, device="cpu")
        )
        assert global_state() == before


def test_backends_set_one_by_one_are_as_they_were():
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    if not hasattr(backends[0], "fp32_precision"):
        pytest.skip("torch has one setting for all")
    before = [backend.fp32_precision for backend in backends]
    for backend, value in zip(backends, ["tf32", "bf16"], strict=True):
        backend.fp32_precision = value
    with full_precision(CPU):
        assert [backend.fp32_precision for backend in backends] == ["ieee", "ieee"]
    assert [backend.fp32_precision for backend in backends] == ["tf32", "bf16"]
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value


@pytest.mark.usefixtures("medium")
def test_fits_are_at_full_precision(batches):
    seen = []

    class Watched(tdecomp.SVD):
        """Notes the precision that it is fitted at."""

        name = "watched"

        def fit(self, *args, **options):
            seen.append(torch.get_float32_matmul_precision())
            return super().fit(*args, **options)

        def fit_to(self, *args, **options):
            seen.append(torch.get_float32_matmul_precision())
            return super().fit_to(*args, **options)

    for data in (None, batches):
        tdecomp.decompose(net(), Watched(), rank=2, data=data, progress=False)
        assert set(seen) == {"highest"}
        seen.clear()


@pytest.mark.usefixtures("medium")
def test_passes_are_at_full_precision_without_the_fast_path(batches):
    seen = set()

    class Watched(Net):
        """Notes the settings that it runs under."""

        def forward(self, x):
            seen.add((get_float32_matmul_precision(), get_fastpath_enabled()))
            return super().forward(x)

    get_float32_matmul_precision = torch.get_float32_matmul_precision
    get_fastpath_enabled = torch.backends.mha.get_fastpath_enabled
    model, options = Watched(), {"progress": False}
    smaller = tdecomp.decompose(model, "svd", rank=2, **options).model
    for call in (
        lambda: tdecomp.calibrate(model, batches, max_memory=10**5, **options),
        lambda: tdecomp.refit(smaller, model, batches, **options),
        lambda: tdecomp.distill(smaller, model, batches, steps=2, **options),
        lambda: tdecomp.recalibrate_batchnorm(smaller, batches, original=model, **options),
    ):
        call()
        assert seen == {("highest", False)}
        seen.clear()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_untouched_models_are_as_they_were(error, batches):
    model, other = net(), net(1)
    with all_unchanged(model, other), pytest.raises(error), evaluating(model, other):  # noqa: PT012
        assert not any(module.training for m in (model, other) for module in m.modules())
        model(batches[0])
        with evaluating(other):
            other(batches[0])
            other.norm.train()
        assert not other.norm.training
        other.norm.running_mean = torch.ones(8)
        raise error


class Late(nn.Module):
    """It makes its buffers in its first call."""

    def __init__(self, *, known):
        super().__init__()
        self.ready = False
        if known:
            self.register_buffer("first", None)
        self.register_buffer("second", torch.zeros(3))

    def forward(self, x):
        if not self.ready:
            self.register_buffer("first", torch.ones(3))
            self.ready = True
        return x + self.first + self.second


@pytest.mark.parametrize("known", [True, False], ids=["None before", "no such buffer before"])
def test_buffers_made_in_a_call_are_gone(known):
    model = Late(known=known).eval()
    with unchanged(model):
        for _ in range(2):
            with evaluating(model):
                model(torch.zeros(3))
    assert not model.ready
    assert list(model.state_dict()) == ["second"]


def test_a_scripted_module_has_its_buffers_again():
    class Replacing(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls = self.calls + 1
            return x + self.calls

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit.script
        model = torch.jit.script(Replacing())
    with evaluating(model):
        model(torch.zeros(3))
    assert float(model.calls) == 0


def test_frozen_parameters_are_trained_again():
    model = net()
    model.fc.weight.requires_grad_(False)
    with unchanged(model):
        with frozen(model):
            assert not any(p.requires_grad for p in model.parameters())
        with torch.inference_mode():
            made_inside = nn.Linear(2, 2)
        with frozen(made_inside):
            pass


def test_a_hook_that_cannot_be_registered_takes_the_others_along():
    layer = nn.Linear(2, 2)

    def fail():
        raise RuntimeError("no")

    registrations = [partial(layer.register_forward_hook, print), fail]
    with unchanged(layer), pytest.raises(RuntimeError, match="no"), hooks(registrations):
        pass


def test_what_was_not_left_is_left_with_the_one_around_it():
    model = net()

    def unfinished():
        with hooks([partial(model.fc.register_forward_hook, print)]), no_fast_path():
            yield

    with all_unchanged(model):
        with evaluating(model):
            generator = unfinished()
            next(generator)
            assert model.fc._forward_hooks
        assert not model.fc._forward_hooks
        generator.close()


def test_one_that_cannot_be_undone_does_not_keep_others():
    model = net()
    broken = evaluating(model)
    with all_unchanged(model):
        with pytest.raises(RuntimeError, match="no"), restoring(model), no_fast_path(), broken:
            broken.undo.callback(fail_to_undo)
        with evaluating(model):  # its lock is free
            pass


def fail_to_undo():
    raise RuntimeError("no")


@pytest.mark.no_cover
def test_an_error_at_any_line_of_entering_leaves_nothing_behind():
    model = net()

    def use():
        registrations = [partial(model.fc.register_forward_hook, print)]
        passes = evaluating(model), exact_passes(), frozen(model), hooks(registrations)
        with ExitStack() as entered:
            for each in (restoring(model, seed=1), *passes, full_precision(CPU)):
                entered.enter_context(each)

    with AtLine(None, 0, fail_to_undo, errors=True) as whole:
        use()
    assert len(whole.hits) > 50
    for line, hits in whole.hits.items():
        for nth in range(1, hits + 1):
            with all_unchanged(model):
                with suppress(RuntimeError), AtLine(line, nth, fail_to_undo, errors=True):
                    use()
                with evaluating(model):  # its lock is free
                    pass


def test_grad_mode_is_that_of_before():
    with all_unchanged(), restoring():
        torch.set_grad_enabled(False)


def test_inference_mode_is_left_where_it_is_on():
    with no_inference_mode(), torch.no_grad():
        assert not torch.zeros(2).is_inference()
    with torch.inference_mode(), no_inference_mode():
        assert not torch.zeros(2).is_inference()
    with torch.no_grad(), no_inference_mode():
        assert not torch.is_grad_enabled()


# Interrupts --------------------------------------------------------------------------------------


class Pressing:
    """A context manager that Ctrl-C is pressed in while it is entered or left."""

    def __init__(self, when):
        self.when, self.open = when, 0

    def __enter__(self):
        if self.when == "enter":
            press()
        self.open += 1

    def __exit__(self, *_):
        if self.when == "exit":
            press()
        self.open -= 1


def wait():
    for _ in range(200):
        time.sleep(0.001)


@pytest.mark.parametrize("when", ["enter", "exit"])
def test_an_interrupt_waits_for_anybodys_context_manager(when):
    pressing = Pressing(when)
    reached = []
    with all_unchanged():
        with pytest.raises(KeyboardInterrupt), restoring():  # noqa: PT012
            with pressing:
                reached.append("inside")
                wait()
            assert pressing.open == 0
            reached.append("after")
            wait()
            reached.append("never")
        assert pressing.open == 0
    # Not kept until the end of it all.
    assert reached == (["inside"] if when == "enter" else ["inside", "after"])


def test_an_interrupt_elsewhere_does_not_wait():
    reached = []
    with all_unchanged(), pytest.raises(KeyboardInterrupt), restoring():
        reached += [press(), "never"]
    assert reached == []


def test_an_interrupt_before_the_end_is_raised_at_the_end():
    done = []

    def work():
        press()
        with interrupts_deferred():
            press()
        time.sleep(0.05)
        done.append(1)

    with all_unchanged(), pytest.raises(KeyboardInterrupt), interrupts_deferred():
        work()
    assert done == [1]
    time.sleep(0.05)  # and once only


def test_an_interrupt_comes_with_the_error_that_was_on_its_way():
    with pytest.raises(KeyboardInterrupt) as caught, interrupts_deferred():  # noqa: PT012
        press()
        raise ValueError("no")
    assert isinstance(caught.value.__context__, ValueError)


def test_a_handler_of_the_users_is_asked_and_stays():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        with all_unchanged(), restoring():
            press()
            assert len(pressed) == 1
            with interrupts_deferred():
                press()
                assert len(pressed) == 1
        assert [number for number, _ in pressed] == [signal.SIGINT] * 2
        with restoring():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a model's own affair
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with restoring(), interrupts_deferred():
            press()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_handler_that_a_model_puts_back_later_does_no_harm():
    before = signal.getsignal(signal.SIGINT)
    with restoring():
        ours = signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGINT, ours)
    try:
        with pytest.raises(KeyboardInterrupt):
            press()
        with pytest.raises(KeyboardInterrupt), interrupts_deferred():
            press()
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_signals_alone():
    def look(model):
        with evaluating(model), interrupts_deferred():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        before = signal.getsignal(signal.SIGINT)
        assert pool.submit(look, net()).result() is before


@pytest.mark.no_cover
def test_waiting_for_a_model_can_be_interrupted():
    model = net()
    held, release = threading.Event(), threading.Event()

    def hold():
        with evaluating(model):
            held.set()
            release.wait(30)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        held.wait(30)
        timer = threading.Timer(0.2, signal.pthread_kill, [threading.get_ident(), signal.SIGINT])
        timer.start()
        with pytest.raises(KeyboardInterrupt), evaluating(model):
            pytest.fail("it is held")
        assert not release.is_set()
        release.set()
        holding.result()


# Threads -----------------------------------------------------------------------------------------


SETTINGS = {
    "fast path": (no_fast_path, torch.backends.mha.get_fastpath_enabled, True, False),
    "precision": (
        partial(full_precision, CPU), torch.get_float32_matmul_precision, "medium", "highest",
    ),
}  # fmt: skip


@pytest.mark.usefixtures("medium")
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_last_user_of_a_setting_restores_it(setting):
    using, get, usual, inside = SETTINGS[setting]
    entered, left, second = (threading.Event() for _ in range(3))
    seen = []

    def first():
        with using():
            entered.set()
            second.wait(30)
        left.set()

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(first)
        entered.wait(30)
        with using():
            with using():
                second.set()
                left.wait(30)
            seen.append(get())
        running.result()
    assert seen == [inside]
    assert get() == usual


def test_the_last_of_several_threads_restores_the_random_state():
    ready = threading.Barrier(4, timeout=30)

    def draw(seconds):
        with evaluating(nn.ReLU()):
            ready.wait()
            torch.rand(3)
            time.sleep(seconds)
            with evaluating(nn.ReLU()):
                torch.rand(3)

    with all_unchanged(), ThreadPoolExecutor(4) as pool:
        list(pool.map(draw, [0.01, 0.03, 0.02, 0.04]))


def test_a_model_is_used_by_one_thread_at_a_time():
    models = [net(), net(1)]
    using = [0, 0]

    def use(order):
        for _ in range(20):
            with evaluating(*(models[i] for i in order)), evaluating(models[order[0]]):
                for i in order:
                    using[i] += 1
                    assert using[i] == 1
                time.sleep(0.0005)
                for i in order:
                    using[i] -= 1

    with all_unchanged(*models), ThreadPoolExecutor(6) as pool:
        # In any order: nobody waits for somebody who waits for them.
        for future in [pool.submit(use, order) for order in [[0, 1], [1, 0], [0], [1]] * 2]:
            future.result(timeout=60)


@pytest.mark.parametrize(
    "call",
    [
        lambda model, batches: list(tdecomp.calibrate(model, batches, progress=False)),
        lambda model, batches: list(
            tdecomp.profile(model, batches[0], methods="svd", effort="quick", progress=False).times
        ),
    ],
    ids=["calibrate", "profile"],
)
def test_hooks_of_another_thread_are_no_reason_to_leave_a_layer_alone(call, batches):
    model = net()
    wanted = call(model, batches)
    held, release = threading.Event(), threading.Event()

    def hold():
        layers = [model.conv, model.fc, model.encoder.linear1]
        registrations = [partial(layer.register_forward_hook, print) for layer in layers]
        with evaluating(model), hooks(registrations):
            held.set()
            release.wait(30)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        held.wait(30)
        timer = threading.Timer(0.2, release.set)
        timer.start()
        assert call(model, batches) == wanted
        holding.result()


def ranks_of(model, batches, rank):
    result = tdecomp.decompose(model, "svd", rank=rank, data=batches, progress=False)
    # Those of `model` itself are another thread's by now.
    modes = {name: module.training for name, module in result.model.named_children()}
    assert modes == {name: name != "norm" for name in modes}
    return [p.detach() for p in result.model.parameters()]


def test_one_model_decomposed_from_several_threads(batches):
    model = net()
    wanted = {rank: ranks_of(model, batches, rank) for rank in (2, 3, 4, 5)}
    for _ in range(10):
        with all_unchanged(model), ThreadPoolExecutor(4) as pool:
            found = {r: pool.submit(ranks_of, model, batches, r) for r in wanted}
            for rank, future in found.items():
                assert all(map(torch.equal, future.result(), wanted[rank]))


def test_several_models_decomposed_from_several_threads(batches):
    models = [net(seed) for seed in range(4)]
    wanted = [ranks_of(model, batches, 3) for model in models]
    for _ in range(5):
        with all_unchanged(*models), ThreadPoolExecutor(4) as pool:
            futures = [pool.submit(ranks_of, model, batches, 3) for model in models]
            for future, expected in zip(futures, wanted, strict=True):
                assert all(map(torch.equal, future.result(), expected))
