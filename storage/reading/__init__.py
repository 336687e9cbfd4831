"""Reading finished parts: arrays, frames, exports, comparisons. Writes nothing into a run."""
