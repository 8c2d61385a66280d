"""The report as one page of HTML: gathering figures, geometry of pictures, a Jinja2 template."""

from pyprune.report.html.page import Sources, page

__all__ = ["Sources", "page"]
