"""An executor that sends everything through pickle, as one with other processes does."""

import pickle
from concurrent.futures import Executor, Future


class Posting(Executor):
    """Runs at once, on copies; keeps what it was sent, and what it returned, as bytes."""

    def __init__(self, protocol=pickle.HIGHEST_PROTOCOL):
        self.sent, self.returned, self.protocol = [], [], protocol

    def submit(self, function, *items):
        future = Future()
        try:
            self.sent.append(pickle.dumps((function, items), self.protocol))
            function, items = pickle.loads(self.sent[-1])
            self.returned.append(pickle.dumps(function(*items), self.protocol))
            future.set_result(pickle.loads(self.returned[-1]))
        except Exception as error:
            future.set_exception(error)
        if not items:
            self.sent.pop()  # it only starts the worker
        return future
