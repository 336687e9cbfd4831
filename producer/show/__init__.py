"""How a run looks on a terminal while it goes on and afterwards."""
