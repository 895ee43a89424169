"""The examples, each framework under each server: ``tox -e frameworks``."""
