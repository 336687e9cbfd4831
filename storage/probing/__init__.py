"""Probes: can the kept vectors tell which answers are wrong? What it does and does not show: docs/probing.md."""
