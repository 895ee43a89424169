"""For servers that take a module and a name: what ``development.ini`` describes, without its server."""

from pathlib import Path

from pyramid.paster import get_app

application = get_app(str(Path(__file__).with_name("development.ini")))
