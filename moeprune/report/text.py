"""A document as text for a terminal, a file or a pipe."""

from collections.abc import Iterator

from rich import box
from rich import table as rich_table
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.text import Text

from moeprune.report.document import Block, Cell, Document, Facts, Lines, Table, Verdict

WIDTH = 160  # columns of text for a file or a pipe: enough for every table
NARROW = 80  # columns that a table fits if it can


def to_text(document: Document, terminal_width: int | None = None) -> str:
    """Return a document as text; gates come last, nearest to the prompt.

    terminal_width: columns of the terminal, which gets colours; None for a file or a pipe.
    """
    on_terminal = terminal_width is not None
    width = terminal_width or WIDTH
    console = Console(  # Rich ignores a width without a height on a dumb terminal
        width=width, height=25, force_terminal=on_terminal, no_color=None if on_terminal else True,
        highlight=False, markup=False, emoji=False,
    )  # fmt: skip
    blocks = [*document.blocks, *([document.gate_table(with_reasons=False)] if document.gates else [])]
    blocks += [document.undecided] if document.undecided.lines else []
    with console.capture() as capture:
        console.print(Text(document.title, style="bold"))
        for index, block in enumerate(blocks):
            if index or (isinstance(block, Table) and block.title is not None):
                console.print()
            for part in _parts(block):
                # A table is never cut: on a narrower terminal its lines wrap.
                console.width = max(width, WIDTH) if isinstance(part, rich_table.Table) else width
                console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"


def _parts(block: Block) -> Iterator[RenderableType]:
    if isinstance(block, Lines):
        yield from (Text(line) for line in block.lines)
    elif isinstance(block, Facts):
        facts = rich_table.Table(box=None, show_header=False, pad_edge=False)
        facts.add_column(no_wrap=True)
        facts.add_column(overflow="fold")
        for row in block.rows:
            facts.add_row(*row)
        yield facts
    elif isinstance(block, Table):
        if block.title is not None:
            yield Text(block.title, style="bold")
        table = rich_table.Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for index, column in enumerate(block.columns):
            table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True, vertical="bottom")
        for cells in block.rows:
            if cells is None:
                table.add_section()
            else:
                table.add_row(*map(_cell, cells))
        if Measurement.get(Console(width=WIDTH), Console(width=WIDTH).options, table).maximum > NARROW:
            table.padding = (0, 1, 0, 0)
        yield table


def _cell(cell: Cell) -> Text | str:
    if isinstance(cell, Verdict):
        return Text(cell.text, style="green" if cell.passed else "bold red")
    return cell if isinstance(cell, str) else cell.text
