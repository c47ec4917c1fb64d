"""Ways in which a program that uses a Runtime may end, for tests/test_process_end.py.

Each is the body of a program: what it runs, how the process has to end (an exit status, or minus
the number of a signal), and what it prints on stdout and as the last line on stderr.
"""

from __future__ import annotations

from dataclasses import dataclass

# argv: checkpoint, clip, VP9 clip.
PREAMBLE = """
import asyncio, atexit, gc, os, signal, sys, threading, time
import torch
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)
from vtts_rt import Ask, EngineConfig, FrameStore, MediaLimits, PerceptionConfig, Runtime
from vtts_rt import RuntimeConfig, SamplingParams
CHECKPOINT, CLIP, VP9 = sys.argv[1:4]
LOOK = dict(sample_fps=1.0, min_pixels=3136, total_pixels=60_000, strategy="append")
SHORT = dict(perception=PerceptionConfig(max_rounds=1, **LOOK),
             sampling=SamplingParams(max_tokens=3, ignore_eos=True))
LONG = dict(perception=PerceptionConfig(max_rounds=3, **LOOK),
            sampling=SamplingParams(max_tokens=3000, ignore_eos=True))
def load(**more):
    engine = EngineConfig(kv_bytes=1 << 26)
    return Runtime.from_pretrained(CHECKPOINT, engine=engine, config=RuntimeConfig(**more))
def begun(events):
    while next(events).type != "token": pass
    return events
def working(rt):
    while not rt.stats()["scheduler"]["running"]: time.sleep(0.001)
def thread(function, *args, daemon=True, **more):
    t = threading.Thread(target=function, args=args, kwargs=more, daemon=daemon)
    t.start()
    return t
"""


@dataclass(frozen=True)
class Way:
    """How a program ends. quick: part of every run of the tests."""

    body: str
    status: int = 0
    out: str = ""
    err: str = ""
    quick: bool = False


DAEMON = "rt = load(); thread({}); working(rt)"
WAYS = {
    "nothing in work": Way("rt = load(); rt.ask(CLIP, 'x', **SHORT)"),
    "a stream open": Way("rt = load(); s = begun(rt.stream(CLIP, 'x', **LONG))", quick=True),
    "a stream open and an exception": Way(
        "rt = load(); s = begun(rt.stream(CLIP, 'x', **LONG)); raise ValueError('a bug')",
        1,
        err="ValueError: a bug",
        quick=True,
    ),
    "a stream open and sys.exit": Way(
        "rt = load(); s = begun(rt.stream(CLIP, 'x', **LONG)); sys.exit(3)", 3, quick=True
    ),
    "a stream left in a function": Way(
        "def f():\n    for e in load().stream(CLIP, 'x', **LONG):\n"
        "        if e.type == 'token': break\nf()"
    ),
    "a stream of a runtime that was closed": Way(
        "rt = load(); s = begun(rt.stream(CLIP, 'x', **LONG)); rt.close(); rt.close()"
    ),
    "a with block left by an exception": Way(
        "with load() as rt:\n    s = begun(rt.stream(CLIP, 'x', **LONG))\n"
        "    raise ValueError('a bug')",
        1,
        err="ValueError: a bug",
    ),
    "a daemon thread asks": Way(
        DAEMON.format("lambda: [rt.ask(CLIP, f'{i}', **SHORT) for i in range(10**6)]"), quick=True
    ),
    "a daemon thread asks a batch": Way(
        DAEMON.format(
            "lambda: rt.ask_batch([dict(video=CLIP, question=f'{i}', **LONG) for i in range(99)])"
        ),
        quick=True,
    ),
    "a daemon thread asks for a timeout": Way(
        DAEMON.format("lambda: rt.ask(CLIP, 'x', timeout_seconds=1e6, **LONG)")
    ),
    "a daemon thread generates": Way(
        DAEMON.format("lambda: [rt.generate(f'{i}') for i in range(10**6)]")
    ),
    "a daemon thread holds a stream": Way(
        "rt = load(); e = threading.Event()\n"
        "def f():\n    s = begun(rt.stream(CLIP, 'x', **LONG)); e.set(); time.sleep(1e6)\n"
        "thread(f); e.wait()"
    ),
    "a daemon thread updates weights": Way(
        "rt = load(); e = threading.Event()\n"
        "def f():\n    while True: rt.update_weights({}); e.set()\n"
        "thread(f); e.wait()"
    ),
    "a daemon thread waits for an update of weights": Way(
        "rt = load(); s = begun(rt.stream(CLIP, 'x', **LONG))\n"
        "thread(rt.update_weights, {}); time.sleep(0.05)"
    ),
    "a daemon thread loads": Way("thread(lambda: [load() for _ in range(99)]); time.sleep(0.2)"),
    "a daemon thread plans": Way(
        "rt = load(); e = threading.Event()\n"
        "def f():\n    while True: rt.plan(CLIP, 'x' * 999); e.set()\n"
        "thread(f); e.wait()",
        quick=True,
    ),
    "a thread goes on asking": Way(
        "rt = load()\n"
        "def f():\n    threading.main_thread().join()\n"
        "    print(rt.ask(CLIP, 'x', **SHORT).stop_reason)\n"
        "thread(f, daemon=False)",
        out="max_rounds",
        quick=True,
    ),
    "a thread goes on asking a batch": Way(
        "rt = load()\n"
        "def f():\n    threading.main_thread().join(); time.sleep(0.1)\n"
        "    print(len(rt.ask_batch([dict(video=CLIP, question='x', **SHORT)] * 3)))\n"
        "thread(f, daemon=False)",
        out="3",
    ),
    "an executor has requests left": Way(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "rt = load(); pool = ThreadPoolExecutor(2)\n"
        "for i in range(4): pool.submit(lambda: print(rt.ask(CLIP, 'x', **SHORT).stop_reason))",
        out="max_rounds\nmax_rounds\nmax_rounds\nmax_rounds",
    ),
    "a coroutine that ran out of time": Way(
        "rt = load()\n"
        "async def f():\n"
        "    try: await asyncio.wait_for(rt.ask_async(CLIP, 'x', **LONG), 0.2)\n"
        "    except asyncio.TimeoutError: print('timeout')\n"
        "asyncio.run(f())",
        out="timeout",
    ),
    "an asynchronous stream open": Way(
        "rt = load(); kept = []\n"
        "async def f():\n"
        "    s = rt.stream_async(CLIP, 'x', **LONG); kept.append(s)\n"
        "    async for e in s:\n        if e.type == 'token': break\n"
        "asyncio.run(f())",
        quick=True,
    ),
    "an asynchronous stream open in a loop that runs no more": Way(
        "rt = load(); loop = asyncio.new_event_loop(); s = rt.stream_async(CLIP, 'x', **LONG)\n"
        "async def f():\n"
        "    while (await s.__anext__()).type != 'token': pass\n"
        "loop.run_until_complete(f()); rt.close(); loop.close()"
    ),
    "an event loop in a daemon thread": Way(
        DAEMON.format("lambda: asyncio.run(rt.ask_async(CLIP, 'x', **LONG))")
    ),
    "a runtime in a reference cycle": Way(
        "class A: pass\n"
        "a = A(); a.a = a; a.rt = load(); a.s = begun(a.rt.stream(CLIP, 'x', **LONG)); del a",
        quick=True,
    ),
    "a runtime that a finaliser closes": Way(
        "class A:\n    def __del__(self): self.rt.close()\n"
        "a = A(); a.a = a; a.rt = load(); a.s = begun(a.rt.stream(CLIP, 'x', **LONG))\n"
        "b = A(); b.rt = a.rt"
    ),
    "a function of atexit asks and closes": Way(
        "rt = load()\n"
        "@atexit.register\n"
        "def f(): print(rt.ask(CLIP, 'x', **SHORT).stop_reason); rt.close()",
        out="max_rounds",
    ),
    "SIGTERM": Way(
        "rt = load(); s = begun(rt.stream(CLIP, 'x', **LONG)); os.kill(os.getpid(), 15); next(s)",
        -15,
    ),
    "SIGINT": Way(
        "rt = load(); t = thread(lambda: (working(rt), os.kill(os.getpid(), 2)))\n"
        "rt.ask(CLIP, 'x', **LONG)",
        -2,
        err="KeyboardInterrupt",
    ),
    "SIGINT in a batch": Way(
        "rt = load(); t = thread(lambda: (working(rt), os.kill(os.getpid(), 2)))\n"
        "try: rt.ask_batch([dict(video=CLIP, question=f'{i}', **LONG) for i in range(99)])\n"
        "except KeyboardInterrupt: pass\n"
        "s = rt.stats()['scheduler']; rt._driver.call(lambda: None)\n"
        "print(rt._driver.call(lambda: rt.engine.has_work)); sys.exit(130)",
        130,
        out="False",
        quick=True,
    ),
    "a forked child ends, and uses what is its parent's": Way(
        "rt = load(); s = begun(rt.stream(CLIP, 'x', **LONG))\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    for use in (lambda: next(s), lambda: rt.ask(CLIP, 'x'), rt.stats, rt.clear_caches,\n"
        "                lambda: rt.generate('x'), lambda: rt.score('x', [1]), lambda: rt.engine,\n"
        "                lambda: rt.plan(CLIP, 'x'), lambda: rt.update_weights({}),\n"
        "                lambda: rt.ask_batch([]), lambda: rt.stream_async(CLIP, 'x'),\n"
        "                rt.discard_staged_weights,\n"
        "                lambda: rt.rollouts(Ask(CLIP, 'x'), 2), rt.perception):\n"
        "        try: print('FAIL', use())\n"
        "        except RuntimeError as e: assert 'forked' in str(e), e\n"
        "    rt.close(); sys.exit(5)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), next(s).type)",
        out="5 token",
        quick=True,
    ),
    "forked workers with runtimes of their own": Way(
        "import multiprocessing\n"
        "torch.set_num_threads(2); rt = load(); s = begun(rt.stream(CLIP, 'x', **LONG))\n"
        "def f(n):\n    with load() as own: return own.ask(CLIP, 'x', **SHORT).stop_reason\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool: print(pool.map(f, range(2)))",
        out="['max_rounds', 'max_rounds']",
    ),
    "forked loaders of data with runtimes of their own": Way(
        "from torch.utils.data import DataLoader, IterableDataset\n"
        "torch.set_num_threads(2); rt = load(); rt.ask(CLIP, 'x', **SHORT)\n"
        "class Data(IterableDataset):\n"
        "    def __iter__(self): yield load().ask(CLIP, 'x', **SHORT).stop_reason\n"
        "print(list(DataLoader(Data(), num_workers=2, batch_size=None,\n"
        "                      multiprocessing_context='fork')))",
        out="['max_rounds', 'max_rounds']",
    ),
    "a daemon thread waits for a URL": Way(
        "import socket, vtts_rt.video.open\n"
        "vtts_rt.video.open.URL_TIMEOUT_SECONDS = 1e6\n"
        "rt = load(media_limits=MediaLimits(max_open_seconds=1e6))\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "url = f'http://127.0.0.1:{server.getsockname()[1]}/a.mp4'\n"
        "thread(lambda: rt.ask(url, 'x', allow_urls=True, **SHORT)); peer = server.accept()",
        quick=True,
    ),
    "frames are being fetched ahead": Way(
        "from vtts_rt import open_video\n"
        "store = FrameStore(1 << 30); kept = []\n"
        "for i in range(8):\n"
        "    v = open_video(CLIP, start_seconds=i, end_seconds=10); kept.append(v)\n"
        "    p = store.provider([v]); p.guess(0, range(v.metadata.num_frames)); kept.append(p)"
    ),
    "DALI has frames in work": Way(
        "rt = load(decoder='dali'); s = begun(rt.stream(VP9, 'x', **LONG))\n"
        "thread(lambda: [rt.ask(VP9, f'{i}', **SHORT) for i in range(10**6)])\n"
        "working(rt); assert s is not None"
    ),
    "DALI in a process that forked": Way(
        "rt = load(decoder='dali'); s = begun(rt.stream(VP9, 'x', **LONG))\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"  # as multiprocessing does: DALI itself does not survive another end there
        "    print(load().ask(CLIP, 'x', **SHORT).stop_reason, flush=True); os._exit(5)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))",
        out="max_rounds\n5",
    ),
}

# Runs the quick ways, each in a child forked from one process that has loaded what takes long.
LAUNCHER = """
import json, os, sys, time
import av, numpy, torch
from vtts_rt import Runtime
torch.set_num_threads(1)
Runtime.from_pretrained(sys.argv[1]).close()
folder, ways = sys.argv[4], json.loads(open(sys.argv[4] + "/ways.json").read())
for number, (name, body) in enumerate(ways.items()):
    child = os.fork()
    if child == 0:
        for descriptor, stream in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_WRONLY | os.O_CREAT), descriptor)
        break
    began, status = time.monotonic(), None
    while status is None and time.monotonic() - began < 120:
        time.sleep(0.01)
        ended, waited = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(waited) if ended else None
    if status is None:
        os.kill(child, 9)
        os.waitpid(child, 0)
    print(json.dumps([name, status]), flush=True)
else:
    sys.exit(0)
exec(compile(body, name, "exec"))
"""
