"""Jobs that survive a crash: after an engine was killed, a job resumes at the step it was in.

A job is a record in the vault; any process may add one (`enqueue`), request its cancellation and `follow` it. The
process that holds the vault's engine lock runs them (`Jobs`), each as one workflow on DBOS. Only `_durable` uses DBOS,
and it is imported when `Jobs` starts: the import takes half a second, which reading a vault does not need.
"""

from asrcore.jobs._failure import error_of
from asrcore.jobs._jobs import Jobs
from asrcore.jobs._record import arguments_of, enqueue, follow, requested_by

__all__ = ["Jobs", "arguments_of", "enqueue", "error_of", "follow", "requested_by"]
