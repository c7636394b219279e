"""How figures of merit are called and written, and what a run comes to.

Knows no metric and imports no torch: tables of thousands of runs need none.
"""

from collections.abc import Mapping

from pydantic import ConfigDict

from spd.config import BaseConfig


class Quantity(BaseConfig):
    """How the figures of one name are shown, wherever they are: `<name>/<place>`, or this name alone."""

    label: str
    meaning: str = ""
    """for readers who do not know it: a phrase that goes on after the label and a colon"""
    format: str = ""
    """as Python's `format` takes it; empty: as the size of the value suggests"""
    headline: bool = True
    """stands where there is room for a few figures only, as in a table of many runs"""
    spread: str | None = None
    """the name of what stands behind its ±, in place of a line of its own"""
    published_as: str | None = None
    """the name whose published figure this one is compared with, too"""


class Conclusion(BaseConfig):
    """What a run comes to, by one of its metrics."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    headline: str
    detail: str = ""
    solved: bool | None = None
    """None: there is no known solution"""


def quantity_of(key: str, quantities: Mapping[str, Quantity]) -> Quantity | None:
    """What a figure is: what its key itself is declared as, else what its name is."""
    return quantities.get(key) or quantities.get(key.partition("/")[0])
