"""Applications to try and to read, each in a folder of its own."""
