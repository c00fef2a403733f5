"""HTML pages that open offline: one style, and pictures within the page.

The templates of a page lie in the folder ``templates`` of its package; they extend ``base.html``, and take tables and
figures from ``parts.html``, both in the folder beside this module.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI: Final = 110


@dataclass(frozen=True)
class Picture:
    """A PNG picture, its size in pixels, and ``alt``, the text for readers who cannot see it."""

    png: bytes
    width: int
    height: int
    alt: str

    @classmethod
    def of(cls, figure: Figure, alt: str) -> Self:
        """Draw a matplotlib figure."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI)
        width, height = (round(side * _DPI) for side in figure.get_size_inches())
        return cls(buffer.getvalue(), width, height, alt)

    @property
    def url(self) -> str:
        """The picture as a data URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


def render(package: str, template: str, **values: object) -> str:
    """Fill in a template of an HTML page.

    Parameters
    ----------
    package : str
        Package that has the template in its folder ``templates``.
    template : str
        Name of the file.
    **values : object
        Names in the template and their values, which are escaped.
    """
    loader = ChoiceLoader([PackageLoader(package), PackageLoader("sgclassify.stages.write")])
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(values)
