"""What every command prints through: a terminal that no text from outside can command, tables that stay readable."""
