"""The path of `apd.included.tasks` in release 0.1.0."""

from apd.included.tasks import *  # noqa: F403
