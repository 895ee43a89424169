"""A page whose database has two replicas: see its README.rst."""
