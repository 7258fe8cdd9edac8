"""Where a run speaks to people: one rich console, so that progress bars and lines do not overwrite each other."""

from rich.console import Console

console = Console(stderr=True, highlight=False)
