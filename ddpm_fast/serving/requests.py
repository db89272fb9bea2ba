"""What clients ask for: JSON or a URL's query, checked against what is offered.

Seeds and numbers of images may be strings of decimal digits, too: a number of JavaScript's holds no
more than 53 bits of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, cast

from .errors import RequestError
from .offer import Address, Offer

Format = Literal["json", "png"]
Watch = Literal["x0", "x_t", "both"]

FIELDS = ("seed", "sample_ids", "first_id", "count", "class", "steps", "guidance_scale")
FORMATS, WATCHES = ("json", "png"), ("x0", "x_t", "both")
SEEDS, IDS = 1 << 64, 1 << 63
_DIGITS = re.compile(r"[0-9]{1,20}", re.ASCII)
_DECIMAL = re.compile(r"-?[0-9]{1,20}(\.[0-9]{0,20})?(e[+-]?[0-9]{1,3})?", re.ASCII | re.I)
_LONGEST = 60  # characters of a value that an error repeats
_MOST_DIGITS = 1000  # of a number; Python reads no more than 4300


@dataclass(frozen=True)
class Asked:
    """A request for images.

    Attributes:
        addresses: of the images.
        format: of the answer.
        watch, frames: of a live view: which state of them, and how many times while they are drawn.
    """

    addresses: list[Address]
    format: Format = "json"
    watch: Watch = "x0"
    frames: int = 0


def read_json(body: bytes) -> dict[str, Any]:
    """A request's body, an object.

    Raises:
        RequestError: 400 for what is no JSON or a number without end, 422 for what is no object or
            names a field twice.
    """

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def whole(text: str) -> int:
        if len(text) > _MOST_DIGITS:
            raise RequestError(
                400, f"a number must have at most {_MOST_DIGITS} digits; got {len(text)}"
            )
        return int(text)

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise RequestError(422, "is given twice", shortened(twice))
        return values

    try:
        values = json.loads(
            body.decode(), parse_int=whole, parse_constant=constant, object_pairs_hook=once
        )
    except UnicodeDecodeError as error:
        raise RequestError(400, f"the body is not UTF-8: {error.reason}") from None
    except RecursionError:
        raise RequestError(400, "the body is not JSON of a request: nested too deeply") from None
    except ValueError as error:
        raise RequestError(400, f"the body is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError(422, f"the body must be a JSON object; got {shown(values)}")
    return values


def asked_by_json(values: Mapping[str, Any], offer: Offer, live: bool = False) -> Asked:
    """A request for any number of images.

    Raises:
        RequestError: 422, with the field that is not as it has to be.
    """
    known = (*FIELDS, *(("watch", "frames") if live else ("format",)))
    _only(values, known)
    ids = _ids(values, offer.limits.images)
    shared = values.get("class")
    labels = _labels(shared, ids, offer)
    seed = _integer("seed", values.get("seed", 0), 0, SEEDS - 1)
    steps, scale = _steps(values.get("steps"), offer), _scale(values, offer)
    addresses = [
        Address(seed, i, label, steps, scale) for i, label in zip(ids, labels, strict=True)
    ]
    if live:
        most = offer.limits.max_frames
        frames = _integer("frames", values.get("frames", min(40, most)), 0, most)
        watch = _one_of("watch", values.get("watch", "x0"), WATCHES)
        return Asked(addresses, watch=cast(Watch, watch), frames=frames)
    form = _one_of("format", values.get("format", "json"), FORMATS)
    return Asked(addresses, format=cast(Format, form))


def asked_by_url(
    seed: str, sample_id: str, query: Sequence[tuple[str, str]], offer: Offer
) -> tuple[Address, str | None]:
    """A request for one image by its address, and of which model, where it says so.

    Raises:
        RequestError: 404 for a path that no image has, 422 for a parameter.
    """
    if not (_DIGITS.fullmatch(seed) and int(seed) < SEEDS):
        raise RequestError(404, f"no seed {shown(seed)}: it must lie in 0 … {SEEDS - 1}")
    if not (_DIGITS.fullmatch(sample_id) and int(sample_id) < IDS):
        raise RequestError(404, f"no image {shown(sample_id)}: it must lie in 0 … {IDS - 1}")
    _only([name for name, _ in query], ("class", "steps", "guidance_scale", "model"))
    values: dict[str, Any] = dict(query)
    if len(values) < len(query):
        names = [name for name, _ in query]
        twice = next(name for name in names if names.count(name) > 1)
        raise RequestError(422, "is given twice", twice)
    if "guidance_scale" in values:
        text = values["guidance_scale"]
        if _DECIMAL.fullmatch(text):
            values["guidance_scale"] = float(text)
    ids = [int(sample_id)]
    label = _labels(values.get("class"), ids, offer)[0]
    steps, scale = _steps(values.get("steps"), offer), _scale(values, offer)
    return Address(int(seed), ids[0], label, steps, scale), values.get("model")


def _only(names: Any, known: Sequence[str]) -> None:
    for name in names:
        if name not in known:
            raise RequestError(
                422, f"is not known; accepted are {', '.join(known)}", shortened(name)
            )


def _ids(values: Mapping[str, Any], most: int) -> list[int]:
    """Of the images: a list, or a first one and how many."""
    if values.get("sample_ids") is None:
        count = _integer("count", values.get("count", 1), 1, most)
        first = _integer("first_id", values.get("first_id", 0), 0, IDS - count)
        return list(range(first, first + count))
    for other in ("first_id", "count"):
        if other in values:
            raise RequestError(422, "is given beside sample_ids: one or the other", other)
    ids = values["sample_ids"]
    if not isinstance(ids, list) or not 1 <= len(ids) <= most:
        what = f"{len(ids)} of them" if isinstance(ids, list) else shown(ids)
        raise RequestError(422, f"must be a list of 1 to {most} integers; got {what}", "sample_ids")
    return [_integer("sample_ids", i, 0, IDS - 1) for i in ids]


def _labels(given: Any, ids: Sequence[int], offer: Offer) -> list[int | None]:
    """Of each image: its own, all images', or its number mod the number of classes."""
    classes = offer.classes
    if classes is None:
        if given is not None:
            raise RequestError(422, "is given, and the model was trained without classes", "class")
        return [None] * len(ids)
    if given is None:
        return [i % len(classes) for i in ids]
    if not isinstance(given, list):
        return [_label(given, classes)] * len(ids)
    if len(given) != len(ids):
        raise RequestError(
            422, f"must be one class, or one an image, {len(ids)}; got {len(given)}", "class"
        )
    return [_label(one, classes) for one in given]


def _label(given: Any, classes: Sequence[str]) -> int:
    """A class by its name, or by its number, which may be a string where it is no name."""
    if isinstance(given, str):
        if given in classes:
            return classes.index(given)
        if _DIGITS.fullmatch(given):
            given = int(given)
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(classes):
        return given
    names = ", ".join(map(shortened, classes[:20])) + (", …" if len(classes) > 20 else "")
    raise RequestError(
        422,
        f"must be a class's name ({names}) or its number, 0 … {len(classes) - 1}; got "
        f"{shown(given)}",
        "class",
    )


def _steps(given: Any, offer: Offer) -> int:
    return offer.default_steps if given is None else _integer("steps", given, 1, offer.most_steps)


def _scale(values: Mapping[str, Any], offer: Offer) -> float | None:
    """null is without guidance; left out is the server's own."""
    if "guidance_scale" not in values:
        return offer.guidance_scale
    given = values["guidance_scale"]
    if given is None:
        return None
    if not offer.guidance:
        raise RequestError(
            422,
            "is given, and the model has not learned what images are like whose class is not told",
            "guidance_scale",
        )
    most = offer.limits.max_guidance
    number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not number or not -most <= given <= most:  # an integer of any length compares
        raise RequestError(
            422, f"must be a number in {-most:g} … {most:g}; got {shown(given)}", "guidance_scale"
        )
    return float(given)


def _integer(field: str, given: Any, least: int, most: int) -> int:
    value = int(given) if isinstance(given, str) and _DIGITS.fullmatch(given) else given
    if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
        return value
    raise RequestError(422, f"must be an integer in {least} … {most}; got {shown(given)}", field)


def _one_of(field: str, given: Any, known: Sequence[str]) -> str:
    if isinstance(given, str) and given in known:
        return given
    raise RequestError(422, f"must be one of {', '.join(known)}; got {shown(given)}", field)


def shown(value: Any) -> str:
    """A value of a request's, no longer than an error bears."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return shortened(json.dumps(value))


def shortened(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
