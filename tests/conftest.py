"""What holds for every test: the program's own process settings, and a cache that tests share."""

from pipeline import environment

environment.prepare()
