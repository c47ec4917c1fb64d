"""The end and the forks of this process, for objects that own threads or are used by them.

When the interpreter is finalised, a daemon thread ends where it next takes the GIL. Inside torch,
tokenizers or our own extension that is a C++ or Rust frame that must not be unwound, and the
process aborts. So before that our own threads are ended, and threads of the program are kept out of
such code: a daemon thread that asks for more then waits forever.

The order of an end: functions of `before_exit`, threads of executors and other threads that are no
daemons are joined, functions of `at_exit`, the interpreter is finalised.

A forked child has one thread, and copies of locks and decoders that belong to threads it has not.
"""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401  registers its own end, which must come after ours
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

Owner = TypeVar("Owner")
_Owners = WeakKeyDictionary[Any, Callable[[Any], object]]

_before_exit: _Owners = WeakKeyDictionary()
_at_exit: _Owners = WeakKeyDictionary()
_after_fork: _Owners = WeakKeyDictionary()
_changed = threading.Condition()
_num_inside = 0  # callers in native code
_thread = threading.local()  # inside: whether this thread is one of them
_ending = _ended = _forked = False


def before_exit(owner: Owner, function: Callable[[Owner], object]) -> None:
    """Have `function(owner)` called once the main thread has ended, while others may go on."""
    _before_exit[owner] = function


def at_exit(owner: Owner, function: Callable[[Owner], object]) -> None:
    """Have `function(owner)` called when no thread is left but daemons; it ends the owner's."""
    _at_exit[owner] = function


def after_fork(owner: Owner, function: Callable[[Owner], object]) -> None:
    """Have `function(owner)` called in every forked child, before anything else runs there."""
    _after_fork[owner] = function


def never_free(*objects: object) -> None:
    """Keep objects whatever other references go: freeing them would wait for another process."""
    for item in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(item))


def is_forked() -> bool:
    """Whether this process was forked after this module was imported."""
    return _forked


def is_ending() -> bool:
    """Whether the main thread has ended: executors take no more work."""
    return _ending


def wait_for_end() -> None:
    """Return at once while the process runs on; once nothing but daemon threads is left, the
    calling thread waits for ever unless it is the main thread."""
    if _ended and threading.current_thread() is not threading.main_thread():
        threading.Event().wait()


@contextmanager
def native_calls() -> Iterator[None]:
    """A section in which a caller's thread may be in native code; the end of the process waits
    for it, and lets no daemon thread in or out any more. Sections within it change nothing."""
    global _num_inside
    if getattr(_thread, "inside", False):
        yield
        return
    with _changed:
        entered = not _ended
        _num_inside += entered
    if not entered:
        wait_for_end()
    _thread.inside = entered
    try:
        yield
    finally:
        with _changed:
            _num_inside -= _thread.inside
            _changed.notify_all()
        _thread.inside = False
        wait_for_end()


@contextmanager
def outside_calls() -> Iterator[None]:
    """A part of such a section that only waits, for a network: the end of the process does not wait
    for it."""
    global _num_inside
    inside = getattr(_thread, "inside", False)
    with _changed:
        _num_inside -= inside
        _changed.notify_all()
    try:
        yield
    finally:
        with _changed:
            _thread.inside = inside and not _ended
            _num_inside += _thread.inside
        wait_for_end()


def _main_thread_ended() -> None:
    global _ending
    _ending = True
    _call_all(_before_exit)


def _only_daemons_left() -> None:
    global _ending, _ended
    _ending = True
    with _changed:
        _ended = True
        _changed.wait_for(lambda: _num_inside == 0)
    _call_all(_at_exit)


def _call_all(owners: _Owners) -> None:
    for owner, function in list(owners.items()):
        function(owner)


def _child_begins() -> None:
    global _changed, _num_inside, _thread, _forked
    _changed, _num_inside, _thread, _forked = threading.Condition(), 0, threading.local(), True
    _before_exit.clear()
    _at_exit.clear()
    _call_all(_after_fork)


# threading's are the only functions that run before executors are waited for; last in, first out.
getattr(threading, "_register_atexit", atexit.register)(_main_thread_ended)
atexit.register(_only_daemons_left)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_child_begins)
