"""The engine against a plain reference, and a timed trial. The reference shares no code with the engine."""
