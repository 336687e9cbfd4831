"""The commands of `storage`, one function each. They import what they need when they are called: `--help` is quick."""
