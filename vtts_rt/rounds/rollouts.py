"""Rollouts: the sampled answers of a group to one Ask, which share all that they can.

The videos are opened once and the first round is planned and encoded once, for all members. These
enter the engine in one call between two forward passes, so that all see the same weights: the first
prefills the shared prompt, the others branch off where their tokens differ.
"""

from __future__ import annotations

import asyncio
import queue
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TypeAlias, TypedDict

from vtts_rt.checks import Rule, check, check_names, is_whole
from vtts_rt.rounds.ask import Ask, ClueInput
from vtts_rt.rounds.driver import Driver, Ticket
from vtts_rt.rounds.prepare import Resources, open_request
from vtts_rt.rounds.results import Answer, AnswerReady, RoundEvent
from vtts_rt.rounds.scheduler import Output, RequestFailed
from vtts_rt.rounds.streams import in_thread, seconds_left, timed_out
from vtts_rt.types import SamplingParams, require

# What sees the events of a group: (member, event). The last event of a member is its AnswerReady.
MemberListener: TypeAlias = Callable[[int, RoundEvent], None]
# `Ask.assume_clues` of each member.
MemberClues: TypeAlias = Sequence[Sequence[ClueInput | None]]


class RolloutOptions(TypedDict, total=False):
    """Keyword arguments of `Runtime.rollouts`.

    group_id: a name for the group. assume_clues: a list with the `Ask.assume_clues` of each member,
    in place of the ask's. on_event(member, event) sees every event; the last of a member that does
    not fail is its AnswerReady.
    """

    group_id: str
    assume_clues: MemberClues | None
    on_event: MemberListener | None


_RULES: dict[str, Rule] = {
    "ask": (lambda v: isinstance(v, Ask), "an Ask"),
    "num_answers": (
        lambda v: is_whole(v) and v >= 2,
        "a whole number >= 2, as advantages compare the members of a group",
    ),
    "group_id": (lambda v: isinstance(v, str), "a text"),
    "assume_clues": (lambda v: v is None or isinstance(v, list | tuple), "a list or None"),
    "on_event": (lambda v: v is None or callable(v), "a function or None"),
}


def check_sampling(what: str, sampling: SamplingParams | None) -> None:
    """BadRequest for a temperature of 0."""
    heat = None if sampling is None else sampling.temperature
    rule = "above 0, or the members would all say the same"
    require(what, "temperature", heat, heat is None or heat > 0, rule)


@dataclass(frozen=True, slots=True, eq=False)
class RolloutGroup:
    """What became of the members 0 .. G - 1 of a rollout group, in order.

    group_id: as the caller named it. ask: as it was given. members: each an Answer, or the error
    that ended it; a deadline ends a member with an Answer whose stop_reason is "timeout".
    """

    group_id: str
    ask: Ask
    members: tuple[Answer | Exception, ...]

    @property
    def answers(self) -> list[Answer]:
        """Of the members that have one."""
        return [member for member in self.members if isinstance(member, Answer)]

    @property
    def errors(self) -> list[Exception]:
        """Of the members that failed."""
        return [member for member in self.members if isinstance(member, Exception)]

    @property
    def weights_version(self) -> int | None:
        """Of the weights that gave all answers; None without any."""
        versions = {answer.weights_version for answer in self.answers}
        assert len(versions) <= 1, "a group never mixes two versions"
        return versions.pop() if versions else None


@dataclass(frozen=True, slots=True, eq=False)
class GroupRequest:
    """A checked call of `Runtime.rollouts`. called: `time.monotonic()` of it."""

    ask: Ask
    num_answers: int
    options: RolloutOptions
    called: float

    @classmethod
    def of_call(cls, ask: Ask, num_answers: int, options: RolloutOptions) -> GroupRequest:
        """TypeError for a name that is unknown; BadRequest names the first argument that is not
        allowed."""
        check_names("rollouts", options, RolloutOptions.__annotations__)
        check("rollouts", _RULES, {"ask": ask, "num_answers": num_answers, **options})
        rule = "None, as the function sets it"
        require("rollouts", "member", ask.member, ask.member is None, rule)
        check_sampling("rollouts", ask.sampling)
        clues = options.get("assume_clues")
        ok = clues is None or len(clues) == num_answers
        require(
            "rollouts", "assume_clues", clues, ok, f"{num_answers} lists, one a member, or None"
        )
        request = cls(ask, num_answers, options, time.monotonic())
        for member in range(0 if clues is None else num_answers):
            request.member(member)
        return request

    def member(self, member: int) -> Ask:
        clues = self.options.get("assume_clues")
        own = self.ask.assume_clues if clues is None else clues[member]
        return replace(self.ask, member=member, assume_clues=own)


class _Group:
    """A group in work. deliver: takes (member, output) from any thread."""

    def __init__(
        self, driver: Driver, request: GroupRequest, deliver: Callable[[int, Output], None]
    ) -> None:
        self._driver, self._request, self._deliver = driver, request, deliver
        self._outcomes: dict[int, Answer | Exception] = {}

    def admit(self, stack: ExitStack) -> None:
        """Take a place for every member; leaving the stack ends those that still run."""
        self._tickets: list[Ticket] = []
        for _ in range(self._request.num_answers):
            self._tickets.append(stack.enter_context(self._driver.admit()))

    @property
    def abandoned(self) -> bool:
        return self._tickets[0].aborted

    def begin(self, resources: Resources, stack: ExitStack) -> None:
        """Open and prepare the group, on the caller's thread, and submit its members."""
        asked = self._request
        first = open_request(resources, asked.called, asked.member(0), stack)
        self._members = [
            replace(
                first,
                ask=asked.member(member),
                provider=first.provider if member == 0 else first.provider.fresh(),
                history=[],
                results=[],
            )
            for member in range(asked.num_answers)
        ]
        self._driver.submit_together(
            [
                (ticket, request, lambda output, member=member: self._deliver(member, output))  # type: ignore[misc]
                for member, (ticket, request) in enumerate(
                    zip(self._tickets, self._members, strict=True)
                )
            ]
        )

    @property
    def running(self) -> bool:
        return len(self._outcomes) < self._request.num_answers

    @property
    def seconds_left(self) -> float | None:
        """How long to wait for the next output; all members begin in the same call."""
        return seconds_left(self._members[0].deadline_seconds, self._tickets[0])

    def take(self, member: int, output: Output) -> None:
        if member in self._outcomes:
            return
        try:
            if isinstance(output, RequestFailed):
                self._outcomes[member] = output.error
                return
            assert not isinstance(output, list)
            listener = self._request.options.get("on_event")
            if listener is not None:
                listener(member, output)
            if isinstance(output, AnswerReady):
                self._outcomes[member] = output.answer
        except Exception as error:  # of `on_event`: the others go on
            self._outcomes[member] = error.with_traceback(None)
            self._driver.abort(self._tickets[member])

    def time_out(self) -> None:
        """The deadline passed before the driver began any member."""
        for member, request in enumerate(self._members):
            self.take(member, timed_out(request))

    def result(self) -> RolloutGroup:
        asked = self._request
        members = tuple(self._outcomes[member] for member in range(asked.num_answers))
        return RolloutGroup(asked.options.get("group_id", ""), asked.ask, members)


def rollouts(
    driver: Driver, resources: Resources, ask: Ask, num_answers: int, options: RolloutOptions
) -> RolloutGroup:
    """See `Runtime.rollouts`."""
    request = GroupRequest.of_call(ask, num_answers, options)
    outputs: queue.SimpleQueue[tuple[int, Output]] = queue.SimpleQueue()
    group = _Group(driver, request, lambda *output: outputs.put(output))
    with ExitStack() as stack:
        group.admit(stack)
        group.begin(resources, stack)
        while group.running:
            try:
                group.take(*outputs.get(timeout=group.seconds_left))
            except queue.Empty:
                group.time_out()
    return group.result()


async def rollouts_async(
    driver: Driver, resources: Resources, ask: Ask, num_answers: int, options: RolloutOptions
) -> RolloutGroup:
    """See `Runtime.rollouts_async`."""
    request = GroupRequest.of_call(ask, num_answers, options)
    loop = asyncio.get_running_loop()
    outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

    def deliver(member: int, output: Output) -> None:
        loop.call_soon_threadsafe(outputs.put_nowait, (member, output))

    group = _Group(driver, request, deliver)
    with ExitStack() as stack:
        group.admit(stack)

        def begin() -> None:
            try:
                group.begin(resources, stack)
            finally:
                if group.abandoned:  # cancelled meanwhile
                    stack.close()

        await in_thread(begin)
        while group.running:
            try:
                group.take(*await asyncio.wait_for(outputs.get(), group.seconds_left))
            except asyncio.TimeoutError:
                group.time_out()
            driver.check_process()
    return group.result()
