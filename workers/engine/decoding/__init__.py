"""Answers: the rules that choose tokens, and where their tokens are run: in slots, or padded."""
