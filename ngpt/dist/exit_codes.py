"""With what a trainer exits, for people, launchers and schedulers to tell apart; 0 is done, 1 an error of the program."""

from __future__ import annotations

EXIT_USER_ERROR = 2  # a mistake in settings or files: starting again changes nothing
EXIT_DIVERGED = 3  # too many updates in a row were not finite
EXIT_PEER_LOST = 4  # a process died or hangs, or holds other weights: starting again continues from the last checkpoint
EXIT_UNAVAILABLE = 69  # the source of data stays away, after saving; EX_UNAVAILABLE of sysexits.h: starting again later continues
EXIT_TRY_AGAIN = 75  # stopped by SIGTERM or SIGUSR1 after saving; EX_TEMPFAIL of sysexits.h, which schedulers are told to requeue
EXIT_INTERRUPTED = 130  # stopped by Ctrl-C after saving; what shells report for it
