"""The command line: reads the CSV, plans a run, feeds it, shows how far it is, or does everything on this machine."""
