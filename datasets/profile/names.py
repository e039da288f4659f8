"""What a column's name says: the words of the trade, and nothing that the data alone could tell."""

from __future__ import annotations

import re
from collections.abc import Collection

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+[a-z]?")


def _set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_CLICK = _set("click clicks clicked clk ctr")
_ACTIONS = _CLICK | _set(
    """like likes liked dislike disliked hate hated follow followed comment commented share shared forward forwarded repost retweet reply
    replied buy bought purchase purchased order ordered cart add2cart conversion converted convert conv cvr pay paid install installed
    download downloaded subscribe subscribed favorite favourite fav collect collected save saved report reported skip skipped view viewed
    watch watched play played finish finished complete completed enter engage engaged engagement book booked booking signup open opened
    rated reward hover lead label target outcome"""
)
_OUTCOMES = _set("true truth pred prediction predicted prob probability pctr pcvr result next after future")
_ENGAGEMENT = _set(
    "dwell watch watched watching play played view viewed stay stayed listen listened read rating stars revenue gmv completion"
)
_EVERYDAY = _set("view open order book save lead read next")
"""Words that say little, unless they are a label's."""
_NOT_OF_LABELS = _set(
    """is has label id the of in at to user item video view time num count cnt type flag date day score rate long short first new valid
    effective profile level"""
)
_BEFORE = _set("past prev previous hist history historical last avg mean total cum days day cnt count num user users before ago")
_GUESSED = _set("true truth pred predicted prediction expected past prev avg mean hist last")
_LENGTH = _set("time duration length spent us ms msec s sec secs second seconds min minutes hours")
_TIME = {"time": 1, "timestamp": 3, "ts": 3, "datetime": 2, "date": 0, "unixtime": 3, "created": 1, "at": 0}
_SCENARIO = ("scenario", "scene", "tab", "page", "surface", "placement", "channel", "section", "domain", "slot")
_ITEMS = """item iid video movie product sku goods article news photo note post doc document content song track book app ad ads creative
listing business recipe game"""
_KINDS = {
    "user": ("user", "uid", "member", "customer", "visitor", "viewer", "account", "buyer", "reader", "listener", "client", "device"),
    "item": tuple(_ITEMS.split()),
}
_ENTITIES = frozenset(kind for kinds in _KINDS.values() for kind in kinds)
_IDS = _set("id ids uid iid sku code cat category categorical sparse brand feat type zip postcode cluster hash")
_NUMBERED = _set("c f x feature field col column slot")
"""Columns without a name of their own: C12, feature_3, and bare numbers."""
_SECONDS = {
    **dict.fromkeys(("us", "usec"), 1e-6),
    **dict.fromkeys(("ms", "msec", "millis"), 1e-3),
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("min", "mins", "minutes"), 60.0),
    "hours": 3600.0,
}


def words(name: str) -> list[str]:
    """The words of a name in lower case: `isClick_30d` is is, click, 30d; `userid` is user, id."""
    found = [word.lower() for word in _WORD.findall(name)]
    return [part for word in found for part in ((word[:-2], "id") if word[:-2] in _ENTITIES and word.endswith("id") else (word,))]


def is_action(name: str) -> bool:
    """Named like something a user did with what was shown."""
    return bool(_ACTIONS & set(words(name)))


def is_click(name: str) -> bool:
    return bool(_CLICK & set(words(name)))


def is_duration(name: str) -> bool:
    """Named like the time a user spent on what was shown, and not like a guess or a mean of it."""
    found = set(words(name))
    if found & _GUESSED:
        return False
    return found == {"dwell"} or {"time", "spent"} <= found or bool(found & _ENGAGEMENT and found & _LENGTH)


def outcome_words(name: str, labels: Collection[str]) -> set[str]:
    """Words that say the column was known only afterwards: of outcomes, of actions, or those of a label; none in a name that speaks of
    the past."""
    found = set(words(name))
    if found & _BEFORE:
        return set()
    of_labels = {word for label in labels for word in words(label)} - _NOT_OF_LABELS - _LENGTH
    return found & ((_OUTCOMES | _ENGAGEMENT | _ACTIONS) - _EVERYDAY | of_labels)


def seconds_in_unit(name: str) -> float | None:
    """Seconds in one of the units that the name ends with, if it does."""
    return _SECONDS.get((words(name) or [""])[-1])


def time_score(name: str) -> int | None:
    """How much the name looks like a moment's; None if it does not."""
    return max((_TIME[word] for word in words(name) if word in _TIME), default=None)


def is_only_time(name: str) -> bool:
    """Nothing but a moment's words: `ts`, `event_time_ms`."""
    return time_score(name) is not None and set(words(name)) <= {*_TIME, *_SECONDS, "event", "log"}


def scenario_score(name: str) -> int | None:
    """How much the name looks like a place in the app, the smaller the more; None if it does not."""
    return min((_SCENARIO.index(word) for word in words(name) if word in _SCENARIO), default=None)


def entity_score(name: str, side: str) -> tuple[int, int] | None:
    """How much the name looks like the id of the user or of the item, the smaller the more; None if it does not."""
    found = words(name)
    ranks = [_KINDS[side].index(word) for word in found if word in _KINDS[side]]
    ends_like_id = bool(found) and found[-1] in ("id", "uid", "iid", "sku")
    if not ranks or not (ends_like_id or len(found) == 1):
        return None
    return min(ranks), len(found)


def shares_entity(name: str, other: str, side: str) -> bool:
    """Both names speak of the same kind of user, or of item: `watched_videos` and `video_id`."""
    stems = [{word.removesuffix("s") for word in words(text)} & set(_KINDS[side]) for text in (name, other)]
    return bool(stems[0] & stems[1])


def is_id(name: str) -> bool:
    """Named like a code, not like an amount."""
    found = set(words(name))
    letters = {word for word in found if not word.isdigit()}
    return bool(_IDS & letters) or (letters < found and letters <= _NUMBERED)


def is_weight(name: str) -> bool:
    return words(name)[-1:] in (["weight"], ["w"])
