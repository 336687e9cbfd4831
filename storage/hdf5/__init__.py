"""The file format of a part: written once, read by column or by question, never trusted. Knows no run and no queue."""
