"""What runs for a long time: the replication service, and process servers that share a vault.

`scheduler`, `due` and `pool` run the cycles that are due (`asr run`); `member`, `assign` and `servers` share a vault's
machines between process servers; `status` and `logs` report.
"""
