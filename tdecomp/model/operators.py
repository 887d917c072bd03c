"""What watches every operator that runs inside a `with` block."""

from torch.utils._python_dispatch import TorchDispatchMode


class OperatorMode(TorchDispatchMode):
    """A dispatch mode that also sees what runs inside higher-order operators."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # To be skipped, a mode imports all of torch.compile first: seconds, and 0.1 GB.
        return False
