"""Jobs that survive a crash: what a person asked for goes on at the step where a killed engine left it.

A job is a record in the vault; any process may add one (`enqueue`), ask for its end and `follow` it. The process that
holds the vault's engine lock runs them (`Jobs`), each as one workflow on DBOS. Only `_durable` knows DBOS, and it is
imported when `Jobs` starts: half a second that looking at a vault does not pay.
"""

from asrcore.jobs._failure import error_of
from asrcore.jobs._jobs import Jobs
from asrcore.jobs._record import arguments_of, enqueue, follow

__all__ = ["Jobs", "arguments_of", "enqueue", "error_of", "follow"]
