"""The binary files, one module a format. All begin with a header of 256 little-endian int32 (see `files`)."""
