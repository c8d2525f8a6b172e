"""A complete driver in the size of an evening: a site is a folder, a machine a subfolder, a disk an image file in it.

Read `site`, then `source`, `replica` and `failover`; `files` is what they stand on. Two ideas carry all of it:

- At the source a frozen view is a *snapshot*: a copy of the machine's files. The snapshot is the mark as well, so what
  changed since a mark is the difference of two snapshots.
- At the target one small file, `replica.json`, says what a replica is. It is replaced as a whole, under a lock.
  Data is written beside what is valid and counts once that file names it.
"""
