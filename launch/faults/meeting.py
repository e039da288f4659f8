"""How the ranks of one attempt find each other, and who is missing if they do not."""

from __future__ import annotations

import json
import time
import uuid

import torch.distributed as dist

from ..nodes.early_words import Listener, connect, meeting_begins
from .reasons import RankFailure
from .stages import stage

_SECONDS_BETWEEN_LOOKS = 0.02
_LISTED = 8


def meet(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Wait for all ranks; returns a store that only these processes use. Collective.

    torchrun keeps one store over its restarts, so it may hold what dead processes left. The first rank calls under a name never used
    before; whoever reads it answers with a name of its own; and the call counts once the first rank has listed these answers.

    Raises:
        RankFailure: not all ranks came in time; names them.
        Told: one failed before it came.
    """
    meeting_begins()
    stage("waiting for the other ranks")
    deadline = time.monotonic() + timeout_s
    try:
        store = connect(timeout_s)
    except dist.DistError as error:
        raise RankFailure(f"could not reach the store where ranks meet within {timeout_s:g} s: {str(error).splitlines()[0]}") from error
    return _call(store, world_size, deadline, timeout_s) if rank == 0 else _answer(store, rank, deadline, timeout_s)


def _call(store: dist.Store, world_size: int, deadline: float, timeout_s: float) -> dist.Store:
    call = uuid.uuid4().hex
    own = dist.PrefixStore(call, store)
    store.set("call", call)
    missing, listener = list(range(1, world_size)), Listener(store)
    while missing:
        listener.listen()
        missing = [rank for rank in missing if not own.check([f"answer/{rank}"])]
        if missing and time.monotonic() > deadline:
            listed = ", ".join(map(str, missing[:_LISTED])) + (", ..." if len(missing) > _LISTED else "")
            raise RankFailure(f"of {world_size} ranks, {listed} did not come within {timeout_s:g} s; their logs tell why")
        time.sleep(_SECONDS_BETWEEN_LOOKS if missing else 0)
    own.set("listed", json.dumps([own.get(f"answer/{rank}").decode() for rank in range(1, world_size)]))
    return own


def _answer(store: dist.Store, rank: int, deadline: float, timeout_s: float) -> dist.Store:
    name, answered, listener = uuid.uuid4().hex, "", Listener(store)
    while time.monotonic() < deadline:
        listener.listen()
        call = store.get("call").decode() if store.check(["call"]) else answered
        own = dist.PrefixStore(call, store)
        if call != answered:
            own.set(f"answer/{rank}", name)
            answered = call
        if call and own.check(["listed"]) and name in json.loads(own.get("listed")):
            return own
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    reason = "some other ranks did not come" if answered else "rank 0 did not come"
    raise RankFailure(f"{reason} within {timeout_s:g} s; their logs tell why")
