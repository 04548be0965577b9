"""Results as one self-contained HTML page: ``fastseq bench report RESULTS --html PAGE``.

``content`` turns results into what the page shows (numbers and words, no markup), ``charts`` places
points on axes, ``colour`` chooses the heat map's colours, ``page`` fills the templates next to it.
"""

from fastseq.bench.html.command import add_command

__all__ = ["add_command"]
