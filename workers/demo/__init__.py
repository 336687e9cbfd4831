"""The small models and easy-vqa: what the demo, the tests and benchmarks run on."""
