"""How a run looks while it goes on and afterwards: on a terminal, and as a web page."""
