"""Where bytes lie: a directory or a prefix of an object store, behind one protocol. Knows no run and no HDF5."""
