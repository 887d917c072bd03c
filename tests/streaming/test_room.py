"""Threads wait for memory, and go on as soon as there is room."""

import threading

from tdecomp.streaming.room import MemoryRoom


def test_no_more_is_held_than_there_is_room_for():
    room, held, most = MemoryRoom(), [], []
    entered = threading.Semaphore(0)
    leave = [threading.Event() for _ in range(4)]

    def work(i):
        with room.held(40, 100):
            held.append(i)
            most.append(len(held))
            entered.release()
            leave[i].wait()
            held.remove(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        entered.acquire()
    assert not entered.acquire(timeout=0.2)
    for event in leave:
        event.set()
    for thread in threads:
        thread.join()
    assert max(most) == 2
    assert len(most) == 4


def test_what_needs_more_than_there_is_goes_in_alone():
    room = MemoryRoom()
    with room.held(1000, 100):
        pass
    assert MemoryRoom.of("a folder") is MemoryRoom.of("a folder")
