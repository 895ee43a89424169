"""``python -m examples.flask``: serve the guest book until Ctrl-C."""

from examples.guest_book import serve

from .application import application

if __name__ == "__main__":
    serve(application, "examples.flask")
